r"""公式：构建时用 KaTeX 把 TeX 变成 HTML + MathML，页面不需要 JavaScript。

``pymdownx.arithmatex``（``generic: true``）先认出公式，这里的树处理器再渲染。KaTeX 由
quickjs-ng 在进程内运行，不需要 node。结果按“KaTeX 与选项的哈希”分目录缓存在磁盘上。

每个行内公式变成 ``<math-tex data-search-exclude>``：自定义标签不会与公式内部的 ``span``
同名，Material 的搜索索引才能正确地整段跳过。行间公式外面再套一层可横向滚动的
``div.zx-math-block``。KaTeX 输出的 MathML 带着 TeX 原文，可以复制。
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import threading
import xml.etree.ElementTree as etree
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from markdown.util import AtomicString

from zhixing.context import current, report

ROOT = Path(__file__).resolve().parents[2]
KATEX_JS = ROOT / "node_modules/katex/dist/katex.min.js"
CACHE_DIR = ROOT / ".cache/zhixing/formula"

# 传 JSON 而不是字符串，任何字符都不会在语言边界上变样。
# trust 用会抛错的函数：trust: false 只把 \href 之类画成红字，不报错。
_RENDER_JS = """
(request) => {
  const [tex, display] = JSON.parse(request);
  const distrust = (c) => { throw new katex.ParseError("不允许使用 " + c.command); };
  try {
    return JSON.stringify({html: katex.renderToString(tex, {
      displayMode: display, output: "htmlAndMathml",
      strict: "error", throwOnError: true, trust: distrust,
    })});
  } catch (e) {
    return JSON.stringify({error: e.rawMessage || String(e.message || e), position: e.position});
  }
}
"""
_STRICT_PREFIX = "LaTeX-incompatible input and strict mode is set to 'error': "
_TEXT_IN_MATH = re.compile(r'(?:Accented )?Unicode text character "(.+?)" used in math mode')
_METRIC = re.compile(r"\{\{\s*m\.")
_HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})


class FormulaError(ValueError):
    """公式有错。

    Attributes:
        message: 一行原因。
        position: 出错处在 TeX 里的字符下标；KaTeX 没给时为 None。
    """

    def __init__(self, message: str, position: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.position = position


class Katex:
    """一份 KaTeX 与它的缓存；线程安全。

    Args:
        js: ``katex.min.js`` 的路径。
        cache_dir: 磁盘缓存的目录；可随时整个删掉。
    """

    def __init__(self, js: Path = KATEX_JS, cache_dir: Path = CACHE_DIR) -> None:
        self._js = js
        self._cache_dir = cache_dir
        self._memory: dict[tuple[str, bool], str] = {}
        self._lock = threading.Lock()

    def render(self, tex: str, display: bool) -> str:
        """TeX 到 KaTeX 的 HTML（不含外层包装）。

        Raises:
            FormulaError: TeX 有错。
            FileNotFoundError: 没有 KaTeX。
        """
        key = (tex, display)
        if key not in self._memory:
            path = self._cache_path(tex, display)
            html = _read_checked(path)
            if html is None:
                html = self._run(tex, display)
                _write_checked(path, html)
            self._memory[key] = html
        return self._memory[key]

    def _run(self, tex: str, display: bool) -> str:
        with self._lock:
            result = json.loads(self._function(json.dumps([tex, display])))
        if "html" in result:
            return result["html"]
        position = result.get("position")
        if position is not None:  # JavaScript 数的是 UTF-16 单元
            position = len(tex.encode("utf-16-le")[: 2 * position].decode("utf-16-le", "ignore"))
        raise FormulaError(_explain(result["error"]), position)

    def _cache_path(self, tex: str, display: bool) -> Path:
        digest = hashlib.sha256(f"{display}\n{tex}".encode()).hexdigest()
        return self._cache_dir / self._version / f"{digest}.html"

    @cached_property
    def _source(self) -> str:
        try:
            return self._js.read_text(encoding="utf-8")
        except OSError:
            raise FileNotFoundError(f"找不到 KaTeX（{self._js}），先运行 make assets") from None

    @cached_property
    def _version(self) -> str:
        """KaTeX 或选项变了，缓存就换目录。"""
        return hashlib.sha256((self._source + _RENDER_JS).encode()).hexdigest()[:16]

    @cached_property
    def _function(self) -> Any:
        import quickjs

        context = quickjs.Context()
        context.eval(self._source)
        return context.eval(_RENDER_JS)


def _explain(error: str) -> str:
    error = " ".join(error.removeprefix(_STRICT_PREFIX).split())
    if match := _TEXT_IN_MATH.match(error):
        return f"公式里直接写了“{match[1]}”，文字要放进 \\text{{}}"
    return error


def _read_checked(path: Path) -> str | None:
    """读缓存；没有、读不了或校验和不符都当作没有。"""
    try:
        checksum, _, data = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return data.decode() if checksum == _checksum(data) else None


def _write_checked(path: Path, html: str) -> None:
    """写到临时文件再改名，并发写时读者总是看到完整的一份；写不了就算了，缓存不是必需。"""
    data = html.encode()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(_checksum(data) + b"\n" + data)
        os.replace(temporary, path)


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


_katex = lru_cache(Katex)


def render(tex: str, display: bool = False) -> str:
    """TeX 到可以直接放进页面的 HTML；notebook 用它。

    Raises:
        FormulaError: TeX 有错。
        FileNotFoundError: 没有 KaTeX。
    """
    inner = _katex(KATEX_JS, CACHE_DIR).render(tex, display)
    tagged = ' class="zx-tagged"' if _is_tagged(inner) else ""
    html = f"<math-tex data-search-exclude{tagged}>{inner}</math-tex>"
    if not display:
        return html
    attributes = " ".join(f'{name}="{value}"' for name, value in _BLOCK_ATTRIBUTES.items())
    return f"<div {attributes}>{html}</div>"


_BLOCK_ATTRIBUTES = {"class": "zx-math-block", "tabindex": "0", "role": "group", "aria-label": "公式"}


class FormulaTreeprocessor(Treeprocessor):
    """把 arithmatex 认出的元素换成 KaTeX 的 HTML。"""

    def __init__(self, md: Markdown, katex: Katex) -> None:
        super().__init__(md)
        self._katex = katex

    def run(self, root: etree.Element) -> None:
        for heading in root.iter():
            if heading.tag in _HEADINGS:
                for element in filter(_is_formula, heading.iter()):
                    tex = _tex(element)
                    line = _line(rf"^[ \t>]*#{{1,6}}[ \t].*?{_inline_pattern(tex)}") or _formula_line(tex, False)
                    report("M402", f"标题里有公式 ${tex}$", line=line)
        _check_stray_dollars(root)
        for element in list(filter(_is_formula, root.iter())):
            self._replace(element)

    def _replace(self, element: etree.Element) -> None:
        tex, display = _tex(element), element.tag == "div"
        try:
            if _METRIC.search(tex):
                raise FormulaError("公式里不能引用 {{ m... }}，把数字写在公式外面")
            html = self._katex.render(tex, display)
        except FormulaError as error:
            _report_error(tex, display, error)
            element.tag = "code"
            element.set("class", "zx-error")
            element.text = AtomicString(tex)
            return
        target = element
        del element.attrib["class"]
        if display:
            element.text = None
            element.attrib.update(_BLOCK_ATTRIBUTES)
            target = etree.SubElement(element, "math-tex")
        target.tag = "math-tex"
        target.set("data-search-exclude", "")
        if _is_tagged(html):
            target.set("class", "zx-tagged")
        target.text = self.md.htmlStash.store(html)


def _is_tagged(html: str) -> bool:
    """公式有没有编号；样式认这个类，不用 ``:has``——长页里它让每次重算样式都慢。"""
    return "katex-tag" in html


def _is_formula(element: etree.Element) -> bool:
    return "arithmatex" in element.get("class", "").split()


def _tex(element: etree.Element) -> str:
    r"""去掉 arithmatex 加的 ``\(...\)`` 或 ``\[...\]``；它只对行间公式做过 HTML 转义。"""
    tex = (element.text or "")[2:-2]
    if element.tag == "div":
        for entity, character in (("&quot;", '"'), ("&gt;", ">"), ("&lt;", "<"), ("&amp;", "&")):
            tex = tex.replace(entity, character)
    return tex.strip()


def _check_stray_dollars(root: etree.Element) -> None:
    r"""正文里剩下的 ``$`` 多半是没被认出的公式，读者会看到一串源码。写成 ``\$`` 的已经被转义。"""
    for text in _prose(root):
        if text and "$" in text and not isinstance(text, AtomicString):
            for piece in re.findall(r"[^\x02\x03\n]*\$[^\x02\x03\n]*", text):
                _report_stray(piece.strip())


def _prose(element: etree.Element) -> Iterator[str | None]:
    """公式以外的文字，按文档顺序；代码是 AtomicString。"""
    if _is_formula(element):
        return
    yield element.text
    for child in element:
        yield from _prose(child)
        yield child.tail


def _report_stray(piece: str) -> None:
    line = _line(re.escape(piece))
    if "$$" in piece:
        report("M401", "行间公式没有被识别：$$ 前后要空一行，公式里不能有空行", line=line, detail=piece)
    else:
        hint = "两侧的 $ 要紧贴公式，表格里的竖线写 \\vert，美元写 \\$"
        report("M401", f"有没配对的 $：{hint}", line=line, detail=piece)


def _report_error(tex: str, display: bool, error: FormulaError) -> None:
    line = _formula_line(tex, display)
    detail = tex
    if error.position is not None:
        if line:
            line += tex.count("\n", 0, error.position)
        row_start = tex.rfind("\n", 0, error.position) + 1
        row = tex[row_start:].split("\n", 1)[0]
        detail = row + "\n" + _caret(row[: error.position - row_start])
    report("M401", error.message, line=line, detail=detail)


def _caret(before: str) -> str:
    """在等宽终端里指向 ``before`` 之后的那一列；中日韩字符占两列。"""
    return "".join(" " * (2 if ord(c) > 0x2E7F else 1) for c in before) + "^"


def _formula_line(tex: str, display: bool) -> int:
    """公式第一行在源文件里的行号。"""
    return _line(_block_pattern(tex) if display else _inline_pattern(tex)) or _first_line(tex)


def _first_line(tex: str) -> int:
    ctx = current.get()
    return ctx.line_of(tex.split("\n", 1)[0]) if ctx else 0


def _line(pattern: str) -> int:
    ctx = current.get()
    return ctx.locate(pattern) if ctx else 0


def _inline_pattern(tex: str) -> str:
    return rf"(?<![\\$])(?:\$|\\\()\s*(?P<at>{_tex_pattern(tex)})\s*(?:\$|\\\))"


def _block_pattern(tex: str) -> str:
    if tex.startswith(r"\begin{"):
        return _tex_pattern(tex)  # 环境可以直接写，不用 $$
    return rf"(?:\$\$|\\\[)[\s>]*(?P<at>{_tex_pattern(tex)})[\s>]*(?:\$\$|\\\])"


def _tex_pattern(tex: str) -> str:
    """匹配源文件里的这段 TeX：换行处可能有缩进或引用符号，双引号 YAML 里反斜杠成对。"""
    words = (re.escape(word).replace(r"\\", r"\\{1,2}") for word in tex.split())
    return r"[\s>]+".join(words)


class FormulaExtension(Extension):
    """在 ``mkdocs.yml`` 里写作 ``zhixing.formula``，放在 ``pymdownx.arithmatex`` 之后。"""

    def __init__(self, **kwargs: Any) -> None:
        self.config = {
            "katex": [str(KATEX_JS), "katex.min.js 的路径"],
            "cache": [str(CACHE_DIR), "缓存目录"],
        }
        super().__init__(**kwargs)

    def extendMarkdown(self, md: Markdown) -> None:
        katex = _katex(Path(self.getConfig("katex")), Path(self.getConfig("cache")))
        # 在 inline（20）与 toc（5）之后：目录要看到标题原来的文字
        md.treeprocessors.register(FormulaTreeprocessor(md, katex), "zhixing-formula", 1)


def makeExtension(**kwargs: Any) -> FormulaExtension:
    return FormulaExtension(**kwargs)
