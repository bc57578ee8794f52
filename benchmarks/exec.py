"""执行引擎与同类工具的对照：``.venv/bin/python benchmarks/exec.py``，结果写进 benchmarks/README.md。

同一份语料（:mod:`corpus`），同一次运行里各工具轮流跑；每轮开头轮换次序，比值逐轮算再取中位数。
CPU 秒是整棵进程树的 user + sys；内存另跑一遍量，采样不干扰计时。
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import corpus

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENV = ROOT / ".cache" / "bench-venv"
RESULTS = ROOT / ".cache" / "bench.json"
BLOCKS_PER_PAGE = 5
OURS, OURS_SITE, SYBIL, JUPYTER = "zhixing", "zhixing-site", "sybil", "mkdocs-jupyter"
BUSY = 0.5  # 开跑前的一分钟负载超过核数的这么多倍，墙钟就不可信
OPERATIONS = {"cold": "冷", "warm": "热", "edit": "改一块"}


# ---- 环境 ----


def bench_python() -> str:
    """对照工具的虚拟环境：直接看得到项目 .venv 里的包（同一份 torch），缺的装在自己这里。"""
    python, stamp = VENV / "bin" / "python", VENV / "requirements.sha256"
    purelib = next(p for p in sys.path if p.endswith("site-packages"))
    want = hashlib.sha256((HERE / "requirements.txt").read_bytes() + purelib.encode()).hexdigest()
    if not (stamp.is_file() and stamp.read_text() == want):
        print(f"建立 {VENV.relative_to(ROOT)}", flush=True)
        venv.create(VENV, clear=True, with_pip=False, symlinks=True)
        own = next((VENV / "lib").glob("python*/site-packages"))
        (own / "project.pth").write_text(purelib + "\n")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
        subprocess.run([*pip, "install", "-q", "-r", str(HERE / "requirements.txt")], check=True)
        stamp.write_text(want)
    return str(python)


def environment(work: Path) -> dict[str, str]:
    """各工具共用的环境变量：单线程算子、不读用户配置、不自动加载无关的 pytest 插件。"""
    home = work / "home"
    home.mkdir(exist_ok=True)
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "LC_ALL": "C.UTF-8",
        "JUPYTER_PATH": str(Path(sys.prefix) / "share" / "jupyter"),  # nbconvert 的模板在项目 .venv 里
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "NO_MKDOCS_2_WARNING": "1",
        "DISABLE_MKDOCS_2_WARNING": "true",
    }


# ---- 工具 ----


@dataclass
class Tool:
    """一个被测的工具。

    Attributes:
        label: 表里的名字。
        prepare: 在空目录里写好语料与配置。
        command: 命令。
        page: 页名 -> 要改的文件。
        executed: 从输出与产物数出这次执行了多少块；与应执行的对不上就停下，不报假数字。
        clean: “冷”之前删掉的缓存与产物。
        caches: 有没有缓存；没有的只量冷。
        rendered: ``executed`` 数的是产物里有输出的块，缓存命中的也在内。
        slow: 每页启动一个内核，一轮要一分钟以上：单独限轮数，内存在第一轮里顺便每秒采样一次。
    """

    label: str
    prepare: Callable[[Path], None]
    command: list[str]
    page: str
    executed: Callable[[str, Path], int]
    clean: tuple[str, ...] = ()
    caches: bool = False
    rendered: bool = False
    slow: bool = False


_SITE = """\
site_name: 对照
theme: {{ name: material, font: false }}
plugins: {plugins}
markdown_extensions:
  admonition: {{}}
  attr_list: {{}}
  md_in_html: {{}}
  tables: {{}}
  pymdownx.arithmatex: {{ generic: true }}
  pymdownx.highlight: {{ pygments_lang_class: true }}
  pymdownx.superfences: {{}}
validation: {{ nav: {{ omitted_files: ignore }} }}
"""


def _site(directory: Path, plugins: str = "[search]", extra: str = "") -> None:
    (directory / "mkdocs.yml").write_text(_SITE.format(plugins=plugins) + extra, "utf-8")
    (directory / "docs").mkdir(exist_ok=True)
    (directory / "docs" / "index.md").write_text("# 首页\n", "utf-8")


def _rendered(log: str, directory: Path) -> int:
    """产物里出现了多少页的输出。"""
    texts = (p.read_text("utf-8") for p in directory.glob("site/**/p??/index.html"))
    return BLOCKS_PER_PAGE * sum(bool(re.search(r"页面 \d+ 通过", text)) for text in texts)


def _counted(pattern: str, each: int = 1) -> Callable[[str, Path], int]:
    return lambda log, directory: each * sum(int(n) for n in re.findall(pattern, log))


def _ours(log: str, directory: Path) -> int:
    run, cached = re.search(r"(\d+) 块跑过（(\d+) 块用缓存）", log).groups()
    return int(run) - int(cached)


def tools(pages: dict[str, list[corpus.Block]], python: str) -> dict[str, Tool]:
    def ours(directory: Path) -> None:
        hooks = "".join(f"  - {ROOT}/hooks/{name}.py\n" for name in ("staging", "verify"))
        _site(directory, extra=f"hooks:\n{hooks}")
        text = (directory / "mkdocs.yml").read_text("utf-8")
        extensions = "  zhixing.formula: {}\n  zhixing.inline: {}\n  zhixing.page: {}\nvalidation:"
        (directory / "mkdocs.yml").write_text(text.replace("validation:", extensions), "utf-8")
        (directory / "docs" / "tags.md").write_text("# 标签\n", "utf-8")
        corpus.write_questions(directory / "docs" / "basics", pages)
        (directory / "node_modules").symlink_to(ROOT / "node_modules")

    def plain(directory: Path, info: Callable[[str, int, corpus.Block], str] = lambda *_: "python") -> None:
        corpus.write_markdown(directory / "docs", pages, info)

    def sybil(directory: Path) -> None:
        plain(directory)
        (directory / "conftest.py").write_text(
            "from sybil import Sybil\nfrom sybil.parsers.markdown import PythonCodeBlockParser\n\n"
            'pytest_collect_file = Sybil([PythonCodeBlockParser()], patterns=["*.md"]).pytest()\n'
        )
        (directory / "pytest.ini").write_text("[pytest]\n")

    def markdown_docs(directory: Path) -> None:
        plain(directory, lambda name, k, block: "python" if k == 1 else "python continuation")
        (directory / "pytest.ini").write_text("[pytest]\n")

    def markdown_exec(directory: Path) -> None:
        plain(directory, lambda name, k, block: f'python exec="1" source="above" result="text" session="{name}"')
        _site(directory, "[search, markdown-exec]")

    def jupyter_cache(directory: Path) -> None:
        corpus.write_notebooks(directory / "docs", pages)
        (directory / "run.py").write_text(
            textwrap.dedent("""\
            from pathlib import Path

            from jupyter_cache import get_cache
            from jupyter_cache.executors import load_executor

            if __name__ == "__main__":
                cache = get_cache(".jupyter_cache")
                for path in sorted(Path("docs").glob("*.ipynb")):
                    cache.add_nb_to_project(str(path))
                result = load_executor("local-parallel", cache).run_and_cache(timeout=120)
                assert not result.errored and not result.excepted, result
                print(len(result.succeeded), "executed")
            """)
        )

    def mkdocs_jupyter(directory: Path) -> None:
        corpus.write_notebooks(directory / "docs", pages)
        _site(directory, "[search, mkdocs-jupyter: { execute: true, allow_errors: false }]")

    build = ["-m", "mkdocs", "build", "-q"]
    results = ".cache/zhixing/results"
    return {
        OURS: Tool(
            "**知行** `zhixing check`", ours, [sys.executable, "-m", "zhixing.cli", "check"],
            "docs/basics/{}.md", _ours, (results,), caches=True,
        ),
        OURS_SITE: Tool(
            "**知行** `mkdocs build`（含渲染）", ours, [sys.executable, *build],
            "docs/basics/{}.md", _ours, (results, "site"), caches=True,
        ),
        SYBIL: Tool(
            "Sybil 10.1.0（pytest）", sybil, [python, "-m", "pytest", "-q", "docs"],
            "docs/{}.md", _counted(r"(\d+) passed"),
        ),
        "pytest-markdown-docs": Tool(
            "pytest-markdown-docs 0.9.2", markdown_docs,
            [python, "-m", "pytest", "-q", "-p", "pytest_markdown_docs.plugin", "--markdown-docs", "docs"],
            "docs/{}.md", _counted(r"(\d+) passed"),
        ),
        "markdown-exec": Tool(
            "markdown-exec 1.12.6（mkdocs build，含渲染）", markdown_exec, [python, *build],
            "docs/{}.md", _rendered, ("site",), rendered=True,
        ),
        "jupyter-cache": Tool(
            "jupyter-cache 1.0.1（local-parallel）", jupyter_cache, [python, "run.py"],
            "docs/{}.ipynb", _counted(r"(\d+) executed", BLOCKS_PER_PAGE), (".jupyter_cache",), caches=True, slow=True,
        ),
        JUPYTER: Tool(
            "mkdocs-jupyter 0.26.3（execute: true，含渲染）", mkdocs_jupyter, [python, *build],
            "docs/{}.ipynb", _rendered, ("site", ".cache"), caches=True, rendered=True, slow=True,
        ),
    }  # fmt: skip


# ---- 量 ----


def _parents() -> dict[int, int]:
    table = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as f:
                    table[int(entry)] = int(f.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue
    return table


def _pss(pid: int) -> int:
    """一个进程的 PSS（字节）：共享页按共享它的进程数平摊。"""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as f:
            for line in f:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


class PeakMemory(threading.Thread):
    """每隔 ``interval`` 秒把 ``pid`` 的整棵进程树的 PSS 加起来，记下最大的一次。"""

    def __init__(self, pid: int, interval: float) -> None:
        super().__init__(daemon=True)
        self.pid, self.interval, self.peak, self.stopped = pid, interval, 0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(self.interval):
            parents = _parents()
            tree, grew = {self.pid}, True
            while grew:
                found = {p for p, parent in parents.items() if parent in tree} - tree
                tree |= found
                grew = bool(found)
            self.peak = max(self.peak, sum(map(_pss, tree)))


def _available() -> int:
    with open("/proc/meminfo") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith("MemAvailable"))


def measure(command: list[str], directory: Path, env: dict[str, str], memory: float = 0) -> tuple[dict, str]:
    """跑一条命令；返回 ``(墙钟、CPU 秒、负载、内存, 输出)``；``memory`` 是内存采样的间隔，0 表示不采。

    Raises:
        RuntimeError: 命令失败。
    """
    load, available = os.getloadavg()[0], _available()
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=directory, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        sampler = PeakMemory(process.pid, memory) if memory else None
        if sampler:
            sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if sampler:
            sampler.stopped.set()
            sampler.join()
        cpu = usage.ru_utime + usage.ru_stime + _reap_orphans()
        log.seek(0)
        text = log.read().decode("utf-8", "replace")
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} 退出码 {process.returncode}（{directory}）\n{text[-4000:]}")
    sample = {"wall": wall, "cpu": cpu, "load": load, "available": available}
    return sample | ({"peak": sampler.peak} if sampler else {}), text


def _reap_orphans() -> float:
    """过继到我们名下的后台进程：等两秒，还在就杀；它们用掉的 CPU 也算。"""
    deadline, cpu = time.monotonic() + 2, 0.0
    while True:
        try:
            pid, _, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return cpu
        if pid:
            cpu += usage.ru_utime + usage.ru_stime
        elif time.monotonic() > deadline:
            for orphan, parent in _parents().items():
                if parent == os.getpid():
                    os.kill(orphan, signal.SIGKILL)
        else:
            time.sleep(0.01)


class Bench:
    """工作目录、工具与全部样本。"""

    def __init__(self, work: Path, selected: dict[str, Tool], blocks: int) -> None:
        self.work, self.tools, self.blocks = work, selected, blocks
        self.env = environment(work)
        self.samples: list[dict] = []
        self.edits = 0
        for name, tool in selected.items():
            (work / name).mkdir()
            tool.prepare(work / name)

    def _clean(self, name: str) -> None:
        for path in self.tools[name].clean:
            shutil.rmtree(self.work / name / path, ignore_errors=True)

    def run(self, name: str, operation: str, turn: int | str, memory: float = 0) -> None:
        tool, directory = self.tools[name], self.work / name
        restore = None
        if operation == "cold":
            self._clean(name)
        if operation == "edit":
            self.edits += 1
            restore = edit(directory / tool.page.format(corpus.edit_target("torch")), self.edits)
        # 内核自己选 inline 后端，图才会进页面；其余工具用不开窗口的 Agg
        env = self.env if tool.slow else self.env | {"MPLBACKEND": "Agg"}
        sample, log = measure(tool.command, directory, env, memory)
        if restore:
            restore()
        due = self.blocks if operation == "cold" or tool.rendered else {"warm": 0, "edit": BLOCKS_PER_PAGE}[operation]
        if (done := tool.executed(log, directory)) != due:
            raise RuntimeError(f"{name}（{OPERATIONS[operation]}）应执行 {due} 块，实际 {done} 块\n{log[-4000:]}")
        self.samples.append({"tool": name, "op": operation, "round": turn} | sample)
        peak = f"，峰值 {sample['peak'] >> 20} MiB" if memory else ""
        print(
            f"  {turn} {name} {OPERATIONS[operation]}：{sample['wall']:.2f} 秒，CPU {sample['cpu']:.2f} 秒，"
            f"负载 {sample['load']:.1f}{peak}",
            flush=True,
        )

    def rounds(self, count: int, slow: int) -> None:
        names = list(self.tools)
        print("先各跑一遍：预热磁盘缓存，量峰值内存", flush=True)
        for name, tool in self.tools.items():
            if not tool.slow:
                self.run(name, "cold", "内存", memory=0.05)
        for turn in range(count):
            active = [name for name in names if turn < slow or not self.tools[name].slow]
            shift = turn % len(active)
            for name in active[shift:] + active[:shift]:
                tool = self.tools[name]
                for operation in OPERATIONS if tool.caches else ("cold",):
                    first = tool.slow and turn == 0 and operation == "cold"
                    self.run(name, operation, turn, memory=1 if first else 0)

    def values(self, name: str, operation: str, field: str) -> list[float]:
        chosen = [s for s in self.samples if (s["tool"], s["op"]) == (name, operation) and s["round"] != "内存"]
        return [s[field] for s in sorted(chosen, key=lambda s: s["round"])]


def edit(path: Path, number: int) -> Callable[[], None]:
    """改一块；返回还原的函数。"""
    before = path.read_text("utf-8")
    after, count = re.subn(r"tweak = \d+", f"tweak = {number}", before)
    assert count == 1, path
    path.write_text(after, "utf-8")
    return lambda: path.write_text(before, "utf-8")


# ---- 引擎自己的三个目标 ----


def site_overhead(bench: Bench, pages: dict[str, list[corpus.Block]], pairs: int) -> list[dict]:
    """热构建：装引擎与不装引擎的同一个站点，交替跑。

    不装：页面相同（含 front matter；由数据生成的索引、报告等页写成静态的），去掉钩子与 zhixing.page、
    zhixing.inline，公式照样在构建时渲染。全无：再去掉构建时的公式，只剩 MkDocs 与 Material。
    """
    from zhixing import pages as generated
    from zhixing.engine import Engine
    from zhixing.project import Project

    with_engine = bench.work / OURS_SITE
    project, engine = Project.load(with_engine), Engine(with_engine)
    project.execute(engine)
    engine.close()
    same = generated.generated(project) | {"tags.md": "# 标签\n"}
    variants = {"装引擎": with_engine}
    for label, extension in (("不装", "  zhixing.formula: {}\nvalidation:"), ("全无", "validation:")):
        directory = variants[label] = bench.work / f"site-{label}"
        directory.mkdir()
        _site(directory)
        text = (directory / "mkdocs.yml").read_text("utf-8").replace("validation:", extension)
        (directory / "mkdocs.yml").write_text(text, "utf-8")
        corpus.write_questions(directory / "docs" / "basics", pages, figures=False)
        for name, text in same.items():
            (directory / "docs" / name).write_text(text, "utf-8")
    samples = []
    for pair in range(-1, pairs):  # 第 -1 对只预热
        order = list(variants) if pair % 2 else list(variants)[::-1]
        row = {label: measure([sys.executable, "-m", "mkdocs", "build", "-q"], variants[label], bench.env)[0] for label in order}
        if pair >= 0:
            samples.append(row)
    return samples


def hot(root: Path, repeats: int) -> dict:
    """进程常驻时：改一块到核对完的延迟；全部命中缓存时每块的开销。"""
    from zhixing.engine import Engine
    from zhixing.project import Project

    engine = Engine(root, checkpoints=True)  # 与 mkdocs serve 相同

    def check() -> tuple[float, float, Project]:
        start = time.perf_counter()
        project = Project.load(root)
        loaded = time.perf_counter()
        project.execute(engine)
        assert not project.problems, project.problems
        return loaded - start, time.perf_counter() - start, project

    def stale(project: Project) -> list:
        return [o for o in project.outcomes.values() if not o.cached]

    latency: dict[str, list[float]] = {kind: [] for kind in corpus.KINDS}
    inside: dict[str, list[float]] = {kind: [] for kind in corpus.KINDS}
    try:
        first, _, _ = check()
        number = 1000
        for turn in range(-1, repeats):  # 第 -1 次是预载
            for kind in corpus.KINDS:
                number += 1
                edit(root / f"docs/basics/{corpus.edit_target(kind)}.md", number)
                _, seconds, project = check()
                (outcome,) = stale(project)
                if turn >= 0:
                    latency[kind].append(seconds)
                    inside[kind].append(outcome.seconds)
        check()
        load, total = [], []
        for _ in range(repeats):
            loaded, seconds, project = check()
            assert not stale(project)
            load.append(loaded)
            total.append(seconds)
    finally:
        engine.close()
    return {"latency": latency, "inside": inside, "first": first, "load": load, "total": total}


# ---- 结果 ----


def machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    total = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return (
        f"{cpu[1].strip() if cpu else '未知 CPU'}，{len(os.sched_getaffinity(0))} 核，"
        f"内存 {int(total[1]) / (1 << 20):.0f} GiB，Linux {os.uname().release.split('-')[0]}，"
        f"Python {sys.version.split()[0]}，{'，'.join(f'{name} {version(name)}' for name in ('torch', 'numpy', 'matplotlib'))}"
    )


def busy() -> str:
    """机器忙的时候的警告；空闲时是空串。"""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load <= BUSY * cores:
        return ""
    return f"警告：负载 {load:.1f}，{cores} 核上还有别的任务。墙钟会偏大，以 CPU 秒之比为准；等负载降到 {BUSY * cores:g} 以下再跑一次。"


def _spread(values: list[float], digits: int = 2) -> str:
    if not values:
        return "—"
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle}（{min(values):.{digits}f}–{max(values):.{digits}f}）"


def _ratio(top: list[float], bottom: list[float]) -> float | None:
    """逐轮比值的中位数；只跑了前几轮的工具只比前几轮。"""
    return statistics.median(a / b for a, b in zip(top, bottom)) if top and bottom else None


def report(bench: Bench, sites: list[dict], heat: dict) -> str:
    mine = bench.values(OURS, "cold", "wall")
    lines = [
        f"机器：{machine()}。",
        "",
        f"语料 {bench.blocks // BLOCKS_PER_PAGE} 页 {bench.blocks} 块；{len(mine)} 轮交错（没写范围的只跑了 1 轮），"
        "数字是中位数（最小–最大），单位秒。没有缓存的工具，热与改一块就等于冷。",
        "",
        "| 工具 | 冷：墙钟 | 冷：CPU | 冷：是知行的几倍 | 热：墙钟 | 热：CPU | 改一块：墙钟 | 改一块：CPU | 峰值内存 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, tool in bench.tools.items():
        ratio = _ratio(bench.values(name, "cold", "wall"), mine)
        cells = [_spread(bench.values(name, "cold", "wall")), _spread(bench.values(name, "cold", "cpu"))]
        cells.append(f"{ratio:.2f}" if ratio else "—")
        for operation in ("warm", "edit"):
            for field in ("wall", "cpu"):
                cells.append(_spread(bench.values(name, operation, field)) if tool.caches else "同冷")
        peak = next(s["peak"] for s in bench.samples if s["tool"] == name and "peak" in s)
        lines.append(f"| {tool.label} | {' | '.join(cells)} | {peak >> 20} MiB |")
    timed = [s for s in bench.samples if s["round"] != "内存"]
    loads = [s["load"] for s in timed]
    # 每次开跑前的负载含本测试自己刚跑完的那一个：两个核上约 1 到 2
    crowded = statistics.median(loads) > 1.5 * len(os.sched_getaffinity(0))
    lines += [
        "",
        f"每次开跑前的一分钟负载：中位数 {statistics.median(loads):.1f}，{min(loads):.1f}–{max(loads):.1f}"
        f"（含本测试自己）；可用内存最少 {min(s['available'] for s in timed) / (1 << 30):.1f} GiB。",
        "",
        *(["**警告：机器忙，墙钟偏大，以 CPU 秒之比为准。**", ""] if crowded else []),
        "| 目标 | 要求 | 实测 | |",
        "|---|---|---|---|",
    ]

    def goal(text: str, limit: float, value: float | None, shown: str, unit: str = "") -> None:
        if value is not None:
            verdict = "达到" if value <= limit else "**未达到**"
            if value > limit and crowded:
                verdict += "（机器忙，墙钟不可信）"
            lines.append(f"| {text} | ≤ {limit:g}{unit} | {shown} | {verdict} |")

    for other, limit in ((SYBIL, 0.65), (JUPYTER, 0.125)):
        for own in (OURS, OURS_SITE) if other == JUPYTER else (OURS,):
            if other in bench.tools and own in bench.tools:
                wall = [_ratio(bench.values(own, "cold", f), bench.values(other, "cold", f)) for f in ("wall", "cpu")]
                what = bench.tools[own].label.replace("**", "").split("（")[0]
                goal(f"冷：{what} ÷ {other}", limit, wall[0], f"{wall[0]:.3f}（CPU 之比 {wall[1]:.3f}）")
    if sites:
        for label, note in (("不装", "公式仍在构建时渲染"), ("全无", "公式也交给浏览器；仅供参考")):
            ratios, cpu = ([row["装引擎"][f] / row[label][f] for row in sites] for f in ("wall", "cpu"))
            seconds = statistics.median(row[label]["wall"] for row in sites)
            shown = f"{_spread(ratios)}（CPU 之比 {statistics.median(cpu):.2f}），分母 {seconds:.2f} 秒"
            goal(f"热构建 ÷ 不装引擎的同一站点（{note}）", 1.15, statistics.median(ratios), shown)
    for kind, values in heat["latency"].items():
        inside = statistics.median(heat["inside"][kind])
        shown = f"{_spread(values, 3)}，其中代码自己 {inside:.3f}"
        goal(f"常驻时改一块到核对完（{kind}页）", 0.15, statistics.median(values), shown, " 秒")
    resident = [1000 * seconds / bench.blocks for seconds in heat["total"]]
    scan = 1000 * heat["first"] / bench.blocks
    fresh = statistics.median(resident) + scan
    goal("全部命中缓存时每块的开销（进程常驻）", 0.5, statistics.median(resident), _spread(resident, 3), " 毫秒")
    goal("全部命中缓存时每块的开销（新进程，含扫描）", 0.5, fresh, f"{fresh:.2f}，其中扫描 {scan:.2f}", " 毫秒")
    return "\n".join(lines)


def publish(section: str, text: str) -> None:
    """换掉 README 里 ``section`` 两行标记之间的内容。"""
    path, begin, end = HERE / "README.md", f"<!-- {section}开始 -->", f"<!-- {section}结束 -->"
    head, _, rest = path.read_text("utf-8").partition(begin)
    _, _, tail = rest.partition(end)
    path.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow-rounds", type=int, default=2, help="每页启动内核的工具跑几轮（缺省 2，每轮各一分钟以上）")
    parser.add_argument("--tools", help="逗号分隔的子集；缺省全部")
    parser.add_argument("--pages", type=int, default=40, help="语料页数（缺省 40；不到 40 的结果不写进 README）")
    parser.add_argument("--quick", action="store_true", help="只跑知行与 Sybil，一轮，结果不写进 README")
    args = parser.parse_args()
    if args.pages < 6:
        parser.error("--pages 至少 6：三类页面各要有第二页可改")
    import zhixing.execute  # noqa: F401  没装好就现在说，不等量完

    if warning := busy():
        print(warning, file=sys.stderr, flush=True)
    pages = corpus.pages(args.pages)
    every = tools(pages, bench_python())
    names = [OURS, SYBIL] if args.quick else args.tools.split(",") if args.tools else list(every)
    if unknown := set(names) - every.keys():
        parser.error(f"没有工具 {'、'.join(sorted(unknown))}，可选 {'、'.join(every)}")
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER：工具留在后台的进程也算得到
    with tempfile.TemporaryDirectory(prefix="zhixing-bench-") as work:
        selected = {name: every[name] for name in every if name in {*names, OURS}}
        bench = Bench(Path(work), selected, BLOCKS_PER_PAGE * len(pages))
        bench.rounds(1 if args.quick else args.rounds, args.slow_rounds)
        sites = site_overhead(bench, pages, 5) if OURS_SITE in selected else []
        heat = hot(Path(work) / OURS, 5 if args.quick else 15)
        text = report(bench, sites, heat)
    if warning := busy():
        print(warning, file=sys.stderr)
    print(text)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"samples": bench.samples, "sites": sites, "hot": heat}, ensure_ascii=False, indent=1))
    if not args.quick and args.pages == 40 and not args.tools:
        command = " ".join(["python", "benchmarks/exec.py", *sys.argv[1:]])
        publish("结果", f"{time.strftime('%Y-%m-%d')}，`{command}`。{text}")


if __name__ == "__main__":
    main()
