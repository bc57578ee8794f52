"""执行结果的缓存：每页一个文件，按内容寻址，原子改名；删掉缓存结果也一样。

键 = 代码与影响执行的选项 + Python、预载的包与引擎自身；另记执行时读过的项目文件的哈希、
import 过（或想 import 却没有）的包的版本，任何一个变了就不算命中。失败从不缓存。
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from zhixing.output import publish

_ENGINE_FILES = ("runner.py", "figures.py", "artifacts.py", "sandbox.py", "zygote.py", "execute.py", "judge.py")


def file_hash(path: Path) -> str | None:
    """文件内容的 SHA-256；不存在时为 None。"""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def stamp(path: Path | str) -> str:
    """文件此刻的样子；不存在时为空串。"""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_mtime_ns}:{status.st_size}"


# 每个页进程 fork 出来就带着的包（见 zygote.HEAVY）
_PRELOADED = ("torch", "numpy", "matplotlib")


@cache
def environment() -> str:
    """Python 版本、预载的包连同它们依赖的包、引擎自身的指纹。"""
    found: dict[str, str] = {}
    stack = list(_PRELOADED)
    while stack:
        name = re.sub(r"[-_.]+", "-", stack.pop()).lower()
        if name in found or (version := version_of(name)) is None:
            continue
        found[name] = version
        needs = re.findall(r"^Requires-Dist: *([\w.-]+)(.*)$", _header(name, _installed_at()) or "", re.M)
        stack += [need for need, rest in needs if "extra ==" not in rest]
    engine = [file_hash(Path(__file__).parent / name) for name in _ENGINE_FILES]
    return hashlib.sha256(json.dumps([sys.version, sorted(found.items()), engine]).encode()).hexdigest()


def version_of(distribution: str) -> str | None:
    found = re.search(r"^Version: *(.*)$", _header(distribution, _installed_at()) or "", re.M)
    return found and found[1]


@cache
def _header(distribution: str, installed_at: int) -> str | None:
    """发行包 METADATA 的头部；没有装是 None。不用 ``metadata.version``：它当邮件解析，三十几个包要几十毫秒。"""
    try:
        found = metadata.distribution(distribution)
        return (found.read_text("METADATA") or found.read_text("PKG-INFO") or "").partition("\n\n")[0]  # 后者是旧式的包
    except metadata.PackageNotFoundError:
        return None


def _installed_at() -> int:
    """装包目录最近一次增删的时刻。"""
    return os.stat(sysconfig.get_paths()["purelib"]).st_mtime_ns


@cache
def _installed() -> str:
    """装了的全部包的指纹。"""
    site = Path(sysconfig.get_paths()["purelib"])
    return hashlib.sha256("\n".join(sorted(p.name for p in site.glob("*.dist-info"))).encode()).hexdigest()


@cache
def _owners(installed_at: int) -> Mapping[str, list[str]]:
    """顶层模块名 → 提供它的发行包。逐包读清单要 0.15 秒，所以只在装包目录变了之后重读。"""
    return metadata.packages_distributions()


def packages_of(modules: Iterable[str]) -> dict[str, dict[str, str]]:
    """顶层模块名 → 提供它的发行包与版本；没有装的是空的。``*`` 是装了的全部。"""
    modules = set(modules)
    if "*" in modules:
        return {"*": {"": _installed()}}
    if not modules:
        return {}
    owners = _owners(_installed_at())
    return {name: {d: metadata.version(d) for d in owners.get(name, ())} for name in sorted(modules)}


def _changed(packages: dict[str, dict[str, str]]) -> str | None:
    """哪个模块的包变了：版本不同、没有了，或原来没有而现在有了。"""
    for module, owners in packages.items():
        if module == "*":
            return None if owners[""] == _installed() else "（装了的全部）"
        if not owners and importlib.util.find_spec(module) is not None:
            return module
        if any(version_of(name) != version for name, version in owners.items()):
            return module
    return None


def key(content: Any) -> str:
    """可 JSON 化的内容连同环境的键。"""
    text = json.dumps([environment(), content], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """``directory`` 下每个源文件一个 JSON。"""

    def __init__(self, directory: Path, root: Path) -> None:
        self.directory, self.root = directory, root

    def path(self, file: str) -> Path:
        return self.directory / (file.replace("/", "__") + ".json")

    def load(self, file: str, key: str) -> tuple[dict[str, Any] | None, str]:
        """返回 ``(结果或 None, 为什么)``；缓存文件损坏当作没有。"""
        try:
            entry = json.loads(self.path(file).read_text("utf-8"))
            stored, deps, digest = entry["key"], entry["deps"], entry["digest"]
            packages, payload = entry["packages"], entry["payload"]
        except FileNotFoundError:
            return None, "没有缓存"
        except (ValueError, KeyError, TypeError, OSError):
            return None, "缓存文件损坏"
        if digest != _digest([deps, packages, payload]):
            return None, "缓存文件损坏"
        if stored != key:
            return None, "代码、选项或环境变了"
        for path, old in deps.items():
            if file_hash(self.root / path) != old:
                return None, f"依赖 {path} 变了"
        if module := _changed(packages):
            return None, f"包 {module} 变了"
        return payload, "代码、环境与依赖都没变"

    def store(
        self, file: str, key: str, payload: dict[str, Any], seen: dict[str, str], modules: Iterable[str] = ()
    ) -> None:
        """原子写入；中途被杀只会留下临时文件，不会留下半个结果。

        Args:
            seen: 读过的文件与读的时候的样子（:func:`stamp`）；此后又变了的话，
                结果与现在的内容对不上，不存。
            modules: import 过的顶层模块。
        """
        deps = {path: file_hash(self.root / path) for path in seen}
        if any(stamp(self.root / path) != old for path, old in seen.items()):
            return
        packages = packages_of(modules)
        entry = {"key": key, "deps": deps, "packages": packages, "payload": payload}
        entry["digest"] = _digest([deps, packages, payload])
        try:
            if self.path(file).is_dir():
                shutil.rmtree(self.path(file))
            write_atomic(self.path(file), json.dumps(entry, ensure_ascii=False))
        except OSError as error:  # 磁盘满、只读：不影响这一次的结论
            print(f"写不了缓存 {self.path(file)}：{error}", file=sys.stderr)


def _digest(payload: Any) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_atomic(path: Path, content: str | bytes) -> None:
    """写到同目录的临时文件再改名。"""
    publish(path, lambda temporary: temporary.write_bytes(content.encode() if isinstance(content, str) else content))
