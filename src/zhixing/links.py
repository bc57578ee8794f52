"""看渲染结果：每个内链、锚点、图片都存在，每个看得见的代码块都登记过。

以渲染后的 HTML 为准（不会漏），再回源文件里找行号（给人看）。
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag, urlparse

from zhixing.errors import Problem


@dataclass
class Rendered:
    """一页渲染后的样子。

    Attributes:
        file: 源文件路径，如 ``docs/control/lora.md``。
        url: 站内网址，如 ``control/lora/``。
        source: 源文件全文。
        html: 正文 HTML。
    """

    file: str
    url: str
    source: str
    html: str
    ids: set[str] = field(default_factory=set)
    links: list[tuple[str, str]] = field(default_factory=list)  # (属性种类, 目标)
    blocks: set[int] = field(default_factory=set)  # 看得见的代码块所在行
    strays: list[str] = field(default_factory=list)  # 没登记的 <pre> 的开头文字

    def __post_init__(self) -> None:
        # 公式与高亮里有几千个 span，都不带我们要的东西；先去掉，解析快三倍
        _Reader(self).feed(re.sub(r"</span>|<span(?![^>]*\bid=)[^>]*>", "", self.html))


class _Reader(HTMLParser):
    def __init__(self, page: Rendered) -> None:
        super().__init__()
        self.page = page
        self.stack: list[tuple[str, bool]] = []  # (标签, 是否已登记的代码块)
        self.capturing: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        page = self.page
        for name in ("id", "name"):
            if values.get(name) and (name == "id" or tag == "a"):
                page.ids.add(values[name])
        marked = False
        if "data-zx" in values:
            page.blocks.add(int(values["data-zx"]))
            marked = True
        if tag == "a" and values.get("href"):
            page.links.append(("href", values["href"]))
        for name in ("src", "data", "poster"):
            if values.get(name) and tag in ("img", "video", "audio", "source", "iframe", "embed", "object", "script"):
                page.links.append(("src", values[name]))
        if tag == "link" and values.get("href"):
            page.links.append(("src", values["href"]))
        if tag == "pre" and not any(m for _, m in self.stack) and not marked:
            self.capturing = []
        if tag not in ("img", "br", "hr", "input", "link", "meta", "source", "wbr", "col", "area", "embed", "track"):
            self.stack.append((tag, marked))

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre" and self.capturing is not None:
            self.page.strays.append("".join(self.capturing))
            self.capturing = None
        while self.stack:
            name, _ = self.stack.pop()
            if name == tag:
                break

    def handle_data(self, data: str) -> None:
        if self.capturing is not None:
            self.capturing.append(data)


def check(pages: list[Rendered], urls: set[str]) -> list[Problem]:
    """检查全部页面。

    Args:
        pages: 全部渲染后的页面。
        urls: 站内存在的全部网址（页面与静态文件），相对站点根。
    """
    problems: list[Problem] = []
    by_url = {page.url: page for page in pages}
    for page in pages:
        for kind, target in page.links:
            problem = _check_link(page, kind, target, by_url, urls)
            if problem:
                problems.append(problem)
    return problems


def _check_link(
    page: Rendered, kind: str, target: str, by_url: dict[str, Rendered], urls: set[str]
) -> Problem | None:
    parsed = urlparse(target)
    if parsed.scheme or parsed.netloc:
        if kind == "src" and parsed.scheme not in ("data", "blob"):
            return Problem(page.file, _line(page, target), "L505", f"外部资源 {target}")
        return None
    path, anchor = urldefrag(target)
    anchor = unquote(anchor)
    path = unquote(path.partition("?")[0])
    url = page.url
    if path:
        base = page.url if page.url.endswith("/") else posixpath.dirname(page.url)
        url = path.lstrip("/") if path.startswith("/") else posixpath.normpath(posixpath.join(base, path))
        url = "" if url == "." else url
        if path.endswith("/") and url and not url.endswith("/"):
            url += "/"
        if path.startswith("/") or url.startswith("..") or url not in urls and url + "/" not in urls and url.rstrip("/") + "/index.html" not in urls:
            code = "L503" if kind == "src" else "L501"
            what = "图片或资源" if kind == "src" else "链接"
            return Problem(page.file, _line(page, target), code, f"{what} {unquote(target)} 的目标不存在")
    destination = by_url.get(url) or by_url.get(url + "/")
    if kind == "href" and anchor and destination is not None and anchor not in destination.ids:
        where = "本页" if destination is page else destination.file
        return Problem(page.file, _line(page, "#" + anchor), "L502", f"{where} 没有锚点 #{anchor}")
    return None


def _line(page: Rendered, needle: str) -> int:
    for text in (needle, unquote(needle)):
        at = page.source.find(text)
        if at >= 0:
            return page.source.count("\n", 0, at) + 1
    return 1
