"""看渲染结果：每个内链、锚点、图片都存在，每个看得见的代码块都登记过。

以渲染后的 HTML 为准（不会漏），再回源文件里找行号（给人看）。
"""

from __future__ import annotations

import html
import posixpath
import re
from dataclasses import dataclass, field
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
        _read(self)


# 一个标签、一段注释或一段脚本；注释与脚本里的东西读者看不见。
# 公式与高亮里成千上万个标签都没有我们要的属性，正则在 C 里跳过它们，比 html.parser 快一个量级
_TAG = re.compile(
    r"""<(?!/?span(?:\ (?:class|style|aria-hidden)="[^"]*")*+>)(?:
        !--.*?(?:-->|\Z)
      | (?P<raw>script|style)\b(?P<head>[^>]*+)>.*?(?:</(?P=raw)\s*>|\Z)
      | (?P<close>/?)(?P<nest>div|pre)(?=[\s/>])(?P<nested>(?:[^>"']++|"[^"]*"|'[^']*')*+)>
      | (?P<tag>[a-z][^\s/>]*+)\s(?P<attrs>(?:[^>"']++|"[^"]*"|'[^']*')*+)>
    )""",
    re.S | re.I | re.X,
)
_ATTR = re.compile(r"""([^\s=>/"']+)(?:\s*=\s*("[^"]*"|'[^']*'|[^\s>"']+))?""")
_SOURCES = frozenset("img video audio source iframe embed object script".split())


def _attributes(text: str) -> dict[str, str]:
    return {name.lower(): html.unescape(value.strip("\"'")) for name, value in _ATTR.findall(text)}


def _read(page: Rendered) -> None:
    """填好 ``page`` 的 id、链接、代码块与没登记的 ``<pre>``。"""
    nesting: list[tuple[str, bool]] = []  # 打开着的 div 与 pre；是不是登记过的代码块
    registered = 0
    captured: int | None = None
    for match in _TAG.finditer(page.html):
        if match["raw"]:
            values = _attributes(match["head"])
            if values.get("id"):
                page.ids.add(values["id"])
            if values.get("src"):
                page.links.append(("src", values["src"]))
            continue
        name = (match["nest"] or match["tag"] or "").lower()
        if match["close"]:
            if name not in (n for n, _ in nesting):
                continue
            if name == "pre" and captured is not None:
                page.strays.append(_text(page.html[captured : match.start()]))
                captured = None
            while nesting:
                closed, known = nesting.pop()
                registered -= known
                if closed == name:
                    break
            continue
        if not name:
            continue  # 注释
        attrs = match["nested"] if match["nest"] else match["attrs"]
        values = _attributes(attrs) if attrs else {}
        if values.get("id"):
            page.ids.add(values["id"])
        if name == "a":
            if values.get("name"):
                page.ids.add(values["name"])
            if values.get("href"):
                page.links.append(("href", values["href"]))
        elif name == "link" and values.get("href"):
            page.links.append(("src", values["href"]))
        elif name in _SOURCES:
            page.links += [("src", values[key]) for key in ("src", "data", "poster") if values.get(key)]
        if match["nest"]:
            known = "data-zx" in values
            if known:
                page.blocks.add(int(values["data-zx"]))
            if name == "pre" and not registered and not known:
                captured = match.end()
            nesting.append((name, known))
            registered += known


def _text(fragment: str) -> str:
    return html.unescape(re.sub(r"<!--.*?-->|<[^>]*>", "", fragment, flags=re.S))


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
