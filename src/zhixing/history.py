"""每个源文件的来历：最近更新的日期与贡献者，取自 git。"""

from __future__ import annotations

import contextlib
import subprocess
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class History:
    """一个文件的来历。"""

    updated: str  # 最近一次提交的日期，如 2026-11-21
    authors: list[str] = field(default_factory=list)  # 按最近一次提交排


def git(root: Path, *command: str) -> str:
    """git 的输出；没有 git、不在仓库里时为空串。"""
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", "-c", "core.quotepath=false", *command], cwd=root, capture_output=True, text=True)
        if not done.returncode:
            return done.stdout.strip()
    return ""


def describe(root: Path, tags: bool = False) -> str:
    """现在是哪个提交（``tags``：有标签就说标签）；工作树改过会写明。"""
    names = ["--tags"] if tags else ["--exclude=*"]
    return git(root, "describe", "--always", *names, "--dirty=（有未提交的改动）")


def read(root: Path) -> dict[str, History]:
    """一条 ``git log`` 读出 ``docs/`` 与 ``examples/`` 下每个文件的来历。

    浅克隆里看得到多少算多少；不在 git 里就是空的。
    """
    found: dict[str, History] = {}
    log = git(root, "log", "--no-merges", "--relative", "--format=%x00%cs%x09%aN", "--name-only", "--", "docs", "examples")
    for commit in log.split("\0")[1:]:
        head, *files = commit.split("\n")
        date, _, author = head.partition("\t")
        for file in filter(None, files):
            history = found.setdefault(file, History(date))
            if author not in history.authors:
                history.authors.append(author)
    return found
