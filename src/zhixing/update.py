"""``zhixing update``：用实际输出改写页面里的期望输出，其余一字不动。"""

from __future__ import annotations

import re

from zhixing.blocks import Expected, read_text
from zhixing.cache import write_atomic
from zhixing.project import Project
from zhixing.runner import outputs_match


def rewrite(project: Project) -> dict[str, int]:
    """改写全部不符的期望输出，相应的问题从 ``project.problems`` 里去掉；返回每个文件改了几处。

    带 ``...`` 的期望输出是作者有意的通配，含围栏的输出放不进代码块：都不改写，问题留着。
    """
    changed: dict[str, int] = {}
    for file, outcome in project.outcomes.items():
        path = project.root / file
        if outcome.unit.kind != "page" or read_text(path, file) != project.scans[file].text:
            continue  # 不是页面，或者执行期间又被改过
        lines = path.read_bytes().splitlines(keepends=True)
        pairs = list(zip(outcome.unit.blocks, outcome.payload["blocks"], strict=False))
        for block, result in reversed(pairs):  # 从后往前改，前面的行号不变
            expected = block.expected
            if not expected or (result["error"] and not block.raises) or "..." in expected.text:
                continue
            if outputs_match(expected.text, result["out"], expected.tol) or not _replace(lines, expected, result["out"]):
                continue
            changed[file] = changed.get(file, 0) + 1
            project.problems = [
                p
                for p in project.problems
                if not (p.file == file and p.code == "R302" and expected.line < p.line <= expected.end)
            ]
        if file in changed:
            write_atomic(path, b"".join(lines))
    return changed


def _replace(lines: list[bytes], expected: Expected, output: str) -> bool:
    """换掉期望输出的正文；缩进、引用符号与换行符照围栏那一行。"""
    opening = lines[expected.line - 1]
    prefix, fence = re.match(rb"([> \t]*)(`{3,}|~{3,})", opening).groups()
    ending = opening[len(opening.rstrip(b"\r\n")) :]
    body = output.expandtabs(4).encode().rstrip().split(b"\n")
    if any(text.lstrip().startswith(fence) for text in body):
        return False
    lines[expected.line : expected.end - 1] = [(prefix + text).rstrip() + ending for text in body]
    return True
