"""项目：有哪些页面、示例，静态扫描与校验的结果，以及执行它们。"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from zhixing import blocks, notebook, questions, search
from zhixing.artifacts import Artifacts
from zhixing.cache import file_hash
from zhixing.errors import ContentError, Problem
from zhixing.engine import Engine, Outcome, Unit

MAX_SKIPPED = 20  # 全站跳过的代码块上限：跳过是例外，不是习惯


@dataclass(frozen=True)
class _Page:
    """一页静态扫描的结果；只由 ``text`` 与 ``included`` 决定。"""

    text: str
    included: dict[str, str | None]  # 引入的文件 -> 内容的哈希
    scan: blocks.Scan
    meta: questions.Meta | None
    problems: list[Problem]


_PAGES: dict[Path, _Page] = {}  # 一次构建要载入两遍，serve 更是每次保存都载入：没变的页不重新扫描
_INCLUDED = re.compile(r'-8<-+\s+"([^":]+)')


def _read_page(path: Path, root: Path) -> _Page:
    file = path.relative_to(root).as_posix()
    text = blocks.read_text(path, file)
    included = {name: file_hash(root / name) for name in _INCLUDED.findall(text)}
    page = _PAGES.get(path)
    if page is None or page.text != text or page.included != included or page.scan.file != file:
        scan, problems = blocks.scan_text(text, file, root), []
        meta = None
        if questions.is_question_page(file):
            meta = questions.load(file, text, problems)
        else:
            questions.check_syntax(file, text, problems)
        page = _PAGES[path] = _Page(text, included, scan, meta, problems)
    return page


def find_root(start: Path | None = None) -> Path:
    """向上找到放着 ``mkdocs.yml`` 的目录。

    Raises:
        FileNotFoundError: 找不到。
    """
    here = (start or Path.cwd()).resolve()
    for directory in (here, *here.parents):
        if (directory / "mkdocs.yml").is_file():
            return directory
    raise FileNotFoundError(f"{here} 及其上级目录里没有 mkdocs.yml")


@dataclass
class Project:
    """一次检查看到的全部内容。"""

    root: Path
    scans: dict[str, blocks.Scan] = field(default_factory=dict)
    metas: dict[str, questions.Meta] = field(default_factory=dict)
    examples: dict[str, notebook.Example] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    artifacts: Artifacts = field(default_factory=Artifacts)
    synonyms: list[list[str]] = field(default_factory=list)  # 搜索的同义词组
    unreadable: set[str] = field(default_factory=set)  # 头部有错、没能载入的示例

    @classmethod
    def load(cls, root: Path, only: Iterable[Path] | None = None) -> Project:
        """扫描并静态校验；``only`` 限定页面（示例总是全部载入）。"""
        project = cls(root)
        paths = sorted(only) if only is not None else sorted((root / "docs").rglob("*.md"))
        for path in paths:
            project._guard(project._load_page, path)
        for path in notebook.find(root):
            project._guard(project._load_example, path)
        questions.check_unique(list(project.metas.values()), project.problems)
        project._check_needs()
        project._check_skips()
        project.synonyms = search.load_synonyms(root, project.problems)
        return project

    def _guard(self, load: Callable[[Path], None], path: Path) -> None:
        try:
            load(path)
        except ContentError as error:
            self.problems += error.problems
            if path.suffix == ".py":
                self.unreadable.add(path.stem)

    def _load_page(self, path: Path) -> None:
        page = _read_page(path, self.root)
        file = page.scan.file
        self.scans[file] = page.scan
        self.problems += page.scan.problems + page.problems
        if page.meta:
            self.metas[file] = page.meta

    def _load_example(self, path: Path) -> None:
        example = notebook.load(path, self.root)
        self.examples[example.id] = example

    def _check_skips(self) -> None:
        skipped = [b for scan in self.scans.values() for b in scan.blocks if b.skip]
        for block in skipped[MAX_SKIPPED:]:
            self.problems.append(
                Problem(block.file, block.line, "B210", f"全站已跳过 {len(skipped)} 块，上限 {MAX_SKIPPED}")
            )

    def _check_needs(self) -> None:
        known = self.examples.keys() | self.unreadable  # 读不了的另有自己的错误
        for item, code in [(e, "E602") for e in self.examples.values()] + [(m, "F102") for m in self.metas.values()]:
            if missing := set(item.needs) - known:
                reason = f"needs 里的示例不存在：{'、'.join(sorted(missing))}"
                self.problems.append(Problem(item.file, item.needs_line, code, reason))
        try:
            list(TopologicalSorter({e.id: set(e.needs) for e in self.examples.values()}).static_order())
        except CycleError as error:
            first = self.examples[error.args[1][0]]
            cycle = " → ".join(error.args[1])
            self.problems.append(Problem(first.file, first.needs_line, "E602", f"needs 成环：{cycle}"))

    def keep_examples(self, chosen: set[str]) -> None:
        """只留这些示例，以及它们与各页面（传递地）``needs`` 的示例。"""
        stack, kept = [*chosen, *(need for meta in self.metas.values() for need in meta.needs)], set()
        while stack:
            example = stack.pop()
            if example in self.examples and example not in kept:
                kept.add(example)
                stack += self.examples[example].needs
        self.examples = {k: v for k, v in self.examples.items() if k in kept}

    def units(self) -> list[Unit]:
        """要执行的单元：全部示例与页面。"""
        units = [
            Unit(e.file, e.blocks, "example", tuple(e.needs), e.needs_line, e.threads) for e in self.examples.values()
        ]
        for scan in self.scans.values():
            meta = self.metas.get(scan.file)
            needs = (tuple(meta.needs), meta.needs_line) if meta else ()
            units.append(Unit(scan.file, [b for b in scan.blocks if b.runs], "page", *needs))
        return units

    def execute(self, engine: Engine, progress: Callable[[Outcome], None] = lambda _: None) -> None:
        """执行全部示例与页面；结果进 ``outcomes`` 与 ``artifacts``，问题进 ``problems``。"""
        for outcome in engine.check(self.units(), progress):
            self.outcomes[outcome.unit.file] = outcome
            # needs 写错的已经在扫描时指出，不再说一遍“没有执行”
            told = {(p.file, p.line) for p in self.problems}
            self.problems += [p for p in outcome.problems if p.code != "E603" or (p.file, p.line) not in told]
        for example in self.examples.values():
            payload = self.outcomes[example.file].payload
            self.artifacts.add_example(example.id, payload["figures"], payload["metrics"])
