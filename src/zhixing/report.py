"""把结果说清楚：终端进度与汇总、JSON、JUnit、GitHub 注解。"""

from __future__ import annotations

import json
import os
import re
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import asdict
from typing import IO, Any

from zhixing.errors import Problem
from zhixing.execute import Outcome
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
    total = summarize(project)["total"]
    print(
        f"代码块：{total.get('run', 0)} 块跑过（{total.get('cached_blocks', 0)} 块用缓存），"
        f"{total.get('skipped', 0)} 块带理由跳过，{total.get('shown', 0)} 块只显示；{len(set(project.problems))} 处错误",
        file=stream or sys.stderr,
    )


def print_problems(problems: list[Problem], stream: IO[str] | None = None) -> None:
    """逐条打印；在 GitHub Actions 里另打注解，直接显示在改动的那一行旁边。"""
    stream = stream or sys.stderr
    for problem in sorted(set(problems)):
        print(problem, file=stream)
        if os.environ.get("GITHUB_ACTIONS") == "true":
            message = f"{problem.code} {problem.reason}".replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
            print(f"::error file={problem.file},line={problem.line or 1}::{message}")


def to_json(project: Project) -> str:
    data = summarize(project) | {"problems": [asdict(p) for p in sorted(set(project.problems))]}
    return json.dumps(data, ensure_ascii=False, indent=2)


def to_junit(project: Project) -> str:
    """每个文件一个 testsuite，每块一个 testcase。"""
    suites = ET.Element("testsuites")
    by_file: dict[str, list[Problem]] = {}
    for problem in sorted(set(project.problems)):
        by_file.setdefault(problem.file, []).append(problem)
    for file, outcome in sorted(project.outcomes.items()):
        suite = ET.SubElement(suites, "testsuite", name=file)
        for block, result in zip(outcome.unit.blocks, outcome.payload["blocks"], strict=False):
            ET.SubElement(suite, "testcase", classname=file, name=f"第 {block.line} 行", time=str(result["seconds"]))
        for problem in by_file.pop(file, []):
            case = ET.SubElement(suite, "testcase", classname=file, name=f"{problem.code} 第 {problem.line} 行")
            ET.SubElement(case, "failure", message=problem.reason).text = str(problem)
    for file, problems in sorted(by_file.items()):
        suite = ET.SubElement(suites, "testsuite", name=file)
        for problem in problems:
            case = ET.SubElement(suite, "testcase", classname=file, name=f"{problem.code} 第 {problem.line} 行")
            ET.SubElement(case, "failure", message=problem.reason).text = str(problem)
    for suite in suites:
        suite.set("tests", str(len(suite)))
        suite.set("failures", str(len(suite.findall("*/failure"))))
    # XML 1.0 放不下的控制字符
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", ET.tostring(suites, "unicode", xml_declaration=True))
