"""一本书：把建好的打印版站点合成章节，去掉只对屏幕有用的东西，页间链接改成书内的锚点。

不 import mkdocs，也不排版：:mod:`zhixing.pdf` 与 :mod:`zhixing.epub` 各自把这里的
:class:`Book` 变成文件。打印版站点由 ``ZHIXING_PRINT=1 mkdocs build`` 建：图只有亮色一版，
Mermaid 图用实色与 SVG 文字。
"""

from __future__ import annotations

import posixpath
import re
import xml.etree.ElementTree as etree
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import yaml

from zhixing import pages
from zhixing.history import describe, git
from zhixing.project import Project

SVG = "{http://www.w3.org/2000/svg}"
MATH = "{http://www.w3.org/1998/Math/MathML}"
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
AUTHOR = "知行贡献者"

# 屏幕上的按钮、标签、输入框；旁边的脚本补上的东西本来就不在 HTML 里
_DROP_TAGS = frozenset({"script", "style", "link", "input", "button", "nav", "form", "template", "noscript"})
_DROP_CLASSES = frozenset({"zx-footer", "headerlink", "md-content__button", "md-button", "md-source-file", "tabbed-labels"})
_PLAIN_TOKENS = frozenset({"n", "p", "w", "o", "x", "nx", ""})  # 与正文同色的记号，不必各占一个元素


class BookError(Exception):
    """出不了书；消息说明原因与怎么改。"""


@dataclass
class Page:
    """书里的一节：站点的一页。

    Attributes:
        url: 站内网址，如 ``control/lora/``。
        slug: 书内锚点的前缀，也是这一节自己的锚点，如 ``control-lora``。
        title: 不含编号的标题。
        body: 正文，``<div>``；标题的级别与站点上一样，锚点已经改成书内的。
    """

    url: str
    slug: str
    title: str
    body: etree.Element


@dataclass
class Chapter:
    """一章。没有编号的（前言、附录里的各页）只有一节，标题与那一节相同。"""

    slug: str
    title: str
    pages: list[Page]
    numbered: bool = True


@dataclass
class Book:
    """合成好的书，可以交给排版。

    Attributes:
        root: 项目根目录。
        site: 打印版站点的目录；正文里图片的地址相对于它。
        version: ``git describe`` 的结果；不在 git 里时为空。
        date: 提交日期，如 ``2026-11-21``；不知道时为空。
    """

    root: Path
    site: Path
    title: str
    subtitle: str
    url: str
    version: str
    date: str
    keywords: list[str]
    chapters: list[Chapter] = field(default_factory=list)

    def all_pages(self) -> Iterator[Page]:
        for chapter in self.chapters:
            yield from chapter.pages


def load(root: Path, site: Path, only: str = "") -> Book:
    """把打印版站点读成一本书。

    Args:
        root: 项目根目录。
        site: 打印版站点。
        only: 只要这一页或这一章，如 ``diffusion/ddpm``、``diffusion``；空串是整本。

    Raises:
        BookError: 站点不是打印版、缺页、有坏链接或没有替代文本的图。
    """
    project = Project.load(root)
    config = _config(root)
    wanted = only.strip("/")
    chapters = [_Draft(*entry) for entry in _outline(pages.nav(project))]
    if wanted:
        for draft in chapters:
            draft.urls = [url for url in draft.urls if url and (url.strip("/") + "/").startswith(wanted + "/")]
        chapters = [draft for draft in chapters if draft.urls]
        if not chapters:
            raise BookError(f"没有 {only} 这一页或这一章；写成站内路径，如 diffusion/ddpm")
    urls = {url for draft in chapters for url in draft.urls}
    reader = _Reader(site, urls, config["site_url"])
    tags = Counter(tag for m in project.metas.values() if not wanted or _url_of(m.file) in urls for tag in m.tags)
    book = Book(
        root=root,
        site=site,
        title=config["site_name"],
        subtitle=config["site_description"],
        url=config["site_url"],
        version=describe(root, tags=True),
        date=git(root, "log", "-1", "--format=%cs"),
        keywords=[tag for tag, _ in sorted(tags.items(), key=lambda item: (-item[1], item[0]))],
    )
    for draft in chapters:
        read = [reader.read(url) for url in draft.urls]
        title = draft.title or read[0].title
        book.chapters.append(Chapter(draft.slug, title, read, numbered=bool(draft.title)))
    if wanted and len(urls) == 1:
        page = book.chapters[0].pages[0]
        book.chapters = [Chapter(page.slug, page.title, [page], numbered=False)]
        book.subtitle = page.title
    reader.finish()
    return book


@dataclass
class _Draft:
    title: str  # 空串：没有编号的一章
    slug: str
    urls: list[str]


def _outline(nav: list) -> Iterator[tuple[str, str, list[str]]]:
    """导航变成章：首页作前言，“索引”里的各页各成一章附录，其余照导航。"""
    for entry in nav:
        ((title, value),) = entry.items()
        if isinstance(value, str):
            yield "", "front", [_url(value)]
        elif title == "索引":
            for path in value:
                yield "", f"appendix-{_slug(_url(path))}", [_url(path)]
        else:
            yield title, f"chapter-{_slug(_url(value[0])).split('-')[0]}", [_url(path) for path in value]


def _url(path: str) -> str:
    path = path.rpartition(".")[0]
    return "" if path == "index" else path + "/"


def _url_of(file: str) -> str:
    return _url(file.removeprefix("docs/"))


def _slug(url: str) -> str:
    return url.strip("/").replace("/", "-") or "home"


def anchor(slug: str, name: str) -> str:
    """书内的锚点。XML 的 id 里不能有冒号与空白，标签页的锚点里有。"""
    return f"{slug}.{re.sub(r'[^0-9A-Za-z_.-]', lambda m: f'_{ord(m[0]):x}', name)}"


class _Config(yaml.SafeLoader):
    """``mkdocs.yml`` 里的 Python 标签只有 MkDocs 认得，这里跳过。"""


_Config.add_multi_constructor("", lambda loader, suffix, node: None)


def _config(root: Path) -> dict[str, str]:
    config = yaml.load((root / "mkdocs.yml").read_text("utf-8"), _Config)  # noqa: S506
    return {name: config.get(name) or "" for name in ("site_name", "site_description", "site_url")}


class _Reader:
    """读站点的页面；坏链接先记着，最后一次报全。"""

    def __init__(self, site: Path, urls: set[str], site_url: str) -> None:
        self.site, self.urls, self.site_url = site, urls, site_url
        self.anchors: set[str] = set()
        self.links: list[tuple[str, str]] = []  # (所在页, 书内锚点)
        self.problems: list[str] = []

    def read(self, url: str) -> Page:
        path = self.site / url / "index.html"
        if not path.is_file():
            raise BookError(f"站点 {self.site} 里没有 {url or '首页'}：先运行 make pdf，它会重建打印版站点")
        article = _parse(path.read_text("utf-8"))
        if article is None:
            raise BookError(f"{path} 里没有正文（article）")
        slug = _slug(url)
        self.anchors.add(slug)
        title = ""
        for parent in article.iter():
            for child in parent:
                if child.tag == "h1" and not title:
                    title = " ".join("".join(_text(child)).split())
                    _remove(parent, child)
                    break
        body = etree.Element("div", {"class": "body"})
        body.text = article.text
        body.extend(article)
        _Cleaner(self, url, slug).clean(body)
        return Page(url, slug, title or url, body)

    def resolve(self, url: str, href: str) -> str:
        """页面里的链接在书里指向哪里；书里没有的页指向线上的站点。"""
        if urlsplit(href).scheme:
            return href
        path, fragment = urldefrag(href)
        target = url if not path else posixpath.normpath(posixpath.join("/", url, path)).lstrip("/")
        if path and target:
            target += "/"
        if target not in self.urls:
            if not self.site_url:
                self.problems.append(f"{url or '首页'}：{href} 不在书里，mkdocs.yml 又没有 site_url，无处可指")
            if target and not (self.site / target.rstrip("/")).exists():
                self.problems.append(f"{url or '首页'}：坏链接 {href}")
            return urljoin(self.site_url, target) + (f"#{fragment}" if fragment else "")
        name = anchor(_slug(target), unquote(fragment)) if fragment else _slug(target)
        self.links.append((url, name))
        return f"#{name}"

    def finish(self) -> None:
        self.problems += [f"{url or '首页'}：没有锚点 {name}" for url, name in self.links if name not in self.anchors]
        if self.problems:
            raise BookError("出不了书：\n" + "\n".join(dict.fromkeys(f"  {p}" for p in self.problems)))


_FORMULA = re.compile(r"<math-tex\b[^>]*>(.*?)</math-tex>", re.S)


def _parse(page: str) -> etree.Element | None:
    """一页的正文元素。公式占掉大半篇幅，用 C 写的 XML 解析器单独读，比 HTML 解析器快几十倍。"""
    from tinyhtml5 import parse

    start, end = page.find("<article"), page.rfind("</article>")
    if start < 0 or end < 0:
        return None
    stashed: list[str] = []

    def stash(match: re.Match[str]) -> str:
        stashed.append(match[1])
        return f"<math-tex data-n={len(stashed) - 1}></math-tex>"

    tree = parse(_FORMULA.sub(stash, page[start:end]), namespace_html_elements=False)
    for formula in tree.iter("math-tex"):
        source = stashed[int(formula.attrib.pop("data-n"))]
        try:
            formula.append(etree.fromstring(source))
        except etree.ParseError:  # notebook 页的属性不带引号，不是 XML
            body = parse(source, namespace_html_elements=False).find("body")
            formula.extend(body)
    return next(tree.iter("article"))


class _Cleaner:
    """把一页的正文改成书里的样子。"""

    def __init__(self, reader: _Reader, url: str, slug: str) -> None:
        self.reader, self.url, self.slug = reader, url, slug

    def clean(self, element: etree.Element) -> None:
        for child in list(element):
            if not isinstance(child.tag, str) or child.tag in _DROP_TAGS or _classes(child) & _DROP_CLASSES:
                _remove(element, child)  # 注释的 tag 是函数
                continue
            if child.tag == f"{SVG}svg" and "zx-diagram" not in _classes(element):
                _remove(element, child)  # 图标
                continue
            rewrite: Callable[[etree.Element], None] | None = getattr(self, f"_{child.tag}".replace("-", "_"), None)
            if child.tag == f"{SVG}svg":
                etree.SubElement(child, f"{SVG}title").text = element.get("aria-label", "")
                child[:] = [child[-1], *child[:-1]]
                child.attrib.pop("aria-hidden", None), child.attrib.pop("focusable", None)
                continue
            if rewrite:
                rewrite(child)
            if "tabbed-set" in _classes(child):
                self._tabs(child)
            self._attributes(child)
            if child.tag != "math-tex":
                self.clean(child)
            if child.tag == "span" and _plain_token(child):
                _unwrap(element, child)

    def _attributes(self, element: etree.Element) -> None:
        for name in list(element.attrib):
            if name.startswith(("data-", "aria-", "on")) and name != "aria-label" or name in ("tabindex", "role", "name"):
                del element.attrib[name]
        if "zx-diagram" not in _classes(element):
            element.attrib.pop("aria-label", None)
        if "id" in element.attrib:
            if element.get("id", "").startswith("__codelineno"):
                del element.attrib["id"]
                return
            name = anchor(self.slug, element.get("id", ""))
            if name in self.reader.anchors:  # 与浏览器一样，重复的只认第一个
                del element.attrib["id"]
            else:
                element.set("id", name)
                self.reader.anchors.add(name)

    def _a(self, link: etree.Element) -> None:
        if "href" in link.attrib:
            link.set("href", self.reader.resolve(self.url, link.get("href", "")))
        if "footnote-backref" in _classes(link):
            link.text = "↑"  # 原来的弯箭头不是每种中文字体都有
        for name in ("title", "target", "rel"):
            link.attrib.pop(name, None)

    def _img(self, image: etree.Element) -> None:
        path, fragment = urldefrag(image.get("src", ""))
        where = f"{self.url or '首页'}：图片 {image.get('src')}"
        if fragment.startswith("only-"):
            self.reader.problems.append(f"{where} 分亮暗两版，这不是打印版站点：用 ZHIXING_PRINT=1 重建")
        if urlsplit(path).scheme != "data":
            path = posixpath.normpath(posixpath.join(self.url, unquote(path)))
            if not (self.reader.site / path).is_file():
                self.reader.problems.append(f"{where} 不存在")
            image.set("src", path)
        if not image.get("alt"):
            self.reader.problems.append(f"{where} 没有替代文本")
        for name in ("loading", "decoding"):
            image.attrib.pop(name, None)

    def _details(self, details: etree.Element) -> None:
        """折叠块在书里展开。"""
        details.tag = "div"
        details.set("class", f"fold {details.get('class', '')}".strip())
        details.attrib.pop("open", None)
        for summary in details.findall("summary"):
            summary.tag = "p"
            summary.set("class", "fold-title")

    def _zx_badge(self, badge: etree.Element) -> None:
        badge.tag = "p"
        badge.attrib.pop("title", None)

    def _tabs(self, tabs: etree.Element) -> None:
        """选项卡按顺序铺开，每张前面写上它的名字。"""
        parts = {part: [e for d in tabs if part in _classes(d) for e in d] for part in ("tabbed-labels", "tabbed-content")}
        names = [" ".join("".join(_text(label)).split()) for label in parts["tabbed-labels"]]
        ids = [e.get("id", "") for e in tabs.findall("input")]
        for name, block, tab_id in zip(names, parts["tabbed-content"], ids, strict=True):
            head = etree.Element("p", {"class": "tab-title"} | ({"id": tab_id} if tab_id else {}))
            head.text = name
            block.insert(0, head)


def _plain_token(span: etree.Element) -> bool:
    return not len(span) and set(span.attrib) <= {"class"} and span.get("class", "") in _PLAIN_TOKENS


def _classes(element: etree.Element) -> set[str]:
    return set(element.get("class", "").split())


def _text(element: etree.Element) -> Iterator[str]:
    """元素里读者看得到的文字。"""
    if element.get("class") in ("headerlink", "katex-mathml"):
        return
    yield element.text or ""
    for child in element:
        if isinstance(child.tag, str):
            yield from _text(child)
        yield child.tail or ""


def _remove(parent: etree.Element, child: etree.Element) -> None:
    _append_text(parent, list(parent).index(child), child.tail or "")
    parent.remove(child)


def _unwrap(parent: etree.Element, child: etree.Element) -> None:
    _append_text(parent, list(parent).index(child), (child.text or "") + (child.tail or ""))
    parent.remove(child)


def _append_text(parent: etree.Element, index: int, text: str) -> None:
    """接在第 ``index`` 个孩子之前。"""
    if index:
        parent[index - 1].tail = (parent[index - 1].tail or "") + text
    else:
        parent.text = (parent.text or "") + text


def tex_of(formula: etree.Element) -> str:
    """公式（``math-tex``）的 TeX 原文。"""
    return next((e.text or "" for e in formula.iter(f"{MATH}annotation")), "")

