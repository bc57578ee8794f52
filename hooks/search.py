"""搜索：换上自己的 worker，改写索引。"""

from pathlib import Path

from mkdocs.plugins import event_priority
from zhixing import build, search


def _root(config):
    return Path(config.config_file_path).resolve().parent


def on_post_page(output, page, config):
    return search.use_worker(output, _root(config))


def on_post_template(output, template_name, config):
    return search.use_worker(output, _root(config)) if template_name.endswith(".html") else output


@event_priority(-50)  # 索引由搜索插件写好之后，离线插件把它变成脚本之前
def on_post_build(config):
    search.rewrite(Path(config.site_dir), build.get(_root(config)).project.synonyms, lazy=not config.extra["offline"])
