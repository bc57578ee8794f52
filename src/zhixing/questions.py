"""题库：每页 front matter 的结构、词表与校验。

同一份数据生成页首的 30 秒答案、页尾的追问与参考、题目索引。词表是封闭的：
拼错一个字就是错误，不会悄悄多出一个分类。
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from zhixing.errors import Problem

SECTIONS = {
    "diffusion": "扩散模型与图像生成",
    "control": "微调与可控生成",
    "vision": "检测、分割与损失",
    "transformer": "Transformer 与大模型",
    "basics": "深度学习基础",
    "ml": "机器学习基础",
    "python": "Python 编程基础",
    "deploy": "模型部署",
    "system": "计算机基础",
    "open": "开放性问题",
    "leetcode": "力扣刷题",
}
LEVELS = ("入门", "进阶", "深入")
ORIGINS = ("真实面试", "公开资料归纳", "预测")

_REQUIRED = ("id", "title", "section", "level", "origin", "tags", "brief", "questions", "refs")
_OPTIONAL = ("followups", "needs", "moved_from", "hide", "search", "description")
# 只解析一遍，节点（行号）与数据都要；有 libyaml 就用它，真实页面的 front matter 快十几倍
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PATH = re.compile(r"[a-z0-9-]+(?:/[a-z0-9-]+)*")
_MATTER = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.S | re.M)


@dataclass(frozen=True)
class Question:
    """面试官的一问；``answer`` 是页内锚点（``#…``）或 Markdown 答案。"""

    ask: str
    answer: str
    line: int


@dataclass
class Meta:
    """一页的 front matter。"""

    file: str
    id: str = ""
    title: str = ""
    section: str = ""
    level: str = ""
    origin: str = ""
    tags: list[str] = field(default_factory=list)
    brief: str = ""
    questions: list[Question] = field(default_factory=list)
    followups: list[Question] = field(default_factory=list)
    refs: list[str] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)  # 正文代码要读哪些示例的产物文件
    needs_line: int = 1
    moved_from: list[str] = field(default_factory=list)  # 这一页用过的网址，如 control/lora-old
    moved_line: int = 1


def is_question_page(file: str) -> bool:
    """``docs/<section>/<id>.md`` 才是题目页；首页、规则页等不受约束。"""
    parts = file.split("/")
    return len(parts) == 3 and parts[0] == "docs" and parts[1] in SECTIONS and parts[2].endswith(".md")


def check_syntax(file: str, text: str, problems: list[Problem]) -> None:
    """不是题目页的页面：front matter 可以没有，有就得是合法的 YAML。"""
    if _MATTER.match(text):
        _parse(text, lambda code, reason, line: problems.append(Problem(file, line, code, reason)))


def _parse(text: str, bad: Any) -> tuple[Any, dict] | None:
    """front matter 的 ``(YAML 节点, 数据)``；不合法时登记 F105 并返回 None。"""
    matter = _MATTER.match(text)[1]
    loader = _Loader(matter)
    try:
        node = loader.get_single_node()
        data = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError：像 2024-13-01 这样不存在的日期
        mark = getattr(error, "problem_mark", None)
        line = min(mark.line + 2, matter.count("\n") + 2) if mark else 1  # 没关上的引号会指到末尾之后
        bad("F105", str(getattr(error, "problem", None) or error).split("\n")[0], line)
        return None
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        bad("F105", "front matter 应是键值对", 1)
        return None
    return node, data


def load(file: str, text: str, problems: list[Problem]) -> Meta:
    """解析并校验一页的 front matter；问题写进 ``problems``，每条都有行号。"""
    meta = Meta(file)

    def bad(code: str, reason: str, line: int) -> None:
        problems.append(Problem(file, line, code, reason))

    if not _MATTER.match(text):
        bad("F101", "缺少 front matter", 1)
        return meta
    parsed = _parse(text, bad)
    if parsed is None:
        return meta
    node, data = parsed

    lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.value in lines:
            bad("F105", f"重复的字段 {key.value!r}", key.start_mark.line + 2)
        lines.setdefault(str(key.value), key.start_mark.line + 2)
    nodes = {str(key.value): value for key, value in node.value}
    for name in _REQUIRED:
        if not data.get(name):
            bad("F101", f"缺少 {name}", lines.get(name, 1))
    for name in lines.keys() - {*_REQUIRED, *_OPTIONAL}:
        bad("F106", f"未知字段 {name!r}", lines[name])

    def text_of(name: str, allowed: Any = None) -> str:
        value = data.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            bad("F102", f"{name} 应是文字，得到 {value!r}", lines[name])
            return ""
        if allowed is not None and value not in allowed:
            bad("F102", f"{name} {value!r} 不在词表里：{'、'.join(allowed)}", lines[name])
        return value.strip()

    def list_of(name: str) -> list[str]:
        value = data.get(name) or []
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            bad("F102", f"{name} 应是文字列表", lines[name])
            return []
        return value

    meta.id, meta.title, meta.brief = text_of("id"), text_of("title"), text_of("brief")
    meta.section = text_of("section", SECTIONS)
    meta.level, meta.origin = text_of("level", LEVELS), text_of("origin", ORIGINS)
    meta.tags, meta.refs, meta.needs = list_of("tags"), list_of("refs"), list_of("needs")
    meta.needs_line = lines.get("needs", 1)
    meta.moved_from, meta.moved_line = list_of("moved_from"), lines.get("moved_from", 1)
    for old in meta.moved_from:
        if not _PATH.fullmatch(old):
            bad("F102", f"moved_from 应是旧网址的路径，如 control/lora-old，得到 {old!r}", meta.moved_line)
    for name in ("questions", "followups"):
        setattr(meta, name, list(_questions(name, data.get(name) or [], nodes.get(name), bad)))
    _, section, stem = file.removesuffix(".md").split("/")
    if meta.id and meta.id != stem:
        bad("F103", f"id {meta.id!r} 与文件名 {stem!r} 不一致", lines["id"])
    if meta.section and meta.section != section:
        bad("F102", f"section {meta.section!r} 与目录 {section!r} 不一致", lines["section"])
    for question in meta.questions:
        if not question.answer.startswith("#"):
            bad("F102", f"questions 的 a 应是页内锚点（#…），得到 {question.answer!r}", question.line)
    return meta


def _questions(name: str, value: Any, node: Any, bad: Any) -> Iterator[Question]:
    if not isinstance(value, list):
        bad("F102", f"{name} 应是列表", node.start_mark.line + 2 if node else 1)
        return
    for item, item_node in zip(value, node.value if node else [], strict=False):
        line = item_node.start_mark.line + 2
        if not isinstance(item, dict) or set(item) != {"q", "a"} or not all(isinstance(v, str) for v in item.values()):
            bad("F102", f"{name} 的每一项都应只有文字 q 与 a", line)
            continue
        yield Question(item["q"].strip(), item["a"].strip(), line)


def check_unique(metas: list[Meta], problems: list[Problem]) -> None:
    """id 全站唯一；旧网址不能是别的页现在的或也用过的网址。"""
    taken = {meta.file.removeprefix("docs/").removesuffix(".md"): meta.file for meta in metas}
    for meta in metas:
        for old in meta.moved_from:
            if old in taken:
                problems.append(Problem(meta.file, meta.moved_line, "F102", f"moved_from 的 {old!r} 是 {taken[old]} 的网址"))
            taken[old] = meta.file
    first: dict[str, str] = {}
    for meta in metas:
        if meta.id and first.setdefault(meta.id, meta.file) != meta.file:
            problems.append(Problem(meta.file, 2, "F103", f"id {meta.id!r} 已被 {first[meta.id]} 使用"))


def template(section: str, page_id: str) -> str:
    """新页的模板：能通过检查的最小一页。"""
    return f"""---
id: {page_id}
title: {page_id}
section: {section}
level: {LEVELS[1]}
origin: {ORIGINS[1]}
tags: [待定]
brief: |
  30 秒答案：能在面试里说出口的两三句话。
questions:
  - q: 面试官怎样问？
    a: "#answer"
followups:
  - q: 追问
    a: 答案
refs:
  - "arXiv:0000.00000 论文标题"
---

## 直接回答 {{#answer}}

```python
claim = 1 + 1
assert claim == 2
```
"""
