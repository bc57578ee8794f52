"""找代码块：每种上下文都找得到，行号与代码逐字对；坏写法一律指到行，绝不静默漏掉。"""

from __future__ import annotations

import html
import re
from pathlib import Path

import markdown
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mkdocs.utils.meta import get_data

from zhixing import blocks, links
from zhixing.context import current
from zhixing.errors import ContentError
from zhixing.page import Page

REPO = Path(__file__).parents[1]
SITE = yaml.unsafe_load((REPO / "mkdocs.yml").read_text("utf-8"))["markdown_extensions"]

HELPER = """\
import math


# --8<-- [start:area]
def area(r):
    return math.pi * r * r
# --8<-- [end:area]


class Box:
    # --8<-- [start:method]
    def double(self):
        return 2
    # --8<-- [end:method]
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("blocks")
    root = root / "site"
    (root / "docs").mkdir(parents=True)
    (root / "examples").mkdir()
    (root.parent / "outside.py").write_text("x = 1\n")
    (root / "examples" / "helper.py").write_text(HELPER, "utf-8")
    (root / "examples" / "latin.py").write_bytes("# caf\xe9\n".encode("latin-1"))
    return root


def scan(root: Path, content: str | bytes, name: str = "p") -> blocks.Scan:
    path = root / "docs" / f"{name}.md"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return blocks.scan(path, root)


def render(found: blocks.Scan) -> tuple[Page, links.Rendered]:
    """像 MkDocs 那样去掉 front matter，再用站点同一组扩展渲染。"""
    body, _ = get_data(found.text)
    offset = found.text.count("\n") - body.count("\n")
    page = Page(found.file, found.text, "../", list(found.problems), None, blocks={b.line: b for b in found.blocks}, offset=offset)
    token = current.set(page)
    try:
        text = markdown.markdown(
            body, extensions=list(SITE), extension_configs={k: v for k, v in SITE.items() if v}
        )
    finally:
        current.reset(token)
    return page, links.Rendered(found.file, "p/", found.text, text)


# (名字, 页面, [(行号, 语言, 代码)])
GOOD: list[tuple[str, str | bytes, list[tuple[int, str, str]]]] = [
    ("顶层", "正文\n\n```python\nx = 1\n```\n", [(3, "python", "x = 1")]),
    ("第一行就是围栏", "```python\nx = 1\n```\n", [(1, "python", "x = 1")]),
    ("文末没有换行", "正文\n\n```python\nx = 1\n```", [(3, "python", "x = 1")]),
    ("紧贴段落", "正文\n```python\nx = 1\n```\n后文\n", [(2, "python", "x = 1")]),
    ("紧贴标题", "## 标题\n```python\nx = 1\n```\n", [(2, "python", "x = 1")]),
    ("两块紧邻", "```python\nx = 1\n```\n```bash\nls\n```\n", [(1, "python", "x = 1"), (4, "bash", "ls")]),
    ("表格之后", "| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nx = 1\n```\n", [(5, "python", "x = 1")]),
    ("公式之后", "$$\nx^2\n$$\n\n```python\nx = 1\n```\n", [(5, "python", "x = 1")]),
    ("提示框", '!!! note "注意"\n\n    ```python\n    x = 1\n    ```\n', [(3, "python", "x = 1")]),
    ("提示框紧贴首行", "!!! note\n    ```python\n    x = 1\n    ```\n", [(2, "python", "x = 1")]),
    ("折叠块", '??? question "问"\n\n    ```python\n    x = 1\n    ```\n', [(3, "python", "x = 1")]),
    ("展开的折叠块", "???+ tip\n\n    ```bash\n    ls\n    ```\n", [(3, "bash", "ls")]),
    (
        "选项卡",
        '=== "甲"\n\n    ```python\n    x = 1\n    ```\n\n=== "乙"\n\n    ```bash\n    ls\n    ```\n',
        [(3, "python", "x = 1"), (9, "bash", "ls")],
    ),
    (
        "选项卡里的折叠块",
        '=== "甲"\n\n    ??? note "折"\n\n        ```python\n        if x:\n            y = 1\n        ```\n',
        [(5, "python", "if x:\n    y = 1")],
    ),
    ("无序列表", "- 项\n\n    ```python\n    x = 1\n    ```\n", [(3, "python", "x = 1")]),
    ("有序列表", "1. 项\n\n    ```python\n    x = 1\n    ```\n\n2. 项\n", [(3, "python", "x = 1")]),
    ("任务列表", "- [x] 项\n\n    ```python\n    x = 1\n    ```\n", [(3, "python", "x = 1")]),
    ("嵌套列表", "- 外\n\n    - 内\n\n        ```python\n        x = 1\n        ```\n", [(5, "python", "x = 1")]),
    ("列表里的提示框", "- 项\n\n    !!! note\n\n        ```python\n        x = 1\n        ```\n", [(5, "python", "x = 1")]),
    ("提示框里的列表", "!!! note\n\n    - 项\n\n        ```python\n        x = 1\n        ```\n", [(5, "python", "x = 1")]),
    ("定义列表", "术语\n\n:   定义\n\n    ```python\n    x = 1\n    ```\n", [(5, "python", "x = 1")]),
    ("引用", "> 引用\n>\n> ```python\n> x = 1\n>\n> y = 2\n> ```\n", [(3, "python", "x = 1\n\ny = 2")]),
    ("两层引用", "> > ```python\n> > x = 1\n> > ```\n", [(1, "python", "x = 1")]),
    ("引用里的提示框", "> !!! note\n>\n>     ```python\n>     x = 1\n>     ```\n", [(3, "python", "x = 1")]),
    ("脚注", "正文[^1]\n\n[^1]: 注\n\n    ```python\n    x = 1\n    ```\n", [(5, "python", "x = 1")]),
    ("md_in_html", '<div markdown="1">\n\n```python\nx = 1\n```\n\n</div>\n', [(3, "python", "x = 1")]),
    ("md_in_html 折叠", "<details markdown>\n<summary>看</summary>\n\n```python\nx = 1\n```\n\n</details>\n", [(4, "python", "x = 1")]),
    ("波浪线", "~~~python\nx = 1\n~~~\n", [(1, "python", "x = 1")]),
    ("四个反引号", "````python\nx = 1\n````\n", [(1, "python", "x = 1")]),
    ("四反引号里展示围栏", "````text\n```python\nx = 1\n```\n````\n", [(1, "text", "```python\nx = 1\n```")]),
    ("五反引号套四反引号", "`````text\n````text\n```python\n```\n````\n`````\n", [(1, "text", "````text\n```python\n```\n````")]),
    ("围栏里的另一种围栏", '```python\ns = """\n~~~\n~~~python\n"""\n```\n', [(1, "python", 's = """\n~~~\n~~~python\n"""')]),
    ("围栏里没到头的反引号", '```python\ns = "```不是结尾"\n```\n', [(1, "python", 's = "```不是结尾"')]),
    ("波浪线里的反引号", "~~~text\n```python\nx\n```\n~~~\n", [(1, "text", "```python\nx\n```")]),
    ("属性列表", "```{.python}\nx = 1\n```\n", [(1, "python", "x = 1")]),
    ("属性列表加空格", "``` { .python }\nx = 1\n```\n", [(1, "python", "x = 1")]),
    ("属性列表带标题", '```{.python title="a.py" hl_lines="1"}\nx = 1\n```\n', [(1, "python", "x = 1")]),
    ("属性列表带执行选项", '```{.python timeout="5"}\nx = 1\n```\n', [(1, "python", "x = 1")]),
    ("标题与行号", '```python title="a.py" linenums="1"\nx = 1\n```\n', [(1, "python", "x = 1")]),
    ("语言别名", "```py\nx = 1\n```\n\n```sh\nls\n```\n", [(1, "python", "x = 1"), (5, "bash", "ls")]),
    ("语言前有空格", "``` python\nx = 1\n```\n", [(1, "python", "x = 1")]),
    ("四种可执行语言", "```console\n$ ls\n```\n\n```pycon\n>>> 1\n1\n```\n", [(1, "console", "$ ls"), (5, "pycon", ">>> 1\n1")]),
    ("只显示的语言", "```yaml\na: 1\n```\n\n```sql\nselect 1\n```\n", [(1, "yaml", "a: 1"), (5, "sql", "select 1")]),
    ("Mermaid", "```mermaid\nflowchart LR\n  A --> B\n```\n", [(1, "mermaid", "flowchart LR\n  A --> B")]),
    ("缩进两格的围栏", "  ```python\n  x = 1\n  ```\n", [(1, "python", "x = 1")]),
    ("制表符缩进", "!!! note\n\n\t```python\n\tif 1:\n\t\tx = 1\n\t```\n", [(3, "python", "if 1:\n    x = 1")]),
    ("代码里的制表符", "```python\nx = 'a\tb'\n```\n", [(1, "python", "x = 'a  b'")]),
    ("CRLF", b"a\r\n\r\n```python\r\nx = 1\r\n```\r\n", [(3, "python", "x = 1")]),
    ("老式 CR 行尾", b"a\r\r```python\rx = 1\r```\r", [(3, "python", "x = 1")]),
    ("Windows BOM", "\ufeff---\ntitle: x\n---\n\n```python\nx = 1\n```\n", [(5, "python", "x = 1")]),
    ("BOM 紧跟围栏", "\ufeff```python\nx = 1\n```\n", [(1, "python", "x = 1")]),
    (
        "front matter 里有围栏",
        "---\ntitle: x\nbrief: |\n  ```python\n  y = 1\n  ```\n---\n\n```python\nx = 1\n```\n",
        [(9, "python", "x = 1")],
    ),
    ("分隔线不是 front matter", "正文\n\n---\n\n```python\nx = 1\n```\n\n---\n", [(5, "python", "x = 1")]),
    ("代码里有三横线", "---\ntitle: x\n---\n\n```yaml\n---\na: 1\n---\n```\n", [(5, "yaml", "---\na: 1\n---")]),
    ("注释与代码块相邻", "<!-- 注 -->\n\n```python\nx = 1\n```\n\n<!-- 尾 -->\n", [(3, "python", "x = 1")]),
    ("代码里的注释起点", "```html\n<!-- a\n```\n\n```python\nx = 1\n```\n\n```html\n-->\n```\n",
     [(1, "html", "<!-- a"), (5, "python", "x = 1"), (9, "html", "-->")]),
    ("行内代码里的注释起点", "写作 `<!--` 开头\n\n```python\nx = 1\n```\n\n以 `-->` 结尾\n", [(3, "python", "x = 1")]),
    ("段落中间的注释起点", "正文 <!-- 注\n\n```python\nx = 1\n```\n\n尾 -->\n", [(3, "python", "x = 1")]),
    ("行内三反引号", "用 ```code``` 表示\n\n```python\nx = 1\n```\n", [(3, "python", "x = 1")]),
    ("空代码块", "```python\n```\n", [(1, "python", "")]),
    ("代码里的空行与缩进", "```python\n\nif 1:\n\n    x = 1\n\n```\n", [(1, "python", "\nif 1:\n\n    x = 1\n")]),
    ("期望输出", '```python\nprint(1)\n```\n\n```text title="输出"\n1\n```\n', [(1, "python", "print(1)"), (5, "text", "1")]),
    ("图注块", "```python\nx = 1\n```\n\n/// caption\n说明\n///\n", [(1, "python", "x = 1")]),
    ("引入整个文件", '```python\n--8<-- "examples/helper.py"\n```\n', [(1, "python", HELPER.replace("# --8<-- [start:area]", "").replace("# --8<-- [end:area]", "").replace("    # --8<-- [start:method]", "").replace("    # --8<-- [end:method]", "").rstrip("\n"))]),
    ("引入区段", '正文\n\n```python\n--8<-- "examples/helper.py:area"\n```\n', [(3, "python", "def area(r):\n    return math.pi * r * r")]),
    ("引入缩进的区段", '!!! note\n\n    ```python\n    --8<-- "examples/helper.py:method"\n    ```\n', [(3, "python", "def double(self):\n    return 2")]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), [c[1:] for c in GOOD], ids=[c[0] for c in GOOD])
def test_found_rendered_and_visible_agree(root, content, expected) -> None:
    found = scan(root, content)
    assert found.problems == []
    assert [(b.line, b.lang, b.source) for b in found.blocks] == expected
    lines = found.text.split("\n")
    assert all(lines[b.line - 1].lstrip("> \t").startswith(("```", "~~~")) for b in found.blocks)
    page, rendered = render(found)
    assert page.problems == []
    assert page.rendered == rendered.blocks == {line for line, _, _ in expected}
    assert rendered.strays == []


@pytest.mark.parametrize(
    "content",
    ["<!--\n```python\nx = 1\n```\n-->\n\n```python\ny = 2\n```\n", "正文 <!--\n```python\nx = 1\n```\n-->\n\n```python\ny = 2\n```\n",
     "> <!-- a\n> ```python\n> x = 1\n> ```\n> -->\n\n```python\ny = 2\n```\n", "- 项\n\n    <!--\n    ```python\n    x = 1\n    ```\n    -->\n\n```python\ny = 2\n```\n"],
    ids=["顶层", "段落中间", "引用里", "列表里"],
)  # fmt: skip
def test_fence_in_html_comment_is_an_error_found_by_the_scan(root, content) -> None:
    """静态扫描就报，构建时不再报第二遍：两边同一编号、同一行。"""
    found = scan(root, content)
    line = next(i for i, text in enumerate(content.split("\n"), 1) if "```python" in text)
    assert [b.source for b in found.blocks] == ["y = 2"]
    assert [(p.line, p.code) for p in found.problems] == [(line, "B211")] and "注释" in found.problems[0].reason
    page, rendered = render(found)
    assert rendered.blocks == {found.blocks[0].line} and rendered.strays == []
    assert page.problems == found.problems


@pytest.mark.parametrize(
    ("content", "missing", "strays"),
    [
        ("正文\n\n    x = 1\n", set(), ["x = 1\n"]),
        ("正文\n\n    ```python\n    x = 1\n    ```\n", {3}, ["```python\nx = 1\n```\n"]),
        ("<script>\n```python\nx = 1\n```\n</script>\n", {2}, []),
        ("<pre>\nx = 1\n</pre>\n", set(), ["\nx = 1\n"]),
    ],
    ids=["裸缩进", "裸缩进里的围栏", "script 里的围栏", "原始 HTML"],
)
def test_code_the_reader_sees_differently_is_noticed(root, content, missing, strays) -> None:
    """语法上骗过静态扫描的写法，最终页面对不上，构建因此报错。"""
    found = scan(root, content)
    _, rendered = render(found)
    assert {b.line for b in found.blocks} - rendered.blocks == missing
    assert rendered.strays == strays


@pytest.mark.parametrize(
    ("content", "copied"),
    [
        ('```console\n$ echo "a" \\\n> && ls <b>\na\n$ true\n```\n', 'echo "a" \\\n&& ls <b>\ntrue'),
        ("```pycon\n>>> for i in range(2):\n...     print(i)\n...\n0\n1\n>>> 1\n1\n```\n", "for i in range(2):\n    print(i)\n\n1"),
        ("```python\nx = 1\n```\n", None),
        ("```bash\nls\n```\n", None),
    ],
    ids=["console", "pycon", "python", "bash"],
)
def test_copying_a_session_copies_only_the_commands(root, content, copied) -> None:
    _, rendered = render(scan(root, content))
    found = re.findall(r'data-copy="([^"]*)"', rendered.html)
    assert [html.unescape(text) for text in found] == ([] if copied is None else [copied])


def test_include_reports_original_location(root) -> None:
    (block,) = scan(root, '```python\n--8<-- "examples/helper.py:area"\n```\n').blocks
    assert block.origin == block.code_start == ("examples/helper.py", 5)
    (block,) = scan(root, "\n\n```python\nx = 1\n```\n").blocks
    assert block.code_start == ("docs/p.md", 4)


def test_options_are_parsed(root) -> None:
    (block,) = scan(
        root,
        '```python title="a.py" raises="ValueError: 秩" timeout="2.5" memory="1.5GiB" fig="看 $x$" output="show"\n```\n',
    ).blocks
    assert (block.title, block.raises, block.fig, block.output) == ("a.py", "ValueError: 秩", "看 $x$", "show")
    assert (block.timeout, block.memory) == (2.5, 3 << 29)
    assert block.runs
    (block,) = scan(root, '```bash skip="要联网"\ncurl x\n```\n').blocks
    assert block.skip == "要联网" and not block.runs


def test_expected_output_binding(root) -> None:
    text = '!!! note\n\n    ```python\n    print(1)\n    ```\n\n    ```text title="输出" tol="1e-3"\n    1.0\n    ```\n'
    code, output = scan(root, text).blocks
    assert (code.expected.text, code.expected.line, code.expected.end) == ("1.0", 7, 9)
    assert (code.expected.tol, code.expected.indent) == (1e-3, "    ")
    assert output.bound and not code.bound and output.expected is None


def test_expected_output_of_skipped_block_is_shown_only(root) -> None:
    found = scan(root, '```bash skip="要联网"\ncurl x\n```\n\n```text title="输出"\nok\n```\n')
    assert found.problems == [] and found.blocks[1].bound


# (名字, 页面, [(行号, 编号)])
BAD: list[tuple[str, str, list[tuple[int, str]]]] = [
    ("未闭合", "正文\n\n```python\nx = 1\n", [(3, "B201")]),
    ("列表里未闭合", "- 项\n\n    ```python\n    x = 1\n", [(3, "B201")]),
    ("引用里未闭合", "> ```python\n> x = 1\n\n正文\n", [(1, "B201")]),
    ("前面有好块的未闭合", "```python\nx = 1\n```\n\n```bash\nls\n", [(5, "B201")]),
    ("结尾缩进不对", "- 项\n\n    ```python\n    x = 1\n```\n", [(3, "B201"), (5, "B201")]),
    ("多出来的结尾", "```python\nx = 1\n```\n\n正文\n\n```\n", [(7, "B201")]),
    ("四开三闭", "````python\nx = 1\n```\n", [(1, "B201")]),
    ("波浪线配反引号", "~~~python\nx = 1\n```\n", [(1, "B201")]),
    ("列表标记同行", "- ```python\n    x = 1\n    ```\n", [(1, "B205")]),
    ("有序列表标记同行", "1. ```python\n    x = 1\n    ```\n", [(1, "B205")]),
    ("未知选项", '```python tiemout="3"\nx = 1\n```\n', [(1, "B202")]),
    ("裸词选项", "正文\n\n```python notest\nx = 1\n```\n", [(3, "B202")]),
    ("选项没有引号", "```python timeout=3\nx = 1\n```\n", [(1, "B202")]),
    ("只显示的语言用执行选项", '```yaml timeout="3"\na: 1\n```\n', [(1, "B202")]),
    ("tol 写在代码块上", '```python tol="0.1"\nx = 1\n```\n', [(1, "B202")]),
    ("tol 写在普通文字上", '```text tol="0.1"\nx\n```\n', [(1, "B202")]),
    ("未知语言", "正文\n\n```rust\nfn main() {}\n```\n", [(3, "B203")]),
    ("大小写不对的语言", "```Python\nx = 1\n```\n", [(1, "B203")]),
    ("没写语言", "```\nx = 1\n```\n", [(1, "B203")]),
    ("属性列表没写语言", '```{title="a.py"}\nx = 1\n```\n', [(1, "B203")]),
    ("空理由", '```python skip=""\nx = 1\n```\n', [(1, "B204")]),
    ("没有理由", "```python skip\nx = 1\n```\n", [(1, "B204")]),
    ("引入的文件不存在", '正文\n\n```python\n--8<-- "examples/nope.py"\n```\n', [(4, "B207")]),
    ("引入的区段不存在", '```python\n--8<-- "examples/helper.py:nope"\n```\n', [(2, "B207")]),
    ("引入项目外的文件", '```python\n--8<-- "../outside.py"\n```\n', [(2, "B207")]),
    ("引入绝对路径", '```python\n--8<-- "/etc/hosts"\n```\n', [(2, "B207")]),
    ("引入目录", '```python\n--8<-- "examples"\n```\n', [(2, "B207")]),
    ("引入不是 UTF-8 的文件", '```python\n--8<-- "examples/latin.py"\n```\n', [(2, "B207")]),
    ("引入的路径太长", f'```python\n--8<-- "{"x" * 5000}"\n```\n', [(2, "B207")]),
    ("引入的路径含空字符", '```python\n--8<-- "a\x00b"\n```\n', [(2, "B207")]),
    ("孤立的期望输出", '正文\n\n```text title="输出"\n1\n```\n', [(3, "B208")]),
    ("期望输出前隔着正文", '```python\nx = 1\n```\n\n正文\n\n```text title="输出"\n1\n```\n', [(7, "B208")]),
    ("期望输出缩进不同", '- 项\n\n    ```python\n    x = 1\n    ```\n\n```text title="输出"\n1\n```\n', [(7, "B208")]),
    ("期望输出前是只显示的语言", '```yaml\na: 1\n```\n\n```text title="输出"\n1\n```\n', [(5, "B208")]),
    ("两段期望输出", '```python\nx = 1\n```\n\n```text title="输出"\n1\n```\n\n```text title="输出"\n1\n```\n', [(9, "B208")]),
    ("pycon 自带输出", '```pycon\n>>> 1\n1\n```\n\n```text title="输出"\n1\n```\n', [(6, "B208")]),
    *[
        (f"{key}={value!r}", f'```python {key}="{value}"\nx = 1\n```\n', [(1, "B209")])
        for key, values in {
            "timeout": ["快", "0", "-1", "nan", "inf", "99999", ""],
            "memory": ["2", "2GB", "-1GiB", "0MiB", "1MiB", "99999999GiB", ""],
            "raises": ["", "1Error", "ValueError 秩", "exit x", "ValueError: "],
            "output": ["", "hide"],
            "fig": [""],
        }.items()
        for value in values
    ],
    *[
        (f"tol={value!r}", f'```python\nx = 1\n```\n\n```text title="输出" tol="{value}"\n1\n```\n', [(5, "B209")])
        for value in ("小", "0", "1", "-0.1", "nan", "")
    ],
    ("一块两处错", '```python skip="" timeout="x"\nx = 1\n```\n', [(1, "B204"), (1, "B209")]),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_bad_block_is_reported_at_its_line(root, content, expected) -> None:
    problems = scan(root, content).problems
    assert sorted((p.line, p.code) for p in problems) == expected
    assert all(p.file == "docs/p.md" and "\n" not in p.reason for p in problems)
    shifted = scan(root, "---\ntitle: x\n---\n\n" + content).problems
    assert sorted((p.line - 4, p.code) for p in shifted) == expected


def test_bad_block_does_not_hide_later_ones(root) -> None:
    found = scan(root, '```rust\n```\n\n```python notest\ny\n```\n\n```yaml skip=""\n```\n\n```python\nx = 1\n```\n')
    assert (found.blocks[-1].line, found.blocks[-1].source) == (11, "x = 1")
    assert sorted((p.line, p.code) for p in found.problems) == [(1, "B203"), (4, "B202"), (8, "B202")]


@pytest.mark.parametrize("data", [b"\xff\xfe# \x00", "正文\n中文".encode("gbk")], ids=["UTF-16", "GBK"])
def test_not_utf8(root, data) -> None:
    with pytest.raises(ContentError) as caught:
        scan(root, b"ok\n\n" + data)
    assert [(p.line, p.code) for p in caught.value.problems] == [(3, "L504")]


# ── 性质 ──────────────────────────────────────────────────────────────

_SHARDS = st.sampled_from(
    ["```", "````", "~~~", "python", " ", "    ", "\t", "\n", "\n\n", "> ", "- ", "1. ", "<!--", "-->", "---\n", "!!! note", "=== \"x\"",
     '--8<-- "examples/helper.py:area"', "{.python}", 'skip=""', 'title="输出"', "text", "x = 1", "$", "`", "[^1]:", "\r", "\x00", "\u2028", "：", "|"]
)  # fmt: skip


@settings(max_examples=300)
@given(st.one_of(st.text(), st.lists(_SHARDS).map("".join)))
def test_any_text_is_scanned_without_crashing(tmp_path_factory, text) -> None:
    found = blocks.scan_text(text, "docs/p.md", REPO)
    count = text.count("\n") + 1
    assert all(1 <= b.line < b.end <= count for b in found.blocks)
    assert all(1 <= p.line <= count for p in found.problems)


def _indent(lines: list[str], prefix: str) -> list[str]:
    return [(prefix + line).rstrip() for line in lines]


_CODE = st.lists(
    st.sampled_from(["x = 1", "if x:", "    y = '```'", "", "# <!-- 注 -->", "---", "~~~", "> z", "- w", "$ 元 $", "\u2028中文"]),
    min_size=1,
    max_size=5,
).map(lambda lines: [*lines, "end()"])  # fmt: skip
_WRAPPERS = {
    "顶层": ([], ""),
    "提示框": (["!!! note", ""], "    "),
    "折叠": (["??? tip \"折\"", ""], "    "),
    "选项卡": (['=== "甲"', ""], "    "),
    "列表": (["- 项", ""], "    "),
    "嵌套": (["- 外", "", "    - 内", ""], "        "),
    "引用": (["> 引", ">"], "> "),
}
_FENCES = st.sampled_from([("```python", "```"), ("````py", "````"), ('```{.python title="a"}', "```"), ('```bash timeout="3"', "```")])
_PROSE = st.sampled_from(["一段正文。", "## 标题", "| a |\n|---|\n| 1 |", "行内 `x` 与 ```y```", "<!-- 注释 -->", "$$\nx\n$$"])


@settings(max_examples=200)
@given(st.lists(st.tuples(_PROSE, st.sampled_from(sorted(_WRAPPERS)), _FENCES, _CODE), min_size=1, max_size=6))
def test_every_block_in_a_random_page_is_found(parts) -> None:
    lines: list[str] = []
    expected = []
    for prose, wrapper, (opening, closing), code in parts:
        head, prefix = _WRAPPERS[wrapper]
        lines += [*prose.split("\n"), "", *head]
        expected.append((len(lines) + 1, "bash" if "bash" in opening else "python", "\n".join(code)))
        lines += _indent([opening, *code, closing], prefix)
        lines += [""]
    found = blocks.scan_text("\n".join(lines), "docs/p.md", REPO)
    assert found.problems == []
    assert [(b.line, b.lang, b.source) for b in found.blocks] == expected
    page, rendered = render(found)
    assert page.rendered == rendered.blocks == {line for line, _, _ in expected}
    assert page.problems == [] and rendered.strays == []
