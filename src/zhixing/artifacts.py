"""示例产生的图、数字与文件：示例里存，页面与别的示例里用。

图与数字（:func:`figure`、:func:`metric`）给页面引用；文件（:func:`output_path`、:func:`input_path`）
在示例之间传递，比如训好的权重。三类东西的名字各管各的，同类之内不能重名。
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
FILE_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9]+)?$")
_VARIABLE = "ZHIXING_SESSION"


@dataclass
class Recorded:
    """一次执行里存下的东西；每个示例进程从空开始。"""

    figures: dict[str, str] = field(default_factory=dict)  # 名字 -> SVG（亮色）
    metrics: dict[str, float | int | str] = field(default_factory=dict)
    outputs: dict[str, list[tuple[str, int]]] = field(default_factory=dict)  # 名字 -> 要它的地方，由里到外
    inputs: dict[str, str | None] = field(default_factory=dict)  # 上游/名字 -> sha256；没有那个产物为 None
    on_scratch: Callable[[], None] | None = None  # 第一次用断点目录时引擎要做的事
    scratch: bool = False


recorded = Recorded()


@dataclass
class Session:
    """引擎给这一次执行的：私有目录、能读的上游产物、断点目录。"""

    directory: str
    store: str
    inputs: dict[str, dict[str, str]]  # 上游示例 -> 名字 -> sha256
    scratch: str | None
    example: bool  # 只有示例能产生文件、能用断点目录


_session: Session | None = None


def begin(session: Session) -> None:
    """引擎在执行之前调用；经环境变量传给代码块里起的 Python 子进程。"""
    global _session
    _session = session
    os.environ[_VARIABLE] = json.dumps(session.__dict__)


def _current() -> Session | None:
    if _session is None and _VARIABLE in os.environ:
        return Session(**json.loads(os.environ[_VARIABLE]))
    return _session


def figure(name: str, fig: Any = None) -> None:
    """存下一张 matplotlib 图，页面用 ``![看什么](fig:示例id/名字)`` 引用。

    Args:
        name: 字母数字与 ``-``、``_``，在一个示例里唯一。
        fig: matplotlib Figure；缺省为当前图。

    Raises:
        ValueError: 名字不合法或重复。
    """
    from zhixing.figures import to_svg

    _check_name(name, recorded.figures)
    if fig is None:
        from matplotlib import pyplot as plt

        fig = plt.gcf()
    recorded.figures[name] = to_svg(fig)


def metric(name: str, value: float | int | str) -> None:
    """存下一个数，页面用 ``{{ m.示例id.名字:.3f }}`` 引用。

    Raises:
        ValueError: 名字不合法、重复，或数值不是有限数。
        TypeError: 值不是数字或字符串。
    """
    _check_name(name, recorded.metrics)
    if hasattr(value, "item"):  # numpy 与 torch 的标量
        value = value.item()
    if not isinstance(value, (int, float, str)):
        raise TypeError(f"metric {name!r} 应是数字或字符串，得到 {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"metric {name!r} 不是有限数：{value}")
    recorded.metrics[name] = value


def output_path(name: str) -> Path:
    """产物文件 ``name`` 该写到哪里；执行成功后收下，下游用 ``input_path("本示例/name")`` 读。

    直接用 ``python examples/x.py`` 运行时，写到一个临时目录（位置打印在标准错误）。

    Args:
        name: 字母数字与 ``-``、``_``，可带一个扩展名，如 ``unet.safetensors``；一个示例里唯一。

    Raises:
        ValueError: 名字不合法或重复，或不是在示例里调用。
    """
    if not FILE_NAME.match(name):
        raise ValueError(f"产物文件名 {name!r} 只能用字母、数字、- 与 _，可带一个扩展名，如 unet.safetensors")
    if name in recorded.outputs:
        raise ValueError(f"产物文件 {name!r} 已经要过一次；把第一次得到的路径存进变量")
    session = _current()
    if session is None:
        directory = Path(tempfile.mkdtemp(prefix="zhixing-output-"))
        print(f"zhixing：产物文件写到 {directory / name}", file=sys.stderr)
    elif not session.example:
        raise ValueError("只有示例（examples/*.py）能产生产物文件；页面读示例的产物用 input_path")
    else:
        directory = Path(session.directory) / "outputs"
        directory.mkdir(parents=True, exist_ok=True)
    recorded.outputs[name] = _callers()
    return directory / name


def input_path(name: str) -> Path:
    """上游示例的产物文件，只读；上游要写进示例头部或页面 front matter 的 ``needs``。

    直接用 ``python examples/x.py`` 运行时，读最近一次构建留下的那一份。

    Args:
        name: ``上游示例 id/产物文件名``，如 ``base/unet.safetensors``。

    Raises:
        ValueError: 写法不对、上游没有在 ``needs`` 里声明，或上游没有这个产物。
    """
    example, slash, file = name.partition("/")
    if not slash or not _NAME.match(example) or not FILE_NAME.match(file):
        raise ValueError(f"应写成 上游示例/产物文件名，如 base/unet.safetensors，得到 {name!r}")
    session = _current()
    if session is None:
        return _last_built(example, file)
    if example not in session.inputs:
        declared = "、".join(sorted(session.inputs)) or "无"
        raise ValueError(f"没有在 needs 里声明上游示例 {example!r}（已声明：{declared}）")
    files = session.inputs[example]
    recorded.inputs[name] = files.get(file)
    if file not in files:
        raise ValueError(f"上游示例 {example!r} 没有产物文件 {file!r}，现有：{'、'.join(sorted(files)) or '无'}")
    link = Path(session.directory) / "inputs" / example / file  # 有名字、有扩展名，报错时认得出
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(Path(session.store) / files[file])
    return link


def scratch_path() -> Path:
    """断点目录：构建被杀后重跑同一个示例，里面的文件还在；执行成功后引擎删掉它。

    示例的代码、读过的项目文件（连同 import 的模块）或上游产物变了，里面就是空的——
    旧进度不会混进新结果。直接用 ``python examples/x.py`` 运行时是一个新的临时目录。

    Raises:
        ValueError: 不是在示例里调用。
    """
    session = _current()
    if session is None:
        return Path(tempfile.mkdtemp(prefix="zhixing-scratch-"))
    if not session.example:
        raise ValueError("只有示例（examples/*.py）能用断点目录")
    if not recorded.scratch and recorded.on_scratch:
        recorded.on_scratch()
    recorded.scratch = True
    path = Path(session.scratch or session.directory, "files" if session.scratch else "scratch")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _callers() -> list[tuple[str, int]]:
    frame, found = sys._getframe(2), []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return found


def _last_built(example: str, file: str) -> Path:
    """引擎之外：最近一次构建里 ``example`` 的产物。"""
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    here = Path(main).resolve().parent if main else Path.cwd()
    root = next((p for p in (here, *here.parents, Path.cwd()) if (p / "mkdocs.yml").is_file()), here)
    cache = root / ".cache" / "zhixing"
    advice = f"先运行 zhixing check examples/{example}.py"
    try:
        entry = json.loads((cache / "results" / f"examples__{example}.py.json").read_text("utf-8"))
        files = entry["payload"]["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"示例 {example!r} 还没有构建过，{advice}") from None
    if file not in files:
        raise ValueError(f"上游示例 {example!r} 没有产物文件 {file!r}，现有：{'、'.join(sorted(files)) or '无'}")
    path = cache / "files" / files[file]
    if not path.is_file():
        raise ValueError(f"产物文件 {example}/{file} 不在缓存里了，{advice}")
    return path


def _check_name(name: str, taken: dict[str, Any]) -> None:
    if not _NAME.match(name):
        raise ValueError(f"名字 {name!r} 只能用字母、数字、- 与 _")
    if name in taken:
        raise ValueError(f"名字 {name!r} 已经用过")


@dataclass(frozen=True)
class Figure:
    """一张图在站内的两个文件与像素尺寸。"""

    light: str
    dark: str
    width: int
    height: int


class Artifacts:
    """全部示例的产物，供页面引用；同时登记哪些文件要写进站点。"""

    ROOT = PurePosixPath("assets/fig")

    def __init__(self) -> None:
        self._metrics: dict[str, dict[str, float | int | str]] = {}
        self._figures: dict[str, dict[str, Figure]] = {}
        self._published: dict[str, Figure] = {}  # SVG 文本 -> 已登记的图
        self.files: dict[str, str] = {}  # 站内路径 -> SVG 文本

    def add_example(self, example: str, figures: dict[str, str], metrics: dict[str, float | int | str]) -> None:
        self._metrics[example] = dict(metrics)
        self._figures[example] = {name: self.publish(f"{example}/{name}", svg) for name, svg in figures.items()}

    def publish(self, stem: str, svg: str) -> Figure:
        """登记一张图的亮暗两版；同一张图再登记一次，返回原来那份。"""
        from zhixing.figures import size, to_dark

        if svg in self._published:
            return self._published[svg]
        light, dark = (str(self.ROOT / f"{stem}.{scheme}.svg") for scheme in ("light", "dark"))
        self.files[light], self.files[dark] = svg, to_dark(svg)
        self._published[svg] = Figure(light, dark, *size(svg))
        return self._published[svg]

    def metric(self, example: str, name: str) -> float | int | str:
        """Raises: KeyError: 没有这个示例或键，参数是可读的原因。"""
        return self._look_up(self._metrics, example, name, "数字")

    def figure(self, example: str, name: str) -> Figure:
        """Raises: KeyError: 没有这个示例或图，参数是可读的原因。"""
        return self._look_up(self._figures, example, name, "图")

    @staticmethod
    def _look_up(table: dict[str, dict[str, Any]], example: str, name: str, what: str) -> Any:
        if example not in table:
            raise KeyError(f"没有示例 {example!r}，现有：{'、'.join(sorted(table)) or '无'}")
        if name not in table[example]:
            raise KeyError(f"示例 {example!r} 没有{what} {name!r}，现有：{'、'.join(sorted(table[example])) or '无'}")
        return table[example][name]
