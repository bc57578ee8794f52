"""公共夹具：一个最小项目，以及整场测试共用的执行进程。"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# 一个线程：模型都很小；两个线程遇上另一个忙着的进程会互相空等，慢几十倍。要在第一次 import torch 之前
os.environ.setdefault("OMP_NUM_THREADS", "1")

from zhixing.engine import Engine
from zhixing.execute import ZygoteExecutor


# 机器忙的时候一个例子多花几百毫秒不算错；CI 里用固定的例子，失败都能原样重现
settings.register_profile("zhixing", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("zhixing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """最慢的文件排在最前：几个核分着跑时，不会最后只剩它一个。"""
    slow = ("test_site.py", "test_build.py", "test_execute.py", "test_book.py")
    rank = {name: k for k, name in enumerate(slow)}
    items.sort(key=lambda item: rank.get(item.path.name, len(slow)))


class Site:
    """一个最小项目：``mkdocs.yml``、``docs/``、``examples/``。"""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("docs", "examples"):
            (root / name).mkdir(parents=True)
        self.write("mkdocs.yml", "site_name: 测试\n")

    def write(self, file: str, content: str | bytes) -> Path:
        """写一个文件；字节原样写，文字按 UTF-8 写且不换行尾。"""
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


@pytest.fixture(scope="session")
def executor(tmp_path_factory: pytest.TempPathFactory):
    """常驻的 zygote，各测试的项目都交给它执行；启动它的环境里有一个令牌，代码块不应看到。"""
    os.environ["ZHIXING_TEST_TOKEN"] = "ghp_secret"
    shared = ZygoteExecutor(tmp_path_factory.mktemp("zygote"), workers=4)
    yield shared
    shared.shutdown()
    del os.environ["ZHIXING_TEST_TOKEN"]


@pytest.fixture
def engine(site: Site, executor: ZygoteExecutor) -> Engine:
    """检查 ``site`` 的引擎；不用 ``close``，执行进程由整场测试共用。"""
    return Engine(site.root, executor=executor)
