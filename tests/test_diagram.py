"""Mermaid 图：跟随主题、id 唯一、坏图指到行、同样的输入得到同样的输出。"""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as etree
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zhixing import diagram
from zhixing.context import PageContext
from zhixing.errors import ContentError

FLOW = """flowchart LR
  A[输入图像 x] -->|编码| B(潜变量 z)
  subgraph S[扩散过程]
    B --> C{t > 0?}
  end
  C -- 是 --> D[(缓存 & 数据)]
"""
SEQUENCE = """sequenceDiagram
  autonumber
  participant U as 用户
  participant S as 服务
  U->>+S: 发送请求
  Note right of S: 检索
  loop 每一步
    S->>S: 去噪
  end
  S-->>-U: 返回
"""
STATE = "stateDiagram-v2\n  [*] --> 空闲\n  空闲 --> 运行: 开始\n  state 运行 {\n    [*] --> 采样\n  }\n"
CLASS = "classDiagram\n  class UNet{\n    +forward(x, t) Tensor\n  }\n  UNet *-- 注意力 : 包含\n"
OTHERS = {
    "er": "erDiagram\n  IMAGE ||--o{ CAPTION : 描述\n",
    "gantt": "gantt\n  title 计划\n  dateFormat YYYY-MM-DD\n  section 训练\n  VAE :a1, 2024-01-01, 3d\n",
    "pie": 'pie title 显存\n  "权重" : 40\n  "梯度" : 20\n',
    "mindmap": "mindmap\n  root((扩散模型))\n    采样\n    训练\n",
    "timeline": "timeline\n  title 历史\n  2020 : DDPM\n  2022 : LDM\n",
}
ALL = {"flow": FLOW, "sequence": SEQUENCE, "state": STATE, "class": CLASS, **OTHERS}


def page(source: str = "", *, for_print: bool = False, file: str = "docs/x/y.md") -> PageContext:
    return PageContext(file, source, "", [], None, for_print)


def parse(figure: str) -> etree.Element:
    """figure 必须是良构的 XML：既能内联进 HTML，也能交给 PDF。"""
    return etree.fromstring(figure)


def labels(figure: str) -> str:
    return "|".join(text.strip() for text in parse(figure).itertext() if text.strip())


# ── 结构 ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ALL)
def test_figure_wraps_one_svg_with_intrinsic_size(name: str) -> None:
    ctx = page()
    figure = parse(diagram.render(ALL[name], ctx=ctx))
    assert ctx.problems == []
    assert (figure.tag, figure.get("class"), figure.get("role")) == ("figure", "zx-diagram", "img")
    assert figure.get("aria-label")
    [svg] = figure
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    width, height = (float(n) for n in svg.get("viewBox").split()[2:])
    assert width <= float(svg.get("width")) < width + 1
    assert height <= float(svg.get("height")) < height + 1
    assert "max-width" not in svg.get("style")
    assert svg.get("aria-hidden") == "true" and svg.get("role") is None


def test_flowchart_keeps_labels_edges_and_source_order() -> None:
    figure = diagram.render(FLOW)
    for label in ("输入图像 x", "编码", "潜变量 z", "扩散过程", "t > 0?", "是", "缓存 & 数据"):
        assert label in labels(figure)
    assert len(re.findall(r'data-edge="true"', figure)) == 3
    two = diagram.render("flowchart TD\n  甲 --> 丙\n  乙 -->|系数| 丙\n")
    x = {k: float(v) for k, v in re.findall(r'id="\S+-flowchart-(.)-\d+" transform="translate\(([\d.]+)', two)}
    assert x["甲"] < x["丙"] < x["乙"]


def test_cjk_labels_are_not_clipped() -> None:
    figure = diagram.render(CLASS)
    svg_id = re.search(r'<svg id="([^"]+)"', figure)[1]
    assert f"#{svg_id} foreignObject{{overflow:visible;}}" in figure
    assert "overflow:visible" in re.search(r"<svg [^>]*>", figure)[0]
    width = float(re.search(r'<foreignObject width="([\d.]+)"[^>]*>(?:(?!</foreignObject>).)*注意力', figure)[1])
    assert width >= 3 * 16  # 三个全角字，16 像素


# ── 颜色 ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("for_print", [False, True])
def test_no_sentinel_is_left(name: str, for_print: bool) -> None:
    figure = diagram.render(ALL[name], ctx=page(for_print=for_print))
    assert not re.search(r"5aa5|, 90, 165", figure, re.I)
    # 哨兵色也没有被推算成别的颜色：剩下的 hsl 就是漏掉的主题变量
    assert "hsl(" not in figure


@pytest.mark.parametrize("name", ["flow", "sequence", "state", "class"])
def test_screen_colors_follow_the_theme(name: str) -> None:
    figure = diagram.render(ALL[name])
    for variable in ("--md-mermaid-node-fg-color", "--md-mermaid-label-fg-color", "--md-mermaid-edge-color"):
        assert f"var({variable})" in figure


@pytest.mark.parametrize("name", ALL)
def test_print_needs_neither_variables_nor_foreign_objects(name: str) -> None:
    figure = diagram.render(ALL[name], ctx=page(for_print=True))
    assert "var(" not in figure
    assert "<foreignObject" not in figure
    style = parse(figure)[0].get("style")
    assert re.fullmatch(r"width:\d+px;max-width:100%", style)


@pytest.mark.parametrize("name", ALL)
def test_print_keeps_every_label(name: str) -> None:
    """换行位置可以不同，字一个不少。"""
    screen, paper = (
        {c for text in diagram._labels(diagram.render(ALL[name], ctx=page(for_print=p))) for c in text}
        for p in (False, True)
    )
    assert screen - paper <= {" ", "2", "0", "4", "-"}  # 甘特图的日期会缩写


def test_custom_fill_needs_a_text_color() -> None:
    ctx = page()
    styles = "  classDef hot fill:#f96\n  style A fill: none\n  style B fill:#fff,color:#000\n"
    diagram.render("flowchart LR\n  A --> B\n" + styles, line=5, ctx=ctx)
    assert [(p.line, p.code) for p in ctx.problems] == [(8, "M403")]


# ── id 与确定性 ───────────────────────────────────────────────────────


def ids(figure: str) -> list[str]:
    return re.findall(r'\sid="([^"]*)"', figure)


def test_ids_are_unique_on_a_page_and_references_resolve() -> None:
    ctx = page()
    figures = "".join(diagram.render(source, ctx=ctx) for source in [*ALL.values(), *ALL.values()])
    found = ids(figures)
    assert len(found) == len(set(found))
    targets = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', figures)
    assert targets
    # Mermaid 的样式表会提到没有画出来的渐变，只查属性里的引用
    used = re.findall(r'="url\(#([^)]+)\)"', figures)
    assert used and set(used) <= set(found)


def test_ids_differ_between_pages() -> None:
    first = ids(diagram.render(FLOW, ctx=page(file="docs/a.md")))
    second = ids(diagram.render(FLOW, ctx=page(file="docs/b.md")))
    assert not set(first) & set(second)


def test_output_is_deterministic() -> None:
    once = [diagram.render(source, ctx=page()) for source in ALL.values()]
    diagram._engine.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda source: diagram.render(source, ctx=page()), ALL.values()))
    assert once == again


# ── 替代文本与搜索 ────────────────────────────────────────────────────


def test_alt_comment_is_the_label() -> None:
    figure = diagram.render('%% alt: 编码器把图变成 "z" & 交给 U-Net\n' + FLOW)
    assert parse(figure).get("aria-label") == '编码器把图变成 "z" & 交给 U-Net'
    assert "%%" not in figure


def test_default_label_lists_texts_once() -> None:
    label = parse(diagram.render(SEQUENCE)).get("aria-label")
    assert label.startswith("时序图：")
    assert label.count("用户") == 1 and "发送请求" in label
    long = "flowchart LR\n" + "".join(f"  n{i}[很长的一个标签 {i}] --> n{i + 1}\n" for i in range(40))
    assert len(parse(diagram.render(long)).get("aria-label")) <= 200


@pytest.mark.parametrize("name", ["flow", "sequence", "state", "class", "pie", "mindmap"])
def test_search_index_gets_labels_and_nothing_else(name: str) -> None:
    plugin = pytest.importorskip("material.plugins.search.plugin")
    figure = diagram.render(ALL[name])
    parser = plugin.Parser()
    parser.feed(f"<p>前文</p>{figure}<p>后文</p>")
    text = "".join(parser.data[0].text)
    words = html.unescape(re.sub(r"<[^>]*>", " ", text)).split()
    assert words[0] == "前文" and words[-1] == "后文"  # 之后的正文没有被吞掉
    assert sorted(words[1:-1]) == sorted(" ".join(diagram._labels(figure)).split())


def test_adjacent_labels_do_not_run_together() -> None:
    plugin = pytest.importorskip("material.plugins.search.plugin")
    parser = plugin.Parser()
    parser.feed(diagram.render(SEQUENCE))
    text = "".join(parser.data[0].text)
    assert "用户服务" not in text and "服务用户" not in text


# ── 坏图 ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("source", "row"),
    [
        ("flowchart LR\n  A --> B\n  B --> C[没有闭合\n", 3),
        ("flowchart LR\n  A --> B\n  B -->\n", 3),
        ("flowchart LR\n  A[甲 (乙)] --> B\n", 2),
        ("sequenceDiagram\n  A->>B: 你好\n  A->>B\n", 3),
        ("stateDiagram-v2\n  [*] --> A\n  state A {\n", 3),
        ("flow chart\n  A --> B\n", 1),
        ("", 1),
        ('flowchart LR\n  A --> B["$$x^2$$"]\n', 2),
    ],
)
def test_broken_diagram_points_to_its_row(source: str, row: int) -> None:
    ctx = page()
    shown = diagram.render(source, line=10, ctx=ctx)
    [problem] = ctx.problems
    assert (problem.file, problem.line, problem.code) == ("docs/x/y.md", 10 + row, "M403")
    assert "\n" not in problem.reason and len(problem.reason) < 200
    assert shown == f'<pre class="zx-error"><code>{html.escape(source)}</code></pre>'


def test_broken_diagram_finds_itself_when_the_line_is_unknown() -> None:
    broken = "flowchart LR\n  甲 --> 乙\n  乙 -->\n"
    ctx = page(f"# 题\n\n```mermaid\n{broken}```\n")
    diagram.render(broken, ctx=ctx)
    assert ctx.problems[0].line == 6


def test_without_context_raises() -> None:
    with pytest.raises(ContentError):
        diagram.render("flowchart LR\n  A -->\n")


NOISE = st.text(
    st.one_of(st.sampled_from("AB->[](){}|\"';:%<>&\n 甲"), st.characters(exclude_categories=["Cs"])), max_size=50
)


@settings(max_examples=100, deadline=None)
@given(NOISE)
def test_any_text_gives_a_figure_or_a_problem(text: str) -> None:
    ctx = page()
    shown = diagram.render("flowchart LR\n" + text, line=1, ctx=ctx)
    assert shown.startswith("<figure" if not ctx.problems else ("<pre", "<figure"))
    for problem in ctx.problems:
        assert 1 <= problem.line <= text.count("\n") + 3


@settings(max_examples=60, deadline=None)
@given(st.text("甲乙丙 abc<>&'=", min_size=1, max_size=20).filter(str.strip))
def test_label_text_survives(text: str) -> None:
    ctx = page()
    figure = diagram.render(f'flowchart LR\n  A["{html.escape(text)}"] --> B[乙]\n', ctx=ctx)
    assert ctx.problems == []
    shown = labels(figure).replace("|", " ").split()
    assert set(re.findall(r"[甲乙丙]+", text)) <= set(re.findall(r"[甲乙丙]+", " ".join(shown)))


def test_without_merman_the_error_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "merman", None)
    monkeypatch.delenv("ZHIXING_DIAGRAMS", raising=False)
    context = PageContext("docs/a.md", "正文\n\n```mermaid\nflowchart LR\n  a --> b\n```\n", "", [], None)
    assert "a --&gt; b" in diagram.render("flowchart LR\n  a --> b", line=3, ctx=context)
    (problem,) = context.problems
    assert (problem.line, problem.code) == (3, "M403") and "没有装 merman" in problem.reason and "ZHIXING_DIAGRAMS" in problem.reason


def test_without_merman_diagrams_can_be_shown_as_source(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "merman", None)
    monkeypatch.setenv("ZHIXING_DIAGRAMS", "source")
    context = PageContext("docs/a.md", "", "", [], None)
    assert "a --&gt; b" in diagram.render("flowchart LR\n  a --> b", line=3, ctx=context) and context.problems == []


# ── 路径坐标 ──────────────────────────────────────────────────────────

STADIUM = "flowchart LR\n  A([圆角框]) --> B((圆))\n"
_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?")


def paths(svg: str) -> list[tuple[str, list[float]]]:
    """每条路径的命令字母，与全部的数。"""
    found = re.findall(r' d="([^"]*)"', svg)
    return [(re.sub(r"[^A-Za-z]", "", _NUMBER.sub("", d)), [float(n) for n in _NUMBER.findall(d)]) for d in found]


@pytest.mark.parametrize("source", [*ALL.values(), STADIUM])
def test_rounding_paths_moves_nothing_visible(source, monkeypatch) -> None:
    monkeypatch.setattr(diagram, "_round_paths", lambda svg: svg)
    exact = diagram.render(source)
    monkeypatch.undo()
    monkeypatch.setattr(diagram, "_join_strokes", lambda d: d)
    rounded = diagram.render(source)
    assert [(c, len(n)) for c, n in paths(exact)] == [(c, len(n)) for c, n in paths(rounded)]
    assert all(abs(a - b) <= 0.0501 for (_, x), (_, y) in zip(paths(exact), paths(rounded)) for a, b in zip(x, y))
    if source == STADIUM:
        assert len(rounded) < len(exact) / 1.8


def test_double_strokes_become_one_polyline(monkeypatch) -> None:
    """圆角框的边框描两遍，各是几百段直的曲线：合成之后经过的点一个不少，体积少一大半；真的弧不动。"""
    monkeypatch.setattr(diagram, "_join_strokes", lambda d: d)
    twice = diagram.render(STADIUM)
    monkeypatch.undo()
    once = diagram.render(STADIUM)
    changed = [(a, b) for a, b in zip(re.findall(r' d="([^"]*)"', twice), re.findall(r' d="([^"]*)"', once)) if a != b]
    assert len(changed) >= 2 and len(once) < 0.6 * len(twice)
    for before, after in changed:
        numbers = [tuple(map(float, re.findall(r"-?[\d.]+", part)))[-2:] for part in re.findall(r"[MC][^MC]*", before)]
        drawn = {tuple(map(float, point)) for point in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", after)}
        assert drawn == set(numbers)
    arc = ' d="M0 0' + " C0 5.5, 4.5 10, 10 10 C15.5 10, 20 5.5, 20 0" * 4 + '"'
    assert diagram._join_strokes(arc) == arc


@given(st.lists(st.one_of(st.floats(-900, 900), st.sampled_from([0.305, -0.045, 0.001, 3.0, -17.0])), min_size=1, max_size=30))
def test_numbers_written_without_separators_stay_apart(numbers) -> None:
    """SVG 允许 “.181.305-.2”：前一个数有小数点，下一个小数点就是新的数。"""
    text = ""
    for n in numbers:
        token = f"{n:.12f}".rstrip("0").rstrip(".").replace("0.", ".", 1) if abs(n) < 1 else repr(round(n, 12))
        glued = text and (token.startswith("-") or token.startswith(".") and "." in text.rsplit(" ", 1)[-1].rsplit("-", 1)[-1])
        text += token if glued or not text else " " + token
    if "e" in text:
        return
    before, after = (paths(f'<path d="{d}"/>')[0][1] for d in (text, re.search(r' d="([^"]*)"', diagram._round_paths(f'<path d="{text}"/>'))[1]))
    assert len(before) == len(after) and all(abs(a - b) <= 0.0501 for a, b in zip(before, after))
