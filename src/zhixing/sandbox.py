"""子进程的围栏：没有网络（只留回环）、项目目录只读、内存与文件大小有上限。

隔离靠 Linux 的命名空间；没有权限或不是 Linux 时退到 Python 的审计钩子，
:func:`enter` 如实返回用上了哪些，验证报告里会写出来。
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import socket
import struct
import sys

MAX_FILE = 256 << 20  # 单个文件（含被截获的标准输出）的上限

_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: object) -> None:
    if getattr(_libc, name)(*args) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{name}: {os.strerror(errno)}")


def _unshare() -> None:
    uid, gid = os.getuid(), os.getgid()
    flags = _CLONE_NEWNET | _CLONE_NEWNS
    if uid == 0:
        _call("unshare", flags)
        return
    _call("unshare", flags | _CLONE_NEWUSER)
    for path, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{path}", "w") as f:
            f.write(text)


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        request = struct.pack("16sh", b"lo", 0x1 | 0x40)  # IFF_UP | IFF_RUNNING
        fcntl.ioctl(s, 0x8914, request)  # SIOCSIFFLAGS


def _read_only(root: str, writable: str | None) -> None:
    path = os.fsencode(root)
    _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    _call("mount", path, path, None, _MS_BIND | _MS_REC, None)
    if writable:  # 先单独挂一份：下面改成只读的只有项目目录那一层
        hole = os.fsencode(writable)
        _call("mount", hole, hole, None, _MS_BIND, None)
    locked = os.statvfs(root).f_flag & (2 | 4 | 8 | 1024 | 2048)  # nosuid、nodev 等不许去掉
    _call("mount", None, path, None, _MS_BIND | _MS_REMOUNT | _MS_RDONLY | _MS_REC | locked, None)


def _audit(root: str, writable: str | None = None) -> None:
    root = os.path.join(root, "")
    hole = os.path.join(writable, "") if writable else "\0"
    changes = {f"os.{name}" for name in ("remove", "rename", "rmdir", "mkdir", "link", "symlink", "truncate", "chmod")}

    def hook(event: str, args: tuple) -> None:
        if event == "socket.connect" and args[0].family != socket.AF_UNIX:
            host = args[1][0] if isinstance(args[1], tuple) else ""
            if not (host == "::1" or host.startswith("127.") or host == "localhost"):
                raise PermissionError("代码块里没有网络")
        elif event in changes or event == "open" and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            for path in args[:2]:
                if not isinstance(path, str | bytes):
                    continue
                full = os.path.abspath(os.fsdecode(path))
                if full.startswith(root) and not full.startswith(hole):
                    raise PermissionError(f"代码块不能写项目目录：{os.fsdecode(path)}")

    sys.addaudithook(hook)


def enter(root: str, writable: str | None = None) -> str:
    """让当前进程（单线程，刚 fork 出来）进入围栏。

    Args:
        root: 项目目录，变成只读。
        writable: 项目目录里唯一可写的子目录（断点目录）。

    Returns:
        ``"namespace"``（内核隔离）或 ``"audit"``（只有 Python 层的检查）。
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE, MAX_FILE))
    try:
        _unshare()
        _loopback_up()
        _read_only(root, writable)
        return "namespace"
    except (OSError, AttributeError):  # AttributeError：不是 Linux，libc 没有 unshare
        _audit(root, writable)
        return "audit"


def limit_memory(nbytes: int) -> None:
    """数据段（含匿名映射）的上限；超过时分配失败，Python 抛 MemoryError。"""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (nbytes, hard))
