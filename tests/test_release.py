"""发布的两种形态在真实浏览器里：离线包（双击打开、断网）与多版本（mike）。"""

import functools
import http.server
import json
import subprocess
import threading
import zipfile

import pytest
from test_practice_browser import PAGE, prepare, run
from test_site import MODES, Quiet, Reader, Web, browser, search  # noqa: F401

from zhixing import offline

pytestmark = pytest.mark.browser

MOVED = PAGE.replace("refs: [某书]", "refs: [某书]\nmoved_from: [old/place]")
RICH = MOVED.replace(
    "## 为什么 {#why}\n",
    """## 为什么 {#why}

公式 $\\sqrt{x^2}=|x|$，图：

```mermaid
flowchart LR
    A["读"] --> B["写"]
```

```python fig="看什么：一条折线"
import matplotlib.pyplot as plt

fig, ax = plt.subplots(figsize=(3, 2))
ax.plot([0, 1], [0, 1])
```
""",
)


# ---- 离线包 ----


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    root = tmp_path_factory.mktemp("offline") / "project"
    prepare(root, RICH)
    run(root, "mkdocs", "build", "-q", "-f", "mkdocs.offline.yml")
    offline.pack(root / "site", root / "dist" / "notes.zip")
    return root


@pytest.fixture(scope="module")
def unpacked(package, tmp_path_factory):
    top = tmp_path_factory.mktemp("解开 的 目录")  # 中文与空格的路径也要能用
    with zipfile.ZipFile(package / "dist" / "notes.zip") as archive:
        archive.extractall(top)
    return Web(top / "notes", (top / "notes").as_uri() + "/")


def test_package_works_from_disk_without_network(unpacked, browser):  # noqa: F811
    with Reader(browser, unpacked, **MODES["light"]) as reader:
        reader.context.set_offline(True)
        tab = reader.open("index.html")
        assert "leetcode/demo.html" in search(tab, "ascending")[0]
        tab.keyboard.press("ArrowDown")
        tab.keyboard.press("Enter")
        tab.wait_for_url("**/leetcode/demo.html**")
        assert tab.locator("article .katex-html").first.bounding_box()["width"] > 20
        assert tab.evaluate("document.fonts.ready.then(() => document.fonts.check('16px KaTeX_Main'))")
        assert tab.locator(".zx-diagram svg").is_visible()
        figure = tab.locator(".zx-figure img").first
        figure.scroll_into_view_if_needed()
        tab.wait_for_function("document.querySelector('.zx-figure img').naturalWidth > 0")
        tab.locator("label[for=__palette_1]:visible").click()
        tab.locator("label[for=__palette_2]:visible").click()
        assert tab.evaluate("document.body.dataset.mdColorScheme") == "slate"
        assert tab.locator(".zx-figure img").nth(1).is_visible() and not figure.is_visible()
        assert reader.errors == [] and reader.external == []


def test_old_addresses_lead_to_the_new_ones(unpacked, versions, browser):  # noqa: F811
    for web, old, new in (
        (unpacked, "old/place.html#why", "**/leetcode/demo.html#why"),
        (versions, "latest/old/place/?h=x#why", "**/latest/leetcode/demo/?h=x#why"),
    ):
        with Reader(browser, web, **MODES["light"]) as reader:
            tab = reader.context.new_page()
            tab.goto(web.url + old)
            tab.wait_for_url(new)
        with Reader(browser, web, **MODES["no-js"]) as reader:
            tab = reader.context.new_page()
            tab.goto(web.url + old)
            tab.wait_for_url(new.partition("?")[0].partition("#")[0] + "*")


def test_package_is_reproducible_and_lean(package):
    first = (package / "dist" / "notes.zip").read_bytes()
    offline.pack(package / "site", package / "dist" / "again.zip")
    with zipfile.ZipFile(package / "dist" / "notes.zip") as a, zipfile.ZipFile(package / "dist" / "again.zip") as b:
        assert [i.filename.partition("/")[2] for i in a.infolist()] == [i.filename.partition("/")[2] for i in b.infolist()]
        names = a.namelist()
    assert not [n for n in names if n.endswith((".map", ".gz")) or "/lunr/" in n]
    offline.pack(package / "site", package / "dist" / "notes.zip")
    assert (package / "dist" / "notes.zip").read_bytes() == first


def test_packing_an_ordinary_site_is_refused(tmp_path):
    (tmp_path / "site").mkdir()
    with pytest.raises(FileNotFoundError, match="make offline"):
        offline.pack(tmp_path / "site", tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()


# ---- 多版本 ----


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """1.0（别名 latest，缺省）与 2.0-dev（别名 dev）部署在本地分支上，取出来提供服务。"""
    top = tmp_path_factory.mktemp("versions")
    root = top / "project"
    prepare(root, MOVED)

    def git(*command: str) -> None:
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *command], cwd=root, check=True, stdout=subprocess.DEVNULL)

    git("init", "-q", "-b", "main")
    git("config", "user.name", "t")
    git("config", "user.email", "t@t")
    (root / ".gitignore").write_text("site/\n.cache/\n")
    git("add", "-A")
    git("commit", "-qm", "初始")
    run(root, "mike", "deploy", "--update-aliases", "1.0", "latest")
    run(root, "mike", "set-default", "latest")
    page = root / "docs/leetcode/demo.md"
    page.write_text(page.read_text("utf-8") + "\n## 新增的一节 {#fresh}\n\n开发版才有的鳄梨。\n", "utf-8")
    run(root, "mike", "deploy", "2.0-dev", "dev")
    git("worktree", "add", "-q", str(top / "zhixing"), "gh-pages")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=top))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Web(top / "zhixing", f"http://127.0.0.1:{server.server_port}/zhixing/")
    server.shutdown()


def test_versions_switch_and_default(versions, browser):  # noqa: F811
    assert [v["version"] for v in json.loads((versions.directory / "versions.json").read_text())] == ["2.0-dev", "1.0"]
    with Reader(browser, versions, **MODES["light"]) as reader:
        tab = reader.open("")
        tab.wait_for_url("**/zhixing/latest/")  # 根目录跳到缺省版本
        tab.goto(versions.url + "latest/leetcode/demo/")
        menu = tab.locator(".md-version")
        menu.locator("button").focus()  # 列表盖在按钮上，用键盘焦点打开
        assert menu.locator("a").all_inner_texts() == ["2.0-dev", "1.0"]
        menu.locator("a", has_text="2.0-dev").click()
        tab.wait_for_url("**/2.0-dev/leetcode/demo/")  # 换版本停在同一页
        assert tab.locator("#fresh").is_visible()
        assert reader.errors == [] and reader.external == []


def test_only_the_unstable_version_shows_the_banner(versions, browser):  # noqa: F811
    with Reader(browser, versions, **MODES["light"]) as reader:
        for version, shown in (("latest", False), ("dev", True)):
            tab = reader.open(f"{version}/leetcode/demo/")
            tab.wait_for_selector(".md-version")
            banner = tab.locator("[data-md-component=outdated]")
            assert banner.is_visible() == shown
            assert tab.locator("link[rel=canonical]").get_attribute("href").endswith("/latest/leetcode/demo/")
        banner.locator("a").click()
        tab.wait_for_url("**/latest/**")


def test_each_version_searches_itself(versions, browser):  # noqa: F811
    with Reader(browser, versions, **MODES["light"]) as reader:
        assert search(reader.open("latest/"), "鳄梨") == []
        assert "/dev/" in search(reader.open("dev/"), "鳄梨")[0]


def test_ordinary_site_does_not_ask_for_versions(package, browser):  # noqa: F811
    """没有用 mike 部署的站点没有 versions.json，也不去请求它。"""
    assert '"version": null' in (package / "site" / "index.html").read_text("utf-8")
