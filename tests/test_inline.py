"""引用示例的数字与图：值与出处正确，坏引用指到行，正文不受影响。"""

from __future__ import annotations

import re

import markdown
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zhixing.artifacts import Artifacts
from zhixing.context import PageContext, current
from zhixing.errors import ContentError

EXTENSIONS = [
    "tables",
    "toc",
    "admonition",
    "attr_list",
    "footnotes",
    "pymdownx.superfences",
    "pymdownx.arithmatex",
    "zhixing.formula",
    "zhixing.inline",
]
CONFIG = {"pymdownx.arithmatex": {"generic": True}}
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="288pt" height="216pt" viewBox="0 0 288 216"></svg>'


def artifacts() -> Artifacts:
    store = Artifacts()
    store.add_example("ddpm", {"loss": SVG}, {"final_loss": 0.123456, "steps": 12000, "name": "余弦 <b>"})
    store.add_example("ip-adapter", {"a-b_2": SVG}, {"k-v": 1e-4})
    return store


def convert(source: str, *, for_print: bool = False) -> tuple[str, PageContext]:
    ctx = PageContext("docs/x/y.md", source, "../../", [], artifacts(), for_print)
    token = current.set(ctx)
    try:
        return markdown.markdown(source, extensions=EXTENSIONS, extension_configs=CONFIG), ctx
    finally:
        current.reset(token)


# ── 数字 ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("{{ m.ddpm.final_loss:.3f }}", "0.123"),
        ("{{ m.ddpm.final_loss }}", "0.123456"),
        ("{{m.ddpm.steps:,}}", "12,000"),
        ("{{ m.ddpm.steps:*>8 }}", "***12000"),
        ("{{ m.ip-adapter.k-v:.0e }}", "1e-04"),
        ("{{ m.ddpm.final_loss:.1% }}", "12.3%"),
        ("{{ m.ddpm.name }}", "余弦 &lt;b&gt;"),
    ],
)
def test_metric_value_and_format(source: str, shown: str) -> None:
    page, ctx = convert(f"约 {source} 左右")
    assert ctx.problems == []
    example = "ip-adapter" if "ip-adapter" in source else "ddpm"
    title = f"由 examples/{example}.py 在构建时量出"
    assert page == f'<p>约 <span class="zx-metric" title="{title}">{shown}</span> 左右</p>'


@pytest.mark.parametrize(
    "template",
    [
        "**{}**",
        "- {}",
        "> {}",
        "| a |\n|--|\n| {} |",
        "## 题 {}",
        '!!! note "注"\n    {}',
        "[^1]\n\n[^1]: {}",
        "[{}](a.md)",
    ],
)
def test_metric_works_in_containers(template: str) -> None:
    page, ctx = convert(template.format("{{ m.ddpm.steps }}"))
    assert ctx.problems == []
    assert '<span class="zx-metric"' in page
    assert "{{" not in page


@pytest.mark.parametrize(
    "source",
    [
        "`{{ m.ddpm.steps }}`",
        "```text\n{{ m.ddpm.steps }}\n```",
        "\\{{ m.ddpm.steps }}",
        "{{ x.ddpm.steps }}",
        "{ m.ddpm.steps }",
    ],
)
def test_not_replaced(source: str) -> None:
    page, ctx = convert(source)
    assert ctx.problems == []
    assert "zx-metric" not in page
    assert "ddpm.steps }" in re.sub(r"<[^>]*>", "", page)


def test_unknown_metric_lists_what_exists() -> None:
    bad = "{{ m.ddpm.los }}"
    _, ctx = convert(f"---\nid: x\n---\n\n`{bad}` \\{bad}\n\n得到 {bad}。\n\n又 {bad}。\n")
    assert [(p.line, p.code) for p in ctx.problems] == [(7, "M404"), (9, "M404")]
    assert "final_loss" in ctx.problems[0].reason


@pytest.mark.parametrize(
    "reference",
    [
        "m.ddqm.steps",
        "m.ddpm",
        "m.ddpm.",
        "m.ddpm.final_loss:.3q",
        "m.ddpm.name:.2f",
        "m.ddpm.steps | int",
        "m.",
        "m.ddpm.a.b",
    ],
)
def test_bad_metric_is_reported_and_shown_as_written(reference: str) -> None:
    page, ctx = convert(f"甲\n\n乙 {{{{ {reference} }}}} 丙")
    assert [(p.line, p.code) for p in ctx.problems] == [(3, "M404")]
    assert f"{{{{ {reference} }}}}" in page
    assert page.endswith("丙</p>")


# ── 图 ────────────────────────────────────────────────────────────────


def test_figure_alone_in_paragraph() -> None:
    page, ctx = convert("前文\n\n![损失在 2000 步后变平](fig:ddpm/loss)\n\n后文")
    assert ctx.problems == []
    assert "<p><figure" not in page and "</figure></p>" not in page
    light, dark = re.findall(r"<img [^>]*>", page)
    common = 'alt="损失在 2000 步后变平" width="384" height="288" loading="lazy" decoding="async">'
    assert light == f'<img src="../../assets/fig/ddpm/loss.light.svg#only-light" {common}'
    assert dark == f'<img src="../../assets/fig/ddpm/loss.dark.svg#only-dark" {common}'
    assert page.count("<p>") == 2
    assert "<figcaption>损失在 2000 步后变平</figcaption>" in page


def test_print_has_one_plain_image() -> None:
    page, _ = convert("![甲](fig:ddpm/loss)", for_print=True)
    assert re.findall(r'<img src="([^"]*)"', page) == ["../../assets/fig/ddpm/loss.light.svg"]
    assert "lazy" not in page


def test_caption_with_formula_code_and_markup() -> None:
    page, ctx = convert("![`lr` 越小，$\\alpha_t<1$ 的 **斜率** 越缓 &amp; 稳 {{ m.ddpm.steps }} \\*步\\*](fig:ddpm/loss)")
    assert ctx.problems == []
    alts = set(re.findall(r'alt="([^"]*)"', page))
    assert alts == {"lr 越小，\\alpha_t&lt;1 的 斜率 越缓 &amp; 稳 12000 *步*"}
    caption = re.search(r"<figcaption>(.*?)</figcaption>", page, re.S)[1]
    assert "<code>lr</code>" in caption and "<math-tex" in caption and "<strong>斜率</strong>" in caption
    assert "zx-metric" in caption


def test_figure_inside_sentence_splits_the_paragraph() -> None:
    page, _ = convert("前 **文** ![甲](fig:ddpm/loss) 后文 $x$")
    assert re.search(r"<p>前 <strong>文</strong> *</p>\s*<figure .*</figure>\s*<p> *后文 <math-tex", page, re.S)


def test_two_figures_in_one_paragraph() -> None:
    page, _ = convert("![甲](fig:ddpm/loss)\n![乙](fig:ip-adapter/a-b_2)")
    assert page.count("<figure") == 2
    assert "<p>" not in page


@pytest.mark.parametrize(
    "template", ["- {}", "1. 甲\n\n    {}", "> {}", "| a |\n|--|\n| {} |", '!!! note "注"\n    {}']
)
def test_figure_works_in_containers(template: str) -> None:
    page, ctx = convert(template.format("![甲](fig:ddpm/loss)"))
    assert ctx.problems == []
    assert page.count("<img") == 2
    assert "<p><figure" not in page.replace("\n", "")


def test_figure_in_link_stays_phrasing_content() -> None:
    page, _ = convert("[![甲](fig:ddpm/loss)](a.md)")
    assert '<a href="a.md"><span class="zx-figure">' in page
    assert "<figure" not in page


@pytest.mark.parametrize("target", ["ddpm/los", "ddqm/loss", "ddpm", "ddpm/loss/x", "", "ddpm/loss x"])
def test_unknown_figure(target: str) -> None:
    page, ctx = convert(f"甲\n\n`![乙](fig:{target})`\n\n![乙](fig:{target})\n")
    assert [(p.line, p.code) for p in ctx.problems] == [(5, "M405")]
    assert "<img" not in page and "乙" in page


def test_ordinary_images_are_untouched() -> None:
    page, ctx = convert("![甲](a.png) ![乙][r]\n\n[r]: b.png\n")
    assert ctx.problems == []
    assert re.findall(r'src="([^"]*)"', page) == ["a.png", "b.png"]
    assert "figure" not in page


def test_figure_without_caption_has_an_alt() -> None:
    page, _ = convert("![](fig:ddpm/loss)")
    assert "figcaption" not in page and 'alt="ddpm/loss"' in page


def test_search_index_keeps_caption_once() -> None:
    plugin = pytest.importorskip("material.plugins.search.plugin")
    page, _ = convert("# 题 {#t}\n\n![看曲线](fig:ddpm/loss)\n\n值 {{ m.ddpm.steps }}\n")
    parser = plugin.Parser()
    parser.feed(page)
    text = "".join("".join(section.text) for section in parser.data)
    assert re.sub(r"<[^>]*>", " ", text).split() == ["看曲线", "值", "12000"]


@pytest.mark.parametrize("source", ["{{ m.ddpm.steps }}", "![甲](fig:ddpm/loss)"])
def test_without_context_raises(source: str) -> None:
    with pytest.raises(ContentError):
        markdown.markdown(source, extensions=["zhixing.inline"])


# ── 性质 ──────────────────────────────────────────────────────────────

NOISE = st.text(
    st.one_of(st.sampled_from("{}m.ddpm:[]()!`\\*_ \nfig/"), st.characters(exclude_categories=["Cs"])), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(NOISE)
def test_any_text_renders_without_crashing(source: str) -> None:
    _, ctx = convert(source)
    for problem in ctx.problems:
        assert 0 <= problem.line <= source.count("\n") + 1


PIECES = ["甲乙", "{{ m.ddpm.steps }}", "![图注](fig:ddpm/loss)", "`丁`", "**丙**", "{{ m.no.no }}", "\n\n", "\n", "戊。"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_prose_is_never_eaten(pieces: list[str]) -> None:
    page, ctx = convert(" ".join(pieces))
    for word in ("甲乙", "丙", "丁", "戊。"):
        assert page.count(word) == sum(word in piece for piece in pieces)
    assert page.count("<figure") == page.count("</figure>") == pieces.count("![图注](fig:ddpm/loss)")
    assert page.count("12000") == pieces.count("{{ m.ddpm.steps }}")
    assert [p.code for p in ctx.problems] == ["M404"] * pieces.count("{{ m.no.no }}")
    assert not re.search(r"<p>[^<]*<figure", page)


# ── 标点 ──────────────────────────────────────────────────────────────


def test_punctuation_stays_with_the_code_or_formula_before_it() -> None:
    from zhixing.page import keep_punctuation

    html, _ = convert("看 `a`，与（`b` 或 `c`）；和 `d` 再说 $x$。\n\n```text\n`e`，\n```\n")
    kept = re.findall(r'<span class="zx-keep">(.*?)</span>(?=[^<]|</p>)', keep_punctuation(html), re.S)
    assert [re.sub(r"<math-tex.*</math-tex>", "$x$", k) for k in kept] == [
        "<code>a</code>，", "（<code>b</code>", "<code>c</code>）；", "$x$。",
    ]  # fmt: skip
    assert re.sub(r'<span class="zx-(keep|free)">|</span>', "", keep_punctuation(html)) == re.sub("</span>", "", html)


def test_only_the_last_part_of_a_formula_is_kept_on_the_line() -> None:
    from zhixing.page import keep_punctuation

    parts = [f"<span class=katex-base>{x}</span>" for x in "abc"]
    for base in ("katex-base", '"katex-base"'):
        inner = [p.replace("katex-base", base) for p in parts]
        head = '<span class="katex-html" aria-hidden="true">' if '"' in base else "<span class=katex-html aria-hidden=true>"
        html = f"<math-tex>{head}{''.join(inner)}</span></math-tex>，后文"
        a, b, c = inner
        assert keep_punctuation(html) == (
            f'<span class="zx-keep"><math-tex>{head}<span class="zx-free">{a}{b}</span>{c}</span></math-tex>，</span>后文'
        )
    one, _ = convert("$x$。")
    assert "zx-free" not in keep_punctuation(one) and "zx-free" in keep_punctuation(convert("$x=y$。")[0])
