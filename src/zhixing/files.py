"""产物文件的仓库与断点目录：示例写出的文件按内容寻址收下，训练到一半的进度留到下次。

只在父进程一侧（提交作业、收结果的那边）用；示例里用的接口在 :mod:`zhixing.artifacts`。
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from zhixing.artifacts import FILE_NAME
from zhixing.cache import file_hash

KEEP_FILES = 24 * 3600.0  # 没有结果引用的产物文件留多久：别的构建可能刚收下、还没记账
KEEP_SCRATCH = 7 * 24 * 3600.0  # 没有做完的断点目录留多久


def store_path(root: Path) -> Path:
    """产物文件的仓库。"""
    return root / ".cache" / "zhixing" / "files"


def intact(root: Path, digest: str) -> bool:
    """仓库里有这份文件，而且逐字节没坏。"""
    return file_hash(store_path(root) / digest) == digest


def collect(root: Path, outputs: Path) -> dict[str, str]:
    """把 ``outputs`` 目录里的文件收进仓库，返回 名字 → sha256。

    原子（写到旁边再改名）、只读；已有一份坏的也会被换掉。

    Raises:
        ValueError: 目录里有不是普通文件的东西，或名字不合法。
        OSError: 写不进去。
    """
    found = {}
    for path in sorted(outputs.iterdir()) if outputs.is_dir() else []:
        if path.is_symlink() or not path.is_file() or not FILE_NAME.match(path.name):
            raise ValueError(f"产物 {path.name!r} 应是普通文件，名字见 zhixing.output_path")
        found[path.name] = _store(store_path(root), path)
    return found


def _store(directory: Path, source: Path) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{os.getpid()}.{time.monotonic_ns()}.tmp"
    digest = hashlib.sha256()
    try:
        with open(source, "rb") as read, open(temporary, "wb") as write:
            while chunk := read.read(1 << 20):
                digest.update(chunk)
                write.write(chunk)
        temporary.chmod(0o444)
        target = directory / digest.hexdigest()
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()


def sweep(root: Path, results: Path) -> None:
    """删掉没有任何结果引用的旧产物文件，与早就没人接着做的断点目录。"""
    now = time.time()
    used: set[str] = set()
    for path in results.glob("*.json"):
        try:
            used.update(json.loads(path.read_text("utf-8"))["payload"]["files"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # 坏了的结果不引用任何东西
    for path, keep in _aged(store_path(root), now):
        if path.name not in used and keep > KEEP_FILES:
            path.unlink(missing_ok=True)
    for path, keep in _aged(root / ".cache" / "zhixing" / "scratch", now):
        if keep > KEEP_SCRATCH:
            shutil.rmtree(path, ignore_errors=True)


def _aged(directory: Path, now: float) -> Iterable[tuple[Path, float]]:
    for path in directory.iterdir() if directory.is_dir() else []:
        try:
            yield path, now - path.stat().st_mtime
        except OSError:
            continue


class Scratch:
    """一个单元的断点目录；进程被杀时留着，下次同样的单元接着用。

    ``files/`` 是示例看到的目录，``read`` 记着开始用它之后依据了哪些项目文件（路径与哈希）：
    其中任何一个变了，里面的进度就不能再用，整个清掉。用不了时（另一个构建正占着，此时 :attr:`busy`；
    或者写不进去）:attr:`path` 为 None，示例得到一个用完就没的临时目录。
    """

    def __init__(self, root: Path, key: str) -> None:
        self.root = root
        self.busy = False
        self.path: Path | None = root / ".cache" / "zhixing" / "scratch" / key
        try:
            self._open()
        except OSError as error:  # 只读、磁盘满，或别人正占着：不影响结论
            self.busy = isinstance(error, BlockingIOError)
            self.path = None

    def _open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise
        if self._stale():
            shutil.rmtree(self.path / "files", ignore_errors=True)
            (self.path / "read").unlink(missing_ok=True)
        (self.path / "files").mkdir(exist_ok=True)

    def _stale(self) -> bool:
        try:
            lines = (self.path / "read").read_text("utf-8").splitlines()
        except FileNotFoundError:
            return True
        try:
            return any(file_hash(self.root / path) != digest for path, digest in map(json.loads, lines))
        except (ValueError, TypeError):  # 写到一半被杀
            return True

    def close(self, done: bool) -> None:
        """作业结束；做完了就删，没做完而且里面有东西就留着。"""
        if self.path is None:
            return
        if done or not any((self.path / "files").iterdir()):
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
