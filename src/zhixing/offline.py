"""离线包：建好的离线站点压成一个 zip，解开后双击 index.html。"""

from __future__ import annotations

from pathlib import Path

from zhixing.output import write_zip

_UNREAD = {".map", ".gz"}  # 调试用的源码映射、网站地图：从磁盘打开时用不到


def pack(site: Path, target: Path) -> int:
    """把 ``site`` 压成 ``target``，包里只有一个与它同名的目录；返回文件数。

    Raises:
        FileNotFoundError: 站点还没有建，或不是离线版。
    """
    if not (site / "search" / "search_index.js").is_file():
        raise FileNotFoundError(f"{site} 里没有离线版的站点：先运行 make offline")
    files = sorted(p for p in site.rglob("*") if p.is_file() and p.suffix not in _UNREAD)
    write_zip(target, ((f"{target.stem}/{p.relative_to(site).as_posix()}", p.read_bytes()) for p in files))
    return len(files)


if __name__ == "__main__":
    import sys

    source, package = map(Path, sys.argv[1:])
    try:
        count = pack(source, package)
    except FileNotFoundError as error:
        sys.exit(str(error))
    print(f"{package}：{count} 个文件，{package.stat().st_size / 1e6:.1f} MB")
