"""只做 import 的单线程进程：每一页 fork 一个子进程，免去反复 import torch 的两秒。

协议：标准输入一行一个 JSON 作业，标准输出一行一个 JSON 事件；标准输入关闭（父进程收工或死了）
就杀掉还在跑的、退出。
它绝不执行任何算子——在多线程 OpenMP 之后 fork，子进程会永远挂住。
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import json
import os
import select
import selectors
import signal
import sys
import time
from typing import Any

from zhixing import runner
from zhixing.checkpoint import Shelf

# import 的重量，决定预载与调度的先后
HEAVY = {"numpy": 1, "matplotlib": 2, "torch": 4}
GATHER = 0.03  # 这么多秒没有新作业，就算到齐了
GRACE = 4.0  # 子进程自己的看门狗没能停下它时，再等这么久就杀


def preload(module: str) -> None:
    """import 一个重模块，并付清它第一次使用时的一次性开销。"""
    try:
        importlib.import_module(module)
    except ImportError:
        return  # 没有装：用到它的那一块会报，别的页照跑
    if module == "numpy":
        importlib.import_module("numpy.random")  # 惰性的；每页开头都要给它定种子
    if module == "matplotlib":
        from matplotlib import pyplot as plt

        from zhixing import figures

        figures.apply_style()
        fig, ax = plt.subplots()  # 字体缓存、Agg 画布
        ax.set_title("预热")
        fig.savefig(io.StringIO(), format="svg")
        plt.close(fig)
    if module == "torch":
        importlib.import_module("torch._dynamo")  # 首个优化器会惰性 import 它：0.7 秒
        torch = importlib.import_module("torch")
        torch.set_num_threads(1)
        torch.manual_seed(0)  # 连同加速器；页进程里只需再定一次 CPU 的


class Child:
    """一个正在跑的页进程与它的三个文件。"""

    def __init__(self, job: dict[str, Any], shelf: Shelf) -> None:
        self.job = job
        base = job["spool"]
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self.progress, self.output, result = (
            os.open(f"{base}.{kind}", flags | extra, 0o600)
            for kind, extra in (("progress", os.O_APPEND), ("out", os.O_APPEND), ("json", 0))
        )
        fds = (self.progress, self.output, result)
        self.pid = shelf.resume(job, fds) or self._fork(fds)
        os.close(result)

    def _fork(self, fds: tuple[int, int, int]) -> int:
        if sys.platform == "linux":
            threads = len(os.listdir("/proc/self/task"))
            if threads != 1:
                raise RuntimeError(f"fork 之前应只有一个线程，现有 {threads} 个")
        gc.freeze()  # 现有对象移出回收范围：子进程回收时不去碰它们，也就不复制那些页
        pid = os.fork()
        if pid == 0:
            try:
                gc.enable()
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                runner.run(self.job, *fds)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(70)
        return pid

    def overdue(self) -> bool:
        _, deadline = self.position()
        return deadline is not None and time.monotonic() > deadline + GRACE

    def position(self) -> tuple[int, float | None]:
        """``(正在跑的块序号, 截止时刻)``；还没开始第一块时是 ``(-1, None)``。"""
        tail = os.pread(self.progress, 1 << 16, max(0, os.fstat(self.progress).st_size - 4096)).decode()
        if not tail:
            return -1, None
        k, deadline = tail.rstrip("\n").rpartition("\n")[2].split()
        return int(k), float(deadline)

    def kill_group(self) -> None:
        """杀掉它的进程组（它一开始就 setsid，组号等于进程号）。"""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        os.close(self.progress)
        os.close(self.output)


class Zygote:
    """调度循环：读作业，按需预载，fork，收尸，报告。"""

    def __init__(self, events: int, slots: int) -> None:
        self.events, self.slots = events, slots
        self.loaded: set[str] = set()
        self.pending: list[dict[str, Any]] = []
        self.shelf = Shelf()
        self.running: dict[int, Child | None] = {}  # None：分出去跑轻作业的分身
        self.busy: dict[int, int] = {}  # 进程号 -> 占几个执行槽
        self.turn: int | None = None  # 最近一个分身退出时关闭的管道

    def emit(self, **event: Any) -> None:
        try:
            # 一行短于 PIPE_BUF，多个进程同写也不会交错
            os.write(self.events, (json.dumps(event) + "\n").encode())
        except BrokenPipeError:
            pass  # 父进程死了；标准输入随即关闭，主循环会收场

    def missing(self) -> set[str]:
        """手里的作业要用、还没有 import 的重模块。"""
        return {m for job in self.pending for m in job["imports"]} - self.loaded

    def doubled(self) -> int:
        """分身占几个执行槽：它们一个接一个地跑，只算占得最多的那个。"""
        return max((self.busy[pid] for pid, child in self.running.items() if child is None), default=0)

    def free(self) -> int:
        pages = sum(self.busy[pid] for pid, child in self.running.items() if child is not None)
        return self.slots - pages - self.doubled()

    def schedule(self) -> None:
        self.pending.sort(key=lambda job: sum(HEAVY[m] for m in job["imports"]))
        while self.pending and (free := self.free()) > 0:
            missing = self.missing()
            if not missing:
                size = min(self.pending[0]["threads"], self.slots)
                if size > free:
                    return  # 排在最前的多线程作业等够槽位，后面的不插队，免得它一直等
                child = Child(self.pending.pop(0), self.shelf)
                self.running[child.pid], self.busy[child.pid] = child, size
                continue
            module = min(missing, key=HEAVY.__getitem__)  # 由轻到重：先到手的先有人用
            ready = [job for job in self.pending if self.loaded.issuperset(job["imports"]) and job["threads"] == 1]
            if ready and (share := self.doubled() or free - 1) > 0:
                # 不用再等的作业交给分身去跑，自己同时 import：torch 的几秒是最长的一段
                self.delegate(ready, min(share, len(ready)))
                self.pending = [job for job in self.pending if job not in ready]
            preload(module)
            self.loaded.add(module)

    def delegate(self, jobs: list[dict[str, Any]], slots: int) -> None:
        """fork 一个分身跑完这些作业；已有分身时排在它后面，同时跑的页数不超过执行槽。"""
        gc.freeze()
        read, write = os.pipe()  # 分身（连同它的页）都退出，读端就关闭
        pid = os.fork()
        if pid:
            os.close(write)
            if self.turn is not None:
                os.close(self.turn)
            self.turn = read
            self.running[pid], self.busy[pid] = None, slots
            return
        try:
            os.close(read)
            _become_subreaper()
            if self.turn is not None:
                os.read(self.turn, 1)
                os.close(self.turn)
            double = Zygote(self.events, slots)
            double.loaded = self.loaded
            double.pending = [job | {"checkpoints": False} for job in jobs]  # 分身一走，检查点就没人认领了
            double.drain()
        finally:
            os._exit(0)

    def drain(self) -> None:
        """跑完手里的作业。"""
        wake = _wake_on_child_exit()
        while self.pending or self.running:
            self.schedule()
            if select.select([wake], [], [], 0.25)[0]:
                os.read(wake, 4096)
            self.reap()

    def reap(self) -> None:
        for pid, child in list(self.running.items()):
            if child is not None and child.overdue():
                child.kill_group()
                os.kill(pid, signal.SIGKILL)  # 万一它还没来得及 setsid
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            del self.running[pid], self.busy[pid]
            if child is None:
                continue
            child.kill_group()  # 它留在后台的子进程
            self.shelf.collect(child.job)
            _reap_orphans(set(self.running) | self.shelf.pids())
            k, deadline = child.position()
            late = deadline is not None and time.monotonic() > deadline
            self.emit(id=child.job["id"], status=os.waitstatus_to_exitcode(status), block=k, late=late)
            child.close()


def _reap_orphans(keep: set[int]) -> None:
    """杀掉过继到我们名下的孙进程（它们用 setsid 逃出了进程组）。"""
    if sys.platform != "linux":
        return
    for _ in range(100):  # 杀掉一个，它的子进程又会过继过来
        strays = _children() - keep
        if not strays:
            return
        for pid in strays:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except OSError:
                continue


def _become_subreaper() -> None:
    """死掉的页留下的孤儿过继给我们；这个身份 fork 时不继承，分身要自己再要一次。"""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _children() -> set[int]:
    me = os.getpid()
    try:
        with open(f"/proc/self/task/{me}/children") as f:
            return set(map(int, f.read().split()))
    except OSError:  # 内核没有编入这个接口：扫一遍全部进程
        found = set()
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{entry}/stat", "rb") as f:
                    if int(f.read().rpartition(b")")[2].split()[1]) == me:
                        found.add(int(entry))
            except (OSError, IndexError):
                continue
        return found


def _wake_on_child_exit() -> int:
    """一个文件描述符：有子进程退出时变得可读。"""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    return read


def main() -> None:
    gc.disable()  # import 只增不减，回收白费力气（torch 慢四分之一）；页进程里再打开
    events = os.dup(1)
    os.dup2(2, 1)
    os.set_inheritable(events, False)
    os.set_blocking(0, False)
    _become_subreaper()
    zygote = Zygote(events, int(sys.argv[1]))
    wake = _wake_on_child_exit()
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(wake, selectors.EVENT_READ)
    buffer, closed, gathering = b"", False, False
    while not closed:
        ready = selector.select(timeout=GATHER if gathering else 0.25 if zygote.running else None)
        gathering = False
        for key, _ in ready:
            if key.fd == wake:
                os.read(wake, 4096)
                continue
            data = os.read(0, 1 << 20)
            if not data:
                closed = True
                selector.unregister(0)
                break
            *lines, buffer = (buffer + data).split(b"\n")
            zygote.pending += map(json.loads, lines)
            gathering = bool(zygote.missing())  # import 时听不见新作业：先等一批到齐
        zygote.reap()
        if not closed and not gathering:
            zygote.schedule()
    zygote.shelf.clear()
    for pid, child in zygote.running.items():
        if child is not None:
            child.kill_group()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    _reap_orphans(set())  # 分身名下的页进程，此刻都过继过来了


if __name__ == "__main__":
    main()
