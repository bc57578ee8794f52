"""亮暗两版图：同一份几何，暗色版里没有黑色的东西。"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from zhixing import figures


@pytest.fixture
def drawn():
    import matplotlib

    with matplotlib.rc_context():
        figures.apply_style()
        from matplotlib.figure import Figure

        fig = Figure()
        ax = fig.subplots()
        ax.plot([0, 1], [1, 0], color="k", marker="o")
        ax.axhline(0.3, color="black", ls="--")
        ax.text(0.5, 0.5, "黑字", color="k")
        ax.text(0.5, 0.7, "缺省的字")
        ax.set(title="标题", xlabel="横轴")
        yield figures.to_svg(fig)


def paints(svg: str) -> set[str]:
    """每个画出来的元素最终用的填充与描边色；没写的按继承与 SVG 的缺省。"""
    found = set()

    def walk(element, inherited):
        own = dict(re.findall(r"(fill|stroke):\s*([^;]+)", element.get("style", "")))
        own |= {k: element.get(k) for k in ("fill", "stroke") if element.get(k)}
        now = inherited | own
        if element.tag.endswith(("}path", "}use")):
            found.update(now.values())
        for child in element:
            if not child.tag.endswith("}clipPath"):
                walk(child, now)

    walk(ET.fromstring(svg), {"fill": "#000000", "stroke": "none"})
    return found


def test_nothing_is_black_on_the_dark_page(drawn) -> None:
    assert "#000000" in paints(drawn)
    assert paints(figures.to_dark(drawn)) <= {*figures.DARK.values(), "none"}


def test_only_colors_differ(drawn) -> None:
    def shape(svg):
        return re.sub(r"#[0-9a-f]{6}", "", svg.replace('<svg fill="#d7dde4" ', "<svg "))

    assert shape(drawn) == shape(figures.to_dark(drawn))
