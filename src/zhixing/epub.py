"""把书打成 EPUB 3：手机上重排着读。公式是 MathML，图是 SVG。

EPUB 就是一个 zip 加几个 XML 文件，直接写；现成的 EbookLib 是 AGPL，不引入。
"""

from __future__ import annotations

import re
import unicodedata
import uuid
import xml.etree.ElementTree as etree
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.sax.saxutils import escape, quoteattr

from zhixing.book import AUTHOR, MATH, SVG, Book, BookError, Page, tex_of
from zhixing.output import write_zip

CSS = Path(__file__).with_name("epub.css")
_XHTML, _EPUB = "http://www.w3.org/1999/xhtml", "http://www.idpf.org/2007/ops"
_MEDIA = {".svg": "image/svg+xml", ".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif"}
_TOKENS = frozenset(f"{MATH}{name}" for name in ("mi", "mo", "mn", "mtext"))
_VARIANTS = {"double-struck": "DOUBLE-STRUCK", "script": "SCRIPT", "bold": "BOLD", "fraktur": "FRAKTUR"}
_CONTAINER = """<?xml version="1.0" encoding="utf-8"?>
<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container">
<rootfiles><rootfile full-path="book/package.opf" media-type="application/oebps-package+xml"/></rootfiles>
</container>
"""


@dataclass(frozen=True)
class Stats:
    """打出来的书有多大。"""

    files: int
    formulas: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.files} 节，{self.formulas} 个公式，{self.bytes / 2**20:.1f} MiB"


def write(book: Book, output: Path) -> Stats:
    """写 EPUB；出错时已有的文件不动。

    Raises:
        BookError: 有 EPUB 放不下的图片格式，或页内链接没有落点。
    """
    made = _Epub(book)
    made.build()
    write_zip(output, made.files.items(), stored="mimetype")  # 按规范排第一、不压缩
    return Stats(len(made.spine), made.formulas, output.stat().st_size)


class _Epub:
    """EPUB 里的全部文件。"""

    def __init__(self, book: Book) -> None:
        self.book = book
        self.files: dict[str, str | bytes] = {"mimetype": "application/epub+zip", "META-INF/container.xml": _CONTAINER}
        self.spine: list[tuple[str, str]] = []  # (文件名, 属性)
        self.images: dict[str, str] = {}  # 站内路径 -> 媒体类型
        self.formulas = 0
        self.homes: dict[str, str] = {}  # 锚点 -> 所在文件
        for page in book.all_pages():
            self.homes[page.slug] = f"{page.slug}.xhtml"
            for element in page.body.iter():
                if "id" in element.attrib:
                    self.homes[element.get("id", "")] = f"{page.slug}.xhtml#{element.get('id')}"

    def build(self) -> None:
        about = "".join(f"<p>{escape(line)}</p>" for line in self._about())
        self._add("cover", self.book.title, f'<section class="cover"><h1>{escape(self.book.title)}</h1>{about}</section>')
        contents, number = [], 0
        for chapter in self.book.chapters:
            number += chapter.numbered
            lines = []
            for i, page in enumerate(chapter.pages, 1):
                title = f"{number}.{i} {page.title}" if chapter.numbered else page.title
                self._page(page, title)
                lines.append(f'<li><a href="{page.slug}.xhtml">{escape(title)}</a></li>')
            if chapter.numbered:
                first = f"{chapter.pages[0].slug}.xhtml"
                head = f'<a href="{first}">第 {number} 章 {escape(chapter.title)}</a>'
                lines = [f"<li>{head}<ol>{''.join(lines)}</ol></li>"]
            contents += lines
        nav = f'<nav epub:type="toc" id="toc"><h1>目录</h1><ol>{"".join(contents)}</ol></nav>'
        self.files["book/nav.xhtml"] = _xhtml("目录", nav)
        self.files["book/epub.css"] = CSS.read_text("utf-8")
        for path in self.images:
            data = (self.book.site / path).read_bytes()
            self.files[f"book/{path}"] = _unique_ids(data) if path.endswith(".svg") else data
        self.files["book/package.opf"] = self._package()

    def _about(self) -> list[str]:
        version = f"版本 {self.book.version} {self.book.date}".strip() if self.book.version else ""
        return [line for line in (self.book.subtitle, version, AUTHOR, "内容 CC BY 4.0，代码 MIT", self.book.url) if line]

    def _add(self, name: str, title: str, body: str) -> None:
        kinds = [kind for kind in ("mathml", "svg") if f"<{kind.removesuffix('ml')} xmlns" in body]
        self.spine.append((f"{name}.xhtml", " ".join(kinds)))
        self.files[f"book/{name}.xhtml"] = _xhtml(title, body)

    def _page(self, page: Page, title: str) -> None:
        body = deepcopy(page.body)
        self._rewrite(body)
        # 每页自成一个文件，标题是一级
        text = etree.tostring(body, encoding="unicode")
        self._add(page.slug, title, f"<section><h1>{escape(title)}</h1>{text}</section>")

    def _rewrite(self, parent: etree.Element) -> None:
        for index, child in enumerate(list(parent)):
            if child.tag == "math-tex":
                parent[index] = self._formula(child)
                continue
            if child.tag == f"{SVG}svg":
                _local(child, SVG)
                continue
            if child.tag == "a" and child.get("href", "").startswith("#"):
                name = child.get("href", "")[1:]
                if name not in self.homes:
                    raise BookError(f"链接 #{name} 没有落点")
                child.set("href", self.homes[name])
            if child.tag == "img" and not urlsplit(child.get("src", "")).scheme:
                path = unquote(child.get("src", ""))
                media = _MEDIA.get(Path(path).suffix.lower())
                if media is None:
                    raise BookError(f"EPUB 里放不下这种图片：{path}")
                self.images[path] = media
            self._rewrite(child)

    def _formula(self, element: etree.Element) -> etree.Element:
        self.formulas += 1
        math = next(element.iter(f"{MATH}math"))
        for part in math.iter():
            if part.tag == f"{MATH}mtd":
                part.attrib.pop("width", None)  # KaTeX 用它把编号推到右边，EPUB 的 MathML 没有这个属性
            if len(part) and part.tag in _TOKENS:
                part.tag, part.attrib = f"{MATH}mrow", {}  # KaTeX 偶尔在记号里再套结构
            if not len(part) and (kind := _VARIANTS.get(part.get("mathvariant", ""))):
                part.text = "".join(_letter(c, kind) for c in part.text or "")
        math.set("alttext", " ".join(tex_of(element).split()))
        _local(math, MATH)
        math.tail = element.tail
        return math

    def _package(self) -> str:
        book = self.book
        identifier = uuid.uuid5(uuid.NAMESPACE_URL, f"{book.url}#{book.title}{book.subtitle}{book.version}")
        date = book.date or "1970-01-01"
        subjects = "".join(f"<dc:subject>{escape(word)}</dc:subject>" for word in book.keywords)
        items = ['<item id="nav" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>']
        items.append('<item id="css" href="epub.css" media-type="text/css"/>')
        for i, (name, kinds) in enumerate(self.spine):
            properties = f" properties={quoteattr(kinds)}" if kinds else ""
            items.append(f'<item id="p{i}" href="{name}" media-type="application/xhtml+xml"{properties}/>')
        items += [f'<item id="i{i}" href={quoteattr(p)} media-type="{m}"/>' for i, (p, m) in enumerate(self.images.items())]
        order = '<itemref idref="p0"/><itemref idref="nav"/>'
        order += "".join(f'<itemref idref="p{i}"/>' for i in range(1, len(self.spine)))
        return f"""<?xml version="1.0" encoding="utf-8"?>
<package xmlns="http://www.idpf.org/2007/opf" version="3.0" unique-identifier="id" xml:lang="zh-CN">
<metadata xmlns:dc="http://purl.org/dc/elements/1.1/">
<dc:identifier id="id">urn:uuid:{identifier}</dc:identifier>
<dc:title>{escape(book.title if book.title == book.subtitle else f"{book.title}：{book.subtitle}")}</dc:title>
<dc:creator>{AUTHOR}</dc:creator><dc:language>zh-CN</dc:language><dc:date>{date}</dc:date>{subjects}
<meta property="dcterms:modified">{date}T00:00:00Z</meta>
<meta property="schema:accessMode">textual</meta><meta property="schema:accessMode">visual</meta>
<meta property="schema:accessibilityFeature">MathML</meta>
<meta property="schema:accessibilityFeature">alternativeText</meta>
<meta property="schema:accessibilityFeature">tableOfContents</meta>
<meta property="schema:accessibilityHazard">none</meta>
</metadata>
<manifest>{"".join(items)}</manifest>
<spine>{order}</spine>
</package>
"""


def _letter(char: str, kind: str) -> str:
    """花体、空心等字母换成 Unicode 里单独的字符：MathML Core 只认它们，不认 ``mathvariant``。"""
    case = "CAPITAL" if char.isupper() else "SMALL"
    for name in (f"MATHEMATICAL {kind} {case} {char.upper()}", f"{kind} {case} {char.upper()}"):
        try:
            return unicodedata.lookup(name)
        except KeyError:
            continue
    return char


def _unique_ids(svg: bytes) -> bytes:
    """同一张位图画两次，matplotlib 给的 id 也相同；没有谁引用它，重复的去掉。"""
    seen: set[bytes] = set()

    def once(match: re.Match[bytes]) -> bytes:
        if match[1] in seen:
            return b""
        seen.add(match[1])
        return match[0]

    return re.sub(rb'(?<=\s)id="([^"]*)"', once, svg)


def _local(root: etree.Element, namespace: str) -> None:
    """去掉标签名里的命名空间，改写在根元素上：不少阅读器不认前缀。"""
    for element in root.iter():
        element.tag = element.tag.removeprefix(namespace)
        for name in [n for n in element.attrib if re.match(r"(?:\{http://www\.w3\.org/2000/xmlns/\}|xmlns)", n)]:
            del element.attrib[name]
    root.attrib = {"xmlns": namespace[1:-1]} | root.attrib


def _xhtml(title: str, body: str) -> str:
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE html>\n'
        f'<html xmlns="{_XHTML}" xmlns:epub="{_EPUB}" lang="zh-CN" xml:lang="zh-CN">'
        f'<head><meta charset="utf-8"/><title>{escape(title)}</title><link rel="stylesheet" href="epub.css"/></head>'
        f"<body>{body}</body></html>\n"
    )
