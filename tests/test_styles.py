"""样式表的裁剪：选不中的删掉，可能选中的都留下，样子不变。"""

from __future__ import annotations

import pytest
from bs4 import BeautifulSoup
from hypothesis import given
from hypothesis import strategies as st

from zhixing import styles

CSS = """
@charset "utf-8";
.used{color:red}.unused{color:red}
.used,.unused,p>.used .other{margin:0}
:not(.unused){padding:0}
:is(.unused,.used) b{top:0}:is(.unused,.gone) b{top:1px}
p:has(.unused){left:0}
#here{left:1px}#gone{left:2px}
[data-md-color-primary=teal]{--a:1}[data-md-color-primary=custom]{--a:2}[data-md-color-primary]{--a:3}
[data-state=gone]{--b:4}
@media print{.unused{top:2px}.used{top:3px}}
@media screen{.unused{top:4px}}
@font-face{font-family:X;src:url(x.woff2)}
@keyframes spin{from{top:0}to{top:1px}}
"""


def test_keeps_what_can_match_and_nothing_else() -> None:
    page = '<p id=here class="used other" data-md-color-primary="custom"></p>'
    small = styles.prune(CSS, styles.names([page], []))
    for kept in (
        '@charset "utf-8"', ".used{color:red}", ".used,p>.used .other{margin:0}", ":not(.unused){padding:0}", ":is(.unused,.used) b{top:0}",
        "#here{", "[data-md-color-primary=custom]", "[data-md-color-primary]{", "[data-state=gone]",
        "@media print{.used{top:3px}}", "@font-face{", "@keyframes spin{from{top:0}to{top:1px}}",
    ):  # fmt: skip
        assert kept in small, kept
    for gone in (".unused{", ".unused,p", ".gone", ":has(.unused)", "#gone", "teal", "@media screen"):
        assert gone not in small, gone


def test_classes_added_by_scripts_are_kept() -> None:
    used = styles.names(['<body><script>document.body.classList.add("inline-made")</script>'], ['e.className = "zx-zoom"'])
    assert {"inline-made", "zx-zoom"} <= used


def test_names_put_together_by_scripts_and_numeric_values_are_kept() -> None:
    css = '.tab--next{top:0}.tab--prev:after{top:1px}.tab{top:2px}.table--wide{top:3px}[data-md-level="1"]{top:4px}[data-md-level="2"]{top:5px}'
    found = styles.names(['<nav data-md-level=1 data-md-x="2x"></nav>'], ["t.className = `tab tab--${e}`; for (;i--;) e--"])
    small = styles.prune(css, styles.mentioned(found, css))
    assert small == '.tab--next{top:0}.tab--prev:after{top:1px}.tab{top:2px}[data-md-level="1"]{top:4px}'


def test_unreferenced_variables_are_dropped() -> None:
    css = ":root{--icon-a:url(a);--icon-b:url(b);color:red}@media print{:root{--icon-a:url(c);--icon-b:url(d)}}.x{mask:var(--icon-a)}"
    assert styles.drop_variables(css, {"--icon-a"}) == (
        ":root{--icon-a:url(a);color:red}@media print{:root{--icon-a:url(c)}}.x{mask:var(--icon-a)}"
    )


classes = st.sampled_from(["a", "b", "c", "d"])
simple = st.builds(lambda tag, names: tag + "".join(f".{n}" for n in names), st.sampled_from(["p", "b", "*"]), st.lists(classes, max_size=2))
wrapped = st.one_of(
    simple, st.builds("p:not({})".format, simple), st.builds(":is({}, {})".format, simple, simple), st.builds("p:has({})".format, simple)
)
selectors = st.builds(lambda parts, joins: "".join(x for pair in zip(parts, joins) for x in pair)[:-3],
                      st.lists(wrapped, min_size=1, max_size=3), st.just([" > "] * 3))  # fmt: skip
pages = st.lists(st.tuples(st.sampled_from(["p", "b"]), st.lists(classes, max_size=2)), max_size=4)


@given(selectors, pages)
def test_a_dropped_selector_matches_nothing(selector, elements) -> None:
    page = "<main>" + "".join(f'<{tag} class="{" ".join(names)}"><b class="b"></b></{tag}>' for tag, names in elements) + "</main>"
    if not styles.prune(selector + "{top:0}", styles.names([page], [])):
        assert BeautifulSoup(page, "html.parser").select(selector) == []


@pytest.fixture
def site(tmp_path):
    top = tmp_path / "site"
    for name, text in {
        "index.html": '<p class="used">',
        "assets/stylesheets/main.css": ":root{--x:url(x);--y:url(y)}.used{mask:var(--x)}.unused{mask:var(--y)}.tab--next{top:0}",
        "assets/css/own.css": ".never{top:0}",
        "assets/js/page.js": "`tab--${e}`",
    }.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text, "utf-8")
    return top


def test_only_their_sheets_change_and_the_cache_is_used(site, tmp_path, monkeypatch) -> None:
    sheet, before = site / "assets/stylesheets/main.css", (site / "assets/stylesheets/main.css").read_text()
    styles.shrink(site, tmp_path / "cache")
    small = sheet.read_text()
    assert small == ":root{--x:url(x)}.used{mask:var(--x)}.tab--next{top:0}" and (site / "assets/css/own.css").read_text() == ".never{top:0}"
    sheet.write_text(before)
    monkeypatch.setattr(styles, "prune", lambda *_: pytest.fail("缓存没有用上"))
    styles.shrink(site, tmp_path / "cache")
    assert sheet.read_text() == small
    monkeypatch.undo()
    sheet.write_text(before)
    (site / "index.html").write_text('<p class="used unused">')  # 又用上了
    styles.shrink(site, tmp_path / "cache")
    assert ".unused{mask:var(--y)}" in sheet.read_text() and "--y:url(y)" in sheet.read_text()
