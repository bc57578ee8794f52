"""离线包：建好的离线站点压成一个 zip，解开后双击 index.html。"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

EPOCH = (1980, 1, 1, 0, 0, 0)  # zip 能记的最早时刻：同样的站点压出同样的字节


def pack(site: Path, target: Path) -> int:
    """把 ``site`` 压成 ``target``，包里只有一个与它同名的目录；返回文件数。先写临时文件再改名。

    Raises:
        FileNotFoundError: 站点还没有建，或不是离线版。
    """
    if not (site / "search" / "search_index.js").is_file():
        raise FileNotFoundError(f"{site} 里没有离线版的站点：先运行 make offline")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    unread = {".map", ".gz"}  # 调试用的源码映射、网站地图：从磁盘打开时用不到
    files = sorted(p for p in site.rglob("*") if p.is_file() and p.suffix not in unread)
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as package:
            for path in files:
                info = zipfile.ZipInfo(f"{target.stem}/{path.relative_to(site).as_posix()}", EPOCH)
                info.compress_type = zipfile.ZIP_DEFLATED
                info.external_attr = 0o644 << 16
                package.writestr(info, path.read_bytes(), compresslevel=9)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return len(files)


if __name__ == "__main__":
    import sys

    source, package = map(Path, sys.argv[1:])
    try:
        count = pack(source, package)
    except FileNotFoundError as error:
        sys.exit(str(error))
    print(f"{package}：{count} 个文件，{package.stat().st_size / 1e6:.1f} MB")
