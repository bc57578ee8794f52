"""调度：挑出要跑的文件，按上下游交给执行后端，核对结果，写缓存。

这里只决定跑什么、何时跑，不影响一个作业跑出什么，所以不在缓存键里（见 :data:`zhixing.cache._ENGINE_FILES`）。
"""

from __future__ import annotations

import ast
import os
import queue
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zhixing import files
from zhixing.blocks import Block
from zhixing.cache import Cache, key
from zhixing.errors import Problem
from zhixing.execute import ZygoteExecutor, empty, execute_job, lost
from zhixing.verify import verify
from zhixing.zygote import HEAVY

POLL = 0.2  # 秒：另一个构建正跑着同一个示例时，多久看一次


@dataclass
class Unit:
    """一起执行、共享变量的一串代码块：一页，或一个示例。"""

    file: str
    blocks: list[Block]  # 只含会执行的块
    kind: str = "page"  # page 或 example
    needs: tuple[str, ...] = ()  # 上游示例的 id：都成功了才执行
    needs_line: int = 1
    threads: int = 1  # 算子用几个线程，也就占几个执行槽


@dataclass
class Outcome:
    """一个单元的执行结果。"""

    unit: Unit
    payload: dict[str, Any]  # blocks figures metrics files inputs isolation
    cached: bool
    why: str
    upstream: dict[str, dict[str, str]] = field(default_factory=dict)  # 上游示例 -> 产物名 -> sha256
    problems: list[Problem] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(b["seconds"] for b in self.payload["blocks"])


def heavy_imports(sources: Iterable[str], root: Path) -> list[str]:
    """这些代码（连同它们 import 的本地模块）会用到哪些重模块。"""
    found: set[str] = set()
    seen: set[Path] = set()
    stack = list(sources)
    while stack:
        try:
            tree = ast.parse(stack.pop())
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # 空字符、嵌套太深：执行到那一块时再报
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            else:
                continue
            for name in names:
                found.add(name.split(".")[0])
                base = root / "examples" / name.replace(".", "/")
                for path in (base.with_suffix(".py"), base / "__init__.py"):
                    if path.is_file() and path not in seen:
                        seen.add(path)
                        stack.append(path.read_text("utf-8", "replace"))
    return sorted(found & HEAVY.keys())


def describe_block(block: Block, unit: Unit) -> dict[str, Any]:
    """块里影响执行结果的部分；``file``、``line`` 只用于报错，不进缓存键。"""
    file, line = block.code_start
    return {
        "lang": block.lang,
        "source": block.source,
        "raises": bool(block.raises),
        "practice": block.practice,
        "solution": block.solution,
        "timeout": block.timeout,
        "memory": block.memory,
        "echo": unit.kind == "example",
        "file": file,
        "line": line,
    }


def _python_of(block: dict[str, Any]) -> str:
    """块里的 Python 代码；``pycon`` 只取提示符后面的。"""
    if block["lang"] == "python":
        return block["source"]
    if block["lang"] == "pycon":
        return "\n".join(re.findall(r"^\s*(?:>>>|\.\.\.) (.*)$", block["source"], re.M))
    return ""


class Engine:
    """核对一批单元；zygote 可以跨多次调用常驻（``mkdocs serve``）。"""

    def __init__(
        self,
        root: Path,
        *,
        workers: int | None = None,
        cache: bool = True,
        executor: Executor | None = None,
        checkpoints: bool = False,
    ) -> None:
        self.root = root
        self.cache = Cache(root / ".cache" / "zhixing" / "results", root)
        self.use_cache, self.checkpoints = cache, checkpoints
        self.workers = workers or (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
        self.executor = executor or ZygoteExecutor(root, self.workers)

    def job(self, unit: Unit, upstream: dict[str, dict[str, str]]) -> dict[str, Any]:
        blocks = [describe_block(block, unit) for block in unit.blocks]
        return {
            "file": unit.file,
            "root": str(self.root),
            "checkpoints": self.checkpoints,
            "blocks": blocks,
            "imports": heavy_imports(map(_python_of, blocks), self.root),
            "example": unit.kind == "example",
            "threads": unit.threads,
            "inputs": upstream,
        }

    def unit_key(self, unit: Unit) -> str:
        # 位置只用于报错；时限放宽或收紧都不改变已经跑完的结果
        harmless = ("file", "line", "timeout")
        described = [describe_block(block, unit) for block in unit.blocks]
        content = [{k: v for k, v in b.items() if k not in harmless} for b in described]
        return key([unit.file, content, unit.needs, unit.threads])

    def recall(self, unit: Unit, upstream: dict[str, dict[str, str]]) -> tuple[dict[str, Any] | None, str]:
        """``(缓存的结果或 None, 为什么)``。

        Args:
            upstream: 上游示例 → 产物名 → sha256，此刻的。
        """
        payload, why = self.cache.load(unit.file, self.unit_key(unit))
        if payload is None:
            return None, why
        if any(r["seconds"] >= b.timeout for b, r in zip(unit.blocks, payload["blocks"])):
            return None, "时限收紧到上次的耗时以下"
        for name, digest in payload["inputs"].items():
            example, _, file = name.partition("/")
            if upstream.get(example, {}).get(file) != digest:
                return None, f"上游 {example} 的产物 {file} 变了"
        for name, digest in payload["files"].items():
            if not files.intact(self.root, digest):
                return None, f"产物文件 {name} 丢了或损坏"
        return payload, why

    def explain(self, units: list[Unit]) -> dict[str, tuple[str, str]]:
        """每个单元 ``(会不会重跑, 为什么)``，不执行任何代码。"""
        told: dict[str, tuple[str, str]] = {}
        products: dict[str, dict[str, str]] = {}
        todo = {unit.file: unit for unit in units}
        while todo:
            waiting = {_example_of(u) for u in todo.values()} - {None}
            ready = [u for u in todo.values() if not waiting & set(u.needs)] or list(todo.values())
            for unit in ready:
                del todo[unit.file]
                stale = [need for need in unit.needs if need not in products]
                payload, why = self.recall(unit, products)
                if stale and self.cache.load(unit.file, self.unit_key(unit))[0]:
                    told[unit.file] = "不一定", f"上游 {'、'.join(stale)} 要先重跑，产物变了它才跟着重跑"
                    continue
                if payload and unit.kind == "example":
                    products[_example_of(unit)] = payload["files"]
                told[unit.file] = "不用重跑" if payload else "会重跑", why
        return told

    def check(self, units: list[Unit], progress: Callable[[Outcome], None] = lambda _: None) -> list[Outcome]:
        """执行（或取缓存）并核对；返回顺序与输入一致。

        上游都成功的单元才交出去；上游失败或不存在的不执行，记一条 E603。
        另一个构建正在跑同一个示例时等它的结果，最多等到它的时限，不各跑一遍。
        """
        outcomes: dict[str, Outcome] = {}
        todo = {unit.file: unit for unit in units}
        examples = {_example_of(unit): unit.file for unit in units}
        waiting: dict[Future, _Running] = {}
        done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        queued: list[_Queued] = []  # 要跑的；示例不一股脑交出去，好让后到的、有许多下游的先跑
        patience: dict[str, float] = {}  # 另一个构建正在跑的，等到什么时候为止
        downstream = _downstream(units, examples)
        stored = False
        while todo or waiting or queued:
            for unit in self._ready(todo, examples, outcomes):
                broken = [need for need in unit.needs if need not in examples or outcomes[examples[need]].problems]
                if broken:
                    outcomes[unit.file] = _blocked(unit, f"因上游 {'、'.join(broken)} 没有成功而未执行")
                    progress(outcomes[unit.file])
                    continue
                upstream = {need: outcomes[examples[need]].payload["files"] for need in unit.needs}
                payload, why = self.recall(unit, upstream) if self.use_cache else (None, "没有使用缓存")
                if payload is None and unit.blocks:
                    queued.append(_Queued(unit, upstream, why))
                else:
                    outcomes[unit.file] = self._finish(unit, payload or empty(), True, why, upstream, progress)
            queued.sort(key=lambda item: -downstream[item.unit.file])
            active = sum(item.unit.kind == "example" for item in waiting.values())
            elsewhere = False
            for item in list(queued):
                unit, scratch = item.unit, None
                if unit.kind == "example":
                    if active >= getattr(self.executor, "workers", active + 1):  # 集群自己排队，全交出去
                        continue
                    scratch = files.Scratch(self.root, key([self.unit_key(unit), item.upstream]))
                    if scratch.busy and self.use_cache:
                        if time.monotonic() < patience.setdefault(unit.file, time.monotonic() + _longest(unit)):
                            elsewhere = True
                            continue
                    # 占到之后再看一次：排着队的时候，另一个构建可能已经存好
                    elif self.use_cache and (payload := self.recall(unit, item.upstream)[0]) is not None:
                        scratch.close(False)
                        queued.remove(item)
                        outcomes[unit.file] = self._finish(unit, payload, True, item.why, item.upstream, progress)
                        continue
                    active += 1
                queued.remove(item)
                future, running = self._submit(item, scratch)
                waiting[future] = running
                future.add_done_callback(done.put)
            if any(self._is_ready(unit, examples, outcomes) for unit in todo.values()):
                continue
            if waiting:
                try:
                    future = done.get(timeout=POLL if elsewhere else None)
                except queue.Empty:
                    continue
                running = waiting.pop(future)
                outcomes[running.unit.file], kept = self._receive(future, running, progress)
                stored |= kept
            elif queued:
                time.sleep(POLL)
            else:
                for unit in todo.values():  # 剩下的互相等着
                    outcomes[unit.file] = _blocked(unit, f"needs 成环（{'、'.join(unit.needs)}），未执行")
                    progress(outcomes[unit.file])
                todo.clear()
        if stored:
            files.sweep(self.root, self.cache.directory)
        return [outcomes[unit.file] for unit in units]

    @staticmethod
    def _is_ready(unit: Unit, examples: dict[str | None, str], outcomes: dict[str, Outcome]) -> bool:
        """上游都有了结论吗。"""
        return all(need not in examples or examples[need] in outcomes for need in unit.needs)

    def _ready(
        self, todo: dict[str, Unit], examples: dict[str | None, str], outcomes: dict[str, Outcome]
    ) -> Iterable[Unit]:
        """从 ``todo`` 里逐个取出上游都有了结论的单元；取的途中又有了结论的，跟着取出。"""
        found = True
        while found:
            found = False
            for unit in list(todo.values()):
                if self._is_ready(unit, examples, outcomes):
                    found = True
                    yield todo.pop(unit.file)

    def _submit(self, item: _Queued, scratch: files.Scratch | None) -> tuple[Future, _Running]:
        job = self.job(item.unit, item.upstream) | {"scratch": str(scratch.path) if scratch and scratch.path else None}
        return self.executor.submit(execute_job, job), _Running(**vars(item), scratch=scratch, job=job, key=self.unit_key(item.unit))

    def _receive(
        self, future: Future, running: _Running, progress: Callable[[Outcome], None]
    ) -> tuple[Outcome, bool]:
        """收下一个作业的结果；返回 ``(结论, 有没有存进缓存)``。"""
        unit = running.unit
        try:
            payload = future.result()
        except Exception as error:  # 执行后端没了：OOM 杀掉了 zygote，或集群的 worker 一再丢失
            payload = lost(running.job, 0, "R305", type(error).__name__, str(error).split("\n")[0])
        outcome = self._finish(unit, payload, False, running.why, running.upstream, progress)
        executed = len(payload["blocks"]) == len(unit.blocks)
        # 期望输出与图由 verify 现判，不算执行失败；块自己报的错误除了声明过的都算
        failed = any(p.code not in ("R302", "R307") for p in outcome.problems) or any(
            result["error"] and not block.raises for block, result in zip(unit.blocks, payload["blocks"])
        )
        success = executed and not failed
        if success:
            self.cache.store(unit.file, running.key, payload, payload.pop("deps"), payload.pop("modules"))
        if running.scratch:
            running.scratch.close(success)
        return outcome, success and bool(payload["files"])

    def _finish(
        self,
        unit: Unit,
        payload: dict[str, Any],
        cached: bool,
        why: str,
        upstream: dict[str, dict[str, str]],
        progress: Callable[[Outcome], None],
    ) -> Outcome:
        outcome = Outcome(unit, payload, cached, why, upstream)
        pairs = list(zip(unit.blocks, payload["blocks"], strict=False))
        for block, result in pairs[-1:] if payload.get("truncated") else pairs:
            outcome.problems += verify(block, result, figures_declared=unit.kind == "page")
        progress(outcome)
        return outcome

    def close(self) -> None:
        self.executor.shutdown()


@dataclass
class _Queued:
    """缓存里没有、要执行的一个单元。"""

    unit: Unit
    upstream: dict[str, dict[str, str]]
    why: str


@dataclass
class _Running(_Queued):
    """交出去、还没回来的一个单元。"""

    scratch: files.Scratch | None
    job: dict[str, Any]
    key: str


def _downstream(units: list[Unit], examples: dict[str | None, str]) -> dict[str, int]:
    """每个单元有几个直接与间接的下游。"""
    users: dict[str, list[str]] = {unit.file: [] for unit in units}
    for unit in units:
        for need in unit.needs:
            if need in examples:
                users[examples[need]].append(unit.file)

    def reach(file: str) -> set[str]:
        found: set[str] = set()
        stack = [file]
        while stack:
            new = set(users[stack.pop()]) - found
            found |= new
            stack += new
        return found

    return {unit.file: len(reach(unit.file)) for unit in units}


def _longest(unit: Unit) -> float:
    """一个单元最多跑几秒。"""
    return sum(block.timeout for block in unit.blocks)


def _example_of(unit: Unit) -> str | None:
    return Path(unit.file).stem if unit.kind == "example" else None


def _blocked(unit: Unit, reason: str) -> Outcome:
    return Outcome(unit, empty(), False, reason, problems=[Problem(unit.file, unit.needs_line, "E603", reason)])
