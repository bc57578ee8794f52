"""示例 notebook：``examples/<id>.py`` 是 jupytext percent 格式的真文件，由同一个引擎执行。"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from zhixing.blocks import DEFAULT_MEMORY, Block, read_text, scan_text
from zhixing.errors import ContentError, Problem

_HEADER = re.compile(r"\A# ---\n((?:#.*\n)*?)# ---[ \t]*(?:\n|\Z)")
_CELL = re.compile(r"^# %%(?!%)[^\[\n]*(?P<kind>\[markdown\])?[^\n]*$")
_FIELDS = {"id", "title", "needs", "timeout", "memory_mib", "threads"}
MAX_THREADS = 16


@dataclass(frozen=True)
class Cell:
    kind: str  # markdown 或 code
    source: str
    line: int  # 首行（1 起）


@dataclass
class Example:
    """一个示例：元数据、全部单元格、可执行的块。"""

    file: str
    id: str
    title: str
    needs: list[str] = field(default_factory=list)
    needs_line: int = 1
    threads: int = 1
    cells: list[Cell] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)


def find(root: Path) -> list[Path]:
    """全部示例文件：``examples/`` 顶层有头部或单元格标记的 ``.py``。"""
    marks = re.compile(rb"\A(?:\xef\xbb\xbf)?# ---|^# %%", re.M)
    return [p for p in sorted((root / "examples").glob("*.py")) if marks.search(p.read_bytes())]


def load(path: Path, root: Path) -> Example:
    """解析一个示例。

    Raises:
        ContentError: 头部缺失、字段不合法，或有不会执行的代码。
    """
    file = path.relative_to(root).as_posix()
    text = read_text(path, file)

    def bad(reason: str, line: int = 1, code: str = "E602") -> ContentError:
        return ContentError([Problem(file, line, code, reason)])

    header = _HEADER.match(text)
    if not header:
        raise bad("文件开头缺少 # --- 头部")
    try:
        meta = yaml.safe_load(re.sub(r"^# ?", "", header[1], flags=re.M))["zhixing"]
        example, title = meta["id"], meta["title"]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise bad(f"头部不是合法的 YAML：{getattr(error, 'problem', error)}", mark.line + 2 if mark else 1) from None
    except (TypeError, KeyError, ValueError) as error:
        raise bad(f"头部应含 zhixing: id 与 title（{error!r}）") from None

    def line_of(name: object) -> int:
        found = re.search(rf"^#\s+{re.escape(str(name))}\s*:", header[0], re.M)
        return header[0].count("\n", 0, found.start()) + 1 if found else 1

    for name in meta:
        if name not in _FIELDS:
            raise bad(f"头部有未知字段 {name!r}", line_of(name))
    if example != path.stem:
        raise bad(f"id {example!r} 与文件名 {path.stem!r} 不一致", line_of("id"))
    if not isinstance(title, str):
        raise bad(f"title 应是文字，得到 {title!r}", line_of("title"))
    needs = meta.get("needs") or []
    if not isinstance(needs, list) or not all(isinstance(n, str) for n in needs):
        raise bad(f"needs 应是示例 id 的列表，得到 {needs!r}", line_of("needs"))
    timeout, memory = meta.get("timeout", 120), meta.get("memory_mib", DEFAULT_MEMORY >> 20)
    for name, value, low, high in (("timeout", timeout, 0, 3600), ("memory_mib", memory, 16, 1 << 20)):
        if type(value) not in (int, float) or not low < value <= high:
            raise bad(f"{name} 应是 {low} 到 {high} 之间的数，得到 {value!r}", line_of(name))
    threads = meta.get("threads", 1)
    if type(threads) is not int or not 1 <= threads <= MAX_THREADS:
        raise bad(f"threads 应是 1 到 {MAX_THREADS} 之间的整数，得到 {threads!r}", line_of("threads"))
    result = Example(file, example, title, needs, line_of("needs"), threads)
    result.cells = split_cells(text, header[0].count("\n"))
    for cell in result.cells:
        if cell.kind == "code":
            result.blocks.append(
                Block(file, cell.line - 1, 0, "python", cell.source, timeout=timeout, memory=int(memory) << 20)
            )
            continue
        for block in scan_text(cell.source, file, root).blocks:
            if block.runs:
                raise bad("示例的文字单元格里的代码不会执行，改成代码单元格", cell.line + block.line - 1, "B206")
        for i, line in enumerate(text.split("\n")[cell.line - 1 :][: cell.source.count("\n") + 1]):
            if line.strip() and not line.startswith("#"):
                raise bad("文字单元格里有没注释掉的行", cell.line + i)
    return result


def split_cells(text: str, skip: int = 0) -> list[Cell]:
    """从第 ``skip`` 行之后按 ``# %%`` 切开；``[markdown]`` 单元格去掉每行开头的 ``# ``。

    第一个标记之前的代码自成一格。
    """
    lines = text.split("\n")
    marks = [i for i, line in enumerate(lines) if i >= skip and _CELL.match(line)]
    cells = []
    for start, end in zip([skip - 1, *marks], [*marks, len(lines)], strict=True):
        body = lines[start + 1 : end]
        while body and not body[-1].strip():
            body.pop()
        first = start + 2
        while body and not body[0].strip():
            body.pop(0)
            first += 1
        markdown = start >= skip and bool(_CELL.match(lines[start])["kind"])
        if markdown:
            body = [re.sub(r"^# ?", "", line) for line in body]
        if body:
            cells.append(Cell("markdown" if markdown else "code", "\n".join(body), first))
    return cells


# ---- 变成 .ipynb，交给 mkdocs-jupyter 渲染 ----

_MATH = re.compile(r"\$\$(?P<display>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$])?)\$(?!\d)", re.S)
_TOKEN = "ZXMATH{}ZX"


def to_ipynb(
    example: Example, results: list[dict], figure_html: Callable[[str, int, int], str], problems: list[Problem]
) -> tuple[str, list[str]]:
    """执行结果写成 notebook。

    公式先换成占位符，渲染完再由 :func:`finish_html` 换回 KaTeX 的 HTML——
    nbconvert 自己的公式要靠 MathJax，离线看不到。

    Args:
        example: 示例。
        results: 每个可执行单元格的结果。
        figure_html: ``(svg, 第几格, 第几张) -> HTML``。
        problems: 公式错误登记在这里。

    Returns:
        ``(notebook 的 JSON, 每个占位符对应的 HTML)``。
    """
    import nbformat

    formulas: list[str] = []
    cells = []
    outcomes = iter(results)
    for index, cell in enumerate(example.cells):
        if cell.kind == "markdown":
            cells.append(nbformat.v4.new_markdown_cell(_stash_math(example.file, cell, formulas, problems), id=f"c{index}"))
            continue
        result = next(outcomes, None)
        outputs = []
        if result is not None:
            if result["out"].strip():
                outputs.append(nbformat.v4.new_output("stream", name="stdout", text=result["out"]))
            for i, svg in enumerate(result["figs"]):
                data = {"text/html": figure_html(svg, index, i), "text/plain": "<Figure>"}
                outputs.append(nbformat.v4.new_output("display_data", data=data))
        cells.append(nbformat.v4.new_code_cell(cell.source, outputs=outputs, id=f"c{index}"))
    book = nbformat.v4.new_notebook(cells=cells)
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book.metadata["title"] = example.title
    return nbformat.writes(book), formulas


def _stash_math(file: str, cell: Cell, formulas: list[str], problems: list[Problem]) -> str:
    from zhixing.formula import FormulaError, render

    def replace(match: re.Match[str]) -> str:
        display = match["display"] is not None
        try:
            rendered = render((match["display"] or match["inline"]).strip(), display)
        except FormulaError as error:
            line = cell.line + cell.source.count("\n", 0, match.start())
            problems.append(Problem(file, line, "M401", str(error)))
            rendered = ""
        formulas.append(rendered)
        return _TOKEN.format(len(formulas) - 1)

    for i, line in enumerate(cell.source.split("\n")):
        if line.startswith("#") and _MATH.search(line):
            problems.append(Problem(file, cell.line + i, "M402", "示例的标题里有公式"))
    parts = re.split(r"(```.*?```|`[^`\n]+`)", cell.source, flags=re.S)
    parts[::2] = [_MATH.sub(replace, part) for part in parts[::2]]
    return "".join(parts)


# 高亮里的名字、空白、标点、运算符用正文的颜色：不必各套一层标签，长页里少几千个元素
PLAIN_TOKENS = (r'<span(?: class="[nwpo]")?>([^<]*)</span>', r"\1")

# mkdocs-jupyter 的皮肤（每页 560 KB 样式、自己的复制按钮、折叠条）换成与别的页一样的
_UNSKIN = [
    (r"<style[^>]*>.*?</style>|<script[^>]*>.*?</script>|<link[^>]*>|<!--.*?-->", ""),
    (r'<div class="zeroclipboard-container">.*?</clipboard-copy>\s*</div>', ""),
    (r'<div class="clipboard-copy-txt"[^>]*>.*?</div>', ""),
    (r'<div class="jp-Collapser[^>]*>\s*</div>', ""),
    (
        r'<div class="highlight-ipynb hl-python"><pre>(.*?)</pre></div>',
        r'<div class="language-python highlight"><pre><code>\1</code></pre></div>',
    ),
    (r'<(div|a) class="(?:jp-|CodeMirror)[^"]*"[^>]*>', r"<\1>"),
    PLAIN_TOKENS,
    (
        r'<span class="(\w+)">[^<]*(?:</span>\s*<span class="\1">[^<]*)+</span>',  # 相邻同类的合成一个
        lambda m: re.sub(r'</span>(\s*)<span class="\w+">', r"\1", m[0]),
    ),
    (r'<span class="(\w{1,3})">([^<]*)</span>', r"<i class=\1>\2</i>"),  # 高亮占一半体积：短的标签
    (r"<pre>(?!<code>)(.*?)</pre>", r"<pre><code>\1</code></pre>"),  # 文字输出
]


def finish_html(body: str, formulas: list[str], slugify: Callable[[str, str], str]) -> tuple[str, list[dict]]:
    """修整 mkdocs-jupyter 渲染出的正文：换掉皮肤、换回公式、给中文标题正确的锚点。

    Returns:
        ``(HTML, 目录 token)``。
    """
    for pattern, replacement in _UNSKIN:
        body = re.sub(pattern, replacement, body, flags=re.S)
    body = _unwrap(body)
    for i, formula in enumerate(formulas):
        body = body.replace(f"<p>{_TOKEN.format(i)}</p>", formula).replace(_TOKEN.format(i), formula)
    tokens: list[dict] = []
    used: set[str] = set()

    def heading(match: re.Match[str]) -> str:
        level, inner = int(match["level"]), re.sub(r'<a class="anchor-link".*?</a>', "", match["inner"], flags=re.S)
        name = re.sub(r"<[^>]+>", "", inner).strip()
        anchor = base = slugify(name, "-") or "section"
        suffix = 1
        while anchor in used:
            suffix += 1
            anchor = f"{base}-{suffix}"
        used.add(anchor)
        tokens.append({"level": level, "id": anchor, "name": name, "html": name, "data-toc-label": "", "children": []})
        link = f'<a class="headerlink" href="#{anchor}" title="永久链接">¶</a>'
        return f'<h{level} id="{anchor}">{inner}{link}</h{level}>'

    body = re.sub(r"<h(?P<level>[1-6])[^>]*>(?P<inner>.*?)</h(?P=level)>", heading, body, flags=re.S)
    return body, _nest(tokens)


def _unwrap(body: str) -> str:
    """去掉没有属性的 ``<div>``：皮肤换掉以后，它们只剩层层包装。"""
    parts = re.split(r"(<div[^>]*>|</div>)", body)
    kept: list[bool] = []
    for i in range(1, len(parts), 2):
        if parts[i] != "</div>":
            kept.append(parts[i] != "<div>")
            parts[i] *= kept[-1]
        elif kept and not kept.pop():
            parts[i] = "\n"
    return "".join(parts)


# 块级元素两侧的空白，浏览器本来就不显示
_BLOCK_TAG = r"</?(?:article|body|div|figure|footer|form|h[1-6]|head|header|html|li|link|main|meta|nav|ol|p|section|title|ul)\b[^<>]*>"
_AROUND_BLOCKS = re.compile(rf"\n?({_BLOCK_TAG})\n?")


def squeeze(page: str) -> str:
    """不改变含义地压缩 HTML：换行与缩进只留一个换行，去掉注释与不必要的引号；``<pre>`` 与脚本原样。"""
    parts = re.split(r"(<(?:pre|script|style|textarea)\b.*?</(?:pre|script|style|textarea)>)", page, flags=re.S)
    for i in range(0, len(parts), 2):
        text = re.sub(r"<!--.*?-->", "", parts[i], flags=re.S)
        text = re.sub(r"\s*\n\s*", "\n", text)
        text = text.replace(" data-search-exclude", "")  # 索引已经建好
        text = _AROUND_BLOCKS.sub(r"\1", text)
        text = re.sub(r"(<span class=\"md-ellipsis\">)\s*|\s*(</span>)\n*(?=</a>|</label>)", r"\1\2", text)
        # HTML 里的 <svg> 与 <math> 不需要命名空间
        text = re.sub(r' xmlns="http://www\.w3\.org/(?:2000/svg|1998/Math/MathML)"', "", text)
        parts[i] = re.sub(r"<[a-z][^<>]*>", _unquote, text)
    return re.sub(r'(<script id="__config"[^>]*>)(.*?)(?=</script>)', _compact, "".join(parts))


def _compact(config: re.Match[str]) -> str:
    """主题的设置：汉字不必写成 \\u 转义。"""
    return config[1] + json.dumps(json.loads(config[2]), ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")


def _unquote(tag: re.Match[str]) -> str:
    if "'" in tag[0]:
        return tag[0]  # 单引号的值里可能有双引号
    short = re.sub(r'( style="[^"]*);"', r'\1"', tag[0].replace("margin-left:0em;", ""))  # KaTeX 写的零
    # 链接、资源与 id 留着引号：检查站外请求、合书的脚本会按引号去找
    return re.sub(r'(?<!src|rel)(?<! id)(?<!href|name)="([^\s"=<>`]*[^\s"=<>`/])"(?=[\s>])', r"=\1", short)


def _nest(tokens: list[dict]) -> list[dict]:
    root: list[dict] = []
    path: list[dict] = []
    for token in tokens:
        while path and path[-1]["level"] >= token["level"]:
            path.pop()
        (path[-1]["children"] if path else root).append(token)
        path.append(token)
    return root
