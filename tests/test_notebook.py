"""示例：percent 格式解析到行，坏头部一律指到行，没有一行代码被悄悄略过，公式能换回来。"""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymdownx.slugs import slugify

from zhixing import formula, notebook
from zhixing.errors import ContentError, Problem
from zhixing.notebook import Cell, split_cells
from zhixing.project import Project

HEAD = "# ---\n# zhixing:\n#   id: e\n#   title: 例子\n#   needs: []\n#   timeout: 60\n#   memory_mib: 512\n# ---\n"
GOOD = (
    HEAD
    + """
# %% [markdown]
# # 标题
#
# 文字 $x^2$
#缩进少一格

# %%
import os

x = 1


# %% 有标题的单元格
y = '''
# 不是标记
'''
# %%

# %% [markdown]
# 尾
"""
)


def load(site, text: str | bytes, name: str = "e"):
    return notebook.load(site.write(f"examples/{name}.py", text), site.root)


def problem_of(site, text: str | bytes) -> Problem:
    with pytest.raises(ContentError) as caught:
        load(site, text)
    (problem,) = caught.value.problems
    assert problem.file == "examples/e.py" and "\n" not in problem.reason
    return problem


def test_cells_and_lines(site) -> None:
    example = load(site, GOOD)
    assert (example.id, example.title, example.needs) == ("e", "例子", [])
    assert example.cells == [
        Cell("markdown", "# 标题\n\n文字 $x^2$\n缩进少一格", 11),
        Cell("code", "import os\n\nx = 1", 17),
        Cell("code", "y = '''\n# 不是标记\n'''", 23),
        Cell("markdown", "尾", 29),
    ]
    lines = GOOD.split("\n")
    for block in example.blocks:
        file, first = block.code_start
        assert file == "examples/e.py" and lines[first - 1] == block.source.split("\n")[0]
        assert (block.timeout, block.memory) == (60, 512 << 20)


def test_code_before_the_first_marker_is_run(site) -> None:
    example = load(site, HEAD + "\nx = 1\n\n# %%\ny = 2\n")
    assert [(b.code_start[1], b.source) for b in example.blocks] == [(10, "x = 1"), (13, "y = 2")]


def test_markdown_cell_with_a_title(site) -> None:
    assert [c.kind for c in load(site, HEAD + "# %% 引言 [markdown]\n# 文\n").cells] == ["markdown"]


@pytest.mark.parametrize("data", [b"\xef\xbb\xbf" + GOOD.encode(), GOOD.replace("\n", "\r\n").encode()], ids=["BOM", "CRLF"])
def test_windows_files(site, data) -> None:
    path = site.write("examples/e.py", data)
    assert notebook.find(site.root) == [path]
    assert notebook.load(path, site.root).cells == split_cells(GOOD, HEAD.count("\n"))


def test_defaults(site) -> None:
    (block,) = load(site, "# ---\n# zhixing:\n#   id: e\n#   title: 例\n# ---\n# %%\nx = 1\n").blocks
    assert (block.timeout, block.memory) == (120, 4 << 30)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("# ---\n# zhixing:", "# zhixing:", 1),
        ("#   memory_mib: 512\n# ---\n", "#   memory_mib: 512\n", 1),
        ("# zhixing:", "# jupytext:", 1),
        ("# zhixing:", "# zhixing: x\n# a:", 1),
        ("#   id: e\n", "", 1),
        ("#   title: 例子\n", "", 1),
        ("#   id: e", "#   id: f", 3),
        ("#   id: e", "#   id: 1", 3),
        ("#   title: 例子", "#   title: 2024", 4),
        ("#   title: 例子", "#   title: [没关", 5),
        ("#   title: 例子", "#   title: 2024-13-01", 1),
        ("#   needs: []", "#   needs: ddpm", 5),
        ("#   needs: []", "#   needs: [1]", 5),
        ("#   timeout: 60", "#   timeout: 快", 6),
        ("#   timeout: 60", "#   timeout: 0", 6),
        ("#   timeout: 60", "#   timeout: true", 6),
        ("#   timeout: 60", "#   timeout: .nan", 6),
        ("#   timeout: 60", "#   timeout: 99999", 6),
        ("#   memory_mib: 512", "#   memory_mib: 1", 7),
        ("#   memory_mib: 512", "#   memory_mib: 2GiB", 7),
        ("#   needs: []", "#   need: []", 5),
        ("# 尾\n", "# 尾\nx = 1\n", 30),
    ],
)
def test_bad_header(site, old, new, line) -> None:
    assert old in GOOD
    problem = problem_of(site, GOOD.replace(old, new, 1))
    assert (problem.line, problem.code) == (line, "E602"), str(problem)


def test_code_fence_in_a_text_cell(site) -> None:
    problem = problem_of(site, GOOD.replace("# 尾", "# 尾\n#\n# ```python\n# x = 1\n# ```"))
    assert (problem.line, problem.code) == (31, "B206")
    assert load(site, GOOD.replace("# 尾", "# ```text\n# 展示\n# ```")).cells[-1].kind == "markdown"


def test_not_utf8(site) -> None:
    problem = problem_of(site, HEAD.encode() + b"# %%\nx = '\xff'\n")
    assert (problem.line, problem.code) == (10, "L504")


def test_which_files_are_examples(site) -> None:
    site.write("examples/helper.py", "x = 1\n")
    site.write("examples/pkg/e.py", GOOD)
    site.write("examples/e.py", GOOD)
    site.write("examples/forgot.py", "# %%\nx = 1\n")
    assert [p.name for p in notebook.find(site.root)] == ["e.py", "forgot.py"]
    project = Project.load(site.root)
    assert [(p.file, p.code) for p in project.problems] == [("examples/forgot.py", "E602")]


def test_needs(site) -> None:
    for name, needs in {"a": "[b]", "b": "[a]", "c": "[nope]", "d": "[]"}.items():
        site.write(f"examples/{name}.py", f"# ---\n# zhixing:\n#   id: {name}\n#   title: x\n#   needs: {needs}\n# ---\n# %%\nx = 1\n")
    problems = {p.reason.partition("：")[0]: p.file for p in Project.load(site.root).problems}
    assert problems.pop("needs 里的示例不存在") == "examples/c.py"
    assert problems.pop("needs 成环") in ("examples/a.py", "examples/b.py") and not problems


_CODE_LINE = st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=20).filter(
    lambda line: not line.startswith("#")
)


@given(st.lists(st.lists(_CODE_LINE, min_size=1, max_size=4).filter(lambda ls: ls[0].strip() and ls[-1].strip()), max_size=5))
def test_every_code_line_lands_in_a_cell_at_its_line(cells) -> None:
    text, expected = HEAD, []
    for lines in cells:
        text += "# %%\n\n"
        expected.append(Cell("code", "\n".join(lines), text.count("\n") + 1))
        text += "\n".join(lines) + "\n\n"
    assert split_cells(text, HEAD.count("\n")) == expected


# ── 变成 notebook ─────────────────────────────────────────────────────


def figure_html(svg: str, cell: int, i: int) -> str:
    return f"<figure>{cell}-{i}</figure>"


def test_outputs_go_under_their_cells(site) -> None:
    results = [
        {"out": "一\n", "error": None, "seconds": 0, "figs": []},
        {"out": "", "error": None, "seconds": 0, "figs": ["<svg/>", "<svg/>"]},
    ]
    text, _ = notebook.to_ipynb(load(site, GOOD.replace("$x^2$", "x")), results, figure_html, [])
    cells = json.loads(text)["cells"]
    assert [c["cell_type"] for c in cells] == ["markdown", "code", "code", "markdown"]
    assert "".join(cells[1]["outputs"][0]["text"]) == "一\n"
    assert ["".join(o["data"]["text/html"]) for o in cells[2]["outputs"]] == ["<figure>2-0</figure>", "<figure>2-1</figure>"]
    assert [c["id"] for c in cells] == [f"c{i}" for i in range(4)]


katex = pytest.mark.skipif(not formula.KATEX_JS.exists(), reason="先运行 make assets")


@katex
def test_formulas_are_stashed_and_restored(site) -> None:
    text = HEAD + "# %% [markdown]\n# 行内 $a+b$，代码 `$HOME`，价格 \\$5 与 $5\n#\n# $$\n# c^2\n# $$\n#\n# ```text\n# $d$\n# ```\n"
    problems: list[Problem] = []
    body, formulas = notebook.to_ipynb(load(site, text), [], figure_html, problems)
    source = "".join(json.loads(body)["cells"][0]["source"])
    assert problems == [] and len(formulas) == 2
    assert "行内 ZXMATH0ZX，代码 `$HOME`，价格 \\$5 与 $5" in source and "$d$" in source and "\nZXMATH1ZX\n" in source
    html, _ = notebook.finish_html("<p>行内 ZXMATH0ZX</p>\n<p>ZXMATH1ZX</p>", formulas, slugify(case="lower"))
    assert "ZXMATH" not in html and html.count("<annotation") == 2
    assert "<p>" + formulas[1] not in html


@katex
def test_more_than_ten_formulas(site) -> None:
    text = HEAD + "# %% [markdown]\n# " + " ".join(f"$x_{{{i}}}$" for i in range(12)) + "\n"
    _, formulas = notebook.to_ipynb(load(site, text), [], figure_html, [])
    page = " ".join(f"ZXMATH{i}ZX" for i in range(12))
    html, _ = notebook.finish_html(page, formulas, slugify())
    assert re.findall(r"<annotation[^>]*>(.*?)<", html) == [f"x_{{{i}}}" for i in range(12)]


@katex
def test_bad_formula_points_to_its_line(site) -> None:
    text = HEAD + "# %% [markdown]\n# 文字\n#\n# 坏的 $\\nope{x}$\n#\n# ## 标题 $y$\n"
    problems: list[Problem] = []
    notebook.to_ipynb(load(site, text), [], figure_html, problems)
    assert sorted((p.line, p.code) for p in problems) == [(12, "M401"), (14, "M402")]


def test_finish_html_is_small_and_loses_nothing() -> None:
    code = (
        '<div class="jp-Cell"><div class="CodeMirror cm-s-jupyter">\n<div class="highlight-ipynb hl-python"><pre><span></span>'
        '<span class="kn">import</span> <span class="nn">a</span>\n<span class="n">x</span> <span class="o">=</span> '
        '<span class="s2">&quot;</span><span class="s2">b </span><span class="s2">c&quot;</span> <span class="c1"># 注 &lt;/i&gt;</span>\n'
        "</pre></div>\n</div></div><div><p>甲</p></div><div class=\"keep\"><div>乙</div></div>"
    )
    html, _ = notebook.finish_html(code, [], slugify())
    assert html.split() == (
        '<div class="language-python highlight"><pre><code><i class=kn>import</i> <i class=nn>a</i>\n'
        'x = <i class=s2>&quot;b c&quot;</i> <i class=c1># 注 &lt;/i&gt;</i>\n</code></pre></div> <p>甲</p> <div class="keep">乙 </div>'
    ).split()

    def text(page: str) -> str:
        return "".join(re.sub(r"<[^>]+>", "", page).split())

    assert text(html) == text(code)


def test_squeeze_keeps_what_the_reader_sees() -> None:
    page = (
        '<!doctype html>\n<p class="a b"\n   title="x">  一\n\n   二 <b>三</b> 四 <!-- 注 --></p>\n'
        "<pre>\n  x = \"1\"\n\n</pre> <a href=\"u/\" class=\"c\">链</a><img alt=\"\" src=\"p.svg\"/><i data-x='a=\"b\" c'></i>"
        '<script id="q">\n  var a = "<b  class=\\"d\\">";\n</script><span style="top:1em;">　</span><a title="&quot;x;&quot;" href=y>z</a>'
    )
    small = notebook.squeeze(page)
    from html.parser import HTMLParser

    class Events(HTMLParser):
        def __init__(self, text: str) -> None:
            super().__init__()
            self.seen: list = []
            self.feed(text)

        def handle_starttag(self, tag, attrs):
            self.seen.append((tag, [(k, v.rstrip(";") if k == "style" else v) for k, v in attrs]))

        def handle_data(self, data):
            raw = self.seen and self.seen[-1][0] in ("pre", "script")
            self.seen.append(data if raw else " ".join(data.split()))

    def seen(text: str) -> list:
        return [event for event in Events(text).seen if event != ""]

    assert seen(small) == seen(re.sub(r"<!--.*?-->", "", page)) and len(small) < len(page) - 20
    assert notebook.squeeze(small) == small
    assert 'href="u/"' in small and 'src="p.svg"' in small and 'id="q"' in small and "class=c>" in small


def test_finish_html_fixes_headings_and_styles() -> None:
    body = (
        '<style>a{}</style><script src="x"></script><link rel="y">'
        '<h2 id="">注意力图<a class="anchor-link" href="#_1">¶</a></h2><h3>注意力图</h3><h2>B <code>c</code></h2>'
    )
    html, toc = notebook.finish_html(body, [], slugify(case="lower"))
    assert "<style" not in html and "<script" not in html and "<link" not in html and "anchor-link" not in html
    assert 'id="注意力图"' in html and 'id="注意力图-2"' in html and 'id="b-c"' in html
    assert [t["id"] for t in toc] == ["注意力图", "b-c"] and toc[0]["children"][0]["id"] == "注意力图-2"
