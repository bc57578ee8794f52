"""练习：写法检查、构建时的两条证明、隔离、缓存与变异，以及判题代码本身。"""

from __future__ import annotations

import pytest

from zhixing import blocks, cli, judge, links, mutate, practice
from zhixing.artifacts import Artifacts
from zhixing.build import Build
from zhixing.context import current
from zhixing.engine import Engine
from zhixing.page import Page
from zhixing.project import Project

SOLUTION = """\
```python
def double(x):
    return 2 * x
```
"""
STARTER = """\
```python practice="starter"
def twice(x):
    return x
```
"""
TESTS = """\
```python practice="tests" solution="double"
def check(solution):
    assert solution(3) == 6, "三的两倍"
    assert solution(0) == 0
```
"""
# 行号：参考解 1–4，起始代码 6–9，测试 11–15
GOOD = "\n".join((SOLUTION, STARTER, TESTS))


def run(site, engine, page: str) -> Project:
    site.write("docs/a.md", page)
    project = Project.load(site.root)
    project.execute(engine)
    return project


def problems(site, engine, page: str) -> list[tuple[int, str]]:
    return sorted((p.line, p.code) for p in run(site, engine, page).problems)


# ── 写法 ──────────────────────────────────────────────────────────────


def test_a_good_page_passes_and_lists_its_exercise(site, engine) -> None:
    project = run(site, engine, "文字\n\n" + GOOD.replace("```\n\n```python practice=\"tests", "```\n\n中间可以有文字。\n\n```python practice=\"tests"))
    assert project.problems == []
    (exercise,) = practice.exercises(project.scans["docs/a.md"].blocks)
    assert exercise.entry == "twice" and exercise.tests.solution == "double"


MORE = GOOD.replace("double", "triple").replace("2 * x", "3 * x").replace("twice", "thrice").replace("== 6", "== 9")


def test_several_exercises_on_a_page(site, engine) -> None:
    project = run(site, engine, GOOD + "\n" + MORE)
    assert project.problems == []
    assert [e.entry for e in practice.exercises(project.scans["docs/a.md"].blocks)] == ["twice", "thrice"]


PLAIN = "```python\nassert True\n```\n"
BAD = [
    ("只有起始代码", SOLUTION + "\n" + STARTER, [(6, "P701")]),
    ("只有测试", SOLUTION + "\n" + TESTS, [(6, "P701")]),
    ("两块之间有别的代码", SOLUTION + STARTER + PLAIN + TESTS, [(5, "P701"), (12, "P701")]),
    ("两份起始代码", SOLUTION + STARTER + STARTER.replace("twice", "other") + TESTS, [(5, "P701")]),
    ("两份测试", SOLUTION + STARTER + TESTS + TESTS, [(14, "P701")]),
    ("先测试后起始代码", SOLUTION + TESTS + STARTER, [(5, "P701"), (10, "P701")]),
    ("一页两题重名", GOOD + "\n" + MORE.replace("thrice", "twice"), [(22, "P702")]),
    ("测试没写参考解", GOOD.replace(' solution="double"', ""), [(11, "P702")]),
    ("参考解写在起始代码上", GOOD.replace('="starter"', '="starter" solution="double"'), [(6, "P702")]),
    ("参考解写在普通块上", GOOD.replace("```python\n", '```python solution="double"\n', 1), [(1, "P702")]),
    ("参考解不是名字", GOOD.replace('="double"', '="2x"'), [(11, "B209"), (11, "P702")]),
    ("practice 的值不认识", GOOD.replace('="starter"', '="start"'), [(6, "B209"), (11, "P701")]),
    ("没有 check", GOOD.replace("check", "test"), [(11, "P702")]),
    ("起始代码没有函数", GOOD.replace("def twice(x):\n    return x", "x = 1"), [(6, "P702")]),
    ("不是 Python", GOOD.replace('python practice="starter"', 'bash practice="starter"'), [(6, "P702")]),
    ("起始代码跳过", GOOD.replace('="starter"', '="starter" skip="慢"'), [(6, "P702")]),
    ("测试要抛异常", GOOD.replace('="double"', '="double" raises="ValueError"'), [(11, "P702")]),
    ("测试里 import 别的库", GOOD.replace("def check", "import numpy as np\nfrom torch.nn import Linear\n\ndef check"), [(12, "P702"), (13, "P702")]),
    ("测试后面跟期望输出", GOOD + '\n```text title="输出"\n1\n```\n', [(17, "B208")]),
]


@pytest.mark.parametrize(("page", "expected"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_writing_is_reported_at_its_line(site, page, expected) -> None:
    site.write("docs/a.md", page)
    found = Project.load(site.root).problems
    assert sorted((p.line, p.code) for p in found) == expected
    assert all("\n" not in p.reason for p in found)


# ── 构建时的证明 ──────────────────────────────────────────────────────


def test_solution_that_fails_its_tests(site, engine) -> None:
    (problem,) = run(site, engine, GOOD.replace("2 * x", "2 * x if x else 1")).problems
    assert (problem.line, problem.code) == (14, "P703")
    for part in ("double", "输入：double(0)", "期望：0", "实际：1"):
        assert part in str(problem)


def test_solution_that_raises_is_reported_where_it_raises(site, engine) -> None:
    (problem,) = run(site, engine, GOOD.replace("2 * x", "6 // x * 3")).problems
    assert (problem.line, problem.code) == (3, "P703")
    assert "ZeroDivisionError" in problem.reason and "输入：double(0)" in problem.detail


def test_unknown_solution(site, engine) -> None:
    assert problems(site, engine, GOOD.replace('"double"', '"nope"')) == [(11, "P702")]


def test_solution_must_come_before_its_tests(site, engine) -> None:
    assert problems(site, engine, "\n".join((STARTER, TESTS, SOLUTION))) == [(6, "P702")]


def test_starter_that_already_passes(site, engine) -> None:
    (problem,) = run(site, engine, GOOD.replace("    return x\n", "    return x + x\n")).problems
    assert (problem.line, problem.code) == (11, "P704") and "twice" in problem.reason


@pytest.mark.parametrize("check", ["    pass", "    solution(3)", "    assert True"])
def test_tests_that_check_nothing(site, engine, check) -> None:
    assert problems(site, engine, GOOD.replace("    assert solution(3) == 6, \"三的两倍\"\n    assert solution(0) == 0", check)) == [(11, "P704")]


@pytest.mark.parametrize("check", ["    return solution(3) == 6", "    yield solution(3) == 6"])
def test_check_must_assert_rather_than_return(site, engine, check) -> None:
    page = GOOD.replace("    assert solution(3) == 6, \"三的两倍\"\n    assert solution(0) == 0", check)
    (problem,) = run(site, engine, page).problems
    assert problem.code == "P703" and "assert" in problem.reason


@pytest.mark.parametrize("body", ["raise NotImplementedError", "return None", "return 1 / 0", "..."])
def test_any_failure_of_the_starter_will_do(site, engine, body) -> None:
    assert problems(site, engine, GOOD.replace("    return x\n", f"    {body}\n")) == []


@pytest.mark.parametrize(
    ("body", "expected"), [("return undefined", [(8, "R301")]), ("return (", [(8, "R301")]), ("while True: pass", [(8, "R304")])]
)
def test_a_broken_starter_is_the_authors_fault(site, engine, body, expected) -> None:
    page = GOOD.replace("    return x\n", f"    {body}\n").replace('solution="double"', 'solution="double" timeout="1"')
    assert problems(site, engine, page) == expected


def test_slow_solution_hits_the_time_limit(site, engine) -> None:
    page = GOOD.replace("    return 2 * x", "    while x: pass\n    return 2 * x").replace('solution="double"', 'solution="double" timeout="1"')
    assert [p.code for p in run(site, engine, page).problems] == ["R304"]


def test_tests_too_slow_for_a_browser(site, engine) -> None:
    slow = "import time\n\n\ndef check(solution):\n    end = time.process_time() + 1.7\n    while time.process_time() < end:\n        pass"
    (problem,) = run(site, engine, GOOD.replace("def check(solution):", slow)).problems
    assert (problem.line, problem.code) == (11, "P705") and "1.5 秒" in problem.reason


def test_code_may_be_included_from_a_file(site, engine) -> None:
    site.write("examples/kata.py", "# --8<-- [start:tests]\ndef check(solution):\n    assert solution(3) == 7\n# --8<-- [end:tests]\n")
    included = '```python practice="tests" solution="double"\n--8<-- "examples/kata.py:tests"\n```\n'
    (problem,) = run(site, engine, "\n".join((SOLUTION, STARTER, included))).problems
    assert (problem.file, problem.line, problem.code) == ("examples/kata.py", 3, "P703")


def test_a_class_can_be_the_exercise(site, engine) -> None:
    page = """\
```python
class Counter:
    def __init__(self):
        self.n = 0

    def add(self, k):
        self.n += k
        return self.n
```

```python practice="starter"
class Counter:
    def add(self, k):
        return k
```

```python practice="tests" solution="Counter"
def check(solution):
    c = solution()
    assert c.add(1) == 1
    assert c.add(2) == 3
```
"""
    assert run(site, engine, page).problems == []
    assert problems(site, engine, page.replace("self.n += k", "self.n = k")) == [(21, "P703")]


# ── 隔离 ──────────────────────────────────────────────────────────────


def test_practice_does_not_touch_the_page(site, engine) -> None:
    before = "```python\nimport random\nx, double_calls = 1, []\nstate = random.getstate()\n```\n\n"
    after = "\n```python\nassert x == 1 and random.getstate() == state\nassert not {'twice', 'check', 'y'} & globals().keys()\n```\n"
    page = GOOD.replace("def twice", "x = y = 5\n\n\ndef twice").replace("def check(solution):", "import random\n\nx = 7\n\n\ndef check(solution):\n    random.random()")
    assert problems(site, engine, before + page + after) == []


@pytest.mark.parametrize("where", ["def twice(x):", "def check(solution):"])
def test_practice_cannot_see_the_page(site, engine, where) -> None:
    page = "```python\nsecret = 1\n```\n\n" + GOOD.replace(where, f"{where}\n    secret")
    (problem,) = run(site, engine, page).problems
    assert problem.code in ("P703", "R301") and "secret" in str(problem)


def test_random_cases_are_the_same_every_time(site, engine) -> None:
    page = GOOD.replace("def check(solution):", "import random\n\n\ndef check(solution):\n    assert random.randint(0, 10**9) == 906691059")
    assert problems(site, engine, "```python\nimport random\nrandom.random()\n```\n\n" + page) == []


# ── 三方一致、缓存、update、why ───────────────────────────────────────


def test_scanned_rendered_and_visible_agree(site, engine) -> None:
    project = run(site, engine, GOOD)
    scan, outcome = project.scans["docs/a.md"], project.outcomes["docs/a.md"]
    results = {b.line: r for b, r in zip(outcome.unit.blocks, outcome.payload["blocks"])}
    page = Page("docs/a.md", scan.text, "", [], Artifacts(), blocks={b.line: b for b in scan.blocks}, results=results)
    import markdown

    token = current.set(page)
    try:
        html = markdown.markdown(scan.text, extensions=["pymdownx.highlight", "pymdownx.superfences", "zhixing.page"])
    finally:
        current.reset(token)
    visible = links.Rendered("docs/a.md", "a/", scan.text, html)
    assert page.rendered == visible.blocks == {1, 6, 11} and visible.strays == [] and page.problems == []
    assert 'data-entry="twice"' in html and "<summary>测试代码</summary>" in html
    assert "参考解 double 通过" in html and "证明它不通过测试" in html


def test_cache_follows_every_part(site, engine) -> None:
    def cached(page: str) -> bool:
        project = run(site, engine, page)
        assert project.problems == []
        return project.outcomes["docs/a.md"].cached

    assert not cached(GOOD) and cached(GOOD)
    assert cached("开头多一行\n\n" + GOOD), "位置只用于报错"
    for old, new in [("return x\n", "return -x\n"), ("三的两倍", "三乘二"), ('="double"', '="again"')]:
        page = GOOD.replace(old, new).replace("    return 2 * x\n", "    return 2 * x\n\n\nagain = double\n")
        assert not cached(page) and cached(page), new


def test_failures_are_not_cached(site, engine) -> None:
    for page in (GOOD.replace("2 * x", "x"), GOOD.replace("    return x\n", "    return x + x\n")):
        for _ in range(2):
            project = run(site, engine, page)
            assert project.problems and not project.outcomes["docs/a.md"].cached


@pytest.fixture
def zx(site, executor, monkeypatch, capsys):
    monkeypatch.chdir(site.root)
    monkeypatch.setattr(cli, "Engine", lambda root, **options: Engine(root, **options | {"executor": executor}))
    monkeypatch.setattr(Engine, "close", lambda self: None)
    return lambda *args: (cli.main(list(args)), *capsys.readouterr())


def test_why_and_update(site, zx) -> None:
    path = site.write("docs/a.md", GOOD)
    assert "会重跑" in zx("why", "docs/a.md")[1]
    assert zx("check")[0] == 0
    assert "不用重跑" in zx("why", "docs/a.md")[1]
    assert zx("update", "docs/a.md")[0] == 0 and path.read_text("utf-8") == GOOD
    site.write("docs/a.md", GOOD.replace("三的两倍", "三乘二"))
    assert "docs/a.md: 会重跑" in zx("why", "docs/a.md")[1]


# ── 变异 ──────────────────────────────────────────────────────────────


def survivors(site, engine, page: str) -> list[tuple[int, str]]:
    project = run(site, engine, page)
    assert project.problems == []
    (verdict,) = mutate.run(project, engine, sample=None)
    return [(m.line, m.what) for m in verdict.survivors]


def test_strong_tests_kill_every_mutant(site, engine) -> None:
    assert survivors(site, engine, GOOD) == []


def test_weak_tests_let_the_mutant_live_even_if_the_page_would_catch_it(site, engine) -> None:
    weak = GOOD.replace("solution(3) == 6", "solution(2) == 4").replace("2 * x", "x ** 2 if x > 2 else 2 * x")
    page = weak + "\n```python\nassert (double(3), double(4), double(2), double(0), double(-1)) == (9, 16, 4, 0, -2)\n```\n"
    left = survivors(site, engine, page)
    assert {line for line, _ in left} == {3} and left
    assert all(what.endswith("（只用练习的测试）") for _, what in left)


def test_helpers_of_the_solution_are_mutated_too(site, engine) -> None:
    helper = "```python\ndef half(x):\n    return x - x // 2 if x > 5 else x / 2\n\n\ndef double(x):\n    return 4 * half(x)\n```\n\n"
    page = helper + GOOD[len(SOLUTION) :] + "\n```python\nassert half(8) == 4 and half(4) == 2\n```\n"
    left = survivors(site, engine, page)
    assert (3, "x - x // 2 → x + x // 2（只用练习的测试）") in left and (3, "x - x // 2 → x + x // 2") not in left


def test_starter_and_tests_are_not_mutated(site) -> None:
    site.write("docs/a.md", GOOD)
    project = Project.load(site.root)
    (unit,) = project.units()
    found = mutate.collect(unit, site.root)
    assert {m.line for m in found} == {3} and {m.block for m in found} == {0, 2}
    for m in found:
        assert mutate.affected(unit, m.block) == ([0, 2] if m.block == 0 else [2])


def test_fingerprint_follows_the_named_solution(site) -> None:
    prints = set()
    for name in ("double", "other"):
        site.write("docs/a.md", GOOD.replace('="double"', f'="{name}"'))
        prints.add(mutate.fingerprint(Project.load(site.root), "docs/a.md"))
    assert len(prints) == 2


# ── 判题代码（浏览器里跑的就是它）────────────────────────────────────

CHECK = "def check(solution):\n    assert solution([3, 1]) == [1, 3], '要升序'\n    assert solution([]) == []\n"


def verdict(code: str, tests: str = CHECK, entry: str = "f") -> dict:
    return judge.judge(code, tests, entry)


def test_judge_pass() -> None:
    result = verdict("f = sorted")
    assert (result["status"], result["calls"], result["line"]) == ("pass", 2, 0)


def test_judge_wrong_answer_shows_the_case() -> None:
    result = verdict("def f(x):\n    return x")
    assert (result["status"], result["kind"], result["message"], result["line"]) == ("fail", "AssertionError", "要升序", 0)
    assert result["case"] == {"input": "f([3, 1])", "expected": "[1, 3]", "actual": "[3, 1]"}


def test_judge_shows_the_input_before_it_was_changed() -> None:
    tests = "def check(solution):\n    x = [3, 1]\n    solution(x)\n    assert x == [1, 3]\n"
    result = verdict("def f(x):\n    x.clear()", tests)
    assert result["case"] == {"input": "f([3, 1])", "expected": "[1, 3]", "actual": "[]"}


def test_judge_error_in_the_readers_code() -> None:
    result = verdict("def g(x):\n    return x[9]\n\n\ndef f(x):\n    return g(x)\n")
    assert (result["status"], result["kind"], result["line"]) == ("error", "IndexError", 2)
    assert result["case"]["input"] == "f([3, 1])" and "return x[9]" in result["trace"]
    assert "judge.py" not in result["trace"]


@pytest.mark.parametrize(
    ("code", "kind", "line"),
    [
        ("def f(x)\n    pass", "SyntaxError", 1),
        ("x = 1\n\n  y = 2", "IndentationError", 3),
        ("x = 1\nraise ValueError('坏')", "ValueError", 2),
        ("def f(x):\n    assert x, '我自己的断言'\n    return sorted(x)", "AssertionError", 2),
        ("def f(x):\n    import sys\n    sys.exit()", "SystemExit", 3),
        ("def f(x):\n    return f(x)", "RecursionError", 2),
    ],
)
def test_judge_points_at_the_line(code, kind, line) -> None:
    result = verdict(code)
    assert (result["status"], result["kind"], result["line"]) == ("error", kind, line)


def test_judge_missing_name() -> None:
    result = verdict("def g(x): ...")
    assert result["status"] == "error" and "f" in result["message"] and result["trace"] == ""


def test_judge_exception_raised_by_the_tests_keeps_the_case() -> None:
    result = verdict("def f(x):\n    return None", "def check(solution):\n    assert len(solution(1)) == 2\n")
    assert (result["status"], result["kind"], result["line"]) == ("error", "TypeError", 0)
    assert result["case"] == {"input": "f(1)", "actual": "None", "expected": ""}


def test_judge_class_shows_the_calls_since_it_was_made() -> None:
    code = "class S:\n    def __init__(self, n=0):\n        self.x = []\n    def push(self, v):\n        self.x.append(v)\n    def pop(self):\n        return self.peek()\n    def peek(self):\n        return self.x[-1]\n"
    tests = "def check(solution):\n    solution(9).push(7)\n    s = solution()\n    s.push(1)\n    s.push(2)\n    assert s.pop() == 2\n    assert s.pop() == 1\n"
    result = verdict(code, tests, "S")
    assert result["case"] == {"input": "S()\npush(1)\npush(2)\npop()\npop()", "expected": "1", "actual": "2"}


def test_judge_huge_and_hostile_values_stay_short() -> None:
    result = verdict("class Bad:\n    def __repr__(self):\n        raise ValueError\n\n\ndef f(x):\n    return Bad()", "def check(solution):\n    assert solution([0] * 10**6) == 'x' * 10**6\n")
    assert all(len(text) < 1000 for text in result["case"].values()) and "Bad" in result["case"]["actual"]


def test_judge_equality_keeps_its_meaning() -> None:
    tests = "def check(solution):\n    assert solution(1) == solution(1) == 1\n    assert not solution(1) == 2\n    assert solution(1) != 2 and solution(1) == 1\n"
    assert verdict("def f(x):\n    return x", tests)["status"] == "pass"


def test_judge_runs_are_independent() -> None:
    code = "seen = []\n\n\ndef f(x):\n    seen.append(x)\n    return sorted(x) if len(seen) < 3 else 1 / 0"
    assert [verdict(code)["status"] for _ in range(2)] == ["pass", "pass"]


def test_judge_imports_only_the_standard_library() -> None:
    import ast
    import inspect
    import sys

    names = {a.name for n in ast.walk(ast.parse(inspect.getsource(judge))) if isinstance(n, ast.Import) for a in n.names}
    assert names and names <= sys.stdlib_module_names


# ── 站点：资源与设置 ──────────────────────────────────────────────────


def test_pyodide_is_copied_only_when_a_page_has_practice(site, engine) -> None:
    (site.root / "node_modules").symlink_to(blocks.__file__.rpartition("/src/")[0] + "/node_modules")
    build = Build(site.root, checkpoints=False)
    build.project = run(site, engine, SOLUTION)
    assert not any("pyodide" in uri for uri in build.assets()) and build.practice_settings() is None

    build.project = run(site, engine, GOOD)
    online, offline = build.assets(), build.assets(offline=True)
    settings = build.practice_settings()
    for assets, suffix in ((online, ".gz"), (offline, ".gz.js")):
        found = {uri for uri in assets if "pyodide" in uri and not uri.endswith("LICENSE.txt")}
        assert len(found) == 4 and all(uri.endswith(suffix) for uri in found)
        assert any(uri.endswith("LICENSE.txt") and "Mozilla" in path.read_text("utf-8") for uri, path in assets.items())
    assert set(settings["files"].values()) <= offline.keys()
    assert settings["python"].startswith("3.") and settings["bytes"] < 7 << 20


def test_missing_assets_are_a_clear_error(site, engine) -> None:
    katex = site.root / "node_modules/katex/dist"
    (katex / "fonts").mkdir(parents=True)
    (katex / "katex.min.css").write_text("")
    build = Build(site.root, checkpoints=False)
    build.project = run(site, engine, GOOD)
    with pytest.raises(FileNotFoundError, match="make assets"):
        build.assets()
