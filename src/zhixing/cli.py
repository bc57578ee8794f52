"""命令行 ``zhixing``；不 import mkdocs。

退出码：0 全部通过；1 内容有错；2 用法不对。
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zhixing import report
from zhixing.execute import Engine
from zhixing.project import Project, find_root


def _pages(root: Path, names: list[str]) -> list[Path] | None:
    if not names:
        return None
    paths: list[Path] = []
    for name in names:
        path = Path(name).resolve()
        if not path.is_relative_to(root):
            raise SystemExit(f"zhixing: {name} 不在项目 {root} 里")
        if path.is_dir():
            paths += sorted(path.rglob("*.md"))
        elif path.is_file():
            paths.append(path)
        else:
            raise SystemExit(f"zhixing: 找不到 {name}")
    return paths


def check(args: argparse.Namespace) -> int:
    """扫描、校验、执行、核对。"""
    root = find_root()
    pages = _pages(root, args.page)
    examples_only = pages is not None and all(p.suffix == ".py" for p in pages)
    project = Project.load(root, [p for p in pages if p.suffix == ".md"] if pages is not None else None)
    if pages is not None:
        chosen = {p.stem for p in pages if p.suffix == ".py"}
        project.examples = {k: v for k, v in project.examples.items() if k in chosen}
    engine = Engine(root, workers=args.jobs, cache=not args.no_cache)
    try:
        project.execute(engine, report.announce)
    finally:
        engine.close()
    if args.json:
        Path(args.json).write_text(report.to_json(project), "utf-8")
    if args.junit:
        Path(args.junit).write_text(report.to_junit(project), "utf-8")
    if examples_only:
        for example, values in sorted(project.artifacts._metrics.items()):
            print(f"{example}: {values}")
    report.print_problems(project.problems)
    report.print_summary(project)
    return 1 if project.problems else 0


def update(args: argparse.Namespace) -> int:
    """用实际输出改写期望输出；其他错误照报、不改。"""
    from zhixing.update import rewrite

    root = find_root()
    project = Project.load(root, _pages(root, args.page))
    project.examples = {}
    engine = Engine(root)
    try:
        project.execute(engine, report.announce)
    finally:
        engine.close()
    for file, count in rewrite(project).items():
        print(f"{file}: 改写 {count} 处期望输出")
    left = [p for p in project.problems if p.code != "R302"]
    report.print_problems(left)
    return 1 if left else 0


def why(args: argparse.Namespace) -> int:
    """说明某页为什么（不）会重跑。"""
    from zhixing.execute import Unit

    root = find_root()
    project = Project.load(root, _pages(root, [args.page]))
    engine = Engine(root)
    for scan in project.scans.values():
        unit = Unit(scan.file, [b for b in scan.blocks if b.runs])
        payload, reason = engine.cache.load(unit.file, engine.unit_key(unit))
        print(f"{scan.file}: {'不用重跑' if payload else '会重跑'}：{reason}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="zhixing", description="核对知识库里的每一个代码块")
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("check", help="扫描、执行、核对（缺省全站，也可给页面、目录或 examples/*.py）")
    p.add_argument("page", nargs="*")
    p.add_argument("-j", "--jobs", type=int, help="并行的进程数，缺省为核数")
    p.add_argument("--no-cache", action="store_true", help="忽略已有缓存")
    p.add_argument("--json", metavar="文件", help="写出 JSON 报告")
    p.add_argument("--junit", metavar="文件", help="写出 JUnit 报告")
    p.set_defaults(run=check)

    p = commands.add_parser("update", help="用实际输出改写期望输出")
    p.add_argument("page", nargs="*")
    p.set_defaults(run=update)

    p = commands.add_parser("why", help="某页为什么（不）会重跑")
    p.add_argument("page")
    p.set_defaults(run=why)

    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except FileNotFoundError as error:
        print(f"zhixing: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
