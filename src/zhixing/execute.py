"""执行：挑出要跑的文件，交给 zygote，收结果，核对，写缓存。"""

from __future__ import annotations

import ast
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zhixing import files
from zhixing.blocks import Block
from zhixing.cache import Cache, key
from zhixing.errors import Problem
from zhixing.verify import verify
from zhixing.zygote import HEAVY

# 子进程只看得到这些环境变量：令牌、代理、主机名之类一概不进去
_PASS_THROUGH = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "SYSTEMROOT")


@dataclass
class Unit:
    """一起执行、共享变量的一串代码块：一页，或一个示例。"""

    file: str
    blocks: list[Block]  # 只含会执行的块
    kind: str = "page"  # page 或 example
    needs: tuple[str, ...] = ()  # 上游示例的 id：都成功了才执行
    needs_line: int = 1
    threads: int = 1  # 算子用几个线程，也就占几个执行槽


@dataclass
class Outcome:
    """一个单元的执行结果。"""

    unit: Unit
    payload: dict[str, Any]  # blocks figures metrics files inputs isolation
    cached: bool
    why: str
    upstream: dict[str, dict[str, str]] = field(default_factory=dict)  # 上游示例 -> 产物名 -> sha256
    problems: list[Problem] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(b["seconds"] for b in self.payload["blocks"])


def clean_environment(root: Path) -> dict[str, str]:
    """子进程的环境变量。"""
    env = {name: os.environ[name] for name in _PASS_THROUGH if name in os.environ}
    # bash 里的 python 与站点用的是同一个
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    return env | {
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "HOME": tempfile.gettempdir(),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": str(root / ".cache" / "zhixing" / "matplotlib"),
        # 多线程算子之后 fork 会挂死；页间并行比页内两线程快
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def heavy_imports(sources: Iterable[str], root: Path) -> list[str]:
    """这些代码（连同它们 import 的本地模块）会用到哪些重模块。"""
    found: set[str] = set()
    seen: set[Path] = set()
    stack = list(sources)
    while stack:
        try:
            tree = ast.parse(stack.pop())
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # 空字符、嵌套太深：执行到那一块时再报
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            else:
                continue
            for name in names:
                found.add(name.split(".")[0])
                base = root / "examples" / name.replace(".", "/")
                for path in (base.with_suffix(".py"), base / "__init__.py"):
                    if path.is_file() and path not in seen:
                        seen.add(path)
                        stack.append(path.read_text("utf-8", "replace"))
    return sorted(found & HEAVY.keys())


def describe_block(block: Block, unit: Unit) -> dict[str, Any]:
    """块里影响执行结果的部分；``file``、``line`` 只用于报错，不进缓存键。"""
    file, line = block.code_start
    return {
        "lang": block.lang,
        "source": block.source,
        "raises": bool(block.raises),
        "practice": block.practice,
        "solution": block.solution,
        "timeout": block.timeout,
        "memory": block.memory,
        "echo": unit.kind == "example",
        "file": file,
        "line": line,
    }


def _python_of(block: dict[str, Any]) -> str:
    """块里的 Python 代码；``pycon`` 只取提示符后面的。"""
    if block["lang"] == "python":
        return block["source"]
    if block["lang"] == "pycon":
        return "\n".join(re.findall(r"^\s*(?:>>>|\.\.\.) (.*)$", block["source"], re.M))
    return ""


class ZygoteExecutor(Executor):
    """本机的执行后端：``submit(execute_job, job)`` 把作业交给 zygote。"""

    def __init__(self, root: Path, workers: int) -> None:
        self.root, self.workers = root, workers
        self._futures: dict[str, tuple[Future, dict[str, Any]]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._count = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        (job,) = args
        future: Future = Future()
        with self._lock:
            if self._process is None:
                self._start()
            self._count += 1
            job = job | {
                "id": str(self._count),
                "spool": str(self._spool / str(self._count)),
                "cwd": tempfile.mkdtemp(prefix="zhixing-"),
            }
            self._futures[job["id"]] = (future, job)
            try:
                self._process.stdin.write((json.dumps(job) + "\n").encode())
                self._process.stdin.flush()
            except BrokenPipeError:
                pass  # 读线程会发现它死了，并给每个作业一个说法
        return future

    def _start(self) -> None:
        self._spool = Path(tempfile.mkdtemp(prefix="zhixing-spool-"))
        self._process = subprocess.Popen(
            # -P：项目根目录不进 sys.path；examples/ 由页进程自己加，免得与标准库同名的示例弄坏 zygote
            [sys.executable, "-P", "-m", "zhixing.zygote", str(self.workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=clean_environment(self.root),
            cwd=self.root,
            start_new_session=True,  # Ctrl-C 只发给我们；它等标准输入关闭，收拾干净再走
        )
        self._reader = threading.Thread(target=self._read, args=(self._process, self._spool), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[bytes], spool: Path) -> None:
        for line in process.stdout:
            event = json.loads(line)
            future, job = self._futures.pop(event["id"])
            try:
                future.set_result(_collect(job, event))
            except BaseException as error:
                future.set_exception(error)
            finally:
                shutil.rmtree(job["cwd"], ignore_errors=True)
                shutil.rmtree(f"{job['spool']}.d", ignore_errors=True)
        code = process.wait()
        with self._lock:
            self._process = None
            left, self._futures = list(self._futures.values()), {}
        shutil.rmtree(spool, ignore_errors=True)
        for future, job in left:
            shutil.rmtree(job["cwd"], ignore_errors=True)
            future.set_exception(RuntimeError(f"执行进程意外退出（{code}）"))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        with self._lock:
            process = self._process
        if process is None:
            return
        process.stdin.close()
        if cancel_futures:
            process.terminate()
        if wait:
            process.wait()
            self._reader.join()


_WORKER: dict[str, ZygoteExecutor] = {}


def execute_job(job: dict[str, Any]) -> dict[str, Any]:
    """在别的进程或机器的 worker 里执行一个作业。

    每个 worker 带一个惰性启动的 zygote：worker 自己有许多线程，不能直接 fork。
    """
    executor = _WORKER.setdefault(job["root"], ZygoteExecutor(Path(job["root"]), 1))
    return executor.submit(execute_job, job).result()


def connect(scheduler: str) -> Executor:
    """连到 dask 集群，如 ``tcp://127.0.0.1:8786``；项目目录要在各 worker 上的同一路径。

    Raises:
        ImportError: 没有安装可选依赖 distributed。
        OSError: 连不上。
    """
    from distributed import Client

    client = Client(scheduler)
    # 同一作业两次提交是两次执行；worker 中途死掉由调度器换一个重试
    executor = client.get_executor(pure=False, retries=2)
    finish = executor.shutdown
    executor.shutdown = lambda *args, **kwargs: (finish(*args, **kwargs), client.close())
    return executor


def _collect(job: dict[str, Any], event: dict[str, Any]) -> dict[str, Any]:
    """读出一个子进程留下的结果；它死了就由最后的位置给出文件与行。"""
    base = Path(job["spool"])
    try:
        payload = json.loads((base.with_suffix(".json")).read_text("utf-8"))
    except ValueError:
        payload = None
    with open(base.with_suffix(".out"), "rb") as f:
        f.seek(max(0, os.fstat(f.fileno()).st_size - 20000))
        output = f.read().decode("utf-8", "replace")
    for kind in (".json", ".out", ".progress"):
        base.with_suffix(kind).unlink(missing_ok=True)
    if payload is not None and event["status"] == 0:
        if (payload.get("blocks") or [{}])[-1].get("error"):
            return payload | {"files": {}}  # 没做完的示例不留产物
        try:
            payload["files"] = files.collect(Path(job["root"]), Path(f"{job['spool']}.d") / "outputs")
        except (OSError, ValueError) as error:
            return _lost(job, len(job["blocks"]) - 1, "R309", type(error).__name__, str(error))
        return payload
    status = event["status"]
    if event["late"]:
        timeout = job["blocks"][max(event["block"], 0)]["timeout"]
        return _lost(job, event["block"], "R304", "Timeout", f"超过 {timeout:g} 秒，已强行结束", output)
    death = f"信号 {-status}" if status < 0 else f"退出码 {status}"
    return _lost(job, event["block"], "R305", "Died", f"进程意外结束（{death}）", output)


def _lost(job: dict[str, Any], k: int, code: str, kind: str, message: str, output: str = "") -> dict[str, Any]:
    """第 ``k`` 块时没了的一页：只有这一块的错误，别的块无从核对。"""
    k = max(k, 0)
    block = job["blocks"][k]
    detail = _readable(output)
    line = _last_line(detail, block["file"]) or block["line"]
    error = {"code": code, "type": kind, "message": message, "file": block["file"], "line": line, "detail": detail}
    blocks = [{"out": "", "error": None, "seconds": 0.0, "figs": []} for _ in range(k)]
    blocks.append({"out": "", "error": error, "seconds": 0.0, "figs": []})
    return _empty() | {"blocks": blocks, "deps": {}, "truncated": True}


def _empty() -> dict[str, Any]:
    """没有执行任何代码块的结果。"""
    return {"blocks": [], "figures": {}, "metrics": {}, "files": {}, "inputs": {}, "isolation": ""}


def _readable(output: str) -> str:
    """faulthandler 的回溯：去掉引擎自己的栈帧，非 ASCII 路径从转义还原。"""
    lines = []
    for text in output.splitlines():
        if re.match(r'  File "(.*/zhixing/\w+\.py|<frozen runpy>)", line \d+ in ', text):
            continue
        if text.startswith('  File "'):
            text = re.sub(r"\\u([0-9a-f]{4})|\\U([0-9a-f]{8})", lambda m: chr(int(m[1] or m[2], 16)), text)
        lines.append(text)
    return "\n".join(lines)


def _last_line(output: str, file: str) -> int | None:
    """从回溯里找出本文件最靠近出事点的行号。"""
    found = re.search(rf'File "{re.escape(file)}", line (\d+)', output)
    return int(found[1]) if found else None


class Engine:
    """核对一批单元；zygote 可以跨多次调用常驻（``mkdocs serve``）。"""

    def __init__(
        self,
        root: Path,
        *,
        workers: int | None = None,
        cache: bool = True,
        executor: Executor | None = None,
        checkpoints: bool = False,
    ) -> None:
        self.root = root
        self.cache = Cache(root / ".cache" / "zhixing" / "results", root)
        self.use_cache, self.checkpoints = cache, checkpoints
        self.workers = workers or (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
        self.executor = executor or ZygoteExecutor(root, self.workers)

    def job(self, unit: Unit, upstream: dict[str, dict[str, str]]) -> dict[str, Any]:
        blocks = [describe_block(block, unit) for block in unit.blocks]
        return {
            "file": unit.file,
            "root": str(self.root),
            "checkpoints": self.checkpoints,
            "blocks": blocks,
            "imports": heavy_imports(map(_python_of, blocks), self.root),
            "example": unit.kind == "example",
            "threads": unit.threads,
            "inputs": upstream,
        }

    def unit_key(self, unit: Unit) -> str:
        # 位置只用于报错；时限放宽或收紧都不改变已经跑完的结果
        harmless = ("file", "line", "timeout")
        described = [describe_block(block, unit) for block in unit.blocks]
        content = [{k: v for k, v in b.items() if k not in harmless} for b in described]
        return key([unit.file, content, unit.needs, unit.threads])

    def recall(self, unit: Unit, upstream: dict[str, dict[str, str]]) -> tuple[dict[str, Any] | None, str]:
        """``(缓存的结果或 None, 为什么)``。

        Args:
            upstream: 上游示例 → 产物名 → sha256，此刻的。
        """
        payload, why = self.cache.load(unit.file, self.unit_key(unit))
        if payload is None:
            return None, why
        if any(r["seconds"] >= b.timeout for b, r in zip(unit.blocks, payload["blocks"])):
            return None, "时限收紧到上次的耗时以下"
        for name, digest in payload["inputs"].items():
            example, _, file = name.partition("/")
            if upstream.get(example, {}).get(file) != digest:
                return None, f"上游 {example} 的产物 {file} 变了"
        for name, digest in payload["files"].items():
            if not files.intact(self.root, digest):
                return None, f"产物文件 {name} 丢了或损坏"
        return payload, why

    def explain(self, units: list[Unit]) -> dict[str, tuple[str, str]]:
        """每个单元 ``(会不会重跑, 为什么)``，不执行任何代码。"""
        told: dict[str, tuple[str, str]] = {}
        products: dict[str, dict[str, str]] = {}
        todo = {unit.file: unit for unit in units}
        while todo:
            waiting = {_example_of(u) for u in todo.values()} - {None}
            ready = [u for u in todo.values() if not waiting & set(u.needs)] or list(todo.values())
            for unit in ready:
                del todo[unit.file]
                stale = [need for need in unit.needs if need not in products]
                payload, why = self.recall(unit, products)
                if stale and self.cache.load(unit.file, self.unit_key(unit))[0]:
                    told[unit.file] = "不一定", f"上游 {'、'.join(stale)} 要先重跑，产物变了它才跟着重跑"
                    continue
                if payload and unit.kind == "example":
                    products[_example_of(unit)] = payload["files"]
                told[unit.file] = "不用重跑" if payload else "会重跑", why
        return told

    def check(self, units: list[Unit], progress: Callable[[Outcome], None] = lambda _: None) -> list[Outcome]:
        """执行（或取缓存）并核对；返回顺序与输入一致。

        上游都成功的单元才交出去；上游失败或不存在的不执行，记一条 E603。
        """
        outcomes: dict[str, Outcome] = {}
        todo = {unit.file: unit for unit in units}
        examples = {_example_of(unit): unit.file for unit in units}
        waiting: dict[Future, _Running] = {}
        done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        stored = False
        while todo or waiting:
            for unit in self._ready(todo, examples, outcomes):
                broken = [need for need in unit.needs if need not in examples or outcomes[examples[need]].problems]
                if broken:
                    outcomes[unit.file] = _blocked(unit, f"因上游 {'、'.join(broken)} 没有成功而未执行")
                    progress(outcomes[unit.file])
                    continue
                upstream = {need: outcomes[examples[need]].payload["files"] for need in unit.needs}
                payload, why = self.recall(unit, upstream) if self.use_cache else (None, "没有使用缓存")
                if payload is None and unit.blocks:
                    future, running = self._submit(unit, upstream, why)
                    waiting[future] = running
                    future.add_done_callback(done.put)
                else:
                    outcomes[unit.file] = self._finish(unit, payload or _empty(), True, why, upstream, progress)
            if waiting:
                future = done.get()
                running = waiting.pop(future)
                outcomes[running.unit.file], kept = self._receive(future, running, progress)
                stored |= kept
            else:
                for unit in todo.values():  # 剩下的互相等着
                    outcomes[unit.file] = _blocked(unit, f"needs 成环（{'、'.join(unit.needs)}），未执行")
                    progress(outcomes[unit.file])
                todo.clear()
        if stored:
            files.sweep(self.root, self.cache.directory)
        return [outcomes[unit.file] for unit in units]

    @staticmethod
    def _ready(todo: dict[str, Unit], examples: dict[str | None, str], outcomes: dict[str, Outcome]) -> Iterable[Unit]:
        """从 ``todo`` 里逐个取出上游都有了结论的单元；取的途中又有了结论的，跟着取出。"""
        found = True
        while found:
            found = False
            for unit in list(todo.values()):
                if all(need not in examples or examples[need] in outcomes for need in unit.needs):
                    found = True
                    yield todo.pop(unit.file)

    def _submit(self, unit: Unit, upstream: dict[str, dict[str, str]], why: str) -> tuple[Future, _Running]:
        unit_key = self.unit_key(unit)
        scratch = files.Scratch(self.root, key([unit_key, upstream])) if unit.kind == "example" else None
        job = self.job(unit, upstream) | {"scratch": str(scratch.path) if scratch and scratch.path else None}
        return self.executor.submit(execute_job, job), _Running(unit, job, unit_key, why, upstream, scratch)

    def _receive(
        self, future: Future, running: _Running, progress: Callable[[Outcome], None]
    ) -> tuple[Outcome, bool]:
        """收下一个作业的结果；返回 ``(结论, 有没有存进缓存)``。"""
        unit = running.unit
        try:
            payload = future.result()
        except Exception as error:  # 执行后端没了：OOM 杀掉了 zygote，或集群的 worker 一再丢失
            payload = _lost(running.job, 0, "R305", type(error).__name__, str(error).split("\n")[0])
        outcome = self._finish(unit, payload, False, running.why, running.upstream, progress)
        executed = len(payload["blocks"]) == len(unit.blocks)
        # 期望输出与图由 verify 现判，不算执行失败；块自己报的错误除了声明过的都算
        failed = any(p.code not in ("R302", "R307") for p in outcome.problems) or any(
            result["error"] and not block.raises for block, result in zip(unit.blocks, payload["blocks"])
        )
        success = executed and not failed
        if success:
            self.cache.store(unit.file, running.key, payload, payload.pop("deps"), payload.pop("modules"))
        if running.scratch:
            running.scratch.close(success)
        return outcome, success and bool(payload["files"])

    def _finish(
        self,
        unit: Unit,
        payload: dict[str, Any],
        cached: bool,
        why: str,
        upstream: dict[str, dict[str, str]],
        progress: Callable[[Outcome], None],
    ) -> Outcome:
        outcome = Outcome(unit, payload, cached, why, upstream)
        pairs = list(zip(unit.blocks, payload["blocks"], strict=False))
        for block, result in pairs[-1:] if payload.get("truncated") else pairs:
            outcome.problems += verify(block, result, figures_declared=unit.kind == "page")
        progress(outcome)
        return outcome

    def close(self) -> None:
        self.executor.shutdown()


@dataclass
class _Running:
    """交出去、还没回来的一个单元。"""

    unit: Unit
    job: dict[str, Any]
    key: str
    why: str
    upstream: dict[str, dict[str, str]]
    scratch: files.Scratch | None


def _example_of(unit: Unit) -> str | None:
    return Path(unit.file).stem if unit.kind == "example" else None


def _blocked(unit: Unit, reason: str) -> Outcome:
    return Outcome(unit, _empty(), False, reason, problems=[Problem(unit.file, unit.needs_line, "E603", reason)])
