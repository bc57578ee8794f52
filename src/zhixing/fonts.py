"""公式字体只留站点用到的字：读者少下一半。结果按内容缓存，字没有变就不重做。"""

from __future__ import annotations

import hashlib
import html
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from zhixing.cache import file_hash
from zhixing.output import publish

_FORMULA = re.compile(r"<math-tex.*?</math-tex>", re.S)
_MATHML = re.compile(r"<math .*?</math>", re.S)  # 给读屏软件的那一份，不用这些字体
_TEXT = re.compile(r'<span(?: class="?([^">]*)"?)?[^>]*>([^<]*)')

# 只用在带这些类的字上的字体（见 katex.css）；其余字体各处都可能用，留全部的字
_CLASSES = {
    "KaTeX_Math-Italic": {"mathnormal"},
    "KaTeX_AMS-Regular": {"mathbb", "textbb", "amsrm"},
    "KaTeX_Caligraphic-Regular": {"mathcal"},
}


def characters(pages: Iterable[str]) -> dict[str, set[str]]:
    """这些 HTML 的公式里画出来的字符：类名 -> 直接写在这一类标签里的字；空串 -> 全部。"""
    found: dict[str, set[str]] = {"": set()}
    for page in pages:
        for formula in _FORMULA.findall(page):
            shown = _MATHML.sub("", formula)
            found[""].update(html.unescape(re.sub(r"<[^>]*>", "", shown)))
            for classes, text in _TEXT.findall(shown):
                for name in classes.split():
                    found.setdefault(name, set()).update(html.unescape(text))
    return found


def _used(font: str, found: dict[str, set[str]]) -> set[str]:
    """一种字体要留的字。"""
    classes = _CLASSES.get(font)
    return set().union(*(found.get(name, set()) for name in classes)) if classes else found[""]


def subset(site: Path, cache: Path) -> None:
    """把 ``site`` 里的 KaTeX 字体换成只含全站公式用到的字的子集。

    Args:
        cache: 放做好的子集，文件名是字体与字符集的哈希；可以删。
    """
    code = file_hash(Path(__file__)).encode()  # 裁法变了，做好的也要重做
    found = characters(path.read_text("utf-8") for path in site.rglob("*.html"))
    for path in sorted((site / "assets" / "katex" / "fonts").glob("*.woff2")):
        text = "".join(sorted(_used(path.stem, found)))
        made = cache / (hashlib.sha256(code + path.read_bytes() + text.encode()).hexdigest() + ".woff2")
        if not made.is_file():
            publish(made, lambda temporary: _write(path, text, temporary))
        path.unlink()  # 可能是从别处复制来的只读文件
        shutil.copyfile(made, path)


def _write(source: Path, text: str, output: Path) -> None:
    from fontTools import subset
    from fontTools.ttLib import TTFont

    # 不带微调指令：高分屏上看不出差别，每个字体少两千字节
    options = subset.Options(layout_features=["*"], notdef_outline=True, hinting=False)
    font = TTFont(source, recalcTimestamp=False)  # 同样的字做出同样的字节
    subsetter = subset.Subsetter(options)
    subsetter.populate(text=text)
    subsetter.subset(font)
    font.flavor = "woff2"
    font.save(output)
