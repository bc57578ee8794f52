"""由数据生成的页面：题目索引、验证报告、验证规则，以及导航。"""

from __future__ import annotations

from html import escape

from zhixing import mutate, practice, report
from zhixing.errors import RULES
from zhixing.project import Project
from zhixing.questions import LEVELS, SECTIONS, Meta


def _by_section(project: Project) -> dict[str, list[Meta]]:
    grouped: dict[str, list[Meta]] = {section: [] for section in SECTIONS}
    for meta in project.metas.values():
        if meta.section in grouped and meta.level in LEVELS:
            grouped[meta.section].append(meta)
    for metas in grouped.values():
        metas.sort(key=lambda m: (LEVELS.index(m.level), m.id))
    return {section: metas for section, metas in grouped.items() if metas}


def nav(project: Project) -> list:
    """MkDocs 的 ``nav``。"""
    entries: list = [{"首页": "index.md"}]
    for section, metas in _by_section(project).items():
        entries.append({SECTIONS[section]: [m.file.removeprefix("docs/") for m in metas]})
    if project.examples:
        entries.append({"示例": [f"examples/{example}.ipynb" for example in sorted(project.examples)]})
    entries.append({"索引": ["questions.md", "tags.md", "report.md", "rules.md"]})
    return entries


def generated(project: Project) -> dict[str, str]:
    """``docs/`` 内的路径 -> Markdown。"""
    return {"questions.md": _questions(project), "report.md": _report(project), "rules.md": _rules()}


def redirects(project: Project, directory_urls: bool) -> dict[str, str]:
    """搬走的页在旧网址上留下的跳转：站内路径 -> HTML。带着 # 与查询串一起跳。"""
    suffix = "/" if directory_urls else ".html"
    found = {}
    for meta in project.metas.values():
        target = meta.file.removeprefix("docs/").removesuffix(".md") + suffix
        for old in meta.moved_from:
            url = "../" * (old.count("/") + directory_urls) + target
            found[old + ("/index.html" if directory_urls else ".html")] = (
                f'<!doctype html><html lang="zh"><meta charset="utf-8"><title>{escape(meta.title)}</title>'
                f'<meta name="robots" content="noindex"><link rel="canonical" href="{url}">'
                f'<script>location.replace("{url}" + location.search + location.hash)</script>'
                f'<noscript><meta http-equiv="refresh" content="0; url={url}"></noscript>'
                f'<p>这一页搬到了 <a href="{url}">{escape(meta.title)}</a>。</p></html>\n'
            )
    return found


def _questions(project: Project) -> str:
    lines = ["---", "title: 题目索引", "---", "", "每一问都指向正文里的答案；折叠的追问在各页末尾。", ""]
    for section, metas in _by_section(project).items():
        lines += [f"## {SECTIONS[section]} {{#{section}}}", ""]
        for meta in metas:
            path = meta.file.removeprefix("docs/")
            lines += [f"### [{meta.title}]({path}) {{#{meta.id}}}", "", f"{meta.level} · {meta.origin}{_mark(project, meta)}", ""]
            lines += [f"- [{q.ask}]({path}{q.answer})" for q in meta.questions]
            lines.append("")
    return "\n".join(lines)


def _mark(project: Project, meta: Meta) -> str:
    """有练习的题的标记；读者通过之后由脚本打勾。"""
    keys = " ".join(f"{meta.id}/{e.entry}" for e in practice.exercises(project.scans[meta.file].blocks))
    return f' · <span class="zx-mark" data-practice="{keys}">练习</span>' if keys else ""


def _report(project: Project) -> str:
    summary = report.summarize(project)
    total = summary["total"]
    lines = [
        "---",
        "title: 验证报告",
        "---",
        "",
        "构建这个站点时，下面每一页的代码块都真的执行并核对过；有一块不过，站点就不会生成。",
        "",
        f"合计 {total.get('run', 0)} 块跑过，{total.get('skipped', 0)} 块带理由跳过，"
        f"{total.get('shown', 0)} 块属于只显示的语言。",
        "",
        "变异检查把代码改坏一处再跑，看断言会不会红；没红的是幸存者，说明那句话还没有被证明。",
        "",
        "| 页面 | 跑过 | 跳过 | 只显示 | 执行耗时 | 变异 | 杀死率 |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    mutations = mutate.recorded(project.root)
    skipped = []
    for row in summary["pages"]:
        file = row["file"]
        if not row["run"] and not row["skipped"]:
            continue
        target = file.removeprefix("docs/") if row["kind"] == "page" else file.removesuffix(".py") + ".ipynb"
        lines.append(
            f"| [{file}]({target}) | {row['run']} | {len(row['skipped'])} | {row['shown']} | {row['seconds']:.1f} 秒 "
            f"| {_mutation(project, file, mutations.get(file))} |"
        )
        skipped += [f"- `{file}:{item['line']}`：{item['reason']}" for item in row["skipped"]]
    lines += ["", "## 跳过的代码块与理由 {#skipped}", "", *(skipped or ["没有。"]), ""]
    return "\n".join(lines)


def _mutation(project: Project, file: str, result: dict | None) -> str:
    if result is None or not result["total"]:
        return "— | —"
    if result["fingerprint"] != mutate.fingerprint(project, file):
        return f"{result['total']} | 记录之后改过，待重测"
    return f"{result['total']} | {1 - len(result['survived']) / result['total']:.0%}"


def _rules() -> str:
    lines = [
        "---",
        "title: 验证规则",
        "---",
        "",
        "报错写作 `文件:行: 编号 原因`。编号一经使用不再改变含义。",
        "",
        "| 编号 | 含义 | 怎么改 |",
        "|---|---|---|",
    ]
    lines += [f"| {code} | {meaning} | {fix.replace('|', chr(92) + '|')} |" for code, (meaning, fix) in RULES.items()]
    return "\n".join(lines) + "\n"
