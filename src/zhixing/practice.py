"""练习：起始代码与测试两块一对的写法。这里只看写法，不执行；判题在 :mod:`zhixing.judge`。

起始代码里最后一个顶层函数（或类）是要读者写的，测试是紧接着的下一个代码块：它定义
``check(solution)``，``solution="名字"`` 指到本页已经定义的参考解。两块都在隔离的命名空间里
执行，读者的浏览器里也只有标准库，所以不能用本页的变量，也不能 import 别的库。
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zhixing.errors import Problem

if TYPE_CHECKING:
    from zhixing.blocks import Block

STARTER, TESTS = "starter", "tests"


@dataclass(frozen=True)
class Exercise:
    """一道练习。"""

    starter: Block
    tests: Block

    @property
    def entry(self) -> str:
        """要读者写的函数或类的名字；也是这道题在本页的名字。"""
        return entry_of(self.starter.source)


def exercises(blocks: list[Block]) -> Iterator[Exercise]:
    """配成对的练习，按页面顺序。"""
    for starter, tests in zip(blocks, blocks[1:]):
        if (starter.practice, tests.practice) == (STARTER, TESTS) and entry_of(starter.source):
            yield Exercise(starter, tests)


def entry_of(source: str) -> str:
    """最后一个顶层函数或类的名字；没有（或代码不合语法）为空串。"""
    return next((node.name for node in reversed(_definitions(source))), "")


def _definitions(source: str) -> list[ast.FunctionDef | ast.ClassDef]:
    try:
        return [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    except (SyntaxError, ValueError, RecursionError):
        return []


def check(blocks: list[Block]) -> Iterator[Problem]:
    """一页里练习的写法错误。"""
    seen: dict[str, int] = {}
    following = [*blocks[1:], None]
    previous = [None, *blocks]
    for before, block, after in zip(previous, blocks, following):
        if not block.practice:
            if block.solution:
                yield Problem(block.file, block.line, "P702", 'solution 只用于 practice="tests" 的块')
            continue
        yield from _check_options(block)
        yield from _check_source(block)
        if block.practice == STARTER:
            if after is None or after.practice != TESTS:
                yield Problem(block.file, block.line, "P701", "起始代码后面没有测试")
            entry = entry_of(block.source)
            first = seen.setdefault(entry, block.line)
            if entry and first != block.line:
                yield Problem(block.file, block.line, "P702", f"第 {first} 行的练习也叫 {entry}，一页里不能重名")
        elif before is None or before.practice != STARTER:
            yield Problem(block.file, block.line, "P701", "测试前面没有起始代码")


def _check_options(block: Block) -> Iterator[Problem]:
    def bad(reason: str) -> Problem:
        return Problem(block.file, block.line, "P702", reason)

    if block.lang != "python":
        yield bad(f"练习只能是 python 块，得到 {block.lang}")
    for name in ("raises", "skip", "fig", "output"):
        if getattr(block, name):
            yield bad(f"练习的块不能写 {name}")
    if block.practice == STARTER and block.solution:
        yield bad("solution 写在测试那一块上")
    if block.practice == TESTS and not block.solution:
        yield bad("测试没有写参考解是哪一个")


def _check_source(block: Block) -> Iterator[Problem]:
    file, first = block.code_start
    try:
        tree = ast.parse(block.source)
    except (SyntaxError, ValueError, RecursionError):
        return  # 执行时会报，带行号
    if block.practice == STARTER and not entry_of(block.source):
        yield Problem(block.file, block.line, "P702", "起始代码里没有函数或类")
    if block.practice == TESTS and "check" not in {d.name for d in _definitions(block.source)}:
        yield Problem(block.file, block.line, "P702", "测试里没有定义函数 check(solution)")
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        for name in names:
            if name.partition(".")[0] not in sys.stdlib_module_names:
                reason = f"练习在浏览器里运行，只有标准库，不能 import {name}"
                yield Problem(file, first + node.lineno - 1, "P702", reason)
