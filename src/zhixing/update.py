"""``zhixing update``：用实际输出改写页面里的期望输出，其余一字不动。"""

from __future__ import annotations

from zhixing.cache import write_atomic
from zhixing.project import Project
from zhixing.runner import outputs_match


def rewrite(project: Project) -> dict[str, int]:
    """改写全部不符的期望输出；返回每个文件改了几处。

    带 ``...`` 的期望输出是作者有意的通配，不自动改写。
    """
    changed: dict[str, int] = {}
    for file, outcome in project.outcomes.items():
        if outcome.unit.kind != "page":
            continue
        lines = project.scans[file].text.split("\n")
        pairs = list(zip(outcome.unit.blocks, outcome.payload["blocks"], strict=False))
        for block, result in reversed(pairs):  # 从后往前改，前面的行号不变
            expected = block.expected
            if not expected or result["error"] or "..." in expected.text:
                continue
            if outputs_match(expected.text, result["out"], expected.tol):
                continue
            body = [expected.indent + text if text else "" for text in result["out"].rstrip().split("\n")]
            lines[expected.line : expected.end - 1] = body
            changed[file] = changed.get(file, 0) + 1
        if file in changed:
            write_atomic(project.root / file, "\n".join(lines))
    return changed
