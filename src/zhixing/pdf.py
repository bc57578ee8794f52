"""把书排成 PDF：合并成一份 HTML，交给 WeasyPrint。

带标签（PDF/UA-1）、书签、目录与题目索引的页码都由 CSS 与 WeasyPrint 得出；公式在结构树里
标成 ``Formula``，替代文本是 TeX 原文——这一步 WeasyPrint 没有接口，见 :func:`_formula_tags`。
时间大半花在公式上：:func:`_speakable` 与 :func:`_share_styles` 把 KaTeX 的 HTML 改成排得快的样子，
:func:`_fast_formulas` 不让公式重复量，版面逐像素不变。同一个提交排出的文件逐字节相同。
"""

from __future__ import annotations

import gc
import hashlib
import logging
import re
import xml.etree.ElementTree as etree
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zhixing.book import AUTHOR, HEADINGS, SVG, Book, BookError, Page, tex_of
from zhixing.output import publish

CSS = Path(__file__).with_name("book.css")
TEXT_WIDTH = 642  # px：版心宽 170 mm，与 book.css 一致
_NARROWER = 28  # px：列表、提示框、折叠块每套一层，公式能用的宽度少这么多
_DIAGRAM_SCALE = 0.75
_EM = 14.4  # px：正文里公式的字号，1.08 × 10 pt
_TAG = 2.6  # em：行间公式的编号占的宽，与 book.css 一致；为了居中，左边也空这么多
_DOUBT = 0.75  # 估计的宽度不到版心的这么多，就不用真排一遍来量；估计最多偏小到五分之四
_STACK = "zx-stack"
_SMALLEST = 0.45  # 公式最多缩到这个比例，再小就看不清了


@dataclass(frozen=True)
class Stats:
    """排出来的书有多大。"""

    pages: int
    bookmarks: int
    links: int
    bytes: int

    def __str__(self) -> str:
        size = self.bytes / 2**20
        return f"{self.pages} 页，{self.bookmarks} 个书签，{self.links} 处链接，{size:.1f} MiB"


def write(book: Book, output: Path) -> Stats:
    """排版并写文件；出错时已有的文件不动。

    Raises:
        BookError: 缺 WeasyPrint 或它要的系统库，或排版时有图片、锚点读不到。
    """
    weasyprint = _weasyprint()
    html = document(book)
    with _complaints() as complaints, _formula_tags(), _fast_formulas(), _no_gc():
        press = _Press(book, weasyprint)
        _fit(html, press)
        _share_styles(html)
        rendered = press.render(html)
        stats: list[int] = []

        def save(path: Path) -> None:
            identifier = hashlib.sha256(f"{book.title}{book.version}{book.subtitle}".encode()).hexdigest()[:32]
            rendered.write_pdf(path, pdf_variant="pdf/ua-1", pdf_identifier=identifier.encode())
            if complaints:
                raise BookError("排版时出错：\n" + "\n".join(f"  {c}" for c in dict.fromkeys(complaints)))
            stats.append(path.stat().st_size)

        publish(output, save)
    links = sum(len(page.links) for page in rendered.pages)
    return Stats(len(rendered.pages), sum(e.tag in HEADINGS for e in html.iter()), links, stats[0])


def _weasyprint() -> Any:
    try:
        import weasyprint
    except ImportError as error:
        raise BookError(f"缺 WeasyPrint（{error}）：先运行 make env") from None
    except OSError as error:
        reason = str(error).split("\n")[0]
        raise BookError(f"缺 WeasyPrint 要的系统库（{reason}）：先运行 bash scripts/system-deps.sh pdf") from None
    return weasyprint


# ---- 合并成一份 HTML ----


def document(book: Book) -> etree.Element:
    """整本书的 HTML：封面、目录、各章。"""
    html = etree.Element("html", {"lang": "zh-CN"})
    head = etree.SubElement(html, "head")
    etree.SubElement(head, "title").text = book.title if book.title == book.subtitle else f"{book.title}：{book.subtitle}"
    meta = {"author": AUTHOR, "description": book.subtitle, "keywords": ", ".join(book.keywords), "generator": "知行"}
    if book.date:
        meta |= {"dcterms.created": book.date, "dcterms.modified": book.date}
    for name, content in meta.items():
        etree.SubElement(head, "meta", {"name": name, "content": content})
    body = etree.SubElement(html, "body")
    _cover(body, book)
    contents = etree.SubElement(body, "section", {"class": "contents"})
    number = 0
    for chapter in book.chapters:
        number += chapter.numbered
        section = etree.SubElement(body, "section", {"class": "chapter"})
        if chapter.numbered:
            title = f"第 {number} 章　{chapter.title}"
            etree.SubElement(section, "h1", {"id": chapter.slug, "class": "chapter-title"}).text = title
            _entry(contents, 1, chapter.slug, title)
        for i, page in enumerate(chapter.pages, 1):
            _page(section, contents, page, f"{number}.{i}" if chapter.numbered else "")
    if len(contents) > 1:
        heading = etree.Element("h1", {"class": "contents-title"})
        heading.text = "目录"
        contents.insert(0, heading)
    else:
        body.remove(contents)  # 单页不要目录
    for formula in body.iter("math-tex"):
        _speakable(formula)
    return html


def _cover(body: etree.Element, book: Book) -> None:
    cover = etree.SubElement(body, "section", {"class": "cover"})
    etree.SubElement(cover, "p", {"class": "cover-title"}).text = book.title
    etree.SubElement(cover, "p", {"class": "cover-subtitle"}).text = book.subtitle
    about = etree.SubElement(cover, "div", {"class": "cover-about"})
    if book.version:
        etree.SubElement(about, "p").text = f"版本 {book.version}" + (f"　{book.date}" if book.date else "")
    etree.SubElement(about, "p").text = f"{AUTHOR}　内容 CC BY 4.0，代码 MIT"
    if book.url:
        link = etree.SubElement(etree.SubElement(about, "p"), "a", {"href": book.url})
        link.text = book.url


def _page(section: etree.Element, contents: etree.Element, page: Page, number: str) -> None:
    name = "h2" if number else "h1"
    classes = f"page page-{page.slug}"
    holder = etree.SubElement(section, "section", {"class": classes})
    title = f"{number}　{page.title}" if number else page.title
    etree.SubElement(holder, name, {"id": page.slug, "class": "page-title" if number else "chapter-title"}).text = title
    _entry(contents, 2 if number else 1, page.slug, title)
    body = deepcopy(page.body)
    for element in list(body.iter()):
        if number and element.tag in HEADINGS:
            element.tag = HEADINGS[min(HEADINGS.index(element.tag) + 1, 5)]
        if element.tag == f"{SVG}svg":  # 图里的字 16px，缩到与正文一般大
            shrink = lambda m: f"width:{float(m[1]) * _DIAGRAM_SCALE:.0f}px"  # noqa: E731
            element.set("style", re.sub(r"width:([\d.]+)px", shrink, element.get("style", ""), count=1))
        if element.tag == "math-tex":
            for parent in element.iter():
                parent[:] = [e for e in parent if e.get("class") != "katex-mathml" or not _stash(element, e)]
    holder.append(body)


def _stash(formula: etree.Element, mathml: etree.Element) -> bool:
    """MathML 不显示，留下 TeX 原文。"""
    formula.set("data-tex", tex_of(mathml))
    return True


def _speakable(formula: etree.Element) -> None:
    formula.set("data-tex", " ".join((formula.get("data-tex") or tex_of(formula)).split()))
    for part in formula.iter(f"{SVG}svg"):
        part.set("data-part", "formula")
    for stack in formula.iter("span"):
        if "vlist-t" in stack.get("class", "").split():
            _flatten(stack)


def _flatten(stack: etree.Element) -> None:
    """上下标、分式用的行内表格（一列，至多两行）换成行内块：排表格要多量几遍。

    第一行的高在基线之上，第二行的高在基线之下；各层本来就是零高的块，只把起点移到基线上。
    """
    cell, *below = [row[0] for row in stack]
    above, *depth = [float(re.search(r"height:(-?[\d.]+)em", e.get("style", ""))[1]) for e in (cell, *below)]
    cell.set("style", f"padding-top:{above}em;height:{sum(depth)}em")
    stack.set("class", f"{stack.get('class')} {_STACK}")
    stack[:] = [cell]


def _share_styles(html: etree.Element) -> None:
    """公式的行内样式换成类：近两万个 ``style`` 只有几百种，WeasyPrint 只在类相同时共用算好的样式。"""
    names: dict[str, str] = {}
    for formula in html.iter("math-tex"):
        for element in formula.iter("span"):
            if style := element.attrib.pop("style", "").strip("; "):
                name = names.setdefault(style, f"zx-s{len(names)}")
                element.set("class", f"{element.get('class', '')} {name}".strip())
    rules = (f".{name}{{{style.replace(';', ' !important;')} !important}}" for style, name in names.items())
    etree.SubElement(html.find("head"), "style").text = "".join(rules)


def _entry(contents: etree.Element, level: int, target: str, title: str) -> None:
    line = etree.SubElement(contents, "p", {"class": f"entry entry-{level}"})
    etree.SubElement(line, "a", {"href": f"#{target}"}).text = title


# ---- 排版 ----


class _Press:
    """排版要用的样式与字体，读一次，量公式与排正文共用。"""

    def __init__(self, book: Book, weasyprint: Any) -> None:
        from weasyprint.text.fonts import FontConfiguration
        from weasyprint.urls import URLFetcher

        katex = book.root / "node_modules/katex/dist/katex.min.css"
        if not katex.is_file():
            raise BookError("缺前端资产（KaTeX 的样式与字体）：先运行 make assets")
        # 直接用 TTF：WOFF2 要在 Python 里解压，二十种字体多花好几秒
        source = re.sub(r'src:url\([^)]*\.woff2\)[^}]*?(url\([^)]*\.ttf\))', r"src:\1", katex.read_text("utf-8"))
        self.html = weasyprint.HTML
        self.base = book.site.resolve().as_uri() + "/"
        self.fonts = FontConfiguration()
        self.fetcher = URLFetcher(allowed_protocols=["file", "data"])  # 排版不上网
        shared = {"font_config": self.fonts, "url_fetcher": self.fetcher}
        self.styles = [
            weasyprint.CSS(string=source, base_url=katex.as_uri(), **shared),
            weasyprint.CSS(filename=CSS, **shared),
        ]

    def render(self, html: etree.Element) -> Any:
        # 直接交出元素树，不必先写成 HTML 再解析一遍
        source = self.html(string="<!doctype html><html></html>", base_url=self.base, url_fetcher=self.fetcher)
        source.etree_element[:] = list(html)
        source.etree_element.attrib.update(html.attrib)
        return source.render(stylesheets=self.styles, font_config=self.fonts)


def _fit(html: etree.Element, press: _Press) -> None:
    """太宽的行间公式缩小到版心里：先把它们单独排一遍，量出宽度。"""
    displays: list[tuple[etree.Element, int]] = []

    def collect(element: etree.Element, available: int) -> None:
        if element.tag in ("li", "blockquote", "td") or {"admonition", "fold"} & set(element.get("class", "").split()):
            available -= _NARROWER
        if element.get("class") == "zx-math-block":
            if _estimate(element) * _EM > available * _DOUBT:
                displays.append((element, available))
            return
        for child in element:
            collect(child, available)

    collect(html, TEXT_WIDTH)
    if not displays:
        return
    probe = etree.Element("html", {"lang": "zh-CN", "class": "probe"})
    etree.SubElement(probe, "head")
    body = etree.SubElement(probe, "body")
    holders = [etree.SubElement(body, "div", {"class": "measure"}) for _ in displays]
    for holder, (element, _) in zip(holders, displays, strict=True):
        holder.append(deepcopy(element))
    widths: dict[int, float] = {}
    for page in press.render(probe).pages:
        for box in page._page_box.descendants():
            if box.element is not None and box.element.get("class") == "measure":
                widths[id(box.element)] = max(widths.get(id(box.element), 0), box.width)
    for holder, (element, available) in zip(holders, displays, strict=True):
        width = widths[id(holder)]
        if width > available:
            element.set("style", f"font-size:{max(available / width * 0.99, _SMALLEST):.3f}em")


def _estimate(element: etree.Element) -> float:
    """公式大约几个 em 宽。``vlist`` 里的各层叠在一起，其余首尾相接。"""
    classes = set(element.get("class", "").split())
    if classes & {"pstrut", "vlist-s"}:
        return 0
    if "katex-tag" in classes:
        return 2 * _TAG
    parts = [_estimate(child) for child in element]
    width = max(parts, default=0) if "vlist" in classes else sum(parts)
    if "mspace" in classes:
        width += sum(float(n) for n in re.findall(r"margin-(?:left|right):([\d.]+)em", element.get("style", "")))
    for text in (element.text, *(child.tail for child in element)):
        width += sum(1.0 if c > "\u2e80" else 0.64 for c in text or "")
    return width * (0.75 if "size3" in classes else 1)


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """WeasyPrint 把读不到的图片、找不到的锚点记进日志就继续；收下来，最后算作失败。"""
    found: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger("weasyprint"), Collect(logging.ERROR)
    quiet = [h for h in logger.handlers]
    logger.handlers, logger.propagate = [handler], False
    try:
        yield found
    finally:
        logger.handlers = quiet


@contextmanager
def _no_gc() -> Iterator[None]:
    """排版时有几百万个存活的对象，循环垃圾回收反复扫过它们，白花两成时间。"""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _fast_formulas() -> Iterator[None]:
    """公式里的盒子不折行：最窄与最宽是同一个数，同一段字排出来也总是同一个样，都只算一次。

    WeasyPrint 70 每进一层行内块就把里面再量两遍。:func:`_flatten` 的行内块以第一行的底为基线，
    CSS 里没有这样的写法，也在这里定。版本写死在 requirements.txt，换版本时由测试
    （关掉这里，排出来逐像素相同）把关。
    """
    from weasyprint.formatting_structure import boxes
    from weasyprint.layout import inline, preferred

    baseline_of, split = inline.inline_block_baseline, inline.split_first_line
    narrowest, widest = preferred.min_content_width, preferred.max_content_width
    lines: dict[tuple, tuple] = {}

    def rigid(box: Any) -> bool:
        return isinstance(box, boxes.InlineBlockBox) and box.style["white_space"] == "nowrap"

    def min_content_width(context: Any, box: Any, outer: bool = True) -> float:
        return max_content_width(context, box, outer) if rigid(box) else narrowest(context, box, outer)

    def max_content_width(context: Any, box: Any, outer: bool = True) -> float:
        if not rigid(box):
            return widest(context, box, outer)
        known = box.__dict__.setdefault("zx_widths", {})
        if outer not in known:
            known[outer] = widest(context, box, outer)
        return known[outer]

    def split_first_line(text: str, style: Any, context: Any, max_width: Any, spacing: float, **options: Any) -> tuple:
        if style["white_space"] != "nowrap":
            return split(text, style, context, max_width, spacing, **options)
        key = text, id(style), spacing
        if key not in lines:  # 连 style 一起留着，它的 id 才不会给了别人
            lines[key] = style, split(text, style, context, max_width, spacing, **options)
        return lines[key][1]

    def inline_block_baseline(box: Any) -> float:
        stacked = box.element is not None and _STACK in box.element.get("class", "")
        return box.children[0].padding_top if stacked else baseline_of(box)

    inline.inline_block_baseline = inline_block_baseline
    inline.split_first_line = preferred.split_first_line = split_first_line
    preferred.min_content_width, preferred.max_content_width = min_content_width, max_content_width
    try:
        yield
    finally:
        inline.inline_block_baseline = baseline_of
        inline.split_first_line = preferred.split_first_line = split
        preferred.min_content_width, preferred.max_content_width = narrowest, widest


@contextmanager
def _formula_tags() -> Iterator[None]:
    """公式在结构树里标成 Formula，替代文本是 TeX；表头写明管的是列；链接说明是它的文字；页眉页脚不算正文。

    WeasyPrint 70 只给 ``img`` 与 ``svg`` 写替代文本，链接说明写的是锚点名，页眉页脚标成读得到的
    内容，这里换掉它建结构树的两个函数与标记内容的那个；版本写死在 requirements.txt，换版本时由测试把关。
    """
    import pydyf
    from weasyprint.formatting_structure.boxes import MarginBox
    from weasyprint.pdf import tags
    from weasyprint.pdf.stream import Stream

    name_of, build, marked = tags._get_pdf_tag, tags._build_box_tree, Stream.marked

    def mark(stream: Any, box: Any, name: str) -> Any:
        return stream.artifact() if box.element is None else marked(stream, box, name)  # 页眉页脚不属于任何元素

    def tag(element: str | None) -> str:
        return "Formula" if element == "math-tex" else name_of(element)

    def tree(box: Any, *rest: Any) -> Iterator[Any]:
        if isinstance(box, MarginBox):
            return
        link = getattr(box, "_box", box)
        if link.link_annotation:
            link.link_annotation["Contents"] = pydyf.String(" ".join("".join(link.element.itertext()).split()))
            link.link_annotation["F"] = 4  # 打印时也在
        for element in build(box, *rest):
            if element["S"] == "/Formula" and "Alt" not in element:
                source = getattr(box, "_box", box).element  # 绝对定位的盒子外面套着一层
                element["Alt"] = pydyf.String(source.get("data-tex"))
            elif element["S"] == "/Figure" and getattr(box, "_box", box).element.get("data-part"):
                element["S"] = "/Span"  # 根号、长横线也是 SVG，但不是图；公式已有替代文本
                element.pop("A", None)
            elif element["S"] == "/TH" and "A" in element:
                element["A"]["Scope"] = "/Column"  # 站点的表头都在第一行
            elif element["S"] == "/Span" and not element["K"]:
                continue  # 公式里只占位的空盒子
            yield element

    tags._get_pdf_tag, tags._build_box_tree, Stream.marked = tag, tree, mark
    try:
        yield
    finally:
        tags._get_pdf_tag, tags._build_box_tree, Stream.marked = name_of, build, marked
