"""公式字体的子集：用到的字都在，没用到的不在，样子不变，缓存与可复现。"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from fontTools.pens.recordingPen import RecordingPen
from fontTools.ttLib import TTFont

from zhixing import fonts

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
