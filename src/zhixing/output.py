"""产物文件怎样落盘：先写旁边的临时文件再改名；zip 同样的内容压出同样的字节。"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

_EPOCH = (1980, 1, 1, 0, 0, 0)  # zip 能记的最早时刻


def publish(output: Path, write: Callable[[Path], object]) -> None:
    """``write`` 写临时文件，写完才改名成 ``output``：失败或被杀都不留下半个文件，已有的不动。"""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def write_zip(output: Path, entries: Iterable[tuple[str, str | bytes]], stored: str = "") -> None:
    """写一个可复现的 zip。

    Args:
        entries: ``(包内路径, 内容)``，照这个次序写。
        stored: 这一个不压缩（EPUB 的 ``mimetype``）。
    """

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries:
                info = zipfile.ZipInfo(name, _EPOCH)
                info.external_attr = 0o644 << 16
                kind = zipfile.ZIP_STORED if name == stored else zipfile.ZIP_DEFLATED
                archive.writestr(info, data, kind, None if name == stored else 9)

    publish(output, write)
