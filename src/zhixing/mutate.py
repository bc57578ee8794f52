"""变异检查：把页面的代码改坏一处，看有没有断言变红。没红的是“幸存者”——那句话没有被证明。

只改“论断依赖的代码”：断言自己、画图、打印、随机种子、超参赋值与文档字符串不动，
因为改坏它们要么必然变红，要么本来就不该影响结论。
"""

from __future__ import annotations

import ast
import builtins
import copy
import hashlib
import io
import json
import random
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from zhixing import practice
from zhixing.blocks import Block
from zhixing.cache import write_atomic
from zhixing.engine import Engine, Unit
from zhixing.execute import execute_job
from zhixing.project import Project

EQUIVALENTS = Path("tests/equivalent-mutants.yml")
_SWAP: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
# 去掉这一步：f(x) -> x，x.f() -> x
_STRIP = {"sqrt", "rsqrt", "exp", "log", "abs", "softmax", "log_softmax", "sigmoid", "relu", "silu", "detach", "clamp",
          "flip", "sort", "sorted", "cumsum", "cumprod", "normalize", "no_grad", "reversed", "set"}  # fmt: skip
_COMMON = {*dir(builtins), "torch", "np", "numpy", "nn", "F", "plt", "math", "random", "ax", "fig", "axes", "t", "i", "k", "_",
           "re", "itertools", "time", "os", "sys"}  # fmt: skip
# 负的轴与下标：-1 改成 1，在只有两维、两个元素时等价，报出来全是噪声；改成一定不同的另一个
_AXIS_NAMES = {"dim", "axis", "dims", "axes", "dim0", "dim1"}
_AXIS_CALLS = {"sum", "mean", "std", "var", "prod", "max", "min", "amax", "amin", "argmax", "argmin", "any", "all", "norm", "size",
               "softmax", "log_softmax", "logsumexp", "cumsum", "cumprod", "sort", "argsort", "topk", "median", "squeeze", "unsqueeze",
               "flatten", "transpose", "swapaxes", "cat", "stack", "concatenate", "chunk", "split", "gather", "normalize", "flip",
               "expand_dims", "diff", "take_along_axis", "unbind", "roll", "movedim"}  # fmt: skip
_PLOTTING = {"plt", "ax", "axes", "fig", "axs", "left", "right", "zhixing"}
_IGNORED_CALLS = {"manual_seed", "seed", "default_rng", "Generator", "print", "set_num_threads", "figure", "metric"}


@dataclass(frozen=True)
class Mutant:
    """一处改动。``block`` 是它在单元里的序号；``module`` 非空时改的是被 import 的本地模块。"""

    file: str
    line: int
    what: str
    source: str
    block: int = 0
    module: str = ""


def mutants_of(source: str) -> Iterator[tuple[int, str, str]]:
    """逐个给出 ``(行号, 说明, 改坏后的代码)``；行号从 1 数起。"""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    targets = list(_targets(tree))
    for index in range(len(targets)):
        fresh = copy.deepcopy(tree)
        node, parent, kind = list(_targets(fresh))[index]
        line = node.lineno
        before = ast.unparse(node)
        replacement = _apply(node, parent, kind)
        after = ast.unparse(replacement) if replacement is not None else "（删掉）"
        yield line, f"{_short(before)} → {_short(after)}", ast.unparse(ast.fix_missing_locations(fresh))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 48 else text[:47] + "…"


def _targets(tree: ast.AST) -> Iterator[tuple[Any, Any, str]]:
    """可以改坏的 ``(节点, 父节点, 种类)``；顺序确定。"""
    stack: list[tuple[ast.AST, ast.AST]] = [(tree, tree)]
    while stack:
        node, parent = stack.pop()
        if _untouchable(node):
            continue
        if isinstance(node, ast.BinOp) and type(node.op) in _SWAP and not _is_text(node):
            yield node, parent, "op"
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAP:
            yield node, parent, "op"
        elif isinstance(node, ast.BoolOp):
            yield node, parent, "op"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
            yield node, parent, _negative(node, parent)
        elif isinstance(node, ast.Constant) and _is_number(node.value) and isinstance(
            parent, (ast.BinOp, ast.Compare, ast.Subscript, ast.Slice)
        ):
            yield node, parent, "constant"
        elif isinstance(node, ast.AugAssign) and type(node.op) in _SWAP:
            yield node, parent, "op"
        if isinstance(node, ast.Call) and _called(node) in _STRIP and (
            node.args or isinstance(node.func, ast.Attribute)
        ):
            yield node, parent, "strip"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, parent, "delete"
        children = list(ast.iter_child_nodes(node))
        stack += [(child, node) for child in reversed(children)]


def _negative(node: ast.UnaryOp, parent: ast.AST) -> str:
    """一元运算怎么改：负的轴 ``axis``，负的下标 ``index``，其余去掉运算符。"""
    if not isinstance(node.op, ast.USub) or not isinstance(node.operand, ast.Constant) or type(node.operand.value) is not int:
        return "unary"
    if isinstance(parent, ast.keyword) and parent.arg in _AXIS_NAMES:
        return "axis"
    if isinstance(parent, ast.Call) and _called(parent) in _AXIS_CALLS and node in parent.args:
        return "axis"
    return "index" if isinstance(parent, (ast.Subscript, ast.Slice, ast.Tuple)) else "unary"


def _untouchable(node: ast.AST) -> bool:
    if isinstance(node, (ast.Assert, ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.arguments)):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # 文档字符串
    if isinstance(node, (ast.Expr, ast.Assign)):
        value = node.value
        if isinstance(value, ast.Call) and (
            _root(value.func) in _PLOTTING or _called(value) in _IGNORED_CALLS or _called(value).startswith("assert")
        ):
            return True
    if isinstance(node, ast.Call) and _called(node).startswith("assert"):
        return True  # torch.testing.assert_close 之类也是断言
    return isinstance(node, ast.Call) and _called(node) in _IGNORED_CALLS


def _called(node: ast.Call) -> str:
    func = node.func
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def _root(node: ast.AST) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(side, (ast.JoinedStr, ast.Constant)) and isinstance(getattr(side, "value", ""), str)
               for side in (node.left, node.right))  # fmt: skip


def _apply(node: Any, parent: Any, kind: str) -> ast.AST | None:
    if kind == "op":
        if isinstance(node, ast.Compare):
            node.ops[0] = _SWAP[type(node.ops[0])]()
        else:
            node.op = _SWAP[type(node.op)]()
        return node
    if kind == "constant":
        node.value = node.value + 1
        return node
    if kind == "unary":
        return _replace(parent, node, node.operand)
    if kind == "axis":
        return _replace(parent, node, ast.Constant(0))
    if kind == "index":
        node.operand.value += 1
        return node
    if kind == "strip":
        inner = node.args[0] if node.args and not (
            isinstance(node.func, ast.Attribute) and _root(node.func) not in ("math", "np", "torch", "F", "nn")
        ) else node.func.value
        return _replace(parent, node, inner)
    _replace(parent, node, ast.Pass())
    return None


def _replace(parent: ast.AST, old: ast.AST, new: ast.AST) -> ast.AST:
    for name, value in ast.iter_fields(parent):
        if value is old:
            setattr(parent, name, new)
        elif isinstance(value, list) and old in value:
            value[value.index(old)] = new
    return ast.copy_location(new, old)


# ---- 对一页做变异检查 ----


@dataclass
class Verdict:
    """一页的结果。"""

    file: str
    total: int
    survivors: list[Mutant]
    equivalent: int
    fingerprint: str

    @property
    def rate(self) -> float:
        return 1.0 if not self.total else 1 - len(self.survivors) / self.total


def collect(unit: Unit, root: Path, modules: bool = True) -> list[Mutant]:
    """一页的全部变异：页内 Python 块，以及页面 import 的本地模块里没有被引入展示的部分。"""
    found: list[Mutant] = []
    shown: set[tuple[str, int]] = set()
    imported: set[str] = set()
    for k, block in enumerate(unit.blocks):
        if block.lang != "python" or block.raises or block.practice:
            continue  # 起始代码本来就是红的；测试强不强，看它能不能发现改坏的参考解
        file, first = block.code_start
        if block.origin:
            shown |= {(file, first + i) for i in range(block.source.count("\n") + 1)}
        for line, what, source in mutants_of(block.source):
            found.append(Mutant(file, first + line - 1, what, source, k))
        imported |= _local_imports(block.source, root)
    found += _practice_mutants(unit)
    for module in sorted(imported) if modules else []:
        source = (root / module).read_text("utf-8")
        for line, what, mutated in mutants_of(source):
            if (module, line) not in shown:
                found.append(Mutant(module, line, what, mutated, 0, module))
    return found


def _practice_mutants(unit: Unit) -> Iterator[Mutant]:
    """改坏练习的参考解（连同它用到的本页函数），只让练习的测试来发现。"""
    defined: dict[str, tuple[Block, ast.FunctionDef | ast.ClassDef]] = {}
    for k, block in enumerate(unit.blocks):
        if block.practice == practice.TESTS:
            stack, seen = [block.solution], set()
            while stack:
                name = stack.pop()
                if name in seen or name not in defined:
                    continue
                seen.add(name)
                home, node = defined[name]
                stack += [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
                above = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
                own = "\n".join(home.source.split("\n")[above : node.end_lineno])
                file, first = home.code_start
                for line, what, source in mutants_of(own):
                    yield Mutant(file, first + above + line - 1, f"{what}（只用练习的测试）", source, k)
        elif block.lang == "python" and not block.raises and not block.practice:
            for node in ast.parse(block.source).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    defined[node.name] = block, node


def affected(unit: Unit, k: int) -> list[int]:
    """改了第 ``k`` 块之后值得重跑的块：它自己，以及（传递地）用到它碰过的名字的块。

    名字按词法看，宁多勿少；bash 等块可能读到它写的文件，也算。
    """
    if unit.blocks[k].practice:
        return [k]
    result, tainted = [k], _names(unit.blocks[k].source)
    for i in range(k + 1, len(unit.blocks)):
        block = unit.blocks[i]
        names = _names(block.source) if block.lang in ("python", "pycon") else set()
        if block.practice:  # 与本页隔离，只看得到参考解
            names = {block.solution} - {""}
        if block.lang not in ("python", "pycon") or names & tainted:
            result.append(i)
            tainted |= names
    return result


def _names(source: str) -> set[str]:
    """代码里出现的变量名；import 进来的模块与内建名字除外。"""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # pycon：连同提示符一起按词切
        return set(re.findall(r"[A-Za-z_]\w*", source))
    found = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    found |= {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    return found - _COMMON


def _local_imports(source: str, root: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        for name in names:
            path = root / "examples" / (name.replace(".", "/") + ".py")
            if path.is_file():
                found.add(path.relative_to(root).as_posix())
    return found


def load_equivalents(root: Path) -> dict[tuple[str, str, str], str]:
    """登记过的等价变异：``(文件, 所在行的代码, 改动说明) -> 理由``。

    Raises:
        ValueError: 不是合法的 YAML，或某条缺字段、没写理由、重复。
    """
    path = root / EQUIVALENTS
    if not path.is_file():
        return {}
    try:
        items = yaml.safe_load(path.read_text("utf-8")) or []
    except yaml.YAMLError as error:
        raise ValueError(f"{EQUIVALENTS} 不是合法的 YAML：{error}") from None
    table = {}
    for item in items if isinstance(items, list) else [items]:
        fields = ("file", "code", "change", "reason")
        if not isinstance(item, dict) or set(item) != {*fields} or not all(isinstance(v, str) and v.strip() for v in item.values()):
            raise ValueError(f"{EQUIVALENTS}：每条应有文字 {'、'.join(fields)}，得到 {item!r}")
        key = (item["file"], item["code"].strip(), item["change"].strip())
        if key in table:
            raise ValueError(f"{EQUIVALENTS}：重复登记 {key}")
        table[key] = item["reason"]
    return table


def unused_equivalents(project: Project) -> list[tuple[str, str, str]]:
    """这些页面与它们 import 的模块里，登记了、却没有生成这个变异的（代码改过，或写错了）。"""
    registered = load_equivalents(project.root)
    units = {unit.file: unit for unit in project.units() if unit.kind == "page"}
    modules = {m for unit in units.values() for m in _modules(unit, project.root)}
    unused = []
    for file, code, change in registered:
        if file in units:
            made = collect(units[file], project.root, modules=False)
        elif file in modules:
            source = (project.root / file).read_text("utf-8")
            made = [Mutant(file, line, what, "") for line, what, _ in mutants_of(source)]
        elif (project.root / file).is_file():
            continue  # 这次没有查到它
        else:
            made = []
        known = {(m.file, m.what) for m in made if m.file == file and _code_at(project.root, m) == code}
        if (file, change) not in known:
            unused.append((file, code, change))
    return unused


def _modules(unit: Unit, root: Path) -> set[str]:
    """页面的 Python 块（传递地）import 的本地模块。"""
    found: set[str] = set()
    stack = [b.source for b in unit.blocks if b.lang == "python"]
    while stack:
        try:
            fresh = _local_imports(stack.pop(), root) - found
        except SyntaxError:
            continue
        found |= fresh
        stack += [(root / module).read_text("utf-8") for module in fresh]
    return found


def _code_at(root: Path, mutant: Mutant) -> str:
    return (root / mutant.file).read_text("utf-8").split("\n")[mutant.line - 1].strip()


def _registered(mutant: Mutant, equivalents: dict[tuple[str, str, str], str], root: Path) -> bool:
    return (mutant.file, _code_at(root, mutant), mutant.what) in equivalents


def run(
    project: Project,
    engine: Engine,
    *,
    sample: int | None,
    seed: int = 0,
    progress: Callable[[Verdict], None] = lambda _: None,
) -> list[Verdict]:
    """对每一页做变异检查。

    同一页的变异共用前缀：页进程跑到第 k 块之前，为第 k 块的每个变异 fork 一份现场，
    在里面跑改坏的块与其后各块，第一处变红就停。

    Args:
        sample: 每页最多抽多少个变异；None 为全部。
        progress: 每一页查完时调用。
    """
    equivalents = load_equivalents(project.root)
    futures = {}
    verdicts = []
    for scan in project.scans.values():
        outcome = project.outcomes[scan.file]
        unit = outcome.unit
        chosen = collect(unit, project.root)
        skipped = [m for m in chosen if _registered(m, equivalents, project.root)]
        chosen = [m for m in chosen if m not in skipped]
        if sample is not None and len(chosen) > sample:
            chosen = random.Random(seed).sample(chosen, sample)
        if not chosen:
            continue
        job = engine.job(unit, outcome.upstream)
        if outcome.problems:
            raise RuntimeError(f"{scan.file} 本来就没通过，先修好再做变异检查")
        for described, block, result in zip(job["blocks"], unit.blocks, outcome.payload["blocks"], strict=True):
            described |= {"declared": _declared(block), "seconds": result["seconds"]}
        by_module: dict[str, list[Mutant]] = {}
        for mutant in chosen:
            by_module.setdefault(mutant.module, []).append(mutant)
        for module, group in by_module.items():
            everything = list(range(len(unit.blocks)))
            job_group = job | {
                "parallel": engine.workers,
                "mutants": [
                    {
                        "block": m.block,
                        "source": m.source,
                        "module": m.module,
                        "line": m.line,
                        "affects": everything if m.module else affected(unit, m.block),
                    }
                    for m in group
                ],
            }
            futures[engine.executor.submit(execute_job, job_group)] = (scan.file, group, len(skipped) if not module else 0)
    left = Counter(file for file, *_ in futures.values())
    survivors: dict[str, list[Mutant]] = {}
    totals: dict[str, int] = {}
    equal: dict[str, int] = {}
    for future in as_completed(futures):
        file, group, skipped = futures[future]
        payload = future.result()
        if "survived" not in payload:
            raise RuntimeError(f"{file} 的变异检查没有跑完：{payload['blocks'][-1]['error']}")
        survivors.setdefault(file, []).extend(group[i] for i in payload["survived"])
        totals[file] = totals.get(file, 0) + len(group) - len(payload["idle"])
        equal[file] = equal.get(file, 0) + skipped
        left[file] -= 1
        if not left[file]:  # 这一页的几组都查完了
            order = sorted(survivors[file], key=lambda m: (m.file, m.line))
            verdicts.append(Verdict(file, totals[file], order, equal[file], fingerprint(project, file)))
            progress(verdicts[-1])
    return sorted(verdicts, key=lambda verdict: verdict.file)


RECORD = Path("tests/mutation.json")


def fingerprint(project: Project, file: str) -> str:
    """页面的代码、声明与它（传递地）import 的本地模块的指纹：变了，记录就过期了；模块的注释与文档串不算。"""
    unit = Unit(file, [b for b in project.scans[file].blocks if b.runs])
    blocks = [[b.lang, b.source, b.solution, _declared(b)] for b in unit.blocks]
    modules = {m: _bare((project.root / m).read_text("utf-8")) for m in _modules(unit, project.root)}
    return hashlib.sha256(json.dumps([blocks, modules], sort_keys=True).encode()).hexdigest()[:16]


@lru_cache(maxsize=None)
def _bare(source: str) -> str:
    """去掉注释、文档串与空行的代码。"""
    lines = source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def record(project: Project, verdicts: list[Verdict]) -> None:
    """把结果并进 ``tests/mutation.json``，验证报告页从这里读。"""
    table = recorded(project.root)
    for verdict in verdicts:
        table[verdict.file] = {
            "fingerprint": verdict.fingerprint,
            "total": verdict.total,
            "survived": [f"{m.file}: {m.what}" for m in verdict.survivors],
            "equivalent": verdict.equivalent,
        }
    text = json.dumps(dict(sorted(table.items())), ensure_ascii=False, indent=1)
    write_atomic(project.root / RECORD, text + "\n")


def recorded(root: Path) -> dict[str, dict[str, Any]]:
    """已登记的变异检查结果。"""
    path = root / RECORD
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _declared(block: Any) -> dict[str, Any]:
    return {
        "raises": block.raises,
        "fig": block.fig,
        "expected": block.expected.text if block.expected else None,
        "tol": block.expected.tol if block.expected else None,
    }
