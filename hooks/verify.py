"""MkDocs 事件 → 验证引擎：执行代码块，渲染时接上结果，收尾时核对。"""

from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File
from zhixing import build, fonts, report, styles
from zhixing.errors import ContentError
from zhixing.links import Rendered
from zhixing.page import finish_tables, keep_punctuation


_serving = False


def _build(config):
    return build.get(Path(config.config_file_path).resolve().parent, checkpoints=_serving)


def on_startup(command, dirty):
    global _serving
    _serving = command == "serve"


def on_config(config):
    config.nav = _build(config).nav()
    return config


@event_priority(100)  # 赶在 mkdocs-jupyter 认领 .ipynb 之前
def on_files(files, config):
    b = _build(config)
    b.start()
    for file in files.documentation_pages():
        content = b.substitute(f"docs/{file.src_uri}")
        if content is not None:
            file.content_string = content
    offline = config.plugins.get("material/offline")
    config.extra["offline"] = bool(offline and offline.config["enabled"])  # 模板与搜索也要知道
    try:
        assets = b.assets(offline=config.extra["offline"])
    except FileNotFoundError as error:
        raise PluginError(str(error)) from None
    for uri, path in assets.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    config.extra["practice"] = b.practice_settings()
    directory, notebooks = b.write_notebooks()
    for uri in notebooks:  # mkdocs-jupyter 要读真文件，所以不用 File.generated
        files.append(File(uri, str(directory), config.site_dir, config.use_directory_urls))
    for uri, text in b.generated_pages().items():
        files.append(File.generated(config, uri, content=text))
    for uri, html in b.redirects(config.use_directory_urls).items():
        files.append(File.generated(config, uri, content=html))
    return files


def on_page_markdown(markdown, page, config, files):
    return _build(config).begin_page(f"docs/{page.file.src_uri}", markdown, page.file.url.removeprefix("./"))


def on_page_content(html, page, config, files):
    return keep_punctuation(finish_tables(html))


def on_page_context(context, page, config, nav):
    context["footer"] = _build(config).footer(page.file.src_uri)
    return context


@event_priority(-50)
def on_env(env, config, files):
    b = _build(config)
    rendered = []
    for file in files.documentation_pages():
        source, text = b.source(file.src_uri)
        rendered.append(Rendered(source, file.url.removeprefix("./"), text, file.page.content or ""))
    try:
        b.finish(rendered, {f.url.removeprefix("./") for f in files})
    except ContentError as error:
        report.print_problems(error.problems)
        if not _serving:  # 预览时照样显示页面，改好一处看一处
            raise PluginError(f"{error}，见上；修好后重新构建，已有的站点没有改动") from None
    for uri, text in b.extra_files().items():
        files.append(File.generated(config, uri, content=text))
    return env


@event_priority(-50)  # 全部页面写好之后
def on_post_build(config):
    site, cache = Path(config.site_dir), _build(config).root / ".cache" / "zhixing"
    fonts.subset(site, cache / "fonts")
    if not _serving:
        styles.shrink(site, cache / "styles")


def on_shutdown():
    build.close_all()
