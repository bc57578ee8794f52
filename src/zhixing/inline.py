r"""正文里引用示例产物的两种短语法：``{{ m.示例.键:格式 }}`` 与 ``![说明](fig:示例/图名)``。

数字与图都来自 :class:`zhixing.artifacts.Artifacts`，也就是本次构建真的跑出来的结果；
引用不存在的东西是带行号的错误。代码里的与写成 ``\{{`` 的不替换。
"""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as etree
from typing import TYPE_CHECKING, Any

from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import ImageInlineProcessor, InlineProcessor
from markdown.treeprocessors import Treeprocessor, UnescapeTreeprocessor
from markdown.util import HTML_PLACEHOLDER_RE, AtomicString

from zhixing.context import PageContext, current, report

if TYPE_CHECKING:
    from zhixing.artifacts import Artifacts

_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
_METRIC = re.compile(rf"({_NAME})\.({_NAME})(?::(.*))?", re.S)
_FIGURE = re.compile(rf"({_NAME})/({_NAME})")
# 这些元素里不能放 figure；段落另外处理，其余（列表项、单元格、引用……）可以
_PHRASING = frozenset("a abbr b del em h1 h2 h3 h4 h5 h6 i ins mark s small span strong sub sup u".split())


class MetricInline(InlineProcessor):
    """``{{ m.ddpm.final_loss:.3f }}`` 变成一个带出处的数。"""

    def __init__(self, md: Markdown) -> None:
        super().__init__(r"\{\{\s*m\.([^{}]*?)\s*\}\}", md)

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[etree.Element, int, int]:  # type: ignore[override]
        element = etree.Element("span", {"class": "zx-metric"})
        try:
            example, text = _metric(m[1])
            element.set("title", f"由 examples/{example}.py 在构建时量出")
        except LookupError as error:
            report("M404", str(error.args[0]), line=_line(m[0]))
            element, text = etree.Element("code", {"class": "zx-error"}), m[0]
        element.text = AtomicString(text)
        return element, m.start(0), m.end(0)


def _metric(reference: str) -> tuple[str, str]:
    """``ddpm.final_loss:.3f`` 到 ``(示例 id, 排好版的数)``。

    Raises:
        LookupError: 写法不对、没有这个数，或格式不适用；参数是可读的原因。
    """
    match = _METRIC.fullmatch(reference)
    if match is None:
        raise LookupError(f"应写成 m.示例.键 或 m.示例.键:格式，得到 m.{reference}")
    example, key, spec = match.groups()
    value = _artifacts().metric(example, key)
    try:
        return example, format(value, spec or "")
    except (ValueError, TypeError):
        raise LookupError(f"格式 {spec!r} 不适用于 {example}.{key} 的值 {value!r}") from None


class FigureInline(ImageInlineProcessor):
    """``![说明](fig:ddpm/loss)`` 先变成只有图注的 figure，图由树处理器补上。"""

    _TARGET = re.compile(r"\(\s*fig:([^()]*?)\s*\)")

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[Any, Any, Any]:  # type: ignore[override]
        caption, index, closed = self.getText(data, m.end(0))
        target = self._TARGET.match(data, index) if closed else None
        if target is None:
            return None, None, None  # 普通图片
        figure = etree.Element("figure", {"class": "zx-figure", "data-fig": target[1]})
        etree.SubElement(figure, "figcaption").text = caption.strip()
        return figure, m.start(0), target.end(0)


class FigureTreeprocessor(Treeprocessor):
    """行内语法处理完之后：把图提到段落外面，补上亮暗两张 ``img``。"""

    def run(self, root: etree.Element) -> None:
        for parent in list(root.iter()):
            for child in list(parent):
                if child.tag == "p" and any(map(_is_figure, child)):
                    _lift_figures(parent, child)
                elif _is_figure(child) and parent.tag in _PHRASING:
                    child.tag = child[0].tag = "span"
        for element in list(root.iter()):
            if "data-fig" in element.attrib:
                self._fill(element)

    def _fill(self, figure: etree.Element) -> None:
        target, caption = figure.attrib.pop("data-fig"), figure[0]
        try:
            match = _FIGURE.fullmatch(target)
            if match is None:
                raise LookupError(f"应写成 fig:示例/图名，得到 fig:{target}")
            image = _artifacts().figure(match[1], match[2])
        except LookupError as error:
            report("M405", str(error.args[0]), line=_line(f"fig:{target}"))
            return
        alt = self._plain_text(caption)
        if not alt:
            figure.remove(caption)
        figure.text = self.md.htmlStash.store(images(image, alt or target, current.get()))

    def _plain_text(self, caption: etree.Element) -> str:
        """图注的纯文字，作替代文本：公式留下 TeX，行内 HTML 去掉标签。"""

        def stashed(m: re.Match[str]) -> str:
            block = self.md.htmlStash.rawHtmlBlocks[int(m[1])]
            return html.unescape(re.sub(r"<[^>]*>", "", block)) if isinstance(block, str) else ""

        text = HTML_PLACEHOLDER_RE.sub(stashed, _text(caption))
        return " ".join(UnescapeTreeprocessor(self.md).unescape(text).split())


def images(image: Any, alt: str, ctx: PageContext | None) -> str:
    """亮暗两张图；Material 的 CSS 按网址片段只显示一张，没有 JavaScript 也一样。"""
    root = ctx.url_root if ctx else ""
    size = f'alt="{html.escape(alt)}" width="{image.width}" height="{image.height}"'
    if ctx and ctx.for_print:
        return f'<img src="{html.escape(root + image.light)}" {size}>'
    return "".join(
        f'<img src="{html.escape(root + path)}#only-{scheme}" {size} loading="lazy" decoding="async">'
        for path, scheme in ((image.light, "light"), (image.dark, "dark"))
    )


def _lift_figures(parent: etree.Element, paragraph: etree.Element) -> None:
    """段落里的图提出来，前后的文字各自成段；段落只有图时不留空段落。"""
    pieces = [etree.Element("p", paragraph.attrib)]
    pieces[0].text = paragraph.text
    for child in list(paragraph):
        if _is_figure(child):
            rest = etree.Element("p")
            rest.text, child.tail = child.tail, None
            pieces += [child, rest]
        else:
            pieces[-1].append(child)
    pieces = [piece for piece in pieces if piece.tag != "p" or len(piece) or (piece.text or "").strip()]
    pieces[-1].tail = paragraph.tail
    index = list(parent).index(paragraph)
    parent[index : index + 1] = pieces


def _is_figure(element: etree.Element) -> bool:
    return element.tag == "figure" and "data-fig" in element.attrib


def _text(element: etree.Element) -> str:
    text = element.text or ""
    if "arithmatex" in element.get("class", "").split():
        text = text[2:-2]  # 去掉 \( 与 \)
    return text + "".join(_text(child) + (child.tail or "") for child in element)


def _artifacts() -> Artifacts:
    ctx = current.get()
    if ctx is None or ctx.artifacts is None:
        raise LookupError("这里没有示例产物可以引用")
    return ctx.artifacts


def _line(literal: str) -> int:
    ctx = current.get()
    return ctx.locate(rf"(?<!\\){re.escape(literal)}") if ctx else 0


class InlineExtension(Extension):
    """在 ``mkdocs.yml`` 里写作 ``zhixing.inline``。"""

    def extendMarkdown(self, md: Markdown) -> None:
        # 反引号（190）、arithmatex（189.9）、转义（180）先走；图要抢在普通图片（150）之前
        md.inlinePatterns.register(MetricInline(md), "zhixing-metric", 175)
        md.inlinePatterns.register(FigureInline(r"!\[", md), "zhixing-figure", 151)
        # 行内处理（20）之后、排版换行（10）之前
        md.treeprocessors.register(FigureTreeprocessor(md), "zhixing-figure", 15)


def makeExtension(**kwargs: Any) -> InlineExtension:
    return InlineExtension(**kwargs)
