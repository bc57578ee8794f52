"""matplotlib 图的统一样式与亮暗两版 SVG。

同一张图只画一次：线条与文字用固定的“墨色”，暗色版只是把这几种颜色换掉，
所以作者不需要画两遍，也不会两版不一致。
"""

from __future__ import annotations

import io
import re
from typing import Any

CJK_FONTS = [
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",  # Debian 的 TTC 首个字面是 JP，同样含全部简体字形
    "Source Han Sans SC",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "WenQuanYi Micro Hei",
]
CYCLE = ["#3b6fd4", "#d9622b", "#2e9e6b", "#b04fc4", "#c9a227", "#8a6d5c", "#d6477f", "#4f8f9c"]
INK, GRID, PAPER = "#24292f", "#d0d7de", "#fffffe"
# 亮 -> 暗；循环色在两种底色上都看得清，不换
DARK = {INK: "#d7dde4", "#000000": "#d7dde4", GRID: "#3d444d", PAPER: "#1e2129", "#ffffff": "#1e2129"}


def apply_style() -> None:
    """设置全局 rcParams；在执行任何用户代码之前调用一次。

    缺字的警告会变成异常：图里出现方框比没有图更糟。
    """
    import warnings

    import matplotlib
    from cycler import cycler

    matplotlib.rcParams.update(
        {
            "font.family": "sans-serif",
            "font.sans-serif": [*CJK_FONTS, "DejaVu Sans"],
            "axes.unicode_minus": False,
            "mathtext.fontset": "cm",
            "font.size": 10.5,
            "axes.titlesize": 11,
            "axes.prop_cycle": cycler(color=CYCLE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": False,
            "axes.axisbelow": True,
            "lines.linewidth": 1.8,
            "legend.frameon": False,
            "figure.figsize": (6.4, 3.4),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "image.cmap": "viridis",
            "image.interpolation": "nearest",
            "svg.fonttype": "path",
            "svg.hashsalt": "zhixing",
            "grid.color": GRID,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "savefig.facecolor": "none",
            "legend.facecolor": PAPER,
            **dict.fromkeys(
                ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "patch.edgecolor"),
                INK,
            ),
        }
    )
    warnings.filterwarnings("error", message=r"Glyph .* missing from")


def to_svg(fig: Any) -> str:
    """把一张图存成确定的 SVG（亮色版）。"""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    canvas, face = fig.canvas, fig.get_facecolor()
    try:
        fig.set_facecolor("none")
        # 不经 savefig：它为排版先空画一遍，多花四分之一的时间；画的时候本来就会排版
        FigureCanvasSVG(fig).print_svg(buffer, metadata={"Date": None, "Creator": None})
    finally:
        fig.set_facecolor(face)
        fig.set_canvas(canvas)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    return re.sub(r"\n\s*", "\n", text)


def size(svg: str) -> tuple[int, int]:
    """SVG 的像素宽高（1 pt = 4/3 px）。"""
    width, height = (float(v) * 4 / 3 for v in re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg).groups())
    return round(width), round(height)


def to_dark(svg: str) -> str:
    """换成暗色版；只换颜色，几何不变。"""
    pattern = re.compile("|".join(map(re.escape, DARK)), re.I)
    # 纯黑的文字 matplotlib 不写 fill，靠 SVG 的缺省值：把缺省值也换掉
    svg = svg.replace("<svg ", f'<svg fill="{DARK["#000000"]}" ', 1)
    return pattern.sub(lambda m: DARK[m.group().lower()], svg)
