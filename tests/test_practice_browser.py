"""练习在真实浏览器里：写代码、运行、看结果、停下、断网、刷新、还原、无 JavaScript、离线包。

站点只有一页两道题。Pyodide 启动要几秒，所以大多数测试按顺序共用一个已经启动好的标签页。
"""

import ast
import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_site import MODES, Quiet, Reader, Web, browser  # noqa: F401

from zhixing import blocks, practice

pytestmark = pytest.mark.browser

REPO = Path(__file__).resolve().parents[1]
PATIENCE = 120_000  # 毫秒；机器忙的时候 Pyodide 启动也能等到

PAGE = """---
id: demo
title: 示范
section: leetcode
level: 入门
origin: 预测
tags: [示范]
brief: 一句话。
questions:
  - q: 为什么？
    a: "#why"
refs: [某书]
---

## 为什么 {#why}

```python
def ascending(nums):
    return sorted(nums)


def double(x):
    return 2 * x
```

```python practice="starter"
def ascending(nums):
    \"\"\"返回升序排好的新列表。\"\"\"
    return nums  # 1 < 2 & 3
```

```python practice="tests" solution="ascending"
def check(solution):
    assert solution([1, 2]) == [1, 2]
    assert solution([3, 1]) == [1, 3], "要升序"
```

```python practice="starter"
def twice(x):
    return None
```

```python practice="tests" solution="double"
def check(solution):
    assert solution(3) == 6
```
"""
STARTER = 'def ascending(nums):\n    """返回升序排好的新列表。"""\n    return nums  # 1 < 2 & 3'
RIGHT = "def ascending(nums):\n    return sorted(nums)\n"


def prepare(root: Path, page: str = PAGE) -> None:
    """与真站点用同一份配置、钩子与主题，只有首页与 ``page`` 一页。"""
    for name in ("hooks", "overrides", "docs/assets"):
        shutil.copytree(REPO / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "mkdocs.offline.yml", "docs/tags.md", "docs/synonyms.txt"):
        shutil.copy(REPO / name, root / name)
    for name in ("src", "node_modules"):
        (root / name).symlink_to(REPO / name)
    (root / "examples").mkdir()
    (root / "docs/leetcode").mkdir()
    (root / "docs/leetcode/demo.md").write_text(page, "utf-8")
    (root / "docs/index.md").write_text("---\ntitle: 首页\n---\n\n[示范](leetcode/demo.md)\n", "utf-8")


def run(root: Path, *command: str) -> None:
    """在项目里跑虚拟环境里的一条命令，失败就连同它的输出一起报。"""
    scripts = Path(sys.executable).parent
    quiet = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    done = subprocess.run(
        [scripts / command[0], *command[1:]],
        cwd=root,
        env=os.environ | quiet | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)} 失败：\n" + done.stdout.decode()[-4000:], pytrace=False)


def build(root: Path, config: str) -> Path:
    prepare(root)
    run(root, "mkdocs", "build", "-q", "-f", config)
    return root / "site"


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    top = tmp_path_factory.mktemp("practice")
    site = build(top / "zhixing", "mkdocs.yml")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Web(site, f"http://127.0.0.1:{server.server_port}/")
    server.shutdown()


class Exercise:
    """页面上的一道练习。"""

    def __init__(self, tab, index: int = 0) -> None:
        self.tab, self.root = tab, tab.locator(".zx-practice").nth(index)
        tab.set_default_timeout(PATIENCE)
        self.area = self.root.locator("textarea")
        self.result = self.root.get_by_role("status")

    def button(self, name: str):
        return self.root.get_by_role("button", name=name, exact=True)

    def start(self, code: str | None = None) -> None:
        if code is not None:
            self.area.fill(code)
        self.button("运行测试").click()

    def wait(self, text: str = "") -> str:
        """等这次运行结束，返回结果区的文字。"""
        self.tab.wait_for_function(
            "([root, text]) => root.querySelector('.zx-button--main').getAttribute('aria-disabled') === 'false'"
            " && root.querySelector('[role=status]').innerText.includes(text)",
            arg=[self.root.element_handle(), text],
        )
        return self.result.inner_text()

    def run(self, code: str) -> str:
        self.start(code)
        return self.wait()

    def case(self) -> dict[str, str]:
        labels, values = (self.result.locator(tag).all_inner_texts() for tag in ("dt", "dd"))
        return dict(zip(labels, values, strict=True))


@pytest.fixture(scope="module")
def reader(web, browser):  # noqa: F811
    with Reader(browser, web, **MODES["light"]) as reader:
        reader.requests = []
        reader.context.on("request", lambda r: reader.requests.append(r.url))
        yield reader


@pytest.fixture(scope="module")
def tab(reader):
    return reader.open("leetcode/demo/")


@pytest.fixture
def first(tab):
    return Exercise(tab)


# ---- 运行 ----


def test_nothing_is_downloaded_before_the_first_run(reader, first) -> None:
    assert first.area.input_value() == STARTER
    assert not any("/pyodide/" in url for url in reader.requests)
    assert first.area.is_visible() and not first.root.locator(".zx-practice__original").is_visible()
    assert first.result.count() == 1, "空的结果区也在无障碍树里，第一条消息才会被念出来"
    assert "Python 3.14" in first.root.inner_text() and "Python 3.11" in first.root.inner_text()


def test_passing(reader, first) -> None:
    text = first.run(RIGHT)
    assert "✓ 全部通过" in text and "2 次" in text
    assert "已通过" in first.root.locator(".zx-practice__state").inner_text()
    assert sum("/pyodide/" in url for url in reader.requests) == 4
    assert reader.errors == [] and reader.external == []


def test_wrong_answer_shows_input_expected_and_actual(first) -> None:
    text = first.run(STARTER)
    assert "✗ 答案不对：要升序" in text
    assert first.case() == {"输入": "ascending([3, 1])", "期望": "[1, 3]", "实际": "[3, 1]"}


def test_exception_points_at_the_line_in_the_editor(first) -> None:
    text = first.run("def ascending(nums):\n    nums = list(nums)\n    return nums[9]\n")
    assert "第 3 行抛出 IndexError：list index out of range" in text
    assert first.case()["输入"] == "ascending([1, 2])"
    assert first.area.get_attribute("aria-invalid") == "true"
    mark = first.root.locator(".zx-editor__stack").evaluate(
        "e => { const m = getComputedStyle(e, '::before'), p = getComputedStyle(e.querySelector('textarea'));"
        " return (parseFloat(m.top) - parseFloat(p.paddingTop)) / parseFloat(p.lineHeight); }"
    )
    assert mark == pytest.approx(2, abs=0.05), "标在第三行"
    first.button("跳到第 3 行").click()
    assert first.area.evaluate("e => e.value.slice(0, e.selectionStart).split('\\n').length") == 3
    assert first.area.evaluate("e => e === document.activeElement")
    first.tab.keyboard.type("#")
    assert first.area.get_attribute("aria-invalid") == "false", "改了代码，旧的标记就撤掉"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def ascending(nums)\n    pass", "第 1 行抛出 SyntaxError：expected ':'"),
        ("def ascending(nums):\n    return ascending(nums)", "第 2 行抛出 RecursionError"),
        ("import numpy", "第 1 行抛出 ModuleNotFoundError：No module named 'numpy'"),
        ("def other(nums):\n    return nums", "没有找到 ascending"),
        ("def ascending(nums):\n    input()", "第 2 行抛出"),
        ("raise SystemExit", "第 1 行抛出 SystemExit"),
    ],
)
def test_mistakes_are_explained(first, code, expected) -> None:
    assert expected in first.run(code)


def test_printed_text_is_shown_and_bounded(first) -> None:
    text = first.run("def ascending(nums):\n    print('看 <b>', nums)\n    return sorted(nums)\n")
    assert "✓" in text and "看 <b> [3, 1]" in text
    text = first.run("def ascending(nums):\n    for i in range(6000): print(i)\n    return sorted(nums)\n")
    assert "✓" in text and "输出太多" in text and len(text) < 40_000


def test_no_network_and_no_leftovers_between_runs(reader, first) -> None:
    assert "抛出" in first.run("import urllib.request\nurllib.request.urlopen('https://example.com')")
    first.run("leak = 1\n" + RIGHT)
    assert "NameError" in first.run("leak\n")
    assert reader.external == []


def test_keyboard_shortcut_runs(first) -> None:
    first.area.fill(RIGHT)
    first.area.press("Control+Enter")
    assert "✓" in first.wait("全部通过")


# ---- 停下 ----


def test_stop_button_ends_an_endless_loop(first) -> None:
    first.start("def ascending(nums):\n    print('进来了')\n    while True:\n        pass\n")
    first.result.get_by_text("正在运行测试").wait_for()
    stop = first.button("停止")
    stop.focus()
    stop.press("Enter")
    text = first.wait()
    assert "■ 已停止" in text
    assert first.button("运行测试").evaluate("e => e === document.activeElement"), "焦点不能掉"
    assert not stop.is_visible()


def test_endless_loop_is_stopped_and_python_comes_back(first) -> None:
    text = first.run("def ascending(nums):\n    print('进来了')\n    while True:\n        pass\n")
    assert "超过 10 秒" in text and "进来了" in text
    assert "✓ 全部通过" in first.run(RIGHT)


def test_only_one_exercise_runs_at_a_time(tab, first) -> None:
    second = Exercise(tab, 1)
    first.start("def ascending(nums):\n    while True: pass\n")
    first.result.get_by_text("正在运行测试").wait_for()
    assert second.button("运行测试").get_attribute("aria-disabled") == "true"
    second.button("运行测试").dispatch_event("click")  # 驱动程序不肯点禁用的按钮，读者会
    assert second.result.inner_text() == ""
    first.button("停止").click()
    assert "已停止" in first.wait()


def test_works_without_network_once_loaded(reader, first) -> None:
    reader.context.set_offline(True)
    try:
        assert "✓ 全部通过" in first.run(RIGHT), "停掉的 Worker 重新启动也不用联网"
    finally:
        reader.context.set_offline(False)


# ---- 草稿与进度 ----


def test_draft_survives_a_reload_and_reset_can_be_undone(tab, first) -> None:
    first.area.fill("我的草稿 = 1\n")
    tab.reload()
    assert first.area.input_value() == "我的草稿 = 1\n"
    assert "已通过" in first.root.locator(".zx-practice__state").inner_text()
    assert Exercise(tab, 1).area.input_value() == "def twice(x):\n    return None", "别的题不受影响"

    first.button("还原").click()
    assert first.area.input_value() == STARTER
    first.button("取回刚才的代码").click()
    assert first.area.input_value() == "我的草稿 = 1\n"
    first.button("还原").click()
    tab.reload()
    assert first.area.input_value() == STARTER
    keys = tab.evaluate("Object.keys(localStorage).filter((k) => k.startsWith('zhixing:practice:'))")
    assert keys == ["zhixing:practice:demo/ascending"]


def test_question_index_shows_progress(reader, tab) -> None:
    index = reader.open("questions/")
    assert index.locator(".zx-mark").inner_text() == "练习 1/2"
    tab.evaluate("zhixing.progress.save('demo/twice', { passed: '2026-01-01T00:00:00Z' })")
    index.wait_for_function("document.querySelector('.zx-mark').textContent === '✓ 练习已通过'")
    index.close()
    tab.evaluate("zhixing.progress.save('demo/twice', { passed: undefined })")


def test_editing_still_works_when_nothing_can_be_stored(web, browser) -> None:  # noqa: F811
    with Reader(browser, web, **MODES["light"]) as fresh:
        fresh.context.add_init_script("Storage.prototype.setItem = () => { throw new DOMException('满了', 'QuotaExceededError') }")
        exercise = Exercise(fresh.open("leetcode/demo/"))
        exercise.area.fill("x = 1")
        assert "不让保存" in exercise.root.locator(".zx-practice__state").inner_text()


# ---- 编辑 ----


def test_keyboard_editing(tab, first) -> None:
    area, keys = first.area, tab.keyboard
    area.fill("")
    keys.type("def f(x):\nif x:\nreturn 1\n")
    assert area.input_value() == "def f(x):\n    if x:\n        return 1\n        "
    keys.press("Backspace")
    assert area.input_value().endswith("return 1\n    ")
    keys.press("Tab")
    assert area.input_value().endswith("return 1\n        ")
    keys.press("Control+a")
    keys.press("Tab")
    assert area.input_value().startswith("    def f(x):\n        if x:\n")
    keys.press("Shift+Tab")
    assert area.input_value().startswith("def f(x):\n    if x:\n")
    keys.press("Control+z")
    assert area.input_value().startswith("    def f(x):"), "撤销认得缩进"
    assert area.evaluate("e => e === document.activeElement")


def test_tab_key_is_not_a_trap(tab, first) -> None:
    first.area.focus()
    tab.keyboard.press("Escape")
    tab.keyboard.press("Tab")
    assert first.button("运行测试").evaluate("e => e === document.activeElement")
    assert "Esc" in tab.locator("#" + first.area.get_attribute("aria-describedby")).inner_text()
    first.area.focus()
    tab.keyboard.press("Escape")
    tab.keyboard.press("Shift+Tab")
    assert not first.area.evaluate("e => e === document.activeElement")


@pytest.mark.parametrize("mode", ["light", "phone-dark"])
def test_paint_lies_exactly_under_the_text(web, browser, mode) -> None:  # noqa: F811
    """着色层与 textarea 逐字重合：量一行混排文字的宽度与总高度。"""
    with Reader(browser, web, **MODES[mode]) as fresh:
        exercise = Exercise(fresh.open("leetcode/demo/"))
        exercise.area.fill("x = '中文，mixed → text'  # 注释 < & > fi ffi\n" * 12 + "\n")
        sizes = exercise.root.locator(".zx-editor__stack").evaluate(
            "e => [...e.children].map((c) => [c.scrollWidth, c.scrollHeight, ...['fontFamily', 'fontSize', 'lineHeight', 'letterSpacing',"
            " 'textAutospace', 'textSpacingTrim', 'fontVariantLigatures', 'paddingLeft', 'paddingTop', 'tabSize'].map((p) => getComputedStyle(c)[p])])"
        )
        assert sizes[0] == sizes[1]
        assert exercise.area.evaluate("e => e.scrollHeight === e.clientHeight && e.scrollWidth === e.clientWidth")


def test_highlight_keeps_the_text_and_the_site_colors(tab, first) -> None:
    code = "@cache\ndef f(x):\n    '''三引号\n    没关 <b>&amp;"
    first.area.fill(code)
    paint = first.root.locator(".zx-editor__paint")
    assert paint.evaluate("e => e.textContent") == code + "\n"
    color = "(s) => getComputedStyle(document.querySelector(s)).color"
    assert tab.evaluate(color, ".zx-editor__paint .k") == tab.evaluate(color, ".highlight pre .k")


# ---- 别的读者 ----


def test_without_javascript_it_is_an_ordinary_code_block(web, browser) -> None:  # noqa: F811
    with Reader(browser, web, **MODES["no-js"]) as fresh:
        tab = fresh.open("leetcode/demo/")
        practice = tab.locator(".zx-practice").first
        assert practice.locator("pre > code").inner_text().rstrip("\n") == STARTER
        assert practice.locator("pre > code").is_visible() and tab.locator("textarea").count() == 0
        tests = tab.locator(".zx-tests").first
        assert not tests.locator("pre").is_visible()
        tests.locator("summary").click()
        assert "要升序" in tests.locator("pre").inner_text()


def test_failed_download_says_so_and_can_be_retried(web, browser) -> None:  # noqa: F811
    with Reader(browser, web, **MODES["light"]) as fresh:
        fresh.context.route("**/pyodide.asm.wasm.gz", lambda route: route.abort())
        exercise = Exercise(fresh.open("leetcode/demo/"))
        assert "没能下载 Python" in exercise.run(RIGHT)
        assert exercise.area.input_value() == RIGHT
        exercise.tab.reload()
        fresh.context.set_offline(True)
        assert "没能下载 Python" in exercise.run(RIGHT)
        fresh.context.set_offline(False)
        fresh.context.unroute("**/pyodide.asm.wasm.gz")
        assert "✓ 全部通过" in exercise.run(RIGHT), "网络恢复后再点一次就行"
        assert fresh.external == []


@pytest.mark.parametrize("mode", ["light", "dark", "phone", "phone-dark"])
def test_looks_and_accessibility(web, browser, mode) -> None:  # noqa: F811
    from axe_playwright_python.sync_playwright import Axe

    # 结果区的样子不必真的启动 Python：假装 Worker 立刻给出结果
    fake = """
      addEventListener("DOMContentLoaded", () => {
        zhixing.Runtime.prototype.run = async (job, seconds, tell) => {
          tell.output("打印的内容\\n");
          return { status: "error", calls: 1, seconds: 0, kind: "ValueError", message: "坏了", line: 2, trace: "回溯",
                   case: { input: "ascending([3, 1])", expected: "[1, 3]", actual: "[3, 1]" } };
        };
      });
    """
    with Reader(browser, web, **MODES[mode]) as fresh:
        fresh.context.add_init_script(fake)
        tab = fresh.open("leetcode/demo/")
        exercise = Exercise(tab)
        exercise.area.fill("def ascending(nums):\n    return nums  # " + "很长的注释" * 30)
        exercise.button("运行测试").click()
        exercise.result.get_by_text("第 2 行抛出").wait_for()
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth + 1"), "整页不能横向滚动"
        assert exercise.root.locator(".zx-editor").evaluate("e => e.scrollWidth > e.clientWidth"), "长行在框里滚动"
        touch = "phone" in mode
        assert exercise.button("缩进").is_visible() == touch, "手机键盘没有 Tab"
        if touch:
            assert exercise.button("运行测试").bounding_box()["height"] >= 40
            assert float(exercise.area.evaluate("e => parseFloat(getComputedStyle(e).fontSize)")) >= 16, "iOS 聚焦时会放大"
        found = {
            v["id"]: [node["html"][:160] for node in v["nodes"]][:3]
            for v in Axe().run(tab, {"exclude": ["math-tex"]}).response["violations"]
            if v["impact"] in ("serious", "critical")
        }
        assert found == {} and fresh.errors == []


def test_print_shows_the_starter_not_the_editor(web, browser) -> None:  # noqa: F811
    with Reader(browser, web, **MODES["dark"]) as fresh:
        exercise = Exercise(fresh.open("leetcode/demo/"))
        exercise.tab.emulate_media(media="print")
        assert exercise.root.locator("pre > code").is_visible() and not exercise.area.is_visible()


# ---- 离线包 ----


def test_offline_package_opened_from_disk(tmp_path, browser) -> None:  # noqa: F811
    site = build(tmp_path / "offline", "mkdocs.offline.yml")
    assert not list((site / "assets/pyodide").rglob("*.gz")), "离线包里只放 file:// 用得上的那一种"
    web = Web(site, site.as_uri() + "/")
    with Reader(browser, web, **MODES["light"]) as fresh:
        exercise = Exercise(fresh.open("leetcode/demo.html"))
        assert fresh.context.pages[0].evaluate("window.Worker !== zhixing.Worker"), "搜索的仿制 Worker 已经换上"
        assert "✓ 全部通过" in exercise.run(RIGHT)
        exercise.start("def ascending(nums):\n    while True: pass\n")
        exercise.result.get_by_text("正在运行测试").wait_for()
        exercise.button("停止").click()
        assert "已停止" in exercise.wait()
        assert "第 1 行抛出 NameError" in exercise.run("nope\n")
        exercise.tab.reload()
        assert exercise.area.input_value() == "nope\n"
        assert fresh.errors == [] and fresh.external == []


def test_ordinary_build_opened_from_disk_explains_itself(web, browser) -> None:  # noqa: F811
    with Reader(browser, Web(web.directory, web.directory.as_uri() + "/"), **MODES["light"]) as fresh:
        exercise = Exercise(fresh.open("leetcode/demo/index.html"))
        assert "make serve" in exercise.run(RIGHT)


# ---- 站点里的每一道题 ----


def reference(page: list[blocks.Block], solution: str) -> str:
    """参考解的源代码，连同它（传递地）用到的本页的函数、类与 import。"""
    defined = {}
    for block in page:
        if block.lang == "python" and not block.raises and not block.practice:
            for node in ast.parse(block.source).body:
                code = ast.get_source_segment(block.source, node)
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    defined[node.name] = node, code
                elif isinstance(node, ast.Import | ast.ImportFrom):
                    for alias in node.names:
                        defined[alias.asname or alias.name.partition(".")[0]] = node, code
    todo, used = [solution], {}
    while todo:
        name = todo.pop()
        if name in defined and name not in used:
            node, used[name] = defined[name]
            todo += [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    return "\n\n\n".join(dict.fromkeys(used.values())) + "\n"


def every_exercise():
    """每道题一项：(题目页, 起始代码, 测试, 参考解的名字, 参考解)。"""
    for path in sorted((REPO / "docs").rglob("*.md")):
        page = blocks.scan(path, REPO).blocks
        for found in practice.exercises(page):
            solution = found.tests.solution
            yield path.stem, found.starter.source, found.tests.source, solution, reference(page, solution)


EXERCISES = list(every_exercise())


@pytest.fixture(scope="module")
def collection(tmp_path_factory, browser):  # noqa: F811
    """把全站的题搬到一页上：只启动一次 Pyodide，构建时也在 CPython 里判一遍。"""
    body = "".join(
        f"```python\n{answer}```\n\n```python practice=\"starter\"\n{starter}\n```\n\n"
        f"```python practice=\"tests\" solution=\"{solution}\"\n{tests}\n```\n\n"
        for _, starter, tests, solution, answer in EXERCISES
    )
    top = tmp_path_factory.mktemp("exercises")
    prepare(top, PAGE[: PAGE.index("```python")] + body)
    run(top, "mkdocs", "build", "-q")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=top / "site"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with Reader(browser, Web(top / "site", f"http://127.0.0.1:{server.server_port}/"), **MODES["light"]) as reader:
        yield reader.open("leetcode/demo/")
    server.shutdown()


def test_collection_covers_every_page() -> None:
    assert {page for page, *_ in EXERCISES} >= {path.stem for path in (REPO / "docs/leetcode").glob("*.md")}
    assert len({practice.entry_of(starter) for _, starter, *_ in EXERCISES}) == len(EXERCISES), "搬到一页上，名字不能重"


@pytest.mark.parametrize("index", range(len(EXERCISES)), ids=[f"{page}-{solution}" for page, _, _, solution, _ in EXERCISES])
def test_reference_passes_and_starter_fails_in_pyodide(collection, index) -> None:
    _, starter, _, solution, answer = EXERCISES[index]
    exercise, entry = Exercise(collection, index), practice.entry_of(starter)
    assert exercise.area.input_value() == starter
    failed = exercise.run(starter)
    assert "✗" in failed and "没有找到" not in failed and "超过" not in failed, failed
    passed = exercise.run(answer if entry == solution else f"{answer}\n\n{entry} = {solution}\n")
    assert "✓ 全部通过" in passed, passed
