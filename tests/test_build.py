"""站点构建的端到端测试：在临时项目里真的运行 ``mkdocs build``。

坏输入按“会在哪一环被发现”分组，每组一次构建；再把各组放进同一个项目构建一次，
断言所有错误一次报全、谁也没有遮住谁。每次失败都断言旧站点逐字节没变。
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
ENV = {
    **{k: v for k, v in os.environ.items() if k not in ("GITHUB_ACTIONS", "ZHIXING_PRINT")},
    "NO_MKDOCS_2_WARNING": "1",
    "DISABLE_MKDOCS_2_WARNING": "true",
    "PYTHONUTF8": "1",
}
HEAD = """---
id: {id}
title: 示范
section: basics
level: 入门
origin: 预测
tags: [示范]
brief: 一句话。
questions:
  - q: 为什么？
    a: "#why"
refs: [某书]
---

## 为什么 {{#why}}
"""
GOOD = {
    "docs/index.md": "---\ntitle: 首页\n---\n\n见[示范页](basics/demo.md#why)与[示例](examples/tiny.ipynb)。\n",
    "docs/basics/demo.md": """---
id: demo
title: 示范：一页的全部写法
section: basics
level: 入门
origin: 预测
tags: [示范]
brief: 一句话答案，$a+b$ 等于 {{ m.tiny.answer:.1f }}。
questions:
  - q: 为什么？
    a: "#why"
followups:
  - q: 然后呢？
    a: 然后 $c$。
refs:
  - "arXiv:2006.11239 Denoising Diffusion Probabilistic Models"
---

## 为什么 {#why}

勾股数满足 $x^2+y^2=z^2$，示例给出 {{ m.tiny.answer:.1f }}。

$$
\\begin{aligned} x &= 3 \\\\ y &= 4 \\end{aligned} \\tag{1}
$$

```python
x, y = 3, 4
print(x * x + y * y)
```

```text title="输出"
25
```

```python fig="看什么：直线"
import matplotlib.pyplot as plt

plt.plot([0, 1], [0, 1])
```

```python skip="要联网"
import nothing
```

```bash
echo 你好 > a.txt
```

```console
$ cat a.txt
你好
```

![看斜率](fig:tiny/line)

```mermaid
flowchart LR
  a["开始"] --> b["结束"]
```

美元写作 \\$5，花括号写作 \\{{ m.tiny.answer }}。
""",
    "examples/tiny.py": """# ---
# zhixing:
#   id: tiny
#   title: 小示例
# ---

# %% [markdown]
# ## 画一条线
#
# 斜率是 $k=2$。

# %%
import matplotlib.pyplot as plt

import zhixing

fig, ax = plt.subplots()
ax.plot([0, 1], [0, 2])
zhixing.figure("line", fig)
zhixing.metric("answer", 42.0)
print("画好了")
""",
}


@dataclass
class Result:
    code: int
    text: str

    @property
    def problems(self) -> Counter:
        """``文件:行: 编号`` 的多重集。"""
        return Counter(re.findall(r"^((?:docs|examples)/\S+?:\d+: [A-Z]\d{3}) ", self.text, re.M))


class Project:
    """一个临时项目，与真项目用同一份配置、钩子与主题。"""

    def __init__(self, root: Path) -> None:
        self.root, self.site = root, root / "site"

    def write(self, files: dict[str, str | bytes]) -> None:
        for name, content in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def build(self, *options: str, **env: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", *options],
            cwd=self.root,
            env=ENV | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=120,
        )
        return Result(done.returncode, done.stdout.decode())

    def snapshot(self) -> dict[str, bytes]:
        return {p.relative_to(self.site).as_posix(): p.read_bytes() for p in self.site.rglob("*") if p.is_file()}

    def leftovers(self) -> list[str]:
        return sorted(p.name for p in self.root.glob(".site.*"))

    def html(self, page: str) -> str:
        return (self.site / page / "index.html").read_text("utf-8")


def new_project(root: Path) -> Project:
    project = Project(root)
    shutil.copytree(REPO / "hooks", root / "hooks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPO / "overrides", root / "overrides")
    shutil.copytree(REPO / "docs/assets", root / "docs/assets")
    for name in ("mkdocs.yml", "docs/tags.md"):
        shutil.copy(REPO / name, root / name)
    for name in ("src", "node_modules"):
        (root / name).symlink_to(REPO / name)
    project.write(GOOD)
    return project


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Project:
    """建成功过一次的项目；不要改它。"""
    project = new_project(tmp_path_factory.mktemp("build") / "base")
    result = project.build()
    assert result.code == 0, result.text
    assert project.leftovers() == []
    return project


@pytest.fixture
def project(base, tmp_path) -> Project:
    """一份可以随便弄坏的副本，带着上一次成功的 ``site/``。"""
    shutil.copytree(base.root, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")


# ---- 成功的站点 ----


def test_site_contains_what_the_page_declares(base):
    page = base.html("basics/demo")
    assert page.count('class="katex"') == 4  # 30 秒答案、正文、行间、追问
    assert 'encoding="application/x-tex">x^2+y^2=z^2<' in page
    assert page.count('class="zx-metric"') == 2 and ">42.0</span>" in page
    assert "$x" not in page and "{{ m.tiny.answer:" not in page
    assert "美元写作 $5，花括号写作 {{ m.tiny.answer }}" in page
    badges = re.findall(r"<zx-badge [^>]*>(.*?)</zx-badge>", page)
    assert badges == ["已运行，输出一致", "已运行", "未执行：要联网", "已运行", "已运行"]
    assert re.search(r'<figure class="zx-diagram"[^>]*aria-label="流程图：开始、结束"><svg ', page)
    assert '<details class="question">' in page and "<summary>然后呢？</summary>" in page
    assert 'href="https://arxiv.org/abs/2006.11239"' in page
    assert '<a href="#why">为什么？</a>' in page and '<h2 id="why">' in page


def test_every_image_is_a_pair_of_real_files(base):
    images = []
    for file in base.site.rglob("*.html"):
        for src in re.findall(r'<img src="([^"]+)"', file.read_text("utf-8")):
            path, _, only = src.partition("#only-")
            target = (file.parent / path).resolve()
            assert target.is_relative_to(base.site) and f".{only}.svg" in target.name
            assert target.read_text("utf-8").startswith("<svg")
            images.append(only)
    assert Counter(images) == {"light": 2, "dark": 2}  # 页面里画的一张、引用示例的一张


def test_notebook_page_is_executed_and_self_contained(base):
    page = base.html("examples/tiny")
    body = page[page.index("<article") : page.index("</article>")]
    assert "画好了" in body and 'id="画一条线"' in body and "<span class=katex>" in body
    assert "<style" not in body and "<script" not in body and "ZXMATH" not in body
    assert 'class="language-python highlight"' in body and "clipboard-copy" not in body


def test_generated_pages_and_navigation(base):
    assert '<a href="../basics/demo/#why">为什么？</a>' in base.html("questions")
    report = base.html("report")
    assert "docs/basics/demo.md" in report and "examples/tiny.py" in report and "要联网" in report
    assert "R301" in base.html("rules")
    assert all("深度学习基础" in base.html(page) for page in ("", "basics/demo", "report"))


def test_site_requests_nothing_external(base):
    for file in base.site.rglob("*.html"):
        html = file.read_text("utf-8")
        for tag in re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", html):
            url = re.search(r'\b(?:src|href)="(https?:)?//[^"]*"', tag)
            assert url is None or 'rel="canonical"' in tag, f"{file}: {tag}"


def test_rebuild_is_byte_identical_except_for_timestamps(project):
    before = project.snapshot()
    assert project.build().code == 0
    after = project.snapshot()
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"sitemap.xml", "sitemap.xml.gz"}, changed
    assert project.leftovers() == []


# ---- 坏输入 ----


@dataclass(frozen=True)
class Bad:
    """一组坏输入，与应当报出的全部错误（多报一条也算错）。"""

    files: dict[str, str | bytes]
    expected: dict[str, list[tuple[str, str]]]  # 文件 -> [(编号, 出错那一行里独有的一段文字)]

    def problems(self) -> Counter:
        return Counter(
            f"{file}:{line_of(self.files[file], needle)}: {code}"
            for file, found in self.expected.items()
            for code, needle in found
        )


def line_of(content: str | bytes, needle: str) -> int:
    """``needle`` 所在行；它在文件里必须只出现一次，否则测试自己写错了。"""
    text = content.decode("utf-8", "replace") if isinstance(content, bytes) else content
    assert text.count(needle) == 1, needle
    return text.count("\n", 0, text.index(needle)) + 1


def page(name: str, body: str, **changes: str) -> str:
    """除了 ``body`` 与 ``changes`` 都合格的一页；``changes`` 把 front matter 的整行换掉。"""
    head = HEAD.format(id=name)
    for key, line in changes.items():
        head, replaced = re.subn(rf"^{key}:.*\n", lambda m: line, head, flags=re.M)
        assert replaced == 1, key
    return f"{head}\n{body}"


BAD = {
    "formula": Bad(
        {
            "docs/basics/formula.md": page(
                "formula",
                r"""好的 $a$，坏的 $\frac{1}{2$。

$$
a = 1 \\
b = \nosuchmacro{2}
$$

没配对的 $x 只有一个。

### 关于 $h$ 的标题

公式里不能代入数字：$n = {{ m.tiny.answer }}$。
""",
                brief="brief: 坏的 $\\left( 1$。\n",
            ),
            "examples/formula_cell.py": """# ---
# zhixing:
#   id: formula_cell
#   title: 公式
# ---

# %% [markdown]
# 第一行
# 坏的 $\\frac{3}{$ 公式

# %% [markdown]
# ## 标题 $t$
""",
        },
        {
            "docs/basics/formula.md": [
                ("M401", r"\frac{1}{2"),
                ("M401", r"\nosuchmacro"),
                ("M401", "没配对的"),
                ("M402", "### 关于"),
                ("M401", "{{ m.tiny.answer }}"),
                ("M401", r"\left("),
            ],
            "examples/formula_cell.py": [("M401", r"\frac{3}"), ("M402", "标题 $t$")],
        },
    ),
    "mermaid": Bad(
        {
            "docs/basics/diagram.md": page(
                "diagram",
                """```mermaid
flowchart LR
  a["好"] --> b["的"]
```

```mermaid
flowchart LR
  c["甲"] --> d["乙"]
  e["没有闭合 --> f
```

```mermaid
flowchart LR
  g["丙"] --> h["丁"]
  style g fill:#ff0000
```
""",
            )
        },
        {"docs/basics/diagram.md": [("M403", "没有闭合"), ("M403", "style g")]},
    ),
    "fences": Bad(
        {
            "docs/basics/unclosed.md": page("unclosed", "```python\nx = 1\n```\n\n```python {title=没闭合}\ny = 1\n"),
            "docs/basics/fences.md": page(
                "fences",
                """```python colour="red"
a = 1
```

```pyhton
b = 1
```

```
没写语言
```

```python skip
c = 1
```

```python timeout="很久"
d = 1
```

```python
--8<-- "examples/minisd/no_such_file.py"
```

文字把两块隔开。

```text title="输出"
没有主人的输出
```
""",
            ),
            "docs/basics/marker.md": page("marker", "- ```python\n  e = 1\n  ```\n"),
            "docs/basics/stray.md": page(
                "stray",
                """一段正文：

    indented = "裸缩进代码块"

又一段正文。

<pre>
raw = "裸 HTML"
</pre>
""",
            ),
            "docs/basics/comment.md": page("comment", "<!--\n```python\nhidden = 1\n```\n-->\n"),
        },
        {
            "docs/basics/unclosed.md": [("B201", "没闭合")],
            "docs/basics/fences.md": [
                ("B202", "colour"),
                ("B203", "```pyhton"),
                ("B203", "```\n没写语言"),
                ("B204", "```python skip"),
                ("B209", "很久"),
                ("B207", "no_such_file"),
                ("B208", 'title="输出"'),
            ],
            "docs/basics/marker.md": [("B205", "- ```python")],
            "docs/basics/stray.md": [("B206", "indented ="), ("B206", "raw =")],
            "docs/basics/comment.md": [("B211", "```python")],
        },
    ),
    "front-matter": Bad(
        {
            "docs/basics/missing.md": page("missing", "", refs=""),
            "docs/basics/headless.md": "没有 front matter。\n",
            "docs/basics/vocabulary.md": page("vocabulary", "", level="level: 大师\n", origin="origin: 道听途说\n"),
            "docs/basics/types.md": page("types", "", tags="tags: 不是列表\n"),
            "docs/basics/misplaced.md": page("misplaced", "", section="section: system\n"),
            "docs/basics/renamed.md": page("another-name", ""),
            "docs/system/demo.md": page("demo", "", section="section: system\n"),
            "docs/basics/yaml.md": page("yaml", "", title="title: 半角冒号: 后面没加引号\n"),
            "docs/index.md": "---\ntitle: 甲: 乙\n---\n\n首页。\n",
            "docs/basics/unknown.md": page("unknown", "", tags="tags: [示范]\nlevle: 入门\n"),
            "docs/basics/anchor.md": page("anchor", "").replace("{#why}", "{#reason}"),
            "docs/basics/inline_answer.md": page("inline_answer", "").replace('a: "#why"', "a: 因为"),
        },
        {
            "docs/basics/missing.md": [("F101", "---\nid")],
            "docs/basics/headless.md": [("F101", "没有 front matter")],
            "docs/basics/vocabulary.md": [("F102", "level:"), ("F102", "origin:")],
            "docs/basics/types.md": [("F102", "tags:")],
            "docs/basics/misplaced.md": [("F102", "section:")],
            "docs/basics/renamed.md": [("F103", "id:")],
            "docs/system/demo.md": [("F103", "id:")],
            "docs/basics/yaml.md": [("F105", "半角冒号")],
            "docs/index.md": [("F105", "甲: 乙")],
            "docs/basics/unknown.md": [("F106", "levle")],
            "docs/basics/anchor.md": [("F104", "- q: 为什么")],
            "docs/basics/inline_answer.md": [("F102", "- q: 为什么")],
        },
    ),
    "links": Bad(
        {
            "docs/basics/links.md": page(
                "links",
                """[好](demo.md#why)、[死链](nowhere.md)、
[没有扩展名的死链](demo2)、
[别页的死锚点](demo.md#no-such-anchor)、
[本页的死锚点](#no-such-section)。

![没有的图](missing.png)

![外部图片](https://example.com/a.png)

[外部链接可以](https://example.com/)
""",
            )
        },
        {
            "docs/basics/links.md": [
                ("L501", "nowhere.md"),
                ("L501", "demo2"),
                ("L502", "#no-such-anchor"),
                ("L502", "#no-such-section"),
                ("L503", "missing.png"),
                ("L505", "https://example.com/a.png"),
            ]
        },
    ),
    "encoding": Bad(
        {"docs/basics/gbk.md": page("gbk", "第一行\n\n中文 GBK\n").encode("gbk")},
        {"docs/basics/gbk.md": [("L504", "title:")]},
    ),
    "execution": Bad(
        {
            "docs/basics/raising.md": page("raising", "```python\nok = 1\n\nassert ok == 2\n```\n\n```python\nlater = 1\n```\n"),
            "docs/basics/syntax.md": page("syntax", "```python\nok = 1\nbroken = (\n```\n"),
            "docs/basics/mismatch.md": page("mismatch", '```python\nprint("甲\\n乙")\n```\n\n```text title="输出"\n甲\n丙\n```\n'),
            "docs/basics/raises.md": page("raises", '```python raises="ValueError"\nint("1")\n```\n'),
            "docs/basics/slow.md": page("slow", '```python timeout="0.3"\nimport time\n\ntime.sleep(30)\n```\n'),
            "docs/basics/died.md": page("died", '```python\n__import__("os")._exit(3)\n```\n'),
            "docs/basics/shell.md": page("shell", "```bash\ntrue\nfalse\n```\n"),
            "docs/basics/nofig.md": page("nofig", '```python fig="看什么"\nz = 1\n```\n'),
        },
        {
            "docs/basics/raising.md": [("R301", "assert ok == 2")],
            "docs/basics/syntax.md": [("R301", "broken")],
            "docs/basics/mismatch.md": [("R302", "丙")],
            "docs/basics/raises.md": [("R303", "raises=")],
            "docs/basics/slow.md": [("R304", "time.sleep")],
            "docs/basics/died.md": [("R305", "_exit(3)")],
            "docs/basics/shell.md": [("R301", "false")],
            "docs/basics/nofig.md": [("R307", "fig=")],
        },
    ),
    "artifacts": Bad(
        {
            "docs/basics/artifacts.md": page(
                "artifacts",
                """没有的数 {{ m.tiny.nothing }}，没有的示例 {{ m.nobody.x }}。

格式不对 {{ m.tiny.answer:.2x }}。

![没有的图](fig:tiny/nothing)
""",
            )
        },
        {
            "docs/basics/artifacts.md": [
                ("M404", "m.tiny.nothing"),
                ("M404", "m.nobody.x"),
                ("M404", ":.2x"),
                ("M405", "fig:tiny/nothing"),
            ]
        },
    ),
    "examples": Bad(
        {
            "examples/failing.py": "# ---\n# zhixing:\n#   id: failing\n#   title: 失败的示例\n# ---\n\n# %%\nx = 1\n\n# %%\nassert x == 2\n",
            "docs/basics/citing.md": page("citing", "失败的示例里的数 {{ m.failing.x }}，图 ![看](fig:failing/y)\n"),
            "examples/header.py": "# ---\n# zhixing:\n#   id: not_the_file_name\n#   title: 头部不对\n# ---\n\n# %%\nx = 1\n",
        },
        # 引用失败的示例不再重复报：修好根因就都好了
        {"examples/failing.py": [("R301", "assert x == 2")], "examples/header.py": [("E602", "not_the_file_name")]},
    ),
}


def assert_rejected(project: Project, result: Result, expected: Counter, before: dict[str, bytes]) -> None:
    assert result.code != 0
    assert result.problems == expected, result.text
    assert "Traceback (most recent call last)" not in re.sub(r"^    .*\n", "", result.text, flags=re.M), result.text
    assert project.snapshot() == before
    assert project.leftovers() == []


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_reported_at_its_line_and_keeps_the_old_site(project, name):
    before = project.snapshot()
    project.write(BAD[name].files)
    assert_rejected(project, project.build(), BAD[name].problems(), before)


def test_every_problem_is_reported_in_one_build(project):
    before = project.snapshot()
    for bad in BAD.values():
        project.write(bad.files)
    result = project.build()
    assert_rejected(project, result, sum((bad.problems() for bad in BAD.values()), Counter()), before)
    # 改好之后照常建成，不受上一次失败影响
    for file in {file for bad in BAD.values() for file in bad.files} - GOOD.keys():
        (project.root / file).unlink()
    project.write(GOOD)
    assert project.build().code == 0
    assert project.snapshot().keys() == before.keys()


def test_first_build_that_fails_leaves_no_site(project):
    shutil.rmtree(project.site)
    project.write(BAD["formula"].files)
    assert project.build().code != 0
    assert not project.site.exists() and project.leftovers() == []


def test_strict_mode_warning_keeps_the_old_site(project):
    before = project.snapshot()
    project.write({"docs/orphan.md": "# 不在导航里的一页\n"})
    result = project.build()
    assert result.code != 0
    assert "orphan.md" in result.text and "严格模式" in result.text
    assert project.snapshot() == before
    assert project.leftovers() == []


# ---- 半路被杀 ----

KILL_HOOK = '''
"""在构建的某一处用 SIGKILL 杀掉自己。"""
import os, pathlib, shutil, signal

point = os.environ.get("KILL_AT", "")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if point.startswith("rename-"):
    original, left = pathlib.Path.rename, [int(point[-1])]
    def rename(self, target):
        result = original(self, target)
        if ".site." in f"{self} {target}":
            left[0] -= 1
            if not left[0]:
                die()
        return result
    pathlib.Path.rename = rename

def on_post_page(output, page, config):
    if point == "page" and page.file.src_uri.startswith("basics/"):
        die()
'''


@pytest.mark.parametrize(
    ("point", "after"),
    [
        ("page", "old"),  # 新站点写了一半
        ("rename-1", "gone"),  # 旧的已挪开，新的还没换上
        ("rename-2", "new"),  # 已换上，旧的还没删
    ],
)
def test_killed_build_is_recovered_by_the_next_one(project, point, after):
    project.write({"hooks/kill.py": KILL_HOOK})
    config = project.root / "mkdocs.yml"
    config.write_text(config.read_text("utf-8").replace("hooks:\n", "hooks:\n  - hooks/kill.py\n", 1), "utf-8")
    old = project.snapshot()
    good = GOOD["docs/index.md"]
    project.write({"docs/index.md": good + "\n改了一句话。\n"})

    assert project.build(KILL_AT=point).code == -signal.SIGKILL
    if after == "old":
        assert project.snapshot() == old
    elif after == "gone":
        assert not project.site.exists()
    else:
        assert "改了一句话" in project.html("")
    assert project.leftovers()
    if after == "gone":  # 最坏的一处：下一次构建即使失败，也要先把旧站点换回来
        project.write({"docs/index.md": good + "\n[死链](nowhere.md)\n"})
        assert project.build().code != 0
        assert project.snapshot() == old
        assert project.leftovers() == []

    project.write({"docs/index.md": good + "\n改了一句话。\n"})
    assert project.build().code == 0
    assert "改了一句话" in project.html("")
    assert project.leftovers() == []
