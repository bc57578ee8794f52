"""执行后端：把一个作业交给本机的 zygote 或集群的 worker，收回它留下的结果。"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from zhixing import files

# 子进程只看得到这些环境变量：令牌、代理、主机名之类一概不进去
_PASS_THROUGH = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "SYSTEMROOT")


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
        # glibc 的堆用大页：张量反复分配时缺页少一个数量级，torch 的代码快一成上下
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }


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
            return lost(job, len(job["blocks"]) - 1, "R309", type(error).__name__, str(error))
        return payload
    status = event["status"]
    if event["late"]:
        timeout = job["blocks"][max(event["block"], 0)]["timeout"]
        return lost(job, event["block"], "R304", "Timeout", f"超过 {timeout:g} 秒，已强行结束", output)
    death = f"信号 {-status}" if status < 0 else f"退出码 {status}"
    return lost(job, event["block"], "R305", "Died", f"进程意外结束（{death}）", output)


def lost(job: dict[str, Any], k: int, code: str, kind: str, message: str, output: str = "") -> dict[str, Any]:
    """第 ``k`` 块时没了的一页：只有这一块的错误，别的块无从核对。"""
    k = max(k, 0)
    block = job["blocks"][k]
    detail = _readable(output)
    line = _last_line(detail, block["file"]) or block["line"]
    error = {"code": code, "type": kind, "message": message, "file": block["file"], "line": line, "detail": detail}
    blocks = [{"out": "", "error": None, "seconds": 0.0, "figs": []} for _ in range(k)]
    blocks.append({"out": "", "error": error, "seconds": 0.0, "figs": []})
    return empty() | {"blocks": blocks, "deps": {}, "truncated": True}


def empty() -> dict[str, Any]:
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
