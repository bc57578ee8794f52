"""执行：挑出要跑的文件，交给 zygote，收结果，核对，写缓存。"""

from __future__ import annotations

import ast
import json
import os
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


@dataclass
class Outcome:
    """一个单元的执行结果。"""

    unit: Unit
    payload: dict[str, Any]  # blocks figures metrics isolation
    cached: bool
    why: str
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
    return {"blocks": blocks, "deps": {}, "figures": {}, "metrics": {}, "isolation": "", "truncated": True}


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

    def job(self, unit: Unit) -> dict[str, Any]:
        blocks = [describe_block(block, unit) for block in unit.blocks]
        return {
            "file": unit.file,
            "root": str(self.root),
            "checkpoints": self.checkpoints,
            "blocks": blocks,
            "needs": heavy_imports(map(_python_of, blocks), self.root),
        }

    def unit_key(self, unit: Unit) -> str:
        # 位置只用于报错；时限放宽或收紧都不改变已经跑完的结果
        harmless = ("file", "line", "timeout")
        described = [describe_block(block, unit) for block in unit.blocks]
        return key([unit.file, [{k: v for k, v in b.items() if k not in harmless} for b in described]])

    def recall(self, unit: Unit) -> tuple[dict[str, Any] | None, str]:
        """``(缓存的结果或 None, 为什么)``。"""
        payload, why = self.cache.load(unit.file, self.unit_key(unit))
        if payload and any(r["seconds"] >= b.timeout for b, r in zip(unit.blocks, payload["blocks"])):
            return None, "时限收紧到上次的耗时以下"
        return payload, why

    def check(self, units: list[Unit], progress: Callable[[Outcome], None] = lambda _: None) -> list[Outcome]:
        """执行（或取缓存）并核对；返回顺序与输入一致。"""
        outcomes: dict[str, Outcome] = {}
        waiting: dict[Future, tuple[Unit, dict[str, Any], str, str]] = {}
        for unit in units:
            unit_key = self.unit_key(unit)
            payload, why = self.recall(unit) if self.use_cache else (None, "没有使用缓存")
            if payload is None and unit.blocks:
                job = self.job(unit)
                waiting[self.executor.submit(execute_job, job)] = (unit, job, unit_key, why)
            else:
                payload = payload or {"blocks": [], "figures": {}, "metrics": {}, "isolation": ""}
                outcomes[unit.file] = self._finish(unit, payload, True, why, progress)
        from concurrent.futures import as_completed

        for future in as_completed(waiting):
            unit, job, unit_key, why = waiting[future]
            try:
                payload = future.result()
            except Exception as error:  # 执行后端没了：OOM 杀掉了 zygote，或集群的 worker 一再丢失
                payload = _lost(job, 0, "R305", type(error).__name__, str(error).split("\n")[0])
            outcome = self._finish(unit, payload, False, why, progress)
            executed = len(payload["blocks"]) == len(unit.blocks)
            # 期望输出与图由 verify 现判，不算执行失败；块自己报的错误除了声明过的都算
            failed = any(p.code not in ("R302", "R307") for p in outcome.problems) or any(
                result["error"] and not block.raises for block, result in zip(unit.blocks, payload["blocks"])
            )
            if executed and not failed:
                self.cache.store(unit.file, unit_key, payload, payload.pop("deps"))
            outcomes[unit.file] = outcome
        return [outcomes[unit.file] for unit in units]

    def _finish(
        self, unit: Unit, payload: dict[str, Any], cached: bool, why: str, progress: Callable[[Outcome], None]
    ) -> Outcome:
        outcome = Outcome(unit, payload, cached, why)
        pairs = list(zip(unit.blocks, payload["blocks"], strict=False))
        for block, result in pairs[-1:] if payload.get("truncated") else pairs:
            outcome.problems += verify(block, result, figures_declared=unit.kind == "page")
        progress(outcome)
        return outcome

    def close(self) -> None:
        self.executor.shutdown()
