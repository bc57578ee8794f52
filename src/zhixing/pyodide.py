"""浏览器里的 Python：把锁定版本的 Pyodide（npm 包）压好放进站点，读者点“运行”才下载。

只取运行标准库代码必需的四个文件，各自 gzip（不指望托管服务会压缩 wasm）。``file://`` 下浏览器
不让脚本读文件，离线包里改成能用 ``<script>`` 载入的写法：base64 包在一次函数调用里，大三分之一。
"""

from __future__ import annotations

import base64
import gzip
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zhixing.cache import write_atomic

FILES = ("pyodide.mjs", "pyodide.asm.mjs", "pyodide.asm.wasm", "python_stdlib.zip")
TIME_LIMIT = 10  # 读者的代码最多跑几秒

_NOTICE = """\
本目录的文件来自 npm 包 pyodide {version}，内容未经修改，只是逐个用 gzip 压缩{wrapped}。

Pyodide：Mozilla Public License 2.0（https://www.mozilla.org/MPL/2.0/）
  源代码：https://github.com/pyodide/pyodide/tree/{version}
其中的 CPython {python}：Python Software Foundation License Version 2
  （https://docs.python.org/3/license.html），Copyright (c) Python Software Foundation
Pyodide 编译进去的其他库（zlib、libffi、sqlite 等）的许可证见它的源代码。
"""


@dataclass(frozen=True)
class Packed:
    """压好的一份 Pyodide。"""

    version: str
    python: str
    lock: str
    assets: dict[str, Path]  # 站内路径 -> 文件
    urls: dict[str, str]  # 文件名 -> 站内路径
    nbytes: int  # 读者要下载多少

    def settings(self) -> dict[str, Any]:
        """写进练习页、给 ``practice.js`` 用的设置。"""
        return {
            "pyodide": self.version,
            "python": self.python,
            "built": platform.python_version(),
            "lock": self.lock,
            "judge": (Path(__file__).parent / "judge.py").read_text("utf-8"),
            "files": self.urls,
            "bytes": self.nbytes,
            "limit": TIME_LIMIT,
        }


def pack(package: Path, cache: Path, offline: bool) -> Packed:
    """压好（或取上次压好的）``package`` 里的文件。

    Args:
        package: ``node_modules/pyodide``。
        cache: 放压好的文件的目录。
        offline: 压成 ``file://`` 下也能载入的写法。

    Raises:
        FileNotFoundError: 还没安装。
    """
    try:
        version = json.loads((package / "package.json").read_text("utf-8"))["version"]
        info = json.loads((package / "pyodide-lock.json").read_text("utf-8"))["info"]
    except FileNotFoundError:
        raise FileNotFoundError("缺少前端资产 pyodide：先运行 make assets") from None
    target = cache / version
    assets, urls, nbytes = {}, {}, 0
    for name in FILES:
        path = target / f"{name}.gz"
        if not path.is_file():
            write_atomic(path, gzip.compress((package / name).read_bytes(), 9, mtime=0))
        nbytes += path.stat().st_size
        if offline:
            path = _as_script(path, name)
        urls[name] = f"assets/pyodide/{version}/{path.name}"
        assets[urls[name]] = path
    wrapped = "、转成 base64" if offline else ""
    notice = target / f"LICENSE{'-offline' if offline else ''}.txt"
    write_atomic(notice, _NOTICE.format(version=version, python=info["python"], wrapped=wrapped))
    assets[f"assets/pyodide/{version}/LICENSE.txt"] = notice
    # 别的包一概不提供：import 它们时直接说没有
    return Packed(version, info["python"], json.dumps({"info": info, "packages": {}}), assets, urls, nbytes)


def _as_script(path: Path, name: str) -> Path:
    script = path.with_suffix(".gz.js")
    if not script.is_file():
        text = base64.b64encode(path.read_bytes()).decode()
        write_atomic(script, f"zhixing.receive({json.dumps(name)}, {json.dumps(text)})\n")
    return script
