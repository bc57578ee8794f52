"""修整 mkdocs-jupyter 渲染的页面：样式共享、公式、中文锚点、无外部脚本。"""

from pathlib import Path, PurePosixPath

from mkdocs.structure.toc import get_toc
from pymdownx.slugs import slugify
from zhixing import build, notebook


def on_page_content(html, page, config, files):
    path = PurePosixPath(page.file.src_uri)
    if path.suffix != ".ipynb":
        return html
    b = build.get(Path(config.config_file_path).resolve().parent)
    page.title = b.project.examples[path.stem].title
    html, tokens = b.finish_notebook(path.stem, html, slugify(case="lower"))
    page.toc = get_toc(tokens)
    return html


def on_post_page(output, page, config):
    return notebook.squeeze(output) if page.file.src_uri.endswith(".ipynb") else output
