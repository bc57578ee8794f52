"""示例产生的图与数字：示例里存（:func:`figure`、:func:`metric`），页面里引用。"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]*$")


@dataclass
class Recorded:
    """一次执行里存下的东西；每个示例进程从空开始。"""

    figures: dict[str, str] = field(default_factory=dict)  # 名字 -> SVG（亮色）
    metrics: dict[str, float | int | str] = field(default_factory=dict)


recorded = Recorded()


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
