"""检查点：长页面只改后面一块时，前面的块不重跑（只在 ``mkdocs serve`` 里用，只在 Linux 上）。

页进程跑过一段耗时的前缀之后 fork 一份停在那里等。下一次同一页来作业、前缀一字未改且读过的
文件都没变，就从那份现场继续。现场是真的进程状态：模型、随机数、打开的图都在。
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zhixing.cache import file_hash

WORTH = 0.2  # 距上一个检查点不到这么多秒就不留
MOST_PER_PAGE = 6
MOST_PAGES = 3

# 块的这些字段（含位置：函数的回溯行号要对）都没变，前缀才算没变
_IDENTITY = ("lang", "source", "raises", "practice", "solution", "file", "line", "memory")


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[name] == b[name] for name in _IDENTITY)


# ---- 页进程一侧 ----


def leave(spool: str, k: int, page: Any) -> Any:
    """在第 ``k`` 块之前留下一份现场。

    Returns:
        原进程里立即返回 None；被唤醒的现场里返回 ``(新作业, progress, output, result)``。
    """
    ready, signal_ready = os.pipe()
    spawned = page.spawned
    pid = os.fork()
    if pid:
        os.close(signal_ready)
        os.read(ready, 1)  # 等它的套接字绑好，免得我们先退出、它成了没人认领的孤儿
        os.close(ready)
        return None
    os.close(ready)
    os.setsid()
    page.spawned = spawned  # 留现场的 fork 不算页里起的子进程
    hashes = {path: file_hash(Path(page.root) / path) for path in page.dependencies()}
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{spool}.at-{k}-{os.getpid()}")
    server.listen()
    os.write(signal_ready, b"1")
    os.close(signal_ready)
    server.settimeout(2)
    while True:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            if os.getppid() == 1:  # zygote 被 SIGKILL，没人会再来了
                os._exit(0)
            continue
        connection.settimeout(None)
        with connection:
            message, fds = _receive(connection)
            if any(file_hash(Path(page.root) / path) != digest for path, digest in hashes.items()):
                connection.sendall(b"0")
                os._exit(0)
            reply, tell = os.pipe()
            middle = os.fork()
            if middle == 0:
                middle = os.getpid()
                worker = os.fork()
                if worker == 0:
                    os.setsid()
                    while os.getppid() == middle:  # 过继之后才能说“父进程死我也死”
                        time.sleep(0.0002)
                    return message, *fds
                os.write(tell, str(worker).encode())
                os._exit(0)
            # 中间进程退出之后，工作进程才过继给 zygote，这时才能告诉它进程号
            os.waitpid(middle, 0)
            connection.sendall(os.read(reply, 32))
            for fd in (reply, tell, *fds):
                os.close(fd)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    fds = array.array("i")
    data, ancillary, _, _ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(3 * fds.itemsize))
    for _, _, payload in ancillary:
        fds.frombytes(payload)
    while not data.endswith(b"\n"):
        data += connection.recv(1 << 16)
    return json.loads(data), list(fds)


# ---- zygote 一侧 ----


@dataclass
class _Saved:
    k: int
    pid: int
    path: str
    blocks: list[dict[str, Any]]
    inputs: dict[str, dict[str, str]]  # 那时的上游产物

    def kill(self) -> None:
        for action in (lambda: os.kill(self.pid, signal.SIGKILL), lambda: os.waitpid(self.pid, 0), lambda: os.unlink(self.path)):
            try:
                action()
            except OSError:
                pass


class Shelf:
    """zygote 手里的检查点，按页存放，只留最近用过的几页。"""

    def __init__(self) -> None:
        self.pages: dict[str, list[_Saved]] = {}

    def pids(self) -> set[int]:
        return {saved.pid for page in self.pages.values() for saved in page}

    def collect(self, job: dict[str, Any]) -> None:
        """登记一个作业留下的检查点。"""
        base = Path(job["spool"])
        found = []
        for path in base.parent.glob(f"{base.name}.at-*"):
            k, pid = map(int, path.name.rpartition(".at-")[2].split("-"))
            found.append(_Saved(k, pid, str(path), job["blocks"], job["inputs"]))
        if not found:
            return
        page = self.pages.pop(job["file"], []) + found
        self.pages[job["file"]] = sorted(page, key=lambda saved: saved.k)
        while len(self.pages) > MOST_PAGES:
            self.drop(next(iter(self.pages)))

    def drop(self, file: str) -> None:
        for saved in self.pages.pop(file, []):
            saved.kill()

    def resume(self, job: dict[str, Any], fds: tuple[int, int, int]) -> int | None:
        """从能用的最后一个检查点继续；返回工作进程号，没有能用的返回 None。"""
        page = self.pages.pop(job["file"], [])
        usable = []
        for saved in page:
            same = saved.k <= len(job["blocks"]) and all(map(_same, saved.blocks[: saved.k], job["blocks"]))
            same = same and saved.inputs == job["inputs"]
            usable.append(saved) if same else saved.kill()
        while usable:
            saved = usable[-1]
            pid = self._wake(saved, job, fds)
            if pid:
                for other in usable:
                    other.blocks = job["blocks"]
                self.pages[job["file"]] = usable
                return pid
            usable.pop().kill()
        return None

    @staticmethod
    def _wake(saved: _Saved, job: dict[str, Any], fds: tuple[int, int, int]) -> int | None:
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(5)
                client.connect(saved.path)
                data = (json.dumps(job) + "\n").encode()
                sent = client.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
                if sent < len(data):  # 对面可能已经答完并关了连接：空的 sendall 也会 EPIPE
                    client.sendall(data[sent:])
                return int(client.recv(32) or 0) or None
        except (OSError, ValueError):
            return None

    def clear(self) -> None:
        for file in list(self.pages):
            self.drop(file)
