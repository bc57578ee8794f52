"""样式表只留站点用得到的规则：主题的样式有一大半管着这里没有的部件。

一条选择器里的类与编号，只要有一个在全站的网页与脚本里都没出现过，它就不可能选中什么。
脚本里按单词找，宁可多留：``tab--${e}`` 这样拼出来的，凡是以 ``tab--`` 开头的都留。``:not(.x)`` 里的不算，
没有 x 它照样选得中。没有谁引用的自定义属性也删，主题把每个图标都写成一个。
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import tinycss2
from tinycss2.ast import AtRule, Node, QualifiedRule

from zhixing.cache import file_hash
from zhixing.output import publish

_NAMES = re.compile(r"""\s(?:class|id|for|data-md-[\w-]+)=(?:"([^"]*)"|'([^']*)'|([^\s>]+))""")
_WORDS = re.compile(r"[A-Za-z_][\w-]*")
_VARIABLE = re.compile(r"--[\w-]+")
_NESTING = frozenset({"media", "supports", "layer", "container"})


def names(pages: Iterable[str], scripts: Iterable[str]) -> set[str]:
    """网页里写着的、脚本可能加上的类与编号。"""
    found: set[str] = set()
    for page in pages:
        for groups in set(_NAMES.findall(page)):
            found.update("".join(groups).split())
        for script in re.findall(r"<script[^>]*>(.+?)</script>", page, re.S):
            found.update(_WORDS.findall(script))
    for script in scripts:
        found.update(_WORDS.findall(script))
    return found


def mentioned(found: set[str], css: str) -> set[str]:
    """样式表里的名字（类、编号、属性值）中，网页与脚本里出现过的。"""
    made = tuple(name for name in found if name.endswith("--"))
    return {name for name in re.findall(r"[\w-]+", css) if name in found or name.startswith(made)}


def prune(css: str, used: set[str]) -> str:
    """删掉选不中任何东西的规则；看不懂的一律留下。"""
    return "".join(_rules(tinycss2.parse_stylesheet(css, skip_comments=True, skip_whitespace=True), used))


def _rules(rules: list[Node], used: set[str]) -> Iterable[str]:
    for rule in rules:
        if isinstance(rule, QualifiedRule):
            kept = [part for part in _split(rule.prelude) if _matches(part, used)]
            if kept:
                prelude = ",".join(tinycss2.serialize(part).strip() for part in kept)
                yield f"{prelude}{{{tinycss2.serialize(rule.content)}}}"
        elif isinstance(rule, AtRule) and rule.lower_at_keyword in _NESTING and rule.content is not None:
            inner = tinycss2.parse_rule_list(rule.content, skip_comments=True, skip_whitespace=True)
            if body := "".join(_rules(inner, used)):
                yield f"@{rule.at_keyword}{tinycss2.serialize(rule.prelude)}{{{body}}}"
        else:
            yield rule.serialize()


def _split(prelude: list[Node]) -> list[list[Node]]:
    """按最外层的逗号分开。"""
    parts: list[list[Node]] = [[]]
    for token in prelude:
        if token == ",":
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _matches(selector: list[Node], used: set[str]) -> bool:
    """这条选择器要求的类与编号是不是都有；``:is()``、``:where()``、``:has()`` 里有一个可能就行。"""
    for before, token in zip([None, *selector], selector):
        if token.type == "ident" and before == "." or token.type == "hash":
            if token.value not in used:
                return False
        elif token.type == "[] block" and len(token.content) == 3 and token.content[0].value.startswith("data-md-"):
            if token.content[1] == "=" and token.content[2].value not in used:  # 主题的二十来种配色，只用到一两种
                return False
        elif token.type == "function" and token.lower_name in ("is", "where", "has"):
            if not any(_matches(part, used) for part in _split(token.arguments)):
                return False
    return True


def drop_variables(css: str, used: set[str]) -> str:
    """删掉名字不在 ``used`` 里的自定义属性。"""
    return "".join(_without(tinycss2.parse_stylesheet(css), used))


def _without(rules: list[Node], used: set[str]) -> Iterable[str]:
    for rule in rules:
        if isinstance(rule, QualifiedRule):
            content = tinycss2.parse_blocks_contents(rule.content, skip_comments=True, skip_whitespace=True)
            if all(d.type == "declaration" for d in content):
                kept = [d.serialize() for d in content if not d.name.startswith("--") or d.name in used]
                if kept:
                    yield f"{tinycss2.serialize(rule.prelude)}{{{';'.join(kept)}}}"
                continue
        elif isinstance(rule, AtRule) and rule.lower_at_keyword in _NESTING and rule.content is not None:
            inner = tinycss2.parse_rule_list(rule.content)
            yield f"@{rule.at_keyword}{tinycss2.serialize(rule.prelude)}{{{''.join(_without(inner, used))}}}"
            continue
        yield rule.serialize()


def shrink(site: Path, cache: Path) -> None:
    """把 ``site`` 里主题与 KaTeX 的样式表换成只含用得到的规则的。

    Args:
        cache: 放做好的样式表，文件名是原样与用到的名字的哈希；可以删。
    """
    assets = site / "assets"
    pages = [p.read_text("utf-8") for p in site.rglob("*.html")]
    scripts = [p.read_text("utf-8") for p in [*assets.glob("javascripts/*.js"), *assets.glob("js/*.js")]]
    ours = [p.read_text("utf-8") for p in assets.glob("css/*.css")]
    sheets = {p: p.read_text("utf-8") for p in sorted([*assets.glob("stylesheets/*.css"), *assets.glob("katex/*.css")])}
    theirs = " ".join(sheets.values())
    used = mentioned(names(pages, scripts), theirs)
    variables = {name for text in [*pages, *scripts, *ours] for name in _VARIABLE.findall(text)} & set(_VARIABLE.findall(theirs))
    key = json.dumps([file_hash(Path(__file__)), *sheets.values(), sorted(used), sorted(variables)])
    made = cache / (hashlib.sha256(key.encode()).hexdigest() + ".json")
    if not made.is_file():
        small = [prune(text, used) for text in sheets.values()]
        for text in small:
            variables.update(re.findall(r"var\(\s*(--[\w-]+)", text))
        small = [drop_variables(text, variables) for text in small]
        publish(made, lambda temporary: temporary.write_text(json.dumps(small), "utf-8"))
    for path, text in zip(sheets, json.loads(made.read_text("utf-8"))):
        publish(path, lambda temporary, text=text: temporary.write_text(text, "utf-8"))
