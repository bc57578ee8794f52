"""命令行：退出码、报告文件、``update`` 只动期望输出、用错时说人话、不 import mkdocs。"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from zhixing import cli, report
from zhixing.errors import Problem
from zhixing.engine import Engine
from zhixing.questions import template

GOOD = '正文\n\n```python\nprint(1)\n```\n\n```text title="输出"\n1\n```\n'
BAD = "```python\n1 / 0\n```\n"
EXAMPLE = "# ---\n# zhixing:\n#   id: e\n#   title: 例\n# ---\n\n# %%\nimport zhixing\nzhixing.metric('n', 3)\n"


@pytest.fixture
def zx(site, executor, monkeypatch, capsys):
    """在项目里调用命令行，返回 ``(退出码, 标准输出, 标准错误)``；执行进程整场共用。"""
    monkeypatch.chdir(site.root)
    monkeypatch.setattr(cli, "Engine", lambda root, **options: Engine(root, **options | {"executor": executor}))
    monkeypatch.setattr(Engine, "close", lambda self: None)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)

    def call(*args: str) -> tuple[int, str, str]:
        try:
            code = cli.main(list(args))
        except SystemExit as stop:  # argparse
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


# ── check ─────────────────────────────────────────────────────────────


def test_exit_codes(site, zx) -> None:
    assert zx("check")[0] == 0
    site.write("docs/a.md", GOOD)
    code, out, err = zx("check")
    assert (code, out) == (0, "") and "1 块跑过" in err and "0 处错误" in err
    site.write("docs/b.md", BAD)
    code, _, err = zx("check")
    assert code == 1 and "docs/b.md:2: R301 ZeroDivisionError" in err and "1 处错误" in err
    assert zx("check", "docs/a.md")[0] == 0
    assert zx("check", "docs/b.md")[0] == 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["check", "docs/nope.md"], "找不到"),
        (["check", "/etc/hosts"], "不在项目"),
        (["check", "../x.md"], "不在项目"),
        (["check", "mkdocs.yml"], "不是页面"),
        (["check", "examples/lib.py"], "不是页面"),
        (["check", "data"], "不是页面"),
        (["check", "-j", "0"], "正整数"),
        (["check", "-j", "-1"], "正整数"),
        (["check", "-j", "多"], "正整数"),
        (["check", "--nope"], "unrecognized"),
        (["nope"], "invalid choice"),
        ([], "required"),
        (["why", "docs/nope.md"], "找不到"),
        (["run", "docs/nope.md"], "找不到"),
        (["run"], "required"),
        (["report"], "没有上一次的结果"),
        (["report", "--format", "pdf"], "invalid choice"),
        (["update", "docs/nope.md"], "找不到"),
        (["new", "nope/x"], "章"),
        (["new", "control"], "章"),
        (["new", "control/a"], "已经存在"),
    ],
)
def test_usage_errors_exit_2(site, zx, args, says) -> None:
    site.write("examples/lib.py", "x = 1\n")
    site.write("data/x.txt", "")
    site.write("docs/control/a.md", GOOD)
    code, _, err = zx(*args)
    assert code == 2 and says in err and "Traceback" not in err


def test_outside_a_project(tmp_path, zx, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, _, err = zx("check")
    assert code == 2 and "mkdocs.yml" in err


def test_from_a_subdirectory(site, zx, monkeypatch) -> None:
    site.write("docs/sub/a.md", BAD)
    monkeypatch.chdir(site.root / "docs" / "sub")
    code, _, err = zx("check", "a.md")
    assert code == 1 and "docs/sub/a.md:2: R301" in err


def test_directories_and_examples(site, zx) -> None:
    site.write("docs/a.md", GOOD)
    site.write("docs/sub/b.md", GOOD)
    site.write("docs/sub/deep/c.md", GOOD)
    site.write("examples/e.py", EXAMPLE)
    site.write("examples/f.py", EXAMPLE.replace("id: e", "id: f\n#   needs: [e]"))
    for args, count in ((["docs/sub"], 2), (["docs"], 3), (["docs/a.md", "docs/sub/b.md"], 2), (["examples"], 2), (["."], 5), ([], 5)):
        code, _, err = zx("check", *args)
        assert code == 0 and f"{count} 块跑过" in err, (args, err)
    code, out, err = zx("check", "examples/f.py")  # 连同它 needs 的 e
    assert code == 0 and "2 块跑过" in err and out == "e: {'n': 3}\nf: {'n': 3}\n"


def test_static_problems_do_not_stop_execution(site, zx) -> None:
    site.write("docs/a.md", "```rust\n```\n\n" + BAD)
    code, _, err = zx("check")
    assert code == 1 and "docs/a.md:1: B203" in err and "docs/a.md:5: R301" in err


def test_not_utf8_is_one_problem_among_others(site, zx) -> None:
    site.write("docs/gbk.md", "第一行\n第二行".encode("gbk"))
    site.write("docs/bad.md", BAD)
    code, _, err = zx("check")
    assert code == 1 and "docs/gbk.md:1: L504" in err and "docs/bad.md:2: R301" in err


def test_question_pages_are_validated(site, zx) -> None:
    site.write("docs/control/x.md", template("control", "x").replace("level: 进阶", "level: 难"))
    code, _, err = zx("check")
    assert code == 1 and "docs/control/x.md:5: F102" in err


def test_too_many_skips(site, zx) -> None:
    site.write("docs/a.md", '```bash skip="要联网"\ncurl x\n```\n\n' * 21)
    code, _, err = zx("check")
    assert code == 1 and err.count("B210") == 1 and "docs/a.md:81: B210" in err and "21 块带理由跳过" in err


def test_cache_and_no_cache(site, zx) -> None:
    site.write("docs/a.md", GOOD)
    assert "0 块用缓存" in zx("check")[2]
    assert "1 块用缓存" in zx("check")[2]
    assert "0 块用缓存" in zx("check", "--no-cache")[2]


def test_new_page_passes_the_check(site, zx) -> None:
    code, out, _ = zx("new", "control/ip-adapter")
    assert (code, out) == (0, "docs/control/ip-adapter.md\n")
    assert zx("check", "docs/control/ip-adapter.md")[0] == 0


# ── 报告 ──────────────────────────────────────────────────────────────


def test_json_report(site, zx) -> None:
    site.write("docs/a.md", GOOD + '\n```yaml\na: 1\n```\n\n```bash skip="要联网"\ncurl x\n```\n')
    site.write("docs/b.md", BAD)
    assert zx("check", "--json", "r.json")[0] == 1
    data = json.loads((site.root / "r.json").read_text("utf-8"))
    assert data["total"] == {"run": 2, "failed": 1, "skipped": 1, "shown": 2, "cached_blocks": 0}
    a, b = data["pages"]
    assert (a["file"], a["run"], a["failed"], a["cached"]) == ("docs/a.md", 1, 0, False)
    assert a["skipped"] == [{"line": 15, "reason": "要联网"}]
    (problem,) = data["problems"]
    assert (problem["file"], problem["line"], problem["code"]) == ("docs/b.md", 2, "R301")
    assert "Traceback" in problem["detail"]


def test_junit_report(site, zx) -> None:
    site.write("docs/a.md", GOOD)
    site.write("docs/b.md", "```python\nraise ValueError('控制符 \\x00\\x1b\\ufffe & <x>')\n```\n")
    site.write("docs/c.md", "```rust\n```\n")
    site.write("docs/gbk.md", "中".encode("gbk"))
    assert zx("check", "--junit", "r.xml")[0] == 1
    tree = ET.parse(site.root / "r.xml").getroot()
    suites = {s.get("name"): s for s in tree}
    assert {name: (s.get("tests"), s.get("failures")) for name, s in suites.items()} == {
        "docs/a.md": ("1", "0"),
        "docs/b.md": ("2", "1"),
        "docs/c.md": ("1", "1"),
        "docs/gbk.md": ("1", "1"),
    }
    failure = suites["docs/b.md"].find("*/failure")
    assert "& <x>" in failure.get("message") and "docs/b.md:2: R301" in failure.text


def test_github_annotations(monkeypatch, capsys) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    report.print_problems([Problem("docs/a.md", 0, "R301", "100% 错\n换行"), Problem("docs/b.md", 3, "B201", "没关")])
    out, err = capsys.readouterr()
    assert out.splitlines() == ["::error file=docs/a.md,line=1::R301 100%25 错%0A换行", "::error file=docs/b.md,line=3::B201 没关"]
    assert err.startswith("docs/a.md:1: R301")


# ── run 与 report ─────────────────────────────────────────────────────


def test_run_prints_every_output(site, zx) -> None:
    site.write("docs/a.md", GOOD + "\n```bash\nprintf b\n```\n")
    site.write("examples/e.py", EXAMPLE)
    code, out, err = zx("run", "docs/a.md")
    assert code == 0 and [line.partition("（")[0] for line in out.splitlines()] == [
        "── docs/a.md:3 python", "1", "── docs/a.md:11 bash", "b"]  # fmt: skip
    assert "docs/a.md  2 块" in err and "缓存" not in err
    assert zx("run", "docs/a.md")[1] == out and "缓存" in zx("run", "docs/a.md")[2]
    assert "缓存" not in zx("run", "--no-cache", "docs/a.md")[2]
    code, out, _ = zx("run", "examples/e.py")
    assert code == 0 and out.endswith("n = 3\n")


def test_run_shows_output_up_to_the_failure(site, zx) -> None:
    site.write("docs/a.md", "```python\nprint('先')\n1 / 0\n```\n")
    code, out, err = zx("run", "docs/a.md")
    assert code == 1 and out.endswith("先\n") and "docs/a.md:3: R301" in err


def test_run_does_not_print_the_upstream(site, zx) -> None:
    site.write("examples/e.py", EXAMPLE)
    site.write("examples/f.py", EXAMPLE.replace("id: e", "id: f\n#   needs: [e]").replace("3", "4"))
    _, out, err = zx("run", "examples/f.py")
    assert "n = 4" in out and "n = 3" not in out and "examples/e.py" in err


def test_report_renders_the_last_result_without_running(site, zx, monkeypatch) -> None:
    site.write("docs/a.md", GOOD + '\n```bash skip="要<联网>"\ncurl x\n```\n')
    assert zx("check")[0] == 0
    monkeypatch.setattr(cli, "Engine", None)
    code, out, _ = zx("report")
    assert code == 0 and "✓ docs/a.md  1 块，跳过 1" in out and "0 处错误" in out
    code, out, _ = zx("report", "--format", "html")
    assert code == 0 and "要&lt;联网&gt;" in out and out.count("<tr>") == 2


def test_report_of_a_failure_exits_1(site, zx) -> None:
    site.write("docs/b.md", BAD)
    assert zx("check", "--json", "a.json", "--junit", "a.xml")[0] == 1
    for name, path in (("json", "b.json"), ("junit", "b.xml"), ("html", "b.html"), ("text", "b.txt")):
        code, out, _ = zx("report", "--format", name, "-o", path)
        assert (code, out) == (1, "") and "R301" in (site.root / path).read_text("utf-8")
    strip = "time"
    first, second = (json.loads((site.root / f"{n}.json").read_text("utf-8")) for n in "ab")
    assert {k: v for k, v in first.items() if k != strip} == {k: v for k, v in second.items() if k != strip}
    assert (site.root / "a.xml").read_text("utf-8") == (site.root / "b.xml").read_text("utf-8").rstrip("\n")


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"problems": [{}]}'])
def test_report_without_a_last_result_exits_2(site, zx, content) -> None:
    if content is not None:
        site.write(".cache/zhixing/last.json", content)
    code, _, err = zx("report")
    assert code == 2 and "先运行 zhixing check" in err


def test_help_lists_every_command_and_exit_codes(zx) -> None:
    code, out, _ = zx("--help")
    assert code == 0 and "退出码" in out
    for command in ("check", "run", "update", "why", "mutate", "report", "new"):
        assert f"\n    {command} " in out and zx(command, "--help")[0] == 0


# ── update ────────────────────────────────────────────────────────────

PAGE = """\
---
title: x
---

正文  两个空格结尾  

```python
print(0.123456)
print()
print("b  ")
```

```text title="输出"
旧
```

!!! note

    ```bash
    printf 'a\\n\\n\\tb\\n'
    ```

    ```text title="输出" tol="1e-3"
    旧
    旧
    ```

> ```python
> print("甲\\n\\n乙")
> ```
>
> ~~~text title="输出"
> ~~~

```python
print("好")
```

```text title="输出"
好
```

```python
print("<f at 0x7f>")
```

```text title="输出"
<f at ...>
```

```python raises="KeyError"
print("先")
{}[1]
```

```text title="输出"
后
```
"""
UPDATED = (
    PAGE.replace('```text title="输出"\n旧\n', '```text title="输出"\n0.123456\n\nb\n')
    .replace("    旧\n    旧\n", "    a\n\n        b\n")
    .replace('~~~text title="输出"\n', '~~~text title="输出"\n> 甲\n>\n> 乙\n')
    .replace("后\n", "先\n")
)


@pytest.mark.parametrize("encode", [str.encode, lambda s: b"\xef\xbb\xbf" + s.replace("\n", "\r\n").encode()], ids=["LF", "BOM 与 CRLF"])
def test_update_rewrites_only_expected_output(site, zx, encode) -> None:
    path = site.write("docs/a.md", encode(PAGE))
    assert zx("check")[0] == 1
    code, out, err = zx("update")
    assert (code, out) == (0, "docs/a.md: 改写 4 处期望输出\n"), err
    assert path.read_bytes() == encode(UPDATED)
    assert zx("check")[0] == 0
    assert zx("update")[:2] == (0, "")
    assert path.read_bytes() == encode(UPDATED)


def test_update_one_page(site, zx) -> None:
    a, b = (site.write(f"docs/{name}.md", GOOD.replace("\n1\n", "\n2\n")) for name in "ab")
    assert zx("update", "docs/a.md")[0] == 0
    assert a.read_text("utf-8") == GOOD != b.read_text("utf-8")


@pytest.mark.parametrize(
    ("page", "where"),
    [
        ('```python\nprint("<f at 0x7f>")\n```\n\n```text title="输出"\n<g at ...>\n```\n', "docs/a.md:6: R302"),
        ("```pycon\n>>> 1\n2\n```\n", "docs/a.md:2: R302"),
        ("```console\n$ echo a\nb\n```\n", "docs/a.md:2: R302"),
        (BAD + '\n```text title="输出"\nx\n```\n', "docs/a.md:2: R301"),
        ('```python\nprint("```")\n```\n\n```text title="输出"\nx\n```\n', "docs/a.md:6: R302"),
        ("```rust\n```\n", "docs/a.md:1: B203"),
    ],
    ids=["通配", "pycon", "console", "执行失败", "输出里有围栏", "静态错误"],
)
def test_update_leaves_and_reports_what_it_cannot_fix(site, zx, page, where) -> None:
    path = site.write("docs/a.md", page)
    code, out, err = zx("update")
    assert (code, out) == (1, "") and where in err
    assert path.read_text("utf-8") == page


def test_update_handles_progress_bars_and_colors(site, zx) -> None:
    page = '```python\nprint("\\r10%\\r100%\\x1b[31m完\\x1b[0m\\r\\n尾")\n```\n\n```text title="输出"\n```\n'
    path = site.write("docs/a.md", page)
    assert zx("update")[0] == 0
    assert path.read_text("utf-8").endswith('"输出"\n100%完\n尾\n```\n')
    assert zx("check")[0] == 0


# ── 独立性 ────────────────────────────────────────────────────────────


def test_command_line_does_not_import_mkdocs(site) -> None:
    site.write("docs/a.md", GOOD)
    site.write("examples/e.py", EXAMPLE)
    code = (
        "import sys\nfrom zhixing import cli\n"
        "codes = [cli.main(['check']), cli.main(['update']), cli.main(['why', 'docs/a.md'])]\n"
        "heavy = [m for m in ('mkdocs', 'material', 'torch', 'numpy', 'matplotlib', 'nbformat', 'distributed') if m in sys.modules]\n"
        "assert codes == [0, 0, 0] and heavy == [], (codes, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=site.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_entry_point_and_ascii_terminal(site) -> None:
    """终端不是 UTF-8 时也要能报错，而不是自己先崩。"""
    site.write("docs/中文.md", BAD)
    done = subprocess.run(
        [os.path.join(os.path.dirname(sys.executable), "zhixing"), "check"],
        cwd=site.root,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 1, done.stderr
    assert b"R301" in done.stderr and b"Traceback" in done.stderr and b"UnicodeEncodeError" not in done.stderr
