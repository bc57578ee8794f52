"""把结果说清楚：终端进度与汇总、JSON、JUnit、HTML、GitHub 注解。

每次核对都把结果存成 ``.cache/zhixing/last.json``（:func:`save`），``zhixing report`` 据此出报告，
不再执行任何代码。
"""

from __future__ import annotations

import html
import json
import os
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from zhixing.cache import write_atomic
from zhixing.errors import Problem
from zhixing.engine import Outcome
from zhixing.project import Project


def announce(outcome: Outcome, stream: IO[str] | None = None) -> None:
    """一个单元跑完时的一行进度。"""
    mark = "✗" if outcome.problems else "·" if outcome.cached else "✓"
    note = "缓存" if outcome.cached else f"{outcome.seconds:.1f} 秒"
    if outcome.unit.blocks:
        print(f"  {mark} {outcome.unit.file}  {len(outcome.unit.blocks)} 块  {note}", file=stream or sys.stderr, flush=True)


def summarize(project: Project) -> dict[str, Any]:
    """全站的数字与逐页明细，也是验证报告页的数据。"""
    pages = []
    total: Counter[str] = Counter()
    for file, outcome in sorted(project.outcomes.items()):
        scan = project.scans.get(file)
        skipped = [b for b in scan.blocks if b.skip] if scan else []
        failed = {(p.file, p.line) for p in outcome.problems}
        row = {
            "file": file,
            "kind": outcome.unit.kind,
            "run": len(outcome.unit.blocks),
            "failed": len(failed),
            "skipped": [{"line": b.line, "reason": b.skip} for b in skipped],
            "shown": sum(b.lang not in ("python", "bash", "console", "pycon") for b in scan.blocks) if scan else 0,
            "seconds": round(outcome.seconds, 2),
            "cached": outcome.cached,
            "isolation": outcome.payload["isolation"],
        }
        pages.append(row)
        total.update(run=row["run"], failed=row["failed"], skipped=len(skipped), shown=row["shown"])
        total["cached_blocks"] += row["run"] if outcome.cached else 0
    return {"total": dict(total), "pages": pages}


def print_summary(project: Project, stream: IO[str] | None = None) -> None:
    print(_total(summarize(project)["total"], len(set(project.problems))), file=stream or sys.stderr)


def _total(total: dict[str, int], problems: int) -> str:
    return (
        f"代码块：{total.get('run', 0)} 块跑过（{total.get('cached_blocks', 0)} 块用缓存），"
        f"{total.get('skipped', 0)} 块带理由跳过，{total.get('shown', 0)} 块只显示；{problems} 处错误"
    )


def print_problems(problems: list[Problem], stream: IO[str] | None = None) -> None:
    """逐条打印；在 GitHub Actions 里另打注解，直接显示在改动的那一行旁边。"""
    stream = stream or sys.stderr
    for problem in sorted(set(problems)):
        print(problem, file=stream)
        if os.environ.get("GITHUB_ACTIONS") == "true":
            message = f"{problem.code} {problem.reason}".replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
            print(f"::error file={problem.file},line={problem.line or 1}::{message}")


# ---- 一次核对的完整记录，与由它生成的各种报告 ----


def record(project: Project) -> dict[str, Any]:
    """一次核对的全部结果，可存成 JSON。"""
    data = summarize(project)
    for row in data["pages"]:
        outcome = project.outcomes[row["file"]]
        pairs = zip(outcome.unit.blocks, outcome.payload["blocks"], strict=False)
        row["blocks"] = [{"line": block.line, "seconds": result["seconds"]} for block, result in pairs]
    data["problems"] = [asdict(p) for p in sorted(set(project.problems))]
    return data | {"time": datetime.now(UTC).isoformat(timespec="seconds")}


def _last(root: Path) -> Path:
    return root / ".cache" / "zhixing" / "last.json"


def save(project: Project) -> None:
    """存下这一次的结果，供 ``zhixing report`` 用；写不了不影响结论。"""
    try:
        write_atomic(_last(project.root), to_json(record(project)))
    except OSError as error:
        print(f"写不了 {_last(project.root)}：{error}", file=sys.stderr)


def load(root: Path) -> dict[str, Any]:
    """上一次核对的结果。

    Raises:
        FileNotFoundError: 还没有核对过，或者记录坏了。
    """
    try:
        data = json.loads(_last(root).read_text("utf-8"))
        return data | {"problems": [asdict(Problem(**p)) for p in data["problems"]]}
    except (OSError, ValueError, KeyError, TypeError):
        raise FileNotFoundError("没有上一次的结果，先运行 zhixing check") from None


def to_json(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, indent=2)


def to_text(data: dict[str, Any]) -> str:
    """逐页一行，接着是错误与合计。"""
    lines = [f"上一次核对：{data['time']}", ""]
    for row in data["pages"]:
        if row["run"] or row["skipped"]:
            mark = "✗" if row["failed"] else "·" if row["cached"] else "✓"
            skipped = f"，跳过 {len(row['skipped'])}" if row["skipped"] else ""
            lines.append(f"  {mark} {row['file']}  {row['run']} 块{skipped}  {row['seconds']:.1f} 秒")
    lines += ["", *(str(Problem(**p)) for p in data["problems"])]
    return "\n".join([*lines, _total(data["total"], len(data["problems"]))])


def to_html(data: dict[str, Any]) -> str:
    """一个自足的 HTML 文件，可以存档或发邮件。"""
    rows = "".join(
        f"<tr><td>{html.escape(r['file'])}<td>{r['run']}<td>{r['failed']}<td>{len(r['skipped'])}<td>{r['seconds']:.1f}"
        for r in data["pages"]
    )
    skipped = "".join(
        f"<li>{html.escape(r['file'])}:{item['line']}：{html.escape(item['reason'])}"
        for r in data["pages"]
        for item in r["skipped"]
    )
    problems = "".join(f"<li><pre>{html.escape(str(Problem(**p)))}</pre>" for p in data["problems"])
    return (
        '<!doctype html><html lang="zh"><meta charset="utf-8"><title>验证报告</title>'
        "<style>body{font-family:sans-serif;max-width:60rem;margin:2rem auto}td,th{padding:.2rem .8rem;text-align:left}"
        "pre{white-space:pre-wrap}</style>"
        f"<h1>验证报告</h1><p>{html.escape(data['time'])}<p>{_total(data['total'], len(data['problems']))}"
        f"<h2>错误</h2><ul>{problems or '<li>没有'}</ul>"
        f"<h2>逐页</h2><table><tr><th>文件<th>跑过<th>失败<th>跳过<th>秒{rows}</table>"
        f"<h2>跳过的理由</h2><ul>{skipped or '<li>没有'}</ul></html>\n"
    )


def to_junit(data: dict[str, Any]) -> str:
    """每个文件一个 testsuite，每块一个 testcase。"""
    suites = ET.Element("testsuites")
    by_file: dict[str, list[Problem]] = {}
    for item in data["problems"]:
        by_file.setdefault(item["file"], []).append(Problem(**item))
    for row in data["pages"]:
        by_file.setdefault(row["file"], [])
    blocks = {row["file"]: row["blocks"] for row in data["pages"]}
    for file, problems in sorted(by_file.items()):
        suite = ET.SubElement(suites, "testsuite", name=file)
        for block in blocks.get(file, []):
            ET.SubElement(suite, "testcase", classname=file, name=f"第 {block['line']} 行", time=str(block["seconds"]))
        for problem in problems:
            case = ET.SubElement(suite, "testcase", classname=file, name=f"{problem.code} 第 {problem.line} 行")
            ET.SubElement(case, "failure", message=problem.reason).text = str(problem)
        suite.set("tests", str(len(suite)))
        suite.set("failures", str(len(suite.findall("*/failure"))))
    # XML 1.0 放不下的控制字符
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", ET.tostring(suites, "unicode", xml_declaration=True))


FORMATS = {"text": to_text, "json": to_json, "junit": to_junit, "html": to_html}
