"""变异检查：生成哪些改动，幸存者怎么报，登记与记录怎么读写。"""

from __future__ import annotations

import json

import pytest

from zhixing import cli, mutate, pages
from zhixing.engine import Engine
from zhixing.project import Project

PAGE = """\
正文

```python
from lib import double

def add(a, b):
    return a + b

assert add(2, 3) == 5
loose = add(1, 1) - 7
assert double(4) == 8
```
"""


@pytest.fixture
def project(site):
    site.write("examples/lib.py", "import deep\n\n\ndef double(x):\n    return x * deep.TWO\n")
    site.write("examples/deep.py", "TWO = 2\n")
    site.write("docs/a.md", PAGE)
    return site


@pytest.fixture
def zx(project, executor, monkeypatch, capsys):
    monkeypatch.chdir(project.root)
    monkeypatch.setattr(cli, "Engine", lambda root, **options: Engine(root, **options | {"executor": executor}))
    monkeypatch.setattr(Engine, "close", lambda self: None)

    def call(*args: str) -> tuple[int, str, str]:
        code = cli.main(list(args))
        return code, *capsys.readouterr()

    return call


def changes(source: str) -> list[str]:
    return [what for _, what, _ in mutate.mutants_of(source)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("y = x[-1]", ["-1 → -2"]),
        ("y = x[:, -1]", ["-1 → -2"]),
        ("y = x[:-2]", ["-2 → -3"]),
        ("y = x.softmax(dim=-1)", ["x.softmax(dim=-1) → x", "-1 → 0"]),
        ("y = x.sum(-1)", ["-1 → 0"]),
        ("y = x.transpose(-2, -1)", ["-2 → 0", "-1 → 0"]),
        ("y = f(-1)", ["-1 → 1"]),
        ("y = -x", ["-x → x"]),
        ("y = a - 1", ["a - 1 → a + 1", "1 → 2"]),
    ],
)
def test_negative_axes_and_indices(source, expected) -> None:
    assert sorted(changes(source)) == sorted(expected)


def test_survivor_and_rate(project, zx) -> None:
    code, out, _ = zx("mutate")
    assert "docs/a.md:10: 幸存 add(1, 1) - 7 → add(1, 1) + 7" in out
    assert code == 1 and "docs/a.md：4 个变异，杀死" not in out.split("\n")[0]
    assert zx("mutate", "--require", "0.1")[0] == 0


def register(project, **changes: str) -> None:
    entry = {"file": "docs/a.md", "code": "loose = add(1, 1) - 7", "change": "add(1, 1) - 7 → add(1, 1) + 7", "reason": "没有用到"}
    project.write("tests/equivalent-mutants.yml", json.dumps([{k: v for k, v in (entry | changes).items() if v}]))


def test_registered_mutant_is_not_a_survivor(project, zx) -> None:
    register(project)
    _, out, _ = zx("mutate", "--require", "0")
    assert "- 7 → add" not in out and "登记为等价 1" in out and "用不上" not in out


@pytest.mark.parametrize(
    "change", [{"code": "loose = add(1, 1) - 8"}, {"change": "别的"}, {"file": "docs/gone.md"}, {"file": "examples/lib.py"}]
)
def test_unused_registration_is_an_error(project, zx, change) -> None:
    register(project, **change)
    code, out, _ = zx("mutate", "--require", "0")
    assert code == 1 and "用不上的登记" in out


def test_registration_of_a_file_not_checked_is_left_alone(project, zx) -> None:
    project.write("docs/b.md", PAGE)
    register(project, file="docs/b.md", code="没有这一行")
    assert zx("mutate", "--require", "0", "docs/a.md")[0] == 0
    assert zx("mutate", "--require", "0")[0] == 1


@pytest.mark.parametrize("text", ["[", "a: 1", "- file: x", '[{"file": "a", "code": "b", "change": "c", "reason": ""}]'])
def test_broken_registration_file(project, zx, text) -> None:
    project.write("tests/equivalent-mutants.yml", text)
    code, _, err = zx("mutate")
    assert code == 2 and "equivalent-mutants.yml" in err


def test_record_goes_stale_when_anything_it_rests_on_changes(project, zx) -> None:
    project.write("docs/a.md", PAGE + '\n```python\nprint(1)\n```\n\n```text title="输出"\n1\n```\n')
    assert zx("mutate", "--record", "--require", "0")[0] == 0
    files = {"docs/a.md": ("a + b", "b + a"), "examples/lib.py": ("x * ", "1 * x * "), "examples/deep.py": ("2", "2 * 1")}

    def shown() -> str:
        loaded = Project.load(project.root)
        return pages._mutation(loaded, "docs/a.md", mutate.recorded(project.root)["docs/a.md"])

    assert "%" in shown()
    for file, (old, new) in {**files, "docs/a.md ": ('"输出"\n1', '"输出"\n...')}.items():
        path = project.root / file.strip()
        before = path.read_text("utf-8")
        path.write_text(before.replace(old, new), "utf-8")
        assert "记录之后改过" in shown(), file
        path.write_text(before, "utf-8")
        assert "%" in shown()
    project.write("docs/a.md", (project.root / "docs/a.md").read_text("utf-8").replace("正文", "正文改了"))
    assert "%" in shown()


def test_record_refuses_a_sample(zx) -> None:
    code, _, err = zx("mutate", "--record", "--sample", "3")
    assert code == 2 and "--sample" in err


def test_pages_are_reported_as_they_finish(project, zx, monkeypatch) -> None:
    project.write("docs/b.md", PAGE)
    seen = []
    original = mutate.run

    def run(*args, progress, **options):
        return original(*args, progress=lambda verdict: (progress(verdict), seen.append(verdict.file)), **options)

    monkeypatch.setattr(mutate, "run", run)
    _, out, _ = zx("mutate", "--require", "0")
    assert sorted(seen) == ["docs/a.md", "docs/b.md"] and out.count("个变异，杀死") == 2


def test_comments_and_docstrings_do_not_outdate_a_record() -> None:
    code = 'def f(x):\n    """旧的说明，\n    两行。"""\n    return x + "# 不是注释"\n'
    same = '"""模块。"""\n\n\ndef f(x):\n    """新的。"""\n    # 想了想\n    return x + "# 不是注释"  # 为什么\n'
    assert mutate._bare(code) == mutate._bare(same) == 'def f(x):\n    return x + "# 不是注释"'
    assert mutate._bare(code.replace("x +", "x *")) != mutate._bare(code) != mutate._bare(code.replace("不是", "是"))
