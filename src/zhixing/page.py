"""把扫描与执行的结果放进页面：superfences 渲染到哪一块，就接上那一块的输出、图与标记。

渲染时看到的每一块都要能在静态扫描里按行号找到，反之亦然；对不上是错误（B211）。
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from pymdownx.superfences import SuperFencesException

from zhixing import diagram, practice
from zhixing.blocks import DISPLAY_ONLY, EXECUTABLE, Block
from zhixing.context import PageContext, current
from zhixing.errors import Problem
from zhixing.formula import FormulaError
from zhixing.formula import render as render_formula
from zhixing.inline import images
from zhixing.notebook import PLAIN_TOKENS
from zhixing.questions import Meta
from zhixing.runner import parse_console

_CAPTION = re.compile(r"\$([^$]+)\$|`([^`]+)`")


@dataclass
class Page(PageContext):
    """一页渲染时要用到的一切。

    Attributes:
        blocks: 围栏所在行 -> 静态扫描到的块。
        results: 围栏所在行 -> 执行结果。
        offset: Markdown 正文第 0 行对应源文件的行号减一（可为负：前面插了摘要）。
        rendered: 渲染时遇到的围栏所在行。
    """

    blocks: dict[int, Block] = field(default_factory=dict)
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    offset: int = 0
    rendered: set[int] = field(default_factory=set)


def wrap(meta: Meta, body: str) -> tuple[str, int]:
    """用 front matter 生成页首与页尾；返回 ``(Markdown, 页首占的行数)``。"""
    head = ['<div class="zx-meta" markdown="1">', f"{meta.level} · {meta.origin}", "</div>", ""]
    head += ['!!! abstract "30 秒答案"', "", *_indent(meta.brief), ""]
    if meta.questions:
        head += ["面试官会这样问：", "", *(f"- [{q.ask}]({q.answer})" for q in meta.questions if q.answer.startswith("#")), ""]
    tail: list[str] = [""]
    if meta.followups:
        tail += ["", "## 追问 {#followups}", ""]
        for item in meta.followups:
            tail += [f'??? question "{item.ask.replace(chr(34), "“")}"', "", *_indent(item.answer), ""]
    if meta.refs:
        tail += ["## 参考 {#references}", "", *(f"- {_reference(ref)}" for ref in meta.refs), ""]
    return "\n".join([*head, body, *tail]), len(head)


def finish_tables(html: str) -> str:
    """窄屏上表格自己横向滚动，键盘也要能滚；左上角的空格不是谁的表头。"""
    html = html.replace("<table>", '<table tabindex="0">')
    return re.sub(r"<th([^>]*)></th>", r"<td\1></td>", html)


_ATOMIC = re.compile(r"([（《「『“‘]?)(<(code|math-tex)\b.*?</\3>)([，。；：、！？）》」』”’]*)", re.S)
_LEADING_PARTS = re.compile(r'(<span class="?katex-html"? [^>]*>)(<span class="?katex-base"?>.*)(?=<span class="?katex-base"?>)', re.S)


def keep_punctuation(html: str) -> str:
    """行内代码、公式与贴着它的标点不分在两行：浏览器在行内块的两边总肯换行，标点会落到行首。

    公式是一串行内块，只有最后一块要与后面的标点连着，前面的照样可以换行。
    """

    def keep(match: re.Match[str]) -> str:
        if not match[1] and not match[4]:
            return match[0]
        inner = _LEADING_PARTS.sub(r'\1<span class="zx-free">\2</span>', match[2]) if match[3] == "math-tex" else match[2]
        return f'<span class="zx-keep">{match[1]}{inner}{match[4]}</span>'

    return _ATOMIC.sub(keep, html)


def _indent(text: str) -> list[str]:
    return ["    " + line if line else "" for line in text.split("\n")]


def _reference(ref: str) -> str:
    """``arXiv:2106.09685 标题`` 与含网址的文字变成链接，其余照写。"""
    match = re.match(r"arXiv:(\d{4}\.\d{4,5})(?:v\d+)?\s*(.*)$", ref)
    if match:
        return f"{match[2]} [arXiv:{match[1]}](https://arxiv.org/abs/{match[1]})".strip()
    return re.sub(r"https?://[^\s，。；）]+", lambda m: f"<{m.group()}>", ref)


class BlocksExtension(Extension):
    """在 ``mkdocs.yml`` 里写作 ``zhixing.page``，放在 ``pymdownx.superfences`` 之后。"""

    def extendMarkdown(self, md: Markdown) -> None:
        fences = md.preprocessors["fenced_code_block"]
        process = fences.process_nested_block

        def remember(ws: str, content: str, start: int, end: int) -> None:
            fences.zhixing_start = start
            process(ws, content, start, end)

        fences.process_nested_block = remember
        # superfences 从后往前试，最后加入的先被问到；什么语言、什么选项都收下，
        # 选项由静态扫描校验——默认的校验遇到未知选项会丢掉围栏，还把后面的代码与正文颠倒
        fences.extension.superfences.append(
            {
                "name": "zhixing",
                "test": lambda language: True,
                "validator": lambda language, inputs, options, attrs, md: options.update(inputs) or True,
                "formatter": _format,
                "reset": None,
            }
        )


def _format(src: str, language: str, options: dict[str, Any], md: Markdown, **kwargs: Any) -> str:
    fences = md.preprocessors["fenced_code_block"]
    fences.get_hl_settings()
    page = current.get()
    start = fences.zhixing_start
    if not isinstance(page, Page):
        block = None
    else:
        line = start + 1 + page.offset
        page.rendered.add(line)
        block = page.blocks.get(line)
        told = any(p.file == page.file and p.line == line and p.code == "B211" for p in page.problems)
        if block is None and not told:  # 在 HTML 注释里的，静态扫描已经报过
            page.problems.append(
                Problem(page.file, max(line, 1), "B211", "构建时渲染了静态扫描没有找到的代码块")
            )
    if block is None:
        return _highlight(fences, src, language, {}, md, kwargs)
    try:
        return _render(fences, block, options, md, kwargs, page)
    except Exception as error:  # superfences 会吞掉一般异常并丢掉围栏
        raise SuperFencesException(f"{block.file}:{block.line}: {error!r}") from error


def _render(fences: Any, block: Block, options: dict[str, Any], md: Markdown, kwargs: Any, page: Page) -> str:
    if block.lang == "mermaid":
        return f'<div class="zx-block" data-zx="{block.line}">{diagram.render(block.source, line=block.line, ctx=page)}</div>'
    visible = {k: v for k, v in options.items() if k in ("title", "hl_lines", "linenums")}
    lang = block.lang if block.lang in EXECUTABLE or block.lang in DISPLAY_ONLY else "text"
    if block.origin:
        visible.setdefault("title", block.origin[0])
    parts = [_highlight(fences, block.source, lang, visible, md, kwargs)]
    result = page.results.get(block.line)
    told = False
    if block.skip:
        parts.append(_badge("skip", f"未执行：{block.skip}"))
    elif result is not None:
        shows = block.output == "show" and result["out"].strip()
        told = block.expected is not None and not shows and not result["figs"]  # 后面紧跟着期望输出
        kind = "pass zx-badge--joined" if shows or told else "pass"
        parts.append(_badge(kind, _passed(block, result), f"构建时执行，{_duration(result['seconds'])}"))
        if shows:
            shown = _highlight(fences, result["out"].rstrip(), "text", {"title": "输出（本次构建）"}, md, kwargs)
            parts.append(f'<div class="zx-output">{shown}</div>')
        for i, svg in enumerate(result["figs"]):
            stem = page.file.removeprefix("docs/").removesuffix(".md")
            figure = page.artifacts.publish(f"{stem}/{len(page.rendered)}-{i}", svg)
            caption = f"<figcaption>{_caption(block.fig)}</figcaption>" if i == 0 else ""
            parts.append(f'<figure class="zx-figure">{images(figure, _plain(block.fig), page)}{caption}</figure>')
    if block.practice == practice.TESTS:
        parts[0] = f'<details class="zx-tests"><summary>测试代码</summary>{parts[0]}</details>'
    if block.practice == practice.STARTER:
        entry = html.escape(practice.entry_of(block.source))
        return f'<div class="zx-block zx-practice" data-zx="{block.line}" data-entry="{entry}">{"".join(parts)}</div>'
    kind = " zx-expected" if block.bound else " zx-block--told" if told else ""
    copy = f' data-copy="{html.escape(commands)}"' if (commands := _commands(block)) else ""
    return f'<div class="zx-block{kind}" data-zx="{block.line}"{copy}>{"".join(parts)}</div>'


def _commands(block: Block) -> str:
    """终端与交互会话里读者要复制的只有命令，不含提示符与输出；Material 的复制按钮认 ``data-copy``。"""
    if block.lang == "console":
        return "\n".join(command for _, command, _ in parse_console(block.source))
    if block.lang == "pycon":
        return "\n".join(re.findall(r"^(?:>>>|\.\.\.) ?(.*)$", block.source, re.M)).rstrip()
    return ""


def _highlight(fences: Any, src: str, language: str, options: dict[str, Any], md: Markdown, kwargs: Any) -> str:
    shown = fences.highlight(
        src=src,
        language=language,
        options=dict(options),
        md=md,
        classes=kwargs.get("classes"),
        id_value=kwargs.get("id_value", ""),
        attrs={},
    )
    return re.sub(*PLAIN_TOKENS, shown)


def _badge(kind: str, text: str, title: str = "") -> str:
    # 自定义元素：Material 的索引器按标签名配对来跳过，用 span 会被内层的 span 提前结束
    tip = f' title="{html.escape(title)}"' if title else ""
    return f'<zx-badge class="zx-badge zx-badge--{kind}" data-search-exclude{tip}>{html.escape(text)}</zx-badge>'


def _passed(block: Block, result: dict[str, Any]) -> str:
    if block.practice == practice.STARTER:
        return "起始代码：构建时证明它不通过测试"
    if block.practice == practice.TESTS:
        return f"已运行，参考解 {block.solution} 通过"
    if block.raises:
        return f"已运行，按声明{'' if block.lang == 'bash' else '抛出'} {block.raises}"
    return "已运行，输出一致" if block.expected else "已运行"


def _duration(seconds: float) -> str:
    for limit in (0.1, 1, 10):
        if seconds < limit:
            return f"不到 {limit:g} 秒"
    return f"约 {seconds:.0f} 秒"


def _caption(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        if match[2] is not None:
            return f"<code>{html.escape(html.unescape(match[2]))}</code>"
        try:
            return render_formula(html.unescape(match[1]))
        except FormulaError:
            return match[0]

    return _CAPTION.sub(replace, html.escape(text, quote=False))


def _plain(text: str) -> str:
    return re.sub(r"[$`]", "", text)


def makeExtension(**kwargs: Any) -> BlocksExtension:
    return BlocksExtension(**kwargs)
