"""命令行 ``zhixing``；不 import mkdocs。

退出码：0 全部通过；1 内容有错（或变异检查的杀死率不够）；2 用法不对。
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zhixing import notebook, report
from zhixing.engine import Engine, Outcome
from zhixing.execute import connect
from zhixing.project import Project, find_root


class UsageError(Exception):
    """命令用得不对，与内容无关。"""


def _load(root: Path, names: list[str]) -> Project:
    """载入全站，或只载入点名的页面、示例与目录。"""
    if not names:
        return Project.load(root)
    pages: set[Path] = set()
    examples: set[Path] = set()
    known = {*(root / "docs").rglob("*.md"), *notebook.find(root)}
    for name in names:
        path = Path(name).resolve()
        if not path.is_relative_to(root):
            raise UsageError(f"{name} 不在项目 {root} 里")
        if not path.exists():
            raise UsageError(f"找不到 {name}")
        chosen = {p for p in known if p.is_relative_to(path)} or {path}
        if any(p.suffix != ".md" and p not in known for p in chosen):
            raise UsageError(f"{name} 不是页面、示例，也不是放着它们的目录")
        pages |= {p for p in chosen if p.suffix == ".md"}
        examples |= {p for p in chosen if p.suffix == ".py"}
    project = Project.load(root, pages)
    project.keep_examples({path.stem for path in examples})
    return project


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"应是正整数，得到 {text!r}")
    return int(text)


def check(args: argparse.Namespace) -> int:
    """扫描、校验、执行、核对。"""
    root = find_root()
    project = _load(root, args.page)
    executor = connect(args.scheduler) if args.scheduler else None
    engine = Engine(root, workers=args.jobs, cache=not args.no_cache, executor=executor)
    try:
        project.execute(engine, report.announce)
    finally:
        engine.close()
    report.save(project)
    for path, render in ((args.json, report.to_json), (args.junit, report.to_junit)):
        if path:
            Path(path).write_text(render(report.record(project)), "utf-8")
    if not project.scans:
        for example, values in sorted(project.artifacts._metrics.items()):
            print(f"{example}: {values}")
    report.print_problems(project.problems)
    report.print_summary(project)
    return 1 if project.problems else 0


def run(args: argparse.Namespace) -> int:
    """执行点名的示例与页面，把每一块的输出打到标准输出。"""
    root = find_root()
    project = _load(root, args.page)
    chosen = {Path(name).resolve() for name in args.page}
    engine = Engine(root, workers=args.jobs, cache=not args.no_cache)

    def show(outcome: Outcome) -> None:
        report.announce(outcome)
        file = root / outcome.unit.file
        if not chosen & {file, *file.parents}:
            return  # 只因为是上游才跑的
        for block, result in zip(outcome.unit.blocks, outcome.payload["blocks"], strict=False):
            figures = f"，{len(result['figs'])} 张图" if result["figs"] else ""
            print(f"── {block.file}:{block.line} {block.lang}（{result['seconds']:.2f} 秒{figures}）")
            print(result["out"], end="" if result["out"].endswith("\n") or not result["out"] else "\n")
        for name, value in outcome.payload["metrics"].items():
            print(f"{name} = {value!r}")
        for kind, what in (("figures", "图"), ("files", "产物文件")):
            if names := "、".join(outcome.payload[kind]):
                print(f"{what}：{names}")
        sys.stdout.flush()

    try:
        project.execute(engine, show)
    finally:
        engine.close()
    report.print_problems(project.problems)
    return 1 if project.problems else 0


def show_report(args: argparse.Namespace) -> int:
    """由上一次核对的结果生成报告，不执行代码。"""
    data = report.load(find_root())
    text = report.FORMATS[args.format](data)
    if args.output:
        Path(args.output).write_text(text if text.endswith("\n") else text + "\n", "utf-8")
    else:
        print(text)
    return 1 if data["problems"] else 0


def update(args: argparse.Namespace) -> int:
    """用实际输出改写期望输出；其他错误照报、不改。"""
    from zhixing.update import rewrite

    root = find_root()
    project = _load(root, args.page)
    project.keep_examples(set())
    engine = Engine(root)
    try:
        project.execute(engine, report.announce)
    finally:
        engine.close()
    for file, count in rewrite(project).items():
        print(f"{file}: 改写 {count} 处期望输出")
    report.print_problems(project.problems)
    return 1 if project.problems else 0


def why(args: argparse.Namespace) -> int:
    """说明某页为什么（不）会重跑。"""
    root = find_root()
    engine = Engine(root)
    for file, (verdict, reason) in engine.explain(_load(root, [args.page]).units()).items():
        print(f"{file}: {verdict}：{reason}")
    return 0


def mutate(args: argparse.Namespace) -> int:
    """把代码改坏一处，报告没有断言发现的改动。"""
    from zhixing import mutate as mutation

    if args.record and args.sample is not None:
        raise UsageError("--record 只记全部变异的结果，不能与 --sample 同用")
    root = find_root()
    project = _load(root, args.page)
    project.keep_examples(set())
    try:
        unused = mutation.unused_equivalents(project)
    except ValueError as error:
        raise UsageError(str(error)) from None
    for file, code, change in unused:
        print(f"{mutation.EQUIVALENTS}: 用不上的登记：{file} 的 {code!r}：{change}（代码改过就删掉或改写）", flush=True)

    def show(verdict: mutation.Verdict) -> None:
        for mutant in verdict.survivors:
            print(f"{mutant.file}:{mutant.line}: 幸存 {mutant.what}")
        print(
            f"{verdict.file}：{verdict.total} 个变异，杀死 {verdict.rate:.0%}，"
            f"幸存 {len(verdict.survivors)}，登记为等价 {verdict.equivalent}",
            flush=True,  # 一页查完就看得到，不等全部
        )

    engine = Engine(root, workers=args.jobs)
    try:
        project.execute(engine, report.announce)
        if project.problems:
            report.print_problems(project.problems)
            return 1
        verdicts = mutation.run(project, engine, sample=args.sample, seed=args.seed, progress=show)
    finally:
        engine.close()
    if args.record:
        mutation.record(project, verdicts)
    return 1 if unused or any(verdict.rate < args.require for verdict in verdicts) else 0


def new(args: argparse.Namespace) -> int:
    """按模板新建一页。"""
    from zhixing.questions import SECTIONS, template

    root = find_root()
    section, _, page_id = args.page.partition("/")
    if section not in SECTIONS or not page_id:
        raise UsageError(f"应写成 章/id，章是 {'、'.join(SECTIONS)} 之一，得到 {args.page!r}")
    path = root / "docs" / section / f"{page_id}.md"
    if path.exists():
        raise UsageError(f"{path.relative_to(root)} 已经存在")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(template(section, page_id), "utf-8")
    print(path.relative_to(root))
    return 0


def book(args: argparse.Namespace) -> int:
    """把建好的打印版站点排成 PDF 或 EPUB。"""
    from time import perf_counter

    from zhixing import book as books

    root, start = find_root(), perf_counter()
    name = "zhixing" + (f"-{args.page.strip('/').replace('/', '-')}" if args.page else "")
    output = Path(args.output or root / "dist" / f"{name}.{args.format}")
    if args.format == "pdf":
        from zhixing import pdf as press
    else:
        from zhixing import epub as press
    try:
        made = press.write(books.load(root, Path(args.site or root / ".cache" / "print"), args.page), output)
    except books.BookError as error:
        print(f"zhixing: {error}", file=sys.stderr)
        return 1
    print(f"{output}：{made}，用时 {perf_counter() - start:.0f} 秒")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="zhixing",
        description="核对知识库里的每一个代码块",
        epilog="退出码：0 全部通过；1 内容有错，或变异检查的杀死率不够；2 用法不对。",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("check", help="扫描、执行、核对（缺省全站，也可给页面、目录或 examples/*.py）")
    p.add_argument("page", nargs="*")
    p.add_argument("-j", "--jobs", type=_positive, help="并行的进程数，缺省为核数")
    p.add_argument("--no-cache", action="store_true", help="忽略已有缓存")
    p.add_argument("--scheduler", metavar="地址", help="交给 dask 集群执行，如 tcp://127.0.0.1:8786")
    p.add_argument("--json", metavar="文件", help="写出 JSON 报告")
    p.add_argument("--junit", metavar="文件", help="写出 JUnit 报告")
    p.set_defaults(run=check)

    p = commands.add_parser("run", help="执行示例或页面，把每一块的输出打到终端")
    p.add_argument("page", nargs="+", help="页面、示例或放着它们的目录；needs 的上游会先跑（有缓存就用）")
    p.add_argument("-j", "--jobs", type=_positive, help="并行的进程数，缺省为核数")
    p.add_argument("--no-cache", action="store_true", help="不用已有的结果，连上游一起重跑")
    p.set_defaults(run=run)

    p = commands.add_parser("report", help="由上一次 check 或构建的结果生成报告，不执行代码；上次有错则退出 1")
    p.add_argument("--format", choices=report.FORMATS, default="text", help="缺省 text")
    p.add_argument("-o", "--output", metavar="文件", help="写到文件，缺省打到标准输出")
    p.set_defaults(run=show_report)

    p = commands.add_parser("update", help="用实际输出改写期望输出")
    p.add_argument("page", nargs="*")
    p.set_defaults(run=update)

    p = commands.add_parser("why", help="某页为什么（不）会重跑")
    p.add_argument("page")
    p.set_defaults(run=why)

    p = commands.add_parser("mutate", help="改坏一处代码，看断言会不会红")
    p.add_argument("page", nargs="*")
    p.add_argument("-j", "--jobs", type=_positive)
    p.add_argument("--sample", type=int, metavar="N", help="每页最多抽 N 个变异（缺省全部）")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--require", type=float, default=0.9, metavar="率", help="低于它就退出 1（缺省 0.9）")
    p.add_argument("--record", action="store_true", help="结果记进 tests/mutation.json，显示在验证报告页")
    p.set_defaults(run=mutate)

    p = commands.add_parser("new", help="按模板新建一页，如 control/ip-adapter")
    p.add_argument("page")
    p.set_defaults(run=new)

    p = commands.add_parser("book", help="把打印版站点（ZHIXING_PRINT=1 mkdocs build -d .cache/print）排成书")
    p.add_argument("format", choices=("pdf", "epub"))
    p.add_argument("--page", metavar="路径", default="", help="只要一页或一章，如 diffusion/ddpm、diffusion")
    p.add_argument("--site", metavar="目录", help="打印版站点，缺省 .cache/print")
    p.add_argument("-o", "--output", metavar="文件", help="缺省 dist/zhixing.pdf、dist/zhixing.epub")
    p.set_defaults(run=book)

    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (UsageError, FileNotFoundError) as error:
        print(f"zhixing: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
