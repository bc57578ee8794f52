"""公式字体只留站点用到的字：读者少下一半。结果按内容缓存，字没有变就不重做。"""

from __future__ import annotations

import hashlib
import html
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from zhixing.output import publish

_FORMULA = re.compile(r"<math-tex.*?</math-tex>", re.S)


def characters(pages: Iterable[str]) -> set[str]:
    """这些 HTML 的公式里出现的全部字符。"""
    found: set[str] = set()
    for page in pages:
        for formula in _FORMULA.findall(page):
            found.update(html.unescape(re.sub(r"<[^>]*>", "", formula)))
    return found


def subset(site: Path, cache: Path) -> None:
    """把 ``site`` 里的 KaTeX 字体换成只含全站公式用到的字的子集。

    Args:
        cache: 放做好的子集，文件名是字体与字符集的哈希；可以删。
    """
    text = "".join(sorted(characters(path.read_text("utf-8") for path in site.rglob("*.html"))))
    for path in sorted((site / "assets" / "katex" / "fonts").glob("*.woff2")):
        made = cache / (hashlib.sha256(path.read_bytes() + text.encode()).hexdigest() + ".woff2")
        if not made.is_file():
            publish(made, lambda temporary: _write(path, text, temporary))
        path.unlink()  # 可能是从别处复制来的只读文件
        shutil.copyfile(made, path)


def _write(source: Path, text: str, output: Path) -> None:
    from fontTools import subset
    from fontTools.ttLib import TTFont

    options = subset.Options(layout_features=["*"], notdef_outline=True)
    font = TTFont(source, recalcTimestamp=False)  # 同样的字做出同样的字节
    subsetter = subset.Subsetter(options)
    subsetter.populate(text=text)
    subsetter.subset(font)
    font.flavor = "woff2"
    font.save(output)
