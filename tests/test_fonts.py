"""公式字体的子集：用到的字都在，没用到的不在，样子不变，缓存与可复现。"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fontTools.pens.recordingPen import RecordingPen
from fontTools.ttLib import TTFont

from zhixing import fonts
from zhixing.formula import render as formula_html

FONTS = Path(__file__).resolve().parents[1] / "node_modules/katex/dist/fonts"
NAME = "KaTeX_Main-Regular.woff2"


@pytest.fixture
def site(tmp_path):
    top = tmp_path / "site"
    (top / "assets/katex/fonts").mkdir(parents=True)
    shutil.copy(FONTS / NAME, top / "assets/katex/fonts" / NAME)
    (top / "index.html").write_text('<p>XYZ</p><math-tex><span class="katex">a &lt; √ β</span></math-tex>', "utf-8")
    return top


def outline(font: TTFont, char: str):
    pen = RecordingPen()
    font.getGlyphSet()[font.getBestCmap()[ord(char)]].draw(pen)
    return pen.value


def test_only_what_formulas_use_is_kept_and_looks_the_same(site, tmp_path) -> None:
    fonts.subset(site, tmp_path / "cache")
    path = site / "assets/katex/fonts" / NAME
    small, full = TTFont(path), TTFont(FONTS / NAME)
    assert path.stat().st_size < (FONTS / NAME).stat().st_size / 3
    assert {"a", "<", "√"} <= {chr(c) for c in small.getBestCmap()} and ord("X") not in small.getBestCmap()
    assert all(outline(small, char) == outline(full, char) for char in "a<√")
    assert all(small["hmtx"][small.getBestCmap()[ord(c)]] == full["hmtx"][full.getBestCmap()[ord(c)]] for c in "a<√")


def test_fonts_bound_to_a_class_keep_only_that_class(tmp_path) -> None:
    """花体只留花体的字、数学斜体只留变量；别处的同一个字母不算，写在 MathML 与 TeX 原文里的也不算。"""
    top = tmp_path / "site"
    (top / "assets/katex/fonts").mkdir(parents=True)
    names = ("KaTeX_Caligraphic-Regular", "KaTeX_Math-Italic", "KaTeX_Main-Regular")
    for name in names:
        shutil.copy(FONTS / f"{name}.woff2", top / "assets/katex/fonts")
    formula = formula_html("\\mathcal{N}(x)+\\text{abc}")
    (top / "index.html").write_text(f"<math-tex>{formula}</math-tex>", "utf-8")
    fonts.subset(top, tmp_path / "cache")
    kept = {name: {chr(c) for c in TTFont(top / f"assets/katex/fonts/{name}.woff2").getBestCmap()} for name in names}
    assert kept["KaTeX_Caligraphic-Regular"] & set("ABNXabcx") == {"N"}
    assert kept["KaTeX_Math-Italic"] & set("ABNXabcx") == {"x"}
    assert set("abc(+)") <= kept["KaTeX_Main-Regular"] and "t" not in kept["KaTeX_Main-Regular"]  # “\\text” 的 t 只在原文里


def test_cached_and_reproducible(site, tmp_path, monkeypatch) -> None:
    path = site / "assets/katex/fonts" / NAME
    fonts.subset(site, tmp_path / "one")
    first = path.read_bytes()
    shutil.copy(FONTS / NAME, path)
    fonts.subset(site, tmp_path / "two")
    assert path.read_bytes() == first
    shutil.copy(FONTS / NAME, path)
    monkeypatch.setattr(fonts, "_write", lambda *_: pytest.fail("缓存没有用上"))
    fonts.subset(site, tmp_path / "one")
    assert path.read_bytes() == first
