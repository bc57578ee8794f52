"""判断：一块代码的实际结果是否符合它在页面上的声明。

只看事实（:mod:`zhixing.runner` 的产物）与声明（:class:`zhixing.blocks.Block`），
所以改期望输出不必重跑代码。
"""

from __future__ import annotations

import difflib
from typing import Any

from zhixing.blocks import Block, Expected
from zhixing.errors import Problem
from zhixing.runner import outputs_match

MAX_DETAIL_LINES = 40


def verify(block: Block, outcome: dict[str, Any], *, figures_declared: bool = True) -> list[Problem]:
    """返回这一块的全部问题；空列表表示通过。

    Args:
        block: 页面上的声明。
        outcome: 执行结果里对应的一项。
        figures_declared: 页面要求画图必须写 ``fig``；示例的单元格不要求。
    """
    error = outcome["error"]
    if error and error["code"] in ("R301", "R306") and block.raises:
        reason = _raises_mismatch(block.raises, error)
        if reason:
            return [Problem(block.file, block.line, "R303", reason, _clip(error["detail"]))]
    elif error:
        head = f"{error['type']}: {error['message']}" if error["message"] else error["type"]
        return [Problem(error["file"], error["line"], error["code"], head, _clip(error["detail"]))]
    elif block.raises:
        return [Problem(block.file, block.line, "R303", f"声明会抛出 {block.raises}，实际没有异常")]

    problems = []
    expected = block.expected
    if expected and not outputs_match(expected.text, outcome["out"], expected.tol):
        offset, diff = _difference(expected, outcome["out"])
        problems.append(Problem(block.file, expected.line + 1 + offset, "R302", "实际输出与期望不同", diff))
    if figures_declared and bool(outcome["figs"]) != bool(block.fig):
        reason = "画了图却没写 fig" if outcome["figs"] else "写了 fig 却没有画图"
        problems.append(Problem(block.file, block.line, "R307", reason))
    return problems


def _raises_mismatch(raises: str, error: dict[str, Any]) -> str:
    """声明与实际异常不符的原因；相符返回空串。"""
    if raises.startswith("exit "):
        return "" if error["type"] == raises else f"声明 {raises}，实际 {error['type']}"
    name, _, message = raises.partition(": ")
    known = {error["type"], error["type"].rpartition(".")[2], *error.get("mro", [])}
    if name not in known:
        return f"声明会抛出 {name}，实际是 {error['type']}: {error['message']}"
    if message and message not in error.get("text", error["message"]):
        return f"异常消息里没有 {message!r}，实际是 {error['message']!r}"
    return ""


def _difference(expected: Expected, got: str) -> tuple[int, str]:
    """``(第几行开始不同, 差异)``。"""
    want, have = (text.strip("\n").split("\n") for text in (expected.text, got))
    same = (outputs_match(a, b, expected.tol) for a, b in zip(want, have))
    offset = next((i for i, equal in enumerate(same) if not equal), min(len(want), len(have)))
    diff = difflib.unified_diff(want, have, "期望", "实际", lineterm="", n=2)
    return min(offset, len(want) - 1), _clip("\n".join(diff))


def _clip(text: str) -> str:
    lines = text.rstrip().splitlines()
    if len(lines) <= MAX_DETAIL_LINES:
        return text.rstrip()
    half = MAX_DETAIL_LINES // 2
    return "\n".join([*lines[:half], f"…… 省略 {len(lines) - 2 * half} 行 ……", *lines[-half:]])
