"""题库：front matter 的每种坏写法都给出编号与行号；好的写法逐字段读对。"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zhixing.errors import RULES, Problem
from zhixing.questions import LEVELS, ORIGINS, SECTIONS, Meta, Question, check_unique, is_question_page, load, template

FILE = "docs/control/lora.md"
GOOD = """\
---
id: lora
title: LoRA：低秩适配
section: control
level: 进阶
origin: 公开资料归纳
tags: [微调, 扩散模型]
brief: |
  两三句话，$W_0$。

  第二段。
questions:
  - q: 省的是什么？
    a: "#memory"
  - {q: 为什么？, a: "#why"}
followups:
  - q: 追问
    a: 答案 $x$
refs:
  - "arXiv:2106.09685 LoRA"
---

正文
"""


def problems_of(text: str, file: str = FILE) -> list[tuple[int, str]]:
    found: list[Problem] = []
    load(file, text, found)
    assert all(p.file == file and "\n" not in p.reason for p in found)
    return sorted((p.line, p.code) for p in found)


def test_good_page() -> None:
    found: list[Problem] = []
    meta = load(FILE, GOOD, found)
    assert found == []
    assert meta == Meta(
        file=FILE,
        id="lora",
        title="LoRA：低秩适配",
        section="control",
        level="进阶",
        origin="公开资料归纳",
        tags=["微调", "扩散模型"],
        brief="两三句话，$W_0$。\n\n第二段。",
        questions=[Question("省的是什么？", "#memory", 13), Question("为什么？", "#why", 15)],
        followups=[Question("追问", "答案 $x$", 17)],
        refs=["arXiv:2106.09685 LoRA"],
    )


@pytest.mark.parametrize("section", SECTIONS)
def test_template_is_valid(section) -> None:
    assert problems_of(template(section, "x-1"), f"docs/{section}/x-1.md") == []


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("docs/control/lora.md", True),
        ("docs/index.md", False),
        ("docs/control/a/b.md", False),
        ("docs/nope/a.md", False),
        ("examples/control/a.md", False),
        ("docs/control/a.txt", False),
    ],
)
def test_which_pages_are_question_pages(file, expected) -> None:
    assert is_question_page(file) == expected


@pytest.mark.parametrize(
    "name", ["id", "title", "section", "level", "origin", "tags", "brief", "questions", "refs"]
)
def test_missing_field(name) -> None:
    """整个不写、写了却空着，都算缺；后者指到那一行。"""
    lines = GOOD.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{name}:"))
    end = next(i for i in range(start + 1, len(lines)) if lines[i] and not lines[i].startswith((" ", "\t")))
    assert problems_of("\n".join(lines[:start] + lines[end:])) == [(1, "F101")]
    empty = problems_of("\n".join([*lines[:start], f"{name}:", *lines[end:]]))
    assert empty == [(start + 1, "F101")]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("section: control", "section: contorl", [(4, "F102"), (4, "F102")]),
        ("section: control", "section: vision", [(4, "F102")]),
        ("level: 进阶", "level: 中级", [(5, "F102")]),
        ("level: 进阶", "level: 3", [(5, "F102")]),
        ("origin: 公开资料归纳", "origin: 网上", [(6, "F102")]),
        ("title: LoRA：低秩适配", "title: [a]", [(3, "F102")]),
        ("title: LoRA：低秩适配", "title: 2024", [(3, "F102")]),
        ("id: lora", "id: 209", [(2, "F102")]),
        ("id: lora", "id: lora2", [(2, "F103")]),
        ("tags: [微调, 扩散模型]", "tags: 微调", [(7, "F102")]),
        ("tags: [微调, 扩散模型]", "tags: [1, 2]", [(7, "F102")]),
        ("tags: [微调, 扩散模型]", "tags: {a: b}", [(7, "F102")]),
        ('    a: "#memory"', "    a: memory", [(13, "F102")]),
        ('    a: "#memory"', "", [(13, "F102")]),
        ('    a: "#memory"', "    a: 3", [(13, "F102")]),
        ('    a: "#memory"', '    a: "#memory"\n    b: x', [(13, "F102")]),
        ("  - q: 省的是什么？\n", "  - 只有文字\n  - q: x\n", [(13, "F102")]),
        ('  - {q: 为什么？, a: "#why"}', "  - {q: [1], a: '#why'}", [(15, "F102")]),
        ("followups:\n", "followups: 无\nhide:\n", [(16, "F102")]),
        ('  - "arXiv:2106.09685 LoRA"', "  - 2106.09685", [(19, "F102")]),
        ("id: lora", "id: lora\nkeywords: x", [(3, "F106")]),
        ("id: lora", "id: lora\n1: x", [(3, "F106")]),
        ("id: lora", "id: lora\non: x", [(3, "F106")]),
        ("id: lora", "id: lora\nnull: x", [(3, "F106")]),
        ("id: lora", "id: lora\ntitle: 重复", [(4, "F105")]),
        ("title: LoRA：低秩适配", "title: LoRA: 低秩", [(3, "F105")]),
        ("title: LoRA：低秩适配", "title: [没关", [(4, "F105")]),
        ("title: LoRA：低秩适配", "title: '没关", [(21, "F105")]),
        ("title: LoRA：低秩适配", "\ttitle: x", [(3, "F105")]),
        ("title: LoRA：低秩适配", "title: @x", [(3, "F105")]),
        ("title: LoRA：低秩适配", "title: *x", [(3, "F105")]),
        ("title: LoRA：低秩适配", "title: !!python/name:os.system x", [(3, "F105")]),
        ("title: LoRA：低秩适配", "title: 2024-13-01", [(1, "F105")]),
        ("title: LoRA：低秩适配", "title: a\x08b", [(1, "F105")]),
        ("title: LoRA：低秩适配", "? [a, b]\n: c", [(3, "F105")]),
    ],
)  # fmt: skip
def test_bad_value(old, new, expected) -> None:
    assert GOOD.count(old) == 1
    assert problems_of(GOOD.replace(old, new)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("正文\n", [(1, "F101")]),
        ("", [(1, "F101")]),
        ("\n" + GOOD, [(1, "F101")]),
        ("---\nid: x\n", [(1, "F101")]),
        ("---\n- a\n---\n", [(1, "F105")]),
        ("---\n只有文字\n---\n", [(1, "F105")]),
        ("---\n---\n", [(1, "F105")]),
        ("---\n# 只有注释\n---\n", [(1, "F105")]),
    ],
    ids=["没有", "空文件", "前面有空行", "没关上", "是列表", "是文字", "空的", "只有注释"],
)
def test_no_front_matter(text, expected) -> None:
    assert problems_of(text) == expected


def test_several_problems_are_reported_together() -> None:
    text = GOOD.replace("level: 进阶", "level: x").replace("origin: 公开资料归纳", "origin: y").replace("id: lora", "idd: lora")
    assert problems_of(text) == [(1, "F101"), (2, "F106"), (5, "F102"), (6, "F102")]


def test_optional_fields_are_accepted() -> None:
    text = GOOD.replace("id: lora\n", "id: lora\nhide: [toc]\nsearch: {boost: 2}\ndescription: x\n")
    assert problems_of(text) == []


@pytest.mark.parametrize("old", ["/lora", "lora/", "a b", "../x", "中文", ""])
def test_old_addresses_are_plain_paths(old) -> None:
    text = GOOD.replace("id: lora\n", f'id: lora\nmoved_from: ["{old}"]\n')
    assert problems_of(text) == [(3, "F102")]


def test_old_addresses_belong_to_nobody_else() -> None:
    found: list[Problem] = []
    a, b = Meta("docs/control/a.md", id="a"), Meta("docs/control/b.md", id="b")
    a.moved_from, a.moved_line = ["control/gone", "control/a"], 7
    b.moved_from, b.moved_line = ["control/a", "control/gone"], 8
    check_unique([a, b], found)
    assert [(p.file, p.line, p.code) for p in found] == [
        ("docs/control/a.md", 7, "F102"),
        ("docs/control/b.md", 8, "F102"),
        ("docs/control/b.md", 8, "F102"),
    ]


def test_ids_are_unique() -> None:
    found: list[Problem] = []
    metas = [Meta("docs/control/a.md", id="a"), Meta("docs/vision/a.md", id="a"), Meta("docs/ml/b.md", id=""), Meta("docs/ml/c.md", id="")]
    check_unique(metas, found)
    assert [(p.file, p.code) for p in found] == [("docs/vision/a.md", "F103")]
    assert "docs/control/a.md" in found[0].reason


@given(st.text(), st.sampled_from(["id", "title", "section", "level", "origin", "tags", "brief", "questions", "refs", "followups"]))
def test_any_value_is_judged_without_crashing(value, name) -> None:
    lines = [f"{name}: {value}" if line.startswith(f"{name}:") else line for line in GOOD.split("\n")]
    problems_of("\n".join(lines))


@given(st.text())
def test_any_text_is_judged_without_crashing(text) -> None:
    problems_of(f"---\n{text}\n---\n")


def test_vocabulary() -> None:
    assert len(SECTIONS) == len(set(SECTIONS.values())) and len(LEVELS) == len(ORIGINS) == 3
    with pytest.raises(KeyError):
        Problem("a", 1, "X999", "未登记")
    problem = Problem("docs/a.md", 3, "R301", "原因", "一\n二")
    assert str(problem) == f"docs/a.md:3: R301 原因（{RULES['R301'][1]}）\n    一\n    二"
    assert str(Problem("docs/a.md", 0, "R301", "原因")).startswith("docs/a.md:1: ")
