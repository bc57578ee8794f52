"""书：先用一个小站点逐条查，再把同样的检查用在整本书上。

检查的是排出来的 PDF 本身：结构用 pypdf 读，版面用 pypdfium2 渲染成图再看像素。整本书要排几分钟：
内容、样式、字体与工具都没变，就用上次排好的，查过没问题的也不再查；删掉 ``.cache`` 结果一样。
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pypdf
import pypdfium2
import pytest
from test_build import ENV, REPO, new_project

from zhixing import book, cli, epub, pdf
from zhixing.cache import write_atomic
from zhixing.output import publish

RICH = """---
id: rich
title: 各种版面
section: python
level: 入门
origin: 预测
tags: [示范, 版面]
brief: 一句话。
questions:
  - q: 选项卡在书里怎么排？
    a: "#layout"
followups:
  - q: 折叠的追问看得到吗？
    a: 看得到，$y=kx$。
refs: [某书]
---

## 版面 {#layout}

=== "甲法"

    先用甲。

    === "甲之一"

        套着的选项卡。

=== "乙法"

    再用乙，见[另一页的证明](../basics/demo.md#why)与[本节](#layout)、[示例](../examples/tiny.ipynb#画一条线)。

??? note "展开的折叠块"

    藏起来的话。[^1]

[^1]: 脚注一条。

根号是画出来的：$\\sqrt{x^2+1}$。很宽的公式：

$$
a_1+a_2+a_3+a_4+a_5+a_6+a_7+a_8+a_9+a_{10}+a_{11}+a_{12}+a_{13}+a_{14}+a_{15}+a_{16}+a_{17}+a_{18}+a_{19}+a_{20}+a_{21}+a_{22}+a_{23}+a_{24}+a_{25}+a_{26}+a_{27}+a_{28} = \\sum_{i=1}^{28} a_i \\tag{1}
$$

分式、求和、根式、矩阵、分段与上下标：$\\frac{a_i^2}{1+\\frac{b}{c}}$、$\\hat y_{t-1}^{(k)}\\ge\\overline{x}$、$\\binom{n}{k}$、$\\mathbb{E}_{x\\sim\\mathcal{N}}\\mathcal{L}$。

$$
f(x)=\\begin{cases}\\sqrt[3]{\\frac{x}{2}} & x>0 \\\\ \\underbrace{-x}_{\\text{负的}} & \\text{否则}\\end{cases}\\qquad
\\begin{pmatrix}a_{11} & \\cdots \\\\ \\vdots & \\ddots\\end{pmatrix}\\sum_{i=1}^{n}\\int_0^1\\left(\\frac{x}{y}\\right)^{2}
$$

| 名字 | 很长的一格 |
|---|---|
| 甲 | `a_very_long_identifier_without_any_space_that_must_be_broken_somewhere_or_it_leaves_the_page_entirely_and_is_lost` |

```python
text = "很长的一行不折行就会伸出页面：0123456789 0123456789 0123456789 0123456789 0123456789 0123456789 0123456789 0123456789"
assert len(text) > 80
```

```python
def double_ref(x):
    return 2 * x
```

```python practice="starter"
def double(x):
    \"\"\"返回两倍。\"\"\"
    return None
```

```python practice="tests" solution="double_ref"
def check(solution):
    assert solution(3) == 6, "三的两倍"
```
"""

INK = 245  # 灰度低于它就算有墨


KEPT = 30 * 86400  # 这么多秒没用到的整本书删掉


@dataclass
class Printed:
    """一本排好的书，与它的来历。

    Attributes:
        memory: 记着哪些检查通过了的文件名前缀；小站点的书不记，每次都查。
    """

    source: book.Book
    path: Path
    stats: pdf.Stats
    memory: Path | None = None

    @cached_property
    def reader(self) -> pypdf.PdfReader:
        return pypdf.PdfReader(self.path)

    @cached_property
    def html(self) -> ElementTree.Element:
        return pdf.document(self.source)

    @cached_property
    def texts(self) -> list[str]:
        document = pypdfium2.PdfDocument(self.path)
        return [page.get_textpage().get_text_range() for page in document]

    @cached_property
    def bitmaps(self) -> list[np.ndarray]:
        """每页的灰度图，一毫米两个像素。"""
        document = pypdfium2.PdfDocument(self.path)
        scale = 2 * 25.4 / 72
        return [np.asarray(page.render(scale=scale, grayscale=True).to_pil()) for page in document]

    @cached_property
    def structure(self) -> list[dict]:
        """结构树的全部节点。"""
        found, stack = [], [self.reader.trailer["/Root"]["/StructTreeRoot"]["/K"]]
        while stack:
            node = stack.pop().get_object()
            if isinstance(node, list):
                stack += node
            elif isinstance(node, dict) and "/S" in node:
                found.append(node)
                stack += [kid for kid in node.get("/K", []) if not isinstance(kid, int)]
        return found

    @cached_property
    def destinations(self) -> dict[str, int]:
        """具名目的地 -> 第几页（1 起）。"""
        numbers = {page.indirect_reference.idnum: i for i, page in enumerate(self.reader.pages, 1)}
        return {name: numbers[target.page.idnum] for name, target in self.reader.named_destinations.items()}

    def page_of(self, name: str) -> int:
        return self.destinations[name]

    def annotations(self, page: pypdf.PageObject) -> list[dict]:
        return [a.get_object() for a in page.get("/Annots", [])]

    def streams(self) -> list[bytes]:
        """全部内容流：页面的，与图里套着的。"""
        found, seen = [], set()

        def visit(resources) -> None:
            for reference in (resources.get("/XObject") or {}).values():
                item = reference.get_object()
                if reference.idnum not in seen and item["/Subtype"] == "/Form":
                    seen.add(reference.idnum)
                    found.append(item.get_data())
                    visit(item.get("/Resources") or {})

        for page in self.reader.pages:
            found.append(page.get_contents().get_data())
            visit(page["/Resources"])
        return found


def print_site(root: Path, site: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(site)],
        cwd=root,
        env=ENV | {"ZHIXING_PRINT": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        pytest.fail("打印版站点没有建成：\n" + done.stdout.decode()[-4000:], pytrace=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Printed:
    project = new_project(tmp_path_factory.mktemp("book") / "small")
    project.write({"docs/python/rich.md": RICH})
    site = project.root / "print"
    print_site(project.root, site)
    source = book.load(project.root, site)
    return Printed(source, project.root / "small.pdf", pdf.write(source, project.root / "small.pdf"))


def identity(source: book.Book) -> str:
    """排出来的 PDF 由什么决定：合成的 HTML、图、样式、字体、排版的代码与工具。"""
    katex = source.root / "node_modules/katex/dist"
    html = pdf.document(source)
    images = sorted({e.get("src", "") for e in html.iter("img") if not e.get("src", "").startswith("data:")})
    files = [source.site / image for image in images]
    files += [Path(pdf.__file__), pdf.CSS, katex / "katex.min.css", *sorted((katex / "fonts").glob("*.ttf"))]
    found = hashlib.sha256(ElementTree.tostring(html))
    for path in files:
        found.update(f"\n{path.name}\n".encode() + path.read_bytes())
    tools = [f"{name} {importlib.metadata.version(name)}" for name in ("weasyprint", "pydyf", "fonttools", "tinycss2", "cssselect2")]
    system = ["libpango-1.0-0", "libharfbuzz0b", "libharfbuzz-subset0", "fonts-noto-cjk"]
    for command in (["dpkg-query", "-W", *system], ["fc-match", "Noto Serif CJK SC", "file"]):
        with contextlib.suppress(OSError):
            tools.append(subprocess.run(command, capture_output=True, text=True).stdout)
    found.update("\n".join(tools).encode())
    return found.hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Printed:
    """真实站点的整本书，只建一次；封面上不印提交号，换一个提交而内容没变就不用重排。"""
    top = tmp_path_factory.mktemp("whole")
    print_site(REPO, top / "print")
    source = replace(book.load(REPO, top / "print"), version="整本", date="2026-01-01")
    store = REPO / ".cache/zhixing/book"
    store.mkdir(parents=True, exist_ok=True)
    for path in store.iterdir():
        if time.time() - path.stat().st_mtime > KEPT:
            path.unlink(missing_ok=True)
    kept = store / identity(source)
    made, stats = kept.with_suffix(".pdf"), kept.with_suffix(".json")
    if made.is_file() and stats.is_file():
        os.utime(made), os.utime(stats)
        return Printed(source, made, pdf.Stats(**json.loads(stats.read_text("utf-8"))), kept)
    found = pdf.write(source, top / "whole.pdf")
    publish(made, lambda temporary: shutil.copy(top / "whole.pdf", temporary))
    write_atomic(stats, json.dumps(asdict(found)))
    return Printed(source, made, found, kept)


def remembered(check: Callable[[Printed], None]) -> Callable[[Printed], None]:
    """对整本书的检查，同一个 PDF、同一份检查通过过一次就不再做。"""
    tools = [importlib.metadata.version(name) for name in ("pypdf", "pypdfium2", "numpy")]
    digest = hashlib.sha256(json.dumps([Path(__file__).read_text("utf-8"), Path(book.__file__).read_text("utf-8"), tools]).encode())

    @functools.wraps(check)
    def run(printed: Printed) -> None:
        passed = printed.memory and printed.memory.with_suffix(f".{check.__name__}-{digest.hexdigest()[:16]}")
        if passed and passed.is_file():
            return os.utime(passed)
        check(printed)
        if passed:
            write_atomic(passed, "")

    return run


@pytest.fixture(params=["small", pytest.param("whole", marks=pytest.mark.slow)])
def printed(request) -> Printed:
    return request.getfixturevalue(request.param)


# ---- 导航：书签、链接、页码 ----


@remembered
def test_every_heading_is_a_bookmark(printed):
    def titles(outline):
        for item in outline:
            if isinstance(item, list):
                yield from titles(item)
            else:
                yield " ".join(item.title.split())

    headings = [" ".join("".join(e.itertext()).split()) for e in printed.html.iter() if e.tag in book.HEADINGS]
    assert list(titles(printed.reader.outline)) == headings
    assert len(headings) == printed.stats.bookmarks > 5


@remembered
def test_every_internal_link_lands_somewhere(printed):
    destinations, links, outside = printed.destinations, 0, []
    for page in printed.reader.pages:
        for note in printed.annotations(page):
            if note["/Subtype"] != "/Link":
                continue
            if "/Dest" in note:
                assert note["/Dest"] in destinations
                links += 1
            else:
                outside.append(note["/A"]["/URI"])
            assert note.get("/Contents"), "PDF/UA 要求链接有说明"
            assert note["/Contents"] != note.get("/Dest"), "说明是给人听的，不是锚点名"
            assert note.get("/F", 0) & 4, "打印时也在"
    wanted = sum(e.get("href", "").startswith("#") for e in printed.html.iter("a"))
    assert links >= wanted > 5  # 折行的链接有几块
    assert all(re.match(r"https?://", url) and "127.0.0.1" not in url for url in outside), outside


def index_lines(printed: Printed, slug: str, stop: str | None) -> list[tuple[int, list[int]]]:
    """一段索引里，每个链接 ``(该印的页码, 印着的页码)``。"""
    first = printed.page_of(slug) if slug else 2
    last = printed.page_of(stop) - 1 if stop else len(printed.reader.pages)
    found, document = [], pypdfium2.PdfDocument(printed.path)
    for number in range(first, last + 1):
        page = printed.reader.pages[number - 1]
        text = document[number - 1].get_textpage()
        rows: dict[str, list] = {}
        for note in printed.annotations(page):
            if "/Dest" in note:
                rows.setdefault(note["/Dest"], []).append([float(v) for v in note["/Rect"]])
        for name, boxes in rows.items():
            printed_numbers = []
            for left, bottom, right, top in boxes:
                line = text.get_text_bounded(right - 60, bottom - 1, right + 2, top + 1)
                printed_numbers += [int(n) for n in re.findall(r"(?:^|[^\d])(\d+)\s*$", line, re.M)]
            found.append((printed.page_of(name), printed_numbers))
    return found


@remembered
def test_contents_and_question_index_print_the_right_page_numbers(printed):
    chapters = printed.source.chapters
    contents = index_lines(printed, "", chapters[0].pages[0].slug)
    assert len(contents) == sum(len(c.pages) + c.numbered for c in chapters)
    assert [c for c in contents if c[0] not in c[1]] == []
    slugs = [page.slug for page in printed.source.all_pages()]
    following = slugs[slugs.index("questions") + 1]
    questions = index_lines(printed, "questions", following)
    page = next(p for p in printed.source.all_pages() if p.slug == "questions")
    assert len(questions) >= len({a.get("href") for a in page.body.iter("a")}) > 1
    assert [q for q in questions if q[0] not in q[1]] == []


@remembered
def test_running_head_names_the_chapter_and_the_page(printed):
    for chapter in printed.source.chapters:
        for page in chapter.pages:
            number = printed.page_of(page.slug)
            head, foot = printed.texts[number - 1], str(number)
            assert chapter.title.split("：")[0] in head.replace("\n", ""), (page.slug, number)
            assert foot in head.split("\n")[0] + "\n" + "\n".join(head.split("\n")[-3:]) or foot in head


# ---- 版面 ----


@remembered
def test_nothing_leaves_the_text_area(printed):
    """版心左右 20 mm、下边 22 mm 之外，除页码外不该有墨。"""
    out = []
    for number, image in enumerate(printed.bitmaps[1:], 2):
        margins = {"左": image[:, :36], "右": image[:, -36:], "下": image[-16:, :], "上": image[:16, :]}
        out += [f"第 {number} 页{side}" for side, part in margins.items() if part.min() < INK]
    assert out == []


@remembered
def test_no_black_boxes(printed):
    """SVG 的颜色没解析出来就是整片纯黑；图里最深的颜色也没有这么黑。"""
    bad = []
    for number, image in enumerate(printed.bitmaps, 1):
        height, width = (size // 6 * 6 for size in image.shape)  # 三毫米见方
        cells = image[:height, :width].reshape(height // 6, 6, width // 6, 6).max(axis=(1, 3))
        bad += [number] * bool((cells < 12).any())
    assert bad == []


@remembered
def test_no_blank_pages(printed):
    assert [n for n, image in enumerate(printed.bitmaps, 1) if image[60:-60].min() > INK] == []


@remembered
def test_no_missing_glyphs(printed):
    shown = 0
    for stream in printed.streams():
        for text in re.findall(rb"<([0-9a-fA-F]+)>", stream):
            glyphs = [text[i : i + 4] for i in range(0, len(text), 4)]
            shown += len(glyphs)
            assert b"0000" not in glyphs, "有字体里没有的字"
    assert shown > 500


@remembered
def test_fonts_are_embedded_subsets(printed):
    fonts = {}
    for page in printed.reader.pages:
        for font in (page["/Resources"].get("/Font") or {}).values():
            font = font.get_object()
            fonts[font["/BaseFont"]] = font
    assert fonts
    for name, font in fonts.items():
        assert font["/Subtype"] == "/Type0", f"{name} 是 {font['/Subtype']}"
        assert re.match(r"/[A-Z]{6}\+", name), f"{name} 不是子集"
        descriptor = font["/DescendantFonts"][0].get_object()["/FontDescriptor"].get_object()
        data = descriptor.get("/FontFile3") or descriptor.get("/FontFile2")
        assert data is not None, f"{name} 没有嵌入"
        assert len(data.get_object().get_data()) < 6_000_000, f"{name} 不像子集"
        assert "/ToUnicode" in font, f"{name} 的字复制不出来"
    assert sum("KaTeX" in name for name in fonts) >= 2
    assert any(re.search("Noto|Source|Song|PingFang", name) for name in fonts)


# ---- 无障碍与元数据 ----


@remembered
def test_tagged_with_language_and_metadata(printed):
    root, info = printed.reader.trailer["/Root"], printed.reader.metadata
    assert root["/MarkInfo"]["/Marked"] and root["/Lang"] == "zh-CN"
    assert root["/ViewerPreferences"]["/DisplayDocTitle"]
    assert "知行" in info.title and info.author == "知行贡献者" and info["/Keywords"]
    assert b"pdfuaid" in root["/Metadata"].get_data()
    kinds = Counter(node["/S"] for node in printed.structure)
    assert {"/H1", "/H2", "/P", "/Table", "/TH", "/L", "/LI", "/Link", "/Figure", "/Formula"} <= kinds.keys()
    assert all(node["/A"]["/Scope"] == "/Column" for node in printed.structure if node["/S"] == "/TH")


@remembered
def test_everything_marked_is_in_the_structure_tree(printed):
    """页眉页脚是 Artifact，读屏软件跳过；其余标了号的内容都读得到。"""
    reached: dict[int, set[int]] = {}
    for node in printed.structure:
        for kid in node.get("/K", []):
            if isinstance(kid, int):
                reached.setdefault(node.raw_get("/Pg").idnum, set()).add(kid)
    for number, page in enumerate(printed.reader.pages, 1):
        content = page.get_contents().get_data()
        assert {int(n) for n in re.findall(rb"/MCID (\d+)", content)} == reached.get(page.indirect_reference.idnum, set()), number
        assert number == 1 or re.search(rb"/Artifact\s+BMC", content)
    assert all(node.get("/K") for node in printed.structure if node["/S"] == "/Span"), "空的 Span 只会让读屏软件白走一趟"


@remembered
def test_formulas_and_figures_have_alternate_text(printed):
    formulas = [e.get("data-tex") for e in printed.html.iter("math-tex")]
    assert len(formulas) > 3 and all(formulas)
    spoken = [node.get("/Alt") for node in printed.structure if node["/S"] == "/Formula"]
    assert len(spoken) >= len(formulas) and all(spoken) and set(spoken) == set(formulas)
    figures = [node.get("/Alt") for node in printed.structure if node["/S"] == "/Figure"]
    drawn = sum(e.tag in ("img", f"{book.SVG}svg") and not e.get("data-part") for e in printed.html.iter())
    assert len(figures) >= drawn > 1 and all(figures)


# ---- 内容（小站点） ----


def test_folded_and_tabbed_content_is_laid_out_in_order(small):
    text = "".join(small.texts).replace("\r", "").replace("\n", "")
    order = ["甲法", "先用甲", "甲之一", "套着的选项卡", "乙法", "再用乙", "展开的折叠块", "藏起来的话", "返回两倍", "三的两倍", "看得到"]
    places = [text.index(piece, text.index("选项卡在书里怎么排")) for piece in order]
    assert places == sorted(places)
    assert "¶" not in text and "编辑此页" not in text


def test_interface_is_left_on_the_screen(small):
    names = {e.tag for e in small.html.iter() if isinstance(e.tag, str)}
    assert not names & {"script", "input", "button", "label", "details", "nav"}
    assert not [e for e in small.html.iter() if e.get("class") in ("headerlink", "katex-mathml")]


def test_same_input_gives_the_same_bytes(small, tmp_path):
    pdf.write(book.load(small.source.root, small.source.site), tmp_path / "again.pdf")
    assert (tmp_path / "again.pdf").read_bytes() == small.path.read_bytes()


def test_fast_layout_looks_exactly_like_the_plain_one(small, tmp_path, monkeypatch):
    """公式改写过的 HTML 与省掉的重复计算，不改变版面的任何一个像素。"""
    monkeypatch.setattr(pdf, "_flatten", lambda stack: None)
    monkeypatch.setattr(pdf, "_share_styles", lambda html: None)
    monkeypatch.setattr(pdf, "_fast_formulas", contextlib.nullcontext)
    monkeypatch.setattr(pdf, "_estimate", lambda element: 1e6)  # 每个行间公式都真排一遍来量
    plain = tmp_path / "plain.pdf"
    stats = pdf.write(small.source, plain)
    assert stats.pages == small.stats.pages
    slow = Printed(small.source, plain, stats)
    for number, (fast, expected) in enumerate(zip(small.bitmaps, slow.bitmaps, strict=True), 1):
        assert np.abs(fast.astype(int) - expected).max() <= 2, f"第 {number} 页"


def test_one_page_or_one_chapter(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(small.source.root)
    target = tmp_path / "one.pdf"
    assert cli.main(["book", "pdf", "--page", "python/rich", "--site", "print", "-o", str(target)]) == 0
    assert "页" in capsys.readouterr().out
    one = Printed(book.load(small.source.root, small.source.site, "python/rich"), target, small.stats)
    links = [n["/A"]["/URI"] for p in one.reader.pages for n in one.annotations(p) if "/A" in n]
    assert any(url.endswith("/basics/demo/#why") for url in links)  # 书里没有的页指向线上
    assert "各种版面" in one.reader.metadata.title
    chapter = book.load(small.source.root, small.source.site, "python")
    assert [p.slug for p in chapter.all_pages()] == ["python-rich"]


# ---- 出错 ----


def copy_of(small: Printed, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small.source.site, tmp_path / "print"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('href="#layout"', 'href="#nowhere"', "没有锚点 python-rich.nowhere"),
        ("../../basics/demo/#why", "../../basics/gone/#why", "坏链接 ../../basics/gone/#why"),
        ("<h2 ", '<img src="no.png" alt="图"><h2 ', "不存在"),
        ("<h2 ", '<img src="../../assets/katex/katex.min.css"><h2 ', "没有替代文本"),
        ("<h2 ", '<img src="../../assets/katex/katex.min.css#only-dark" alt="图"><h2 ', "ZHIXING_PRINT=1"),
        ("<article", "<div", "没有正文"),
    ],
)
def test_bad_site_is_refused_with_the_reason(small, tmp_path, old, new, message):
    site = copy_of(small, tmp_path)
    page = site / "python/rich/index.html"
    text = page.read_text("utf-8")
    assert old in text
    page.write_text(text.replace(old, new), "utf-8")
    with pytest.raises(book.BookError, match=re.escape(message)):
        book.load(small.source.root, site)


def test_missing_site_page_and_name(small, tmp_path):
    with pytest.raises(book.BookError, match="make pdf"):
        book.load(small.source.root, tmp_path / "nothing")
    with pytest.raises(book.BookError, match="没有 python/nothing 这一页"):
        book.load(small.source.root, small.source.site, "python/nothing")


def test_unreadable_image_fails_and_keeps_the_old_file(small, tmp_path):
    site, output = copy_of(small, tmp_path), tmp_path / "out.pdf"
    output.write_bytes(b"old")
    image = next((site / "assets/fig").rglob("*.svg"))
    for path in (site / "assets/fig").rglob("*.svg"):
        path.write_text("不是 SVG", "utf-8")
    with pytest.raises(book.BookError, match=re.escape(image.suffix)):
        pdf.write(book.load(small.source.root, site), output)
    assert output.read_bytes() == b"old"
    assert [p.name for p in tmp_path.glob(".*")] == []


@pytest.mark.parametrize(("error", "message"), [("ImportError('没有')", "make env"), ("OSError('libpango')", "system-deps.sh pdf")])
def test_missing_library_says_how_to_get_it(small, tmp_path, monkeypatch, error, message):
    (tmp_path / "weasyprint.py").write_text(f"raise {error}\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "weasyprint", raising=False)
    with pytest.raises(book.BookError, match=message):
        pdf.write(small.source, tmp_path / "out.pdf")


# ---- EPUB ----


def test_epub_is_well_formed_and_complete(small, tmp_path):
    output = tmp_path / "small.epub"
    stats = epub.write(small.source, output)
    again = io.BytesIO(output.read_bytes())
    assert epub.write(small.source, output) == stats and output.read_bytes() == again.getvalue()
    archive = zipfile.ZipFile(output)
    names = archive.namelist()
    assert names[0] == "mimetype" and archive.getinfo("mimetype").compress_type == zipfile.ZIP_STORED
    trees = {n: ElementTree.fromstring(archive.read(n)) for n in names if n.endswith((".xhtml", ".opf", ".svg"))}
    manifest = {f"book/{e.get('href')}" for e in trees["book/package.opf"].iter("{http://www.idpf.org/2007/opf}item")}
    assert manifest == set(names) - {"mimetype", "META-INF/container.xml", "book/package.opf"}

    xhtml = "{http://www.w3.org/1999/xhtml}"
    ids = {name: {e.get("id") for e in tree.iter()} for name, tree in trees.items()}
    links = 0
    for tree in trees.values():
        for link in tree.iter(f"{xhtml}a"):
            target, _, fragment = link.get("href", "").partition("#")
            if not target.startswith("http"):
                assert not fragment or fragment in ids[f"book/{target}"]
                links += 1
        for image in tree.iter(f"{xhtml}img"):
            assert f"book/{image.get('src')}" in names and image.get("alt")
    assert links > 10
    formulas = [m for tree in trees.values() for m in tree.iter(f"{book.MATH}math")]
    assert len(formulas) == stats.formulas > 3 and all(m.get("alttext") for m in formulas)
    shown = {"".join(m.itertext()) for m in formulas}
    assert any(text.startswith("𝔼") and "𝒩" in text and "ℒ" in text for text in shown), "不认 mathvariant 的阅读器只看得到 E、N、L"
    assert not any(e.tag.startswith((f"{xhtml}math", f"{xhtml}zx-")) for t in trees.values() for e in t.iter())
