"""一次站点构建：把项目、执行、渲染上下文与检查串起来；不 import mkdocs。

钩子（``hooks/``）按 MkDocs 的事件顺序调用这里的方法，换一个构建器只需重写钩子。
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from zhixing import history, links, notebook, pages, practice, pyodide, report
from zhixing.blocks import front_matter_end
from zhixing.cache import write_atomic
from zhixing.context import current
from zhixing.errors import ContentError, Problem
from zhixing.engine import Engine
from zhixing.inline import images
from zhixing.page import Page, wrap
from zhixing.project import Project


class Build:
    """一个项目的构建；``mkdocs serve`` 期间反复 :meth:`start`，执行引擎常驻。"""

    def __init__(self, root: Path, checkpoints: bool) -> None:
        self.root = root
        self.engine = Engine(root, checkpoints=checkpoints)
        self._loaded: Project | None = None
        self.for_print = bool(os.environ.get("ZHIXING_PRINT"))

    # ---- 开始：扫描、执行 ----

    def start(self) -> None:
        """扫描全部内容并执行；内容错误先记着，等页面都渲染过再一起报。"""
        print("知行：核对代码块", flush=True)
        # 导航刚载入过的这一次就用它，不扫描两遍
        self.project, self._loaded = self._loaded or Project.load(self.root), None
        self.project.execute(self.engine, report.announce)
        self.problems: list[Problem] = self.project.problems
        self.histories = history.read(self.root)
        self.commit = history.describe(self.root)
        self.pages: dict[str, Page] = {}
        self.formulas: dict[str, list[str]] = {}

    def substitute(self, file: str) -> str | None:
        """MkDocs 读不了的页（编码或 front matter 有错）换成读得了的内容，好让其余错误一次报全。"""
        codes = {p.code for p in self.problems if p.file == file}
        if "L504" in codes:
            return ""
        if any(code.startswith("F") for code in codes):
            text = self.project.scans[file].text
            return text[front_matter_end(text) :]
        return None

    def nav(self) -> list:
        """导航：首页、各章、示例、关于。章内按难度再按 id 排。"""
        self._loaded = Project.load(self.root)
        return pages.nav(self._loaded)

    def generated_pages(self) -> dict[str, str]:
        """由数据生成的页面：``docs/`` 内的路径 -> Markdown。"""
        return pages.generated(self.project)

    def redirects(self, directory_urls: bool) -> dict[str, str]:
        """旧网址上的跳转页：站内路径 -> HTML。"""
        return pages.redirects(self.project, directory_urls)

    def assets(self, offline: bool = False) -> dict[str, Path]:
        """从锁定版本的 npm 包复制进站点的文件。

        Args:
            offline: 这一份要能用 ``file://`` 打开（离线包）。

        Raises:
            FileNotFoundError: 前端资产还没安装。
        """
        modules = self.root / "node_modules"
        katex = modules / "katex" / "dist"
        if not (katex / "katex.min.css").is_file():
            raise FileNotFoundError("缺少前端资产：先运行 make assets")
        found = {"assets/katex/katex.min.css": katex / "katex.min.css"}
        found["assets/js/copy-tex.min.js"] = katex / "contrib" / "copy-tex.min.js"
        found |= {f"assets/katex/fonts/{p.name}": p for p in sorted((katex / "fonts").glob("*.woff2"))}
        if offline:
            found["assets/js/iframe-worker.shim.js"] = modules / "iframe-worker" / "shim" / "index.js"
        self.practice = None
        if any(any(practice.exercises(scan.blocks)) for scan in self.project.scans.values()):
            self.practice = pyodide.pack(modules / "pyodide", self.root / ".cache" / "zhixing" / "pyodide", offline)
            found |= self.practice.assets
        return found

    def practice_settings(self) -> dict[str, Any] | None:
        """练习页的脚本要知道的事；全站没有练习时为 None。"""
        return self.practice and self.practice.settings()

    def write_notebooks(self) -> tuple[Path, list[str]]:
        """把每个示例的执行结果写成 ``.ipynb``；返回 ``(目录, 目录内的相对路径)``。"""
        # 打印版里图的写法不同；两种构建可能同时在跑，各写各的
        directory = self.root / ".cache" / "zhixing" / ("notebooks-print" if self.for_print else "notebooks")
        written = []
        for example in self.project.examples.values():
            results = self.project.outcomes[example.file].payload["blocks"]
            context = Page(example.file, "", "../../", self.problems, self.project.artifacts, self.for_print)

            def figure_html(svg: str, cell: int, i: int, example=example, context=context) -> str:
                figure = self.project.artifacts.publish(f"{example.id}/cell-{cell}-{i}", svg)
                return f'<figure class="zx-figure">{images(figure, f"{example.title}：第 {cell + 1} 格的图", context)}</figure>'

            text, self.formulas[example.id] = notebook.to_ipynb(example, results, figure_html, self.problems)
            written.append(f"examples/{example.id}.ipynb")
            write_atomic(directory / written[-1], text)
        return directory, written

    # ---- 每一页 ----

    def begin_page(self, file: str, body: str, url: str) -> str:
        """渲染一页之前：设好上下文，返回加上页首页尾的 Markdown。

        Args:
            file: 相对项目根目录的源文件。
            body: 去掉 front matter 的正文。
            url: 本页网址，如 ``control/lora/``。
        """
        scan = self.project.scans.get(file)
        source = scan.text if scan else body
        if scan:  # 以扫描时的内容为准：构建期间文件被改，也不会一半新一半旧
            body = source[front_matter_end(source) :]
        offset = source.count("\n") - body.count("\n")
        meta = self.project.metas.get(file)
        if meta:
            body, added = wrap(meta, body)
            offset -= added
        results = {}
        if scan:
            outcome = self.project.outcomes[file]
            for block, result in zip(outcome.unit.blocks, outcome.payload["blocks"], strict=False):
                results[block.line] = result
        page = Page(
            file,
            source,
            "../" * url.count("/"),
            self.problems,
            self.project.artifacts,
            for_print=self.for_print,
            blocks={b.line: b for b in scan.blocks} if scan else {},
            results=results,
            offset=offset,
        )
        self.pages[file] = page
        current.set(page)
        return body

    def finish_notebook(self, example: str, html: str, slugify) -> tuple[str, list[dict]]:
        """修整 mkdocs-jupyter 的输出，返回 ``(HTML, 目录 token)``。"""
        return notebook.finish_html(html, self.formulas[example], slugify)

    def footer(self, uri: str) -> dict[str, Any] | None:
        """页脚的数据：这一页（或示例）跑过几块、跳过几块，在哪个提交上，谁写的，最近何时更新。"""
        path = Path(uri)
        file = f"examples/{path.stem}.py" if path.suffix == ".ipynb" else f"docs/{uri}"
        outcome = self.project.outcomes.get(file)
        if outcome is None:
            return None
        scan = self.project.scans.get(file)
        return {
            "run": len(outcome.unit.blocks),
            "skipped": sum(bool(block.skip) for block in scan.blocks) if scan else 0,
            "commit": self.commit,
            "history": self.histories.get(file),
        }

    # ---- 收尾 ----

    def source(self, uri: str) -> tuple[str, str]:
        """``docs/`` 内的页面路径 -> ``(贡献者该去改的文件, 它的全文)``。"""
        path = Path(uri)
        if path.suffix == ".ipynb" and path.stem in self.project.examples:
            file = self.project.examples[path.stem].file
            return file, (self.root / file).read_text("utf-8")
        file = f"docs/{uri}"
        return file, self.pages[file].source if file in self.pages else ""

    def finish(self, rendered: list[links.Rendered], urls: set[str]) -> None:
        """全部页面渲染之后：交叉核对，检查链接，有错就报。

        Raises:
            ContentError: 内容有错。
        """
        current.set(None)
        urls = urls | self.project.artifacts.files.keys()
        problems = self.problems
        for page in rendered:
            context = self.pages.get(page.file)
            if context is None or page.file not in self.project.scans:
                continue  # 由数据生成的页面与示例没有可扫描的源文件
            problems += self._cross_check(page, context)
            meta = self.project.metas.get(page.file)
            for question in meta.questions if meta else []:
                if question.answer.startswith("#") and question.answer[1:] not in page.ids:
                    problems.append(Problem(page.file, question.line, "F104", f"没有锚点 {question.answer}"))
        # questions 的锚点已经单独报过，不再当死链重复一遍
        reported = {(p.file, p.reason.rpartition("#")[2]) for p in problems if p.code == "F104"}
        problems += [
            p for p in links.check(rendered, urls) if (p.file, p.reason.rpartition("#")[2]) not in reported
        ]
        if any(p.code.startswith("F") for p in problems):
            # 题目索引等页由 front matter 生成：根因已经报过，不再报它们的死链
            problems = [p for p in problems if p.file in self.project.scans or p.code not in ("L501", "L502")]
        # 示例自己失败了，引用它的图与数字当然没有：修好根因就都好了
        broken = [repr(Path(p.file).stem) for p in problems if p.file.startswith("examples/")]
        problems = [p for p in problems if p.code not in ("M404", "M405") or not any(b in p.reason for b in broken)]
        report.print_summary(self.project)
        self.project.problems = problems
        report.save(self.project)
        if problems:
            raise ContentError(problems)

    def _cross_check(self, page: links.Rendered, context: Page) -> list[Problem]:
        problems = []
        for line in sorted(context.blocks.keys() - page.blocks):
            problems.append(Problem(page.file, line, "B211", "静态扫描找到了这一块，但页面上看不到它"))
        if any(p.file == page.file and p.code in ("B201", "B205", "M403") for p in self.problems):
            return []  # 已经报过根因
        for text in page.strays:
            first = text.strip().split("\n")[0]
            problems.append(Problem(page.file, context.line_of(first), "B206", f"没有执行的代码块：{first[:60]!r}"))
        return problems

    def extra_files(self) -> dict[str, str]:
        """渲染之后才知道的静态文件：站内路径 -> 文本。"""
        return self.project.artifacts.files

    def close(self) -> None:
        self.engine.close()


_BUILDS: dict[Path, Build] = {}


def get(root: Path, checkpoints: bool = False) -> Build:
    """同一个项目在一个进程里共用一个 Build；``checkpoints`` 只在 ``mkdocs serve`` 里打开。"""
    if root not in _BUILDS:
        _BUILDS[root] = Build(root, checkpoints)
    return _BUILDS[root]


def close_all() -> None:
    """收掉常驻的执行进程。"""
    while _BUILDS:
        _BUILDS.popitem()[1].close()


# ---- 站点目录：写在旁边，成功才换上 ----


def staging(site: Path) -> Path:
    """本次构建写到哪里；清掉上次被杀留下的半成品，上次换到一半的恢复回来。"""
    stage, old = _aside(site)
    shutil.rmtree(stage, ignore_errors=True)
    if old.exists():
        if site.exists():
            shutil.rmtree(old)
        else:
            old.rename(site)
    return stage


def publish(site: Path) -> None:
    """把写好的站点换上；此前任何一步失败，旧站点都原样还在。"""
    stage, old = _aside(site)
    if site.exists():
        site.rename(old)
    stage.rename(site)
    shutil.rmtree(old, ignore_errors=True)


def _aside(site: Path) -> tuple[Path, Path]:
    return site.with_name(f".{site.name}.building"), site.with_name(f".{site.name}.old")
