"""图与可交互的部分在真实浏览器里：滑条、解码游乐场、放大、没有 JavaScript、从磁盘打开。"""

import functools
import http.server
import itertools
import re
import threading

import pytest
import torch
from minillm.decoding import Sampler
from test_practice_browser import PAGE as PRACTICE
from test_practice_browser import prepare, run
from test_site import MODES, Quiet, Reader, Web, browser  # noqa: F401

pytestmark = pytest.mark.browser

SCORES = {"是": 3.0, "在": 2.2, "有": 1.8, "很": 1.0, "会": 0.6, "要": 0.6, "像": -0.5, "把": -1.5}   # 有一对并列
HEAD = PRACTICE[: PRACTICE.index("```python")]  # front matter 与第一个标题
PAGE = f"""{HEAD}```python
from matplotlib import pyplot as plt


def show(T):
    fig, ax = plt.subplots(figsize=(4, 1))
    ax.set_title(f"T = {{T}}")
```

=== "T = 0.4"

    ```python fig="看什么：第一张"
    show(0.4)
    ```

=== "T = 1"

    ```python fig="看什么：第二张"
    show(1)
    ```

=== "T = 3"

    ```python fig="看什么：第三张"
    show(3)
    ```

另一组：

=== "甲"

    普通的选项卡。

=== "乙"

    没有图。

=== "丙"

    也没有。

```python
for word, score in {SCORES}.items():
    print(word, score)
```

```text title="输出"
{chr(10).join(f"{word} {score}" for word, score in SCORES.items())}
```

<div class="zx-decoding"></div>
"""


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    top = tmp_path_factory.mktemp("interactive")
    prepare(top / "zhixing", PAGE)
    run(top / "zhixing", "mkdocs", "build", "-q")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=top / "zhixing/site"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Web(top / "zhixing/site", f"http://127.0.0.1:{server.server_port}/")
    server.shutdown()


@pytest.fixture
def open_page(web, browser):  # noqa: F811
    """``open_page("dark")`` 打开那一页；结束时没有控制台错误与站外请求。"""
    readers = []

    def open_as(mode):
        readers.append(Reader(browser, web, **MODES[mode]).__enter__())
        return readers[-1].open("leetcode/demo/")

    yield open_as
    for reader in readers:
        assert reader.errors == [] and reader.external == []
        reader.__exit__()


def shown(tab) -> list[str]:
    """看得见的图的说明。"""
    return tab.evaluate("[...document.querySelectorAll('.zx-figure')].filter((f) => f.checkVisibility()).map((f) => f.innerText.trim())")


# ---- 滑条 ----


def test_slider_and_tabs_move_together(open_page):
    tab = open_page("light")
    slider = tab.get_by_role("slider", name="T", exact=True)
    assert shown(tab) == ["看什么：第一张"]
    slider.focus()
    tab.keyboard.press("ArrowRight")
    assert shown(tab) == ["看什么：第二张"] and slider.get_attribute("aria-valuetext") == "1"
    tab.keyboard.press("End")
    assert shown(tab) == ["看什么：第三张"]
    tab.wait_for_function("[...document.querySelectorAll('.zx-figure img')].filter((m) => m.checkVisibility()).every((m) => m.naturalWidth)")
    tab.locator(".tabbed-labels label", has_text="T = 0.4").click()
    assert shown(tab) == ["看什么：第一张"] and slider.input_value() == "0"
    assert tab.locator(".tabbed-set").nth(0).evaluate("(s) => s.previousElementSibling.className") == "zx-slider"
    assert tab.locator(".tabbed-set").nth(1).evaluate("(s) => s.previousElementSibling.className") != "zx-slider"


def test_without_javascript_they_are_tabs(open_page):
    tab = open_page("no-js")
    assert tab.get_by_role("slider").count() == 0 and tab.locator(".zx-zoom").count() == 0
    tab.locator(".tabbed-labels label", has_text="T = 3").click()
    assert shown(tab) == ["看什么：第三张"]
    assert tab.locator(".zx-decoding").bounding_box()["height"] == 0


# ---- 解码 ----


def test_playground_agrees_with_the_library(open_page):
    tab = open_page("phone")
    root = tab.locator(".zx-decoding")

    def move(**values):
        for name, value in values.items():
            root.locator(f"input[name={name}]").evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')) }", value)
        return root.locator(".zx-bars li").all_inner_texts()

    logits = torch.tensor([list(SCORES.values())], dtype=torch.float64)
    seen = set()
    for T, k, p, low in itertools.product((0.3, 1, 2.5), (1, 3, 5, 8), (0.4, 0.85, 1), (0, 0.15, 0.6)):
        rows = [row.split() for row in move(T=T, k=k, p=p, minP=low)]
        expected = Sampler(temperature=T, top_k=k, top_p=p, min_p=low or None).warp(logits, torch.zeros(1, 0, dtype=torch.long)).softmax(-1)[0]
        assert [word for word, _ in rows] == list(SCORES)
        for (_, text), probability in zip(rows, expected.tolist()):
            assert text == ("砍掉" if probability == 0 else f"{probability:.1%}") or abs(float(text[:-1]) - 100 * probability) < 0.051, (T, k, p, low)
        kept = int((expected > 0).sum())
        assert root.get_by_role("status").inner_text() == f"留下 {kept} 个"
        seen.add(kept)
    assert len(seen) >= 6                                         # 真的砍出了不同的个数
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


# ---- 放大 ----


@pytest.mark.parametrize("mode", ["light", "phone-dark"])
def test_figure_can_be_enlarged(open_page, mode):
    tab = open_page(mode)
    figure = tab.locator(".zx-figure").first
    small = figure.locator("img:visible").bounding_box()["width"]
    figure.get_by_role("button", name="放大这张图").focus()
    tab.keyboard.press("Enter")
    image = tab.locator("dialog img")
    assert image.bounding_box()["width"] > small * 1.4
    assert ("dark" in image.get_attribute("src")) == ("dark" in mode)
    tab.keyboard.press("Escape")
    assert not tab.locator("dialog").is_visible()
    assert tab.evaluate("document.activeElement.classList.contains('zx-zoom')")      # 焦点回到按钮
    figure.locator("img:visible").click()
    tab.locator("dialog").click(position={"x": 5, "y": 5})
    assert not tab.locator("dialog").is_visible()


# ---- 无障碍与离线 ----


@pytest.mark.parametrize("mode", ["light", "dark", "phone"])
def test_accessibility(open_page, mode):
    from axe_playwright_python.sync_playwright import Axe

    tab = open_page(mode)
    tab.locator(".zx-decoding input[name=k]").evaluate("(e) => { e.value = 3; e.dispatchEvent(new Event('input')) }")
    found = Axe().run(tab).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")] == []


def test_opened_from_disk(tmp_path, browser):  # noqa: F811
    prepare(tmp_path / "site", PAGE)
    run(tmp_path / "site", "mkdocs", "build", "-q", "-f", "mkdocs.offline.yml")
    site = tmp_path / "site/site"
    with Reader(browser, Web(site, site.as_uri() + "/")) as reader:
        tab = reader.open("leetcode/demo.html")
        tab.get_by_role("slider", name="T", exact=True).focus()
        tab.keyboard.press("End")
        assert shown(tab) == ["看什么：第三张"] and tab.locator(".zx-bars li").count() == len(SCORES)
        assert reader.errors == []


def test_page_without_figures_loads_neither(web):
    assert not re.search(r"assets/js/(figures|decoding)", (web.directory / "index.html").read_text("utf-8"))
