"""先写到旁边的目录，全部成功才换上：失败或被杀都不会留下半个站点。"""

import logging
import shutil
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.utils import CountHandler
from zhixing import build

_site = None
_warnings = CountHandler()


def on_startup(command, dirty):
    global _site
    _site = ... if command == "build" else None  # mike 只读配置，问的是最后的目录


@event_priority(100)
def on_config(config):
    global _site
    if _site is None:
        return config
    _site = Path(config.site_dir)
    config.site_dir = str(build.staging(_site))
    if config.strict:
        _warnings.setLevel(logging.WARNING)
        logging.getLogger("mkdocs").addHandler(_warnings)
    return config


@event_priority(-200)  # 最后一个
def on_post_build(config):
    if _site is None:
        return
    if _warnings.get_counts():
        raise PluginError("严格模式下有警告，已有的站点没有改动")
    build.publish(_site)
    config.site_dir = str(_site)


def on_build_error(error):
    if _site is not None:
        shutil.rmtree(build.staging(_site), ignore_errors=True)
