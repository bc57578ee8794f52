"""Mermaid 图：构建时由 merman 变成内联 SVG，读者的浏览器不加载 Mermaid。

一张 SVG 同时适合亮色与暗色：先用约定的“哨兵色”渲染，再把它们换成 CSS 变量，颜色随主题变。
PDF 版换成实色，文字用 SVG 文本而不是 foreignObject。
"""

from __future__ import annotations

import atexit
import hashlib
import html
import json
import math
import os
import platform
import re
from collections import Counter
from functools import lru_cache
from typing import Any

from zhixing.context import PageContext, current, report

# 颜色的用途 -> (屏幕, 打印)。前一组的名字由 merman 规定。
_ROLES = {
    "canvas": ("transparent", "none"),
    "surface": ("var(--md-mermaid-node-bg-color)", "#eef0fb"),
    "surface-alt": ("var(--md-mermaid-label-bg-color)", "#ffffff"),
    "text": ("var(--md-mermaid-label-fg-color)", "#222222"),
    "subtle-text": ("var(--md-default-fg-color--light)", "#555555"),
    "border": ("var(--md-mermaid-node-fg-color)", "#4051b5"),
    "line": ("var(--md-mermaid-edge-color)", "#555555"),
    "note-background": ("var(--zx-diagram-note-bg,#f9a82533)", "#fff8e1"),
    "note-border": ("var(--zx-diagram-note-fg,#f9a825)", "#b8860b"),
    "success": ("var(--zx-diagram-success,#2e7d32)", "#2e7d32"),
    "warning": ("var(--zx-diagram-warning,#ef6c00)", "#ef6c00"),
    "error": ("var(--zx-diagram-error,#c62828)", "#c62828"),
    "edge-label-background": ("var(--md-mermaid-label-bg-color)", "#ffffff"),
    "cluster-background": ("var(--md-default-fg-color--lightest)", "#f4f4f4"),
    "cluster-border": ("var(--md-default-fg-color--lighter)", "#aaaaaa"),
}
# 分类色（饼图、思维导图、时间线……）：屏幕上半透明，亮底暗底都衬得住文字
_HUES = {
    "hue-1": ("var(--zx-diagram-1,#4c78a880)", "#a5bbd3"),
    "hue-2": ("var(--zx-diagram-2,#f5851880)", "#fac28b"),
    "hue-3": ("var(--zx-diagram-3,#54a24b80)", "#a9d0a5"),
    "hue-4": ("var(--zx-diagram-4,#e4575680)", "#f1abaa"),
    "hue-5": ("var(--zx-diagram-5,#72b7b280)", "#b8dbd8"),
    "hue-6": ("var(--zx-diagram-6,#b279a280)", "#d8bcd0"),
    "hue-7": ("var(--zx-diagram-7,#eeca3b80)", "#f6e49d"),
    "hue-8": ("var(--zx-diagram-8,#9d755d80)", "#cebaae"),
}
_COLORS = _ROLES | _HUES
# 第 i 种用途的哨兵色是 #ii5aa5：不像任何人会写的颜色
_SENTINELS = {name: f"#{i:02x}5aa5" for i, name in enumerate(_COLORS)}
_SENTINEL = re.compile(r"#([0-9a-f]{2})5aa5\b|rgba?\((\d+), 90, 165(?:, [\d.]+)?\)", re.I)

# 读者的字体可能比 merman 估的宽（西文最多约两成）：标签向两侧均匀伸出，不裁掉
_LABEL_CSS = (
    "#id foreignObject{overflow:visible;}"
    '#id foreignObject>div[style*="nowrap"][style*="text-align: center"]'
    "{display:block!important;width:200%!important;max-width:none!important;margin-left:-50%;background:none;}"
    "#id .members-group foreignObject>div,#id .methods-group foreignObject>div"
    "{margin-left:0!important;text-align:left!important;}"
    "#id .edgeLabel p{display:inline-block;}"
)
_PRINT_FONT = "Noto Sans CJK SC, Noto Sans SC, Source Han Sans SC, sans-serif"
_KINDS = {
    "flowchart-v2": "流程图",
    "sequence": "时序图",
    "stateDiagram": "状态图",
    "classDiagram": "类图",
    "er": "实体关系图",
    "gantt": "甘特图",
    "pie": "饼图",
    "mindmap": "思维导图",
    "timeline": "时间线",
    "gitGraph": "提交图",
}
_FILL = re.compile(r"\s*(?:classDef|style)\s.*\bfill\s*:(?!\s*(?:none|transparent))")
_COLOR = re.compile(r"(?<![\w-])color\s*:")
_ALT_LENGTH = 200  # 字；再长就不如正文说明了


def render(source: str, *, line: int = 0, ctx: PageContext | None = None) -> str:
    """Mermaid 源码到 ``<figure class="zx-diagram">``。

    Args:
        source: 围栏里的内容。有一行 ``%% alt: 说明`` 时用作替代文本，否则用图里的文字拼。
        line: 围栏开头在源文件里的行号。
        ctx: 页面上下文，缺省取当前页。

    Returns:
        图有错或没有装 merman 时返回源码的 ``<pre>``，错误（M403）登记在上下文里；
        环境变量 ``ZHIXING_DIAGRAMS=source`` 表示没有 merman 也照样构建，图以源码显示。

    Raises:
        ContentError: 图有错，且没有上下文可登记。
    """
    ctx = ctx or current.get()
    try:
        import merman
    except ImportError:
        return _without_merman(source, line, ctx)
    for_print = bool(ctx and ctx.for_print)
    diagram_id = _diagram_id(source, ctx)
    try:
        svg = _engine(for_print).render_svg(source, json.dumps({"svg": {"diagram_id": diagram_id}}))
    except merman.MermanError as error:
        _report_error(source, str(getattr(error, "message", error)), line, ctx)
        return f'<pre class="zx-error"><code>{html.escape(source)}</code></pre>'
    _check_contrast(source, line, ctx)
    label = html.escape(_alt(source, svg))
    return f'<figure class="zx-diagram" role="img" aria-label="{label}">{_adapt(svg, diagram_id, for_print)}</figure>'


def _without_merman(source: str, line: int, ctx: PageContext | None) -> str:
    if os.environ.get("ZHIXING_DIAGRAMS") == "source":
        return f'<pre class="zx-diagram-source"><code>{html.escape(source)}</code></pre>'
    machine = f"{platform.system()} {platform.machine()}"
    reason = (
        f"这台机器（{machine}）没有装 merman。Linux 上它只有 x86-64、glibc 2.35 以上的轮子；"
        "换一台机器构建，或设环境变量 ZHIXING_DIAGRAMS=source，先以源码显示图"
    )
    report("M403", reason, line=line, ctx=ctx)
    return f'<pre class="zx-error"><code>{html.escape(source)}</code></pre>'


def _diagram_id(source: str, ctx: PageContext | None) -> str:
    """页面内唯一（同一张图出现两次也是），合成一本书时页面之间也唯一，且每次构建相同。"""
    name = "zx-" + hashlib.sha256(f"{ctx.file if ctx else ''}\n{source}".encode()).hexdigest()[:10]
    again = ctx.ordinal(name) if ctx else 0
    return f"{name}-{again + 1}" if again else name


@lru_cache
def _engine(for_print: bool) -> Any:
    import merman

    options: dict[str, Any] = {
        "version": 2,
        "presentation": {
            "theme": {
                "roles": {role: _SENTINELS[role] for role in _ROLES},
                "font_family": _PRINT_FONT if for_print else "inherit",
            }
        },
        "svg": {"pipeline": "resvg-safe" if for_print else "parity"},
        "site_config": {
            "look": "classic",
            "layout": "dagre",  # 保持源码里的左右次序；merman 缺省的 elk 会重排
            "htmlLabels": not for_print,
            "flowchart": {"minNodeWidth": 0, "htmlLabels": not for_print},
            "state": {"minNodeWidth": 0},
            "themeVariables": _theme_variables(),
        },
    }
    return merman.MermanEngine(json.dumps(options), None)


atexit.register(_engine.cache_clear)  # 等解释器拆掉模块之后再析构，merman 会报错


def _theme_variables() -> dict[str, Any]:
    """merman 的角色没有覆盖的颜色；不设的话会由哨兵色推算出别的颜色。"""
    hues = [_SENTINELS[name] for name in _HUES]
    text, line, page = (_SENTINELS[name] for name in ("text", "line", "surface-alt"))
    variables: dict[str, Any] = {"sequenceNumberColor": page, "xyChart": {"plotColorPalette": ",".join(hues)}}
    for i in range(12):
        hue = hues[i % len(hues)]
        variables |= {f"cScale{i}": hue, f"cScaleLabel{i}": text, f"cScalePeer{i}": line, f"cScaleInv{i}": line}
        variables |= {f"pie{i + 1}": hue}
    for i, hue in enumerate(hues):
        variables |= {f"git{i}": hue, f"gitInv{i}": line, f"gitBranchLabel{i}": text, f"fillType{i}": hue}
    return variables


def _adapt(svg: str, diagram_id: str, for_print: bool) -> str:
    """把 merman 的 SVG 改成适合放进页面的样子。"""
    colors = [pair[for_print] for pair in _COLORS.values()]

    def recolor(match: re.Match[str]) -> str:
        index = int(match[1], 16) if match[1] else int(match[2])
        return colors[index] if index < len(colors) else match[0]

    svg = _SENTINEL.sub(recolor, svg)
    for literal, role in (('fill="white"', "surface-alt"), ('stroke="black"', "line")):  # merman 写死的
        svg = svg.replace(literal, literal.split('"')[0] + f'"{_COLORS[role][for_print]}"')
    svg = _prefix_ids(svg, diagram_id)
    svg = re.sub(r"<svg ([^>]*)>", lambda m: _root_tag(m[1], for_print), svg, count=1)
    svg = re.sub(r' data-points="[^"]*"', "", svg)  # 只有 Mermaid 的编辑器用它
    svg = _round_paths(svg)
    svg = svg.replace("</style>", _LABEL_CSS.replace("#id", f"#{diagram_id}") + "</style>", 1)
    # 相邻的标签之间要有空白，搜索索引才不会把它们连成一个词
    return svg.replace("</text>", "</text>\n")


# 排版算出来的长小数；图标里紧挨着写的短小数（.181.305 是两个数）不碰
_LONG = re.compile(r"(?:(?<![\d.])|(?=-))-?\d+\.\d{5,}(?![\d.])")


def _round_paths(svg: str) -> str:
    """路径坐标取到十分之一像素，描两遍的短弧合成一条折线：圆角框的一条边有几百个十几位小数的点。"""

    def shorten(d: re.Match[str]) -> str:
        return _join_strokes(_LONG.sub(lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), d[0]))

    return re.sub(r' d="[^"]*"', shorten, svg)


_STEP = re.compile(r"(M|C)([-\d. ,]+?)(?= ?[MC]|$)")
_STRAIGHT = 0.3  # 像素：控制点离弦不到这么远，弧就是直的


def _join_strokes(d: str) -> str:
    """圆角框的边框是几百段直的三次曲线，手绘风格的还描两遍：合成折线，体积剩一成。别的路径原样返回。"""
    body = d[4:-1]
    steps = [(m[1], [float(n) for n in re.split("[ ,]+", m[2].strip())]) for m in _STEP.finditer(body)]
    if len(steps) < 8 or _STEP.sub("", body).strip() or any(len(n) != (2 if kind == "M" else 6) for kind, n in steps):
        return d
    joined, drawn, pen, at = [], set(), (0.0, 0.0), None  # pen：画到哪里；at：写下的折线到哪里
    for kind, numbers in steps:
        if kind == "M":
            pen = tuple(numbers)
            continue
        (x0, y0), (x, y) = pen, numbers[4:]
        length = math.hypot(x - x0, y - y0) or 1.0
        bends = (abs((x - x0) * (y0 - v) - (x0 - u) * (y - y0)) / length for u, v in (numbers[:2], numbers[2:4]))
        if max(bends) > _STRAIGHT:
            return d
        if (x0, y0, x, y) not in drawn and (x0, y0) != (x, y):
            drawn.add((x0, y0, x, y))
            joined.append(f"L{x:g} {y:g}" if at == pen else f"M{x0:g} {y0:g}L{x:g} {y:g}")
            at = x, y
        pen = x, y
    return f' d="{"".join(joined)}"'


def _root_tag(attributes: str, for_print: bool) -> str:
    """固有尺寸取自 viewBox，由页面的 CSS 决定缩放；名字与角色在外层的 figure 上。"""
    kept = dict(re.findall(r'([\w:-]+)="([^"]*)"', attributes))
    for name in ("role", "aria-roledescription", "aria-labelledby", "aria-describedby"):
        kept.pop(name, None)
    width, height = (math.ceil(float(size)) for size in kept["viewBox"].split()[2:])
    if for_print:  # WeasyPrint 只有这样写才按比例缩放
        kept.pop("width"), kept.pop("height", None)
        kept["style"] = f"width:{width}px;max-width:100%"
    else:
        # 最多缩到六成半，再窄就横向滚动：字缩得更小就看不清了
        style = f"overflow:visible;min-width:{round(0.65 * width)}px"
        kept |= {"width": str(width), "height": str(height), "style": style}
    kept |= {"aria-hidden": "true", "focusable": "false"}
    return "<svg " + " ".join(f'{name}="{value}"' for name, value in kept.items()) + ">"


def _prefix_ids(svg: str, diagram_id: str) -> str:
    seen: Counter[str] = Counter()

    def prefixed(name: str) -> str:
        return name if name.startswith(diagram_id) else f"{diagram_id}-{name}"

    def declare(match: re.Match[str]) -> str:
        name = prefixed(match[0])
        seen[name] += 1
        return name if seen[name] == 1 else f"{name}-{seen[name]}"

    svg = re.sub(r'(?<=\sid=")[^"]+', declare, svg)
    return re.sub(r'(?<=url\(#)[^)]+|(?<=href="#)[^"]+', lambda m: prefixed(m[0]), svg)


def _alt(source: str, svg: str) -> str:
    if match := re.search(r"^\s*%%\s*alt:[ \t]*(\S.*?)\s*$", source, re.M):
        return match[1]
    kind = re.search(r'aria-roledescription="([^"]*)"', svg)
    texts = dict.fromkeys(_labels(svg))  # 时序图的参与者上下各画一遍，只留一个
    alt = _KINDS.get(kind[1] if kind else "", "图") + "：" + "、".join(texts)
    return alt if len(alt) <= _ALT_LENGTH else alt[: _ALT_LENGTH - 1] + "…"


def _labels(svg: str) -> list[str]:
    """图里的每一段文字。"""
    found = re.findall(r"<(text|foreignObject)\b[^>]*>(.*?)</\1>", svg, re.S)
    plain = (re.sub(r"<[^>]*>", "", re.sub(r"<br\s*/?>", " ", inner)) for _, inner in found)
    return [text for text in (" ".join(html.unescape(p).split()) for p in plain) if text]


def _check_contrast(source: str, line: int, ctx: PageContext | None) -> None:
    """自己定了底色却没定字色，换到另一种主题就可能看不清。"""
    for row, text in enumerate(source.split("\n"), 1):
        if _FILL.match(text) and not _COLOR.search(text):
            reason = "写了 fill 就要同时写 color，否则亮暗主题之一看不清"
            report("M403", reason, line=_row(source, line, row, ctx), ctx=ctx)


def _report_error(source: str, message: str, line: int, ctx: PageContext | None) -> None:
    """把 merman 的诊断指到源文件的行。"""
    analysis = json.loads(_engine(False).analyze_json(source, None))
    errors = [d for d in analysis["diagnostics"] if d["severity"] == "error" and d.get("span")]
    row, detail = 0, ""
    if errors:
        message, span = errors[0]["message"], errors[0]["span"]
        # 意外结束的错误指到末尾之后，退回最后一行有内容的
        row = min(span["line"], len(source.rstrip().split("\n")))
        detail = source.split("\n")[row - 1].strip()
    elif "$$" in source:
        message, row = "标签里不能写 $$ 公式", source[: source.index("$$")].count("\n") + 1
    message = " ".join(message.split())
    if len(message) > 160:  # 期望的记号可能列出几十个
        message = message[:159] + "…"
    report("M403", f"Mermaid：{message}", line=_row(source, line, row, ctx), detail=detail, ctx=ctx)


def _row(source: str, line: int, row: int, ctx: PageContext | None) -> int:
    """图内第 ``row`` 行在源文件里的行号；调用者不知道围栏在哪（``line`` 为 0）时自己找。"""
    if not line and ctx:
        lines = source.split("\n")
        first = next((i for i, text in enumerate(lines) if text.strip()), 0)
        found = ctx.line_of(lines[first].strip())
        line = found - first - 1 if found else 0
    return line + row
