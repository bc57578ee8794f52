"""公式：构建时渲染正确、错误指到行、缓存坏了也不影响结果。"""

from __future__ import annotations

import html
import re
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import markdown
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zhixing import formula
from zhixing.context import PageContext, current
from zhixing.errors import ContentError
from zhixing.formula import FormulaError, Katex

EXTENSIONS = [
    "tables",
    "toc",
    "admonition",
    "footnotes",
    "attr_list",
    "pymdownx.superfences",
    "pymdownx.arithmatex",
    "zhixing.formula",
]
CONFIG = {"pymdownx.arithmatex": {"generic": True}}

pytestmark = pytest.mark.skipif(not formula.KATEX_JS.exists(), reason="先运行 make assets")


def convert(source: str, file_text: str | None = None) -> tuple[str, PageContext]:
    """渲染一段 Markdown，返回 HTML 与带着错误的上下文；``file_text`` 是源文件全文，缺省就是它。"""
    ctx = PageContext("docs/x/y.md", source if file_text is None else file_text, "../../", [], None)
    token = current.set(ctx)
    try:
        return markdown.markdown(source, extensions=EXTENSIONS, extension_configs=CONFIG), ctx
    finally:
        current.reset(token)


def tex_of(page: str) -> list[str]:
    """页面上每个公式的 TeX 原文（读者复制得到的就是它）。"""
    found = re.findall(r'<annotation encoding="application/x-tex">(.*?)</annotation>', page, re.S)
    return [html.unescape(tex) for tex in found]


def problems(source: str) -> list[tuple[int, str]]:
    _, ctx = convert(source)
    return sorted((p.line, p.code) for p in ctx.problems)


# ── 渲染 ──────────────────────────────────────────────────────────────


def test_inline_and_block_are_rendered_and_wrapped() -> None:
    page, ctx = convert("设 $x^2$ 为正。\n\n$$\n\\int_0^1 f\n$$\n")
    assert ctx.problems == []
    assert '<p>设 <math-tex data-search-exclude=""><span class="katex">' in page
    assert re.search(r'<div [^>]*class="zx-math-block"[^>]* tabindex="0">\s*<math-tex', page)
    assert '<math-tex data-search-exclude=""><span class="katex-display">' in page
    assert page.count("<math-tex") == page.count("</math-tex>") == 2
    assert tex_of(page) == ["x^2", r"\int_0^1 f"]
    assert "arithmatex" not in page


@pytest.mark.parametrize(
    "tex",
    [
        r"\begin{aligned} a &= b + c \\ &= d \end{aligned}",
        r"f(x)=\begin{cases} 1 & x<0 \\ 2 & x>0 \end{cases}",
        r"\text{损失} = \frac{1}{N}\sum_i \ell_i \tag{1}",
        r"a < b > c \& d",
        r"""\text{\& “引号” "q"}""",
        r"\mathcal{L} \boxed{\bm{\epsilon}} \mathbb{E}",
    ],
)
def test_block_tex_survives_html_escaping(tex: str) -> None:
    """arithmatex 对行间公式做 HTML 转义；不还原的话 & 会变成看得见的 amp; 而且不报错。"""
    page, ctx = convert(f"$$\n{tex}\n$$")
    assert ctx.problems == []
    assert tex_of(page) == [tex]


@pytest.mark.parametrize("tex", [r"x &lt; y", r"\text{a & b}", r"a % 没有换行的注释"])
def test_html_entities_and_stray_alignment_are_errors(tex: str) -> None:
    assert problems(f"$$\n{tex}\n$$") == [(2, "M401")]


def test_inline_tex_is_not_unescaped_twice() -> None:
    page, ctx = convert(r"取 $a<b$、$\text{&amp;}$ 与 $a \& b$。")
    assert tex_of(page) == ["a<b", r"a \& b"]
    assert [(p.line, p.code) for p in ctx.problems] == [(1, "M401")]  # & 不能出现在 \text 里


@pytest.mark.parametrize(
    "context",
    ["> {}", "- 甲\n\n    {}", '!!! note "注"\n    {}', "[^1]\n\n[^1]: {}", "| a |\n|--|\n| {} |"],
)
def test_renders_in_containers(context: str) -> None:
    page, ctx = convert(context.format("取 $x_0$ 时"))
    assert ctx.problems == []
    assert tex_of(page) == ["x_0"]


def test_code_is_left_alone() -> None:
    page, ctx = convert("`$x$` 与\n\n```text\n$y$ 和 $$\n```\n")
    assert ctx.problems == []
    assert "<math-tex" not in page
    assert "<code>$x$</code>" in page


def test_escaped_dollar_is_a_dollar() -> None:
    page, ctx = convert(r"每百万 \$3 到 \$5。")
    assert ctx.problems == []
    assert page == "<p>每百万 $3 到 $5。</p>"


def test_formula_function_matches_page() -> None:
    page, _ = convert("$x^2$")
    assert formula.render("x^2").removeprefix("<math-tex data-search-exclude>") in page
    assert formula.render("x^2", True).startswith('<div class="zx-math-block" tabindex="0"')
    with pytest.raises(FormulaError) as error:
        formula.render(r"a+\oops")
    assert error.value.position == 2


def test_search_index_skips_formulas_only() -> None:
    plugin = pytest.importorskip("material.plugins.search.plugin")
    page, _ = convert("# 题 {#t}\n\n前文 $\\alpha_t$ 中文\n\n$$\n\\text{不该出现}\n$$\n\n后文\n")
    parser = plugin.Parser()
    parser.feed(page)
    text = "".join("".join(section.text) for section in parser.data)
    assert re.sub(r"<[^>]*>|\s", "", text) == "前文中文后文"


# ── 错误与行号 ────────────────────────────────────────────────────────


def test_error_points_to_line_in_file_with_front_matter() -> None:
    source = "---\ntitle: x\n---\n\n正文 $\\undefcmd{x}$ 继续\n"
    _, ctx = convert(source)
    [problem] = ctx.problems
    assert (problem.file, problem.line, problem.code) == ("docs/x/y.md", 5, "M401")
    assert "\\undefcmd" in problem.reason
    assert "\n" not in problem.reason


def test_multiline_formula_points_to_the_bad_row() -> None:
    source = "文字\n\n$$\n\\begin{aligned}\na &= b \\\\\nc &= \\oops \\\\\nd &= e\n\\end{aligned}\n$$\n"
    _, ctx = convert(source)
    [problem] = ctx.problems
    assert problem.line == 6
    assert problem.detail == "c &= \\oops \\\\\n     ^"


@pytest.mark.parametrize(
    ("source", "row"),
    [
        ("> 引用\n>\n> $$\n> a \\\\\n> b \\oops\n> $$\n", 5),
        ("- 甲\n\n    $$\n    a \\\\\n    b \\oops\n    $$\n", 5),
        ("\\begin{align}\na \\\\\nb \\oops\n\\end{align}\n", 3),
        ("\\[\na\n\\oops\n\\]\n", 3),
        ("正文 \\(\\oops\\)\n", 1),
    ],
)
def test_error_line_in_containers(source: str, row: int) -> None:
    assert problems(source) == [(row, "M401")]


def test_same_bad_formula_twice_gets_both_lines() -> None:
    source = "`$\\oops$`\n\n甲 $\\oops$\n\n```text\n$\\oops$\n```\n\n<!-- $\\oops$ -->\n\n乙 $x+\\oops$ 与 $\\oops$\n"
    assert problems(source) == [(3, "M401"), (11, "M401"), (11, "M401")]


def test_footnotes_rendered_last_still_get_their_own_line() -> None:
    assert problems("甲[^1]\n\n[^1]: 注 $\\oops$\n\n乙 $\\oops$\n") == [(3, "M401"), (5, "M401")]


def test_formula_from_quoted_yaml_is_found() -> None:
    """front matter 里的追问另外渲染，双引号里的反斜杠在源文件中成对。"""
    _, ctx = convert("见 $\\alpha + \\oops_1$", '---\nfollowups:\n  - a: "见 $\\\\alpha + \\\\oops_1$"\n---\n')
    assert [p.line for p in ctx.problems] == [3]


def test_chinese_in_math_explains_the_fix() -> None:
    _, ctx = convert("$损失$")
    assert "\\text{}" in ctx.problems[0].reason


@pytest.mark.parametrize(
    "tex", [r"\href{https://a.b}{c}", r"\includegraphics{a.png}", r"\htmlClass{a}{b}", r"\url{a}"]
)
def test_untrusted_commands_are_errors_not_red_text(tex: str) -> None:
    assert problems(f"${tex}$") == [(1, "M401")]


def test_formula_in_heading() -> None:
    source = "正文 $x$\n\n## 标题 $x$ 后 {#a}\n\n再 $x$\n"
    page, ctx = convert(source)
    assert [(p.line, p.code) for p in ctx.problems] == [(3, "M402")]
    assert tex_of(page) == ["x", "x", "x"]


@pytest.mark.parametrize(
    ("source", "row"),
    [
        ("甲\n\n文字紧挨着\n$$\nx\n$$\n", 4),
        ("甲\n\n$$\nx\n\ny\n$$\n", 3),
        ("行内 $$x$$ 写法\n", 1),
        ("甲\n\n乙 $ x $ 丙\n", 3),
        ("| a | b |\n|--|--|\n| $p(x|y)$ | c |\n", 3),
        ("价格 $5。\n", 1),
    ],
)
def test_unrecognized_formula_is_reported(source: str, row: int) -> None:
    """没被认出的公式会原样显示给读者，不能静默。"""
    found = problems(source)
    assert found and found[0] == (row, "M401")


def test_metric_inside_formula_is_an_error() -> None:
    [found] = problems("得 $L = {{ m.ddpm.loss }}$\n")
    assert found == (1, "M401")


def test_without_context_renders_but_errors_raise() -> None:
    ok = markdown.markdown("$x$", extensions=EXTENSIONS, extension_configs=CONFIG)
    assert tex_of(ok) == ["x"]
    with pytest.raises(ContentError) as error:
        markdown.markdown("$\\oops$", extensions=EXTENSIONS, extension_configs=CONFIG)
    assert [p.code for p in error.value.problems] == ["M401"]


def test_missing_katex_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make assets"):
        Katex(tmp_path / "katex.min.js", tmp_path).render("x", False)


def test_position_counts_characters_not_utf16_units() -> None:
    with pytest.raises(FormulaError) as error:
        formula.render("\\text{𝐀𝐁} \\oops")
    assert error.value.position == len("\\text{𝐀𝐁} ")


def test_deep_nesting_is_an_error_and_the_engine_survives(tmp_path: Path) -> None:
    katex = Katex(cache_dir=tmp_path)
    with pytest.raises(FormulaError):
        katex.render("{" * 5000, False)
    assert "katex" in katex.render("x", False)


# ── 缓存 ──────────────────────────────────────────────────────────────


def test_second_process_does_not_need_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Katex(cache_dir=tmp_path).render("x^3", True)
    fresh = Katex(cache_dir=tmp_path)
    monkeypatch.setattr(fresh, "_run", lambda *_: pytest.fail("应当读缓存"))
    assert fresh.render("x^3", True) == first
    assert fresh.render("x^3", True) is fresh.render("x^3", True)


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\xff\xfe\n\x00", None])
def test_damaged_cache_heals(tmp_path: Path, damage: bytes | None) -> None:
    first = Katex(cache_dir=tmp_path).render("x^3", True)
    [path] = tmp_path.rglob("*.html")
    path.write_bytes(path.read_bytes()[:-5] if damage is None else damage)
    assert Katex(cache_dir=tmp_path).render("x^3", True) == first
    [path] = tmp_path.rglob("*.html")
    assert formula._read_checked(path) == first


def test_display_and_inline_do_not_share_an_entry(tmp_path: Path) -> None:
    katex = Katex(cache_dir=tmp_path)
    assert "katex-display" in katex.render("x", True)
    assert "katex-display" not in katex.render("x", False)


def test_changed_katex_gets_a_new_cache(tmp_path: Path) -> None:
    other = tmp_path / "katex.js"
    other.write_text(formula.KATEX_JS.read_text(encoding="utf-8") + "\n// 改动", encoding="utf-8")
    Katex(cache_dir=tmp_path / "c").render("x", False)
    Katex(other, tmp_path / "c").render("x", False)
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_errors_are_not_cached(tmp_path: Path) -> None:
    with pytest.raises(FormulaError):
        Katex(cache_dir=tmp_path).render(r"\oops", False)
    assert list(tmp_path.rglob("*.html")) == []


def test_unwritable_cache_is_not_fatal(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("这里不是目录", encoding="utf-8")
    assert "katex" in Katex(cache_dir=blocked).render("x", False)


def _render_many(cache_dir: str) -> list[str]:
    katex = Katex(cache_dir=Path(cache_dir))
    return [katex.render(f"x_{{{i}}}", False) for i in range(30)]


def test_concurrent_writers_agree(tmp_path: Path) -> None:
    with ProcessPoolExecutor(3) as pool:
        results = list(pool.map(_render_many, [str(tmp_path)] * 3))
    assert results[0] == results[1] == results[2]
    files = list(tmp_path.rglob("*"))
    assert len([f for f in files if f.suffix == ".html"]) == 30
    assert all(f.is_dir() or f.suffix == ".html" for f in files)  # 没有留下临时文件
    assert all(formula._read_checked(f) for f in files if f.suffix == ".html")


def test_threads_share_one_engine(tmp_path: Path) -> None:
    katex, results = Katex(cache_dir=tmp_path), []
    threads = [threading.Thread(target=lambda: results.append(katex.render("y^2", False))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1 and len(results) == 4


# ── 性质 ──────────────────────────────────────────────────────────────

MARKDOWNISH = st.text(
    st.one_of(st.sampled_from("$\\{}&<>`*_#|[]()!:\n -^%~ab中。"), st.characters(exclude_categories=["Cs"])),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(MARKDOWNISH)
def test_any_text_renders_without_crashing(source: str) -> None:
    _, ctx = convert(source)
    for problem in ctx.problems:
        assert 0 <= problem.line <= source.count("\n") + 1
        assert "\n" not in problem.reason


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["甲乙", "$x$", "**丙**", "`丁`", "\\$", "$\\oops$", "\n\n", "戊。"]), max_size=12))
def test_prose_around_formulas_is_never_eaten(pieces: list[str]) -> None:
    page, ctx = convert(" ".join(pieces))
    outside = re.sub(r"<math-tex.*?</math-tex>", "", page, flags=re.S)
    for word in ("甲乙", "丙", "丁", "戊。"):
        assert outside.count(word) == sum(word in piece for piece in pieces)
    assert len(tex_of(page)) == pieces.count("$x$")
    assert len([p for p in ctx.problems if p.code == "M401"]) == pieces.count("$\\oops$")


@settings(max_examples=100, deadline=None)
@given(MARKDOWNISH, st.booleans())
def test_render_returns_html_or_formula_error(tex: str, display: bool) -> None:
    try:
        page = formula.render(tex, display)
    except FormulaError as error:
        assert error.position is None or 0 <= error.position <= len(tex)
    else:
        assert page.count("<math-tex") == 1
