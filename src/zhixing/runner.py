"""在 fork 出来的子进程里执行一页（或一个示例）的代码块。

这里只产生事实：每块的输出、异常、图、耗时，以及读过哪些项目文件。
对不对由父进程里的 :mod:`zhixing.verify` 判断。
"""

from __future__ import annotations

import ast
import ctypes
import doctest
import faulthandler
import io
import json
import linecache
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from typing import Any

from zhixing import checkpoint, sandbox

MAX_OUTPUT = 256 << 10
_HERE = os.path.dirname(os.path.abspath(__file__))


class BlockTimeout(BaseException):
    """代码块超时；继承 BaseException 以免被用户的 ``except Exception`` 吞掉。"""


class Failure(Exception):
    """非 Python 代码块的失败：已经知道文件与行。"""

    def __init__(self, kind: str, message: str, file: str, line: int) -> None:
        super().__init__(message)
        self.kind, self.file, self.line = kind, file, line


def run(job: dict[str, Any], progress: int, output: int, result: int) -> None:
    """执行 ``job`` 并把结果写进 ``result``；不返回。

    Args:
        job: 见 :func:`zhixing.execute.make_job`。
        progress: 每块开始时写一行 ``块序号 截止时刻``，死掉时父进程据此给出行号。
        output: 截获标准输出与标准错误的文件。
        result: 写结果 JSON 的文件。
    """
    os.setsid()
    sys.stdin = open(os.devnull)
    os.dup2(sys.stdin.fileno(), 0)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, io.TextIOWrapper(os.fdopen(fd, "wb", 0, closefd=False), "utf-8", write_through=True))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    faulthandler.enable(file=sys.stderr)
    page = _Page()
    page.attach(job, progress, output, result)
    isolation = sandbox.enter(job["root"])
    page.begin()
    if "mutants" in job:
        payload = page.hunt()
    else:
        page.execute()
        payload = {
            "blocks": page.results,
            "deps": page.dependencies(),
            "figures": page.recorded.figures,
            "metrics": page.recorded.metrics,
            "isolation": isolation,
            "resumed": page.resumed,
        }
    with os.fdopen(page.result, "w", encoding="utf-8") as f:
        json.dump(payload, f, ensure_ascii=False)
    # 不走解释器的正常退出：torch 的收尾要 0.3–0.7 秒，而结果已经写好
    os._exit(0)


class _Page:
    def __init__(self) -> None:
        from zhixing.artifacts import recorded

        self.recorded = recorded
        self.results: list[dict[str, Any]] = []
        self.opened: set[str] = set()
        self.before = set(sys.modules)
        self.resumed = 0

    def attach(self, job: dict[str, Any], progress: int, output: int, result: int) -> None:
        """接上一个作业的文件与工作目录（从检查点继续时再接一次）。"""
        self.job, self.progress, self.output, self.result = job, progress, output, result
        self.root = os.path.join(job["root"], "")
        self.read_from = 0
        _die_with_parent()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(job["cwd"])
        os.environ.update(HOME=job["cwd"], TMPDIR=job["cwd"], PWD=job["cwd"])

    def begin(self) -> None:
        module = types.ModuleType("__main__")
        module.__file__ = self.job["file"]
        sys.modules["__main__"] = module
        self.globals = module.__dict__
        _seed()
        self._line_cache()
        sys.addaudithook(self._on_audit)
        signal.signal(signal.SIGALRM, self._on_alarm)

    def _on_audit(self, event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str) and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            path = os.path.abspath(args[0])
            if path.startswith(self.root):
                self.opened.add(path)

    def _line_cache(self) -> None:
        """放一张“遮罩页”：只有代码、去了缩进、在它真正的行上——回溯的行号、插入符与 inspect 都对。"""
        masks: dict[str, list[str]] = {}
        for block in self.job["blocks"]:
            lines = masks.setdefault(block["file"], [])
            source = block["source"].split("\n")
            lines.extend(["\n"] * (block["line"] - 1 + len(source) - len(lines)))
            for i, text in enumerate(source):
                lines[block["line"] - 1 + i] = text + "\n"
        for file, lines in masks.items():
            linecache.cache[file] = (sum(map(len, lines)), None, lines, file)

    def execute(self) -> None:
        k, since = 0, 0.0
        while k < len(self.job["blocks"]):
            if since >= checkpoint.WORTH and self.job.get("checkpoints") and not os.listdir():
                since = 0.0
                woken = checkpoint.leave(self.job["spool"], k, self)
                if woken:
                    self.attach(*woken)
                    self._line_cache()
                    self.resumed = k
            block = self.job["blocks"][k]
            entry = self._run_block(k, block)
            self.results.append(entry)
            since += entry["seconds"]
            error = entry["error"]
            if error and not (block["raises"] and error["code"] in ("R301", "R306")):
                return
            k += 1

    def _run_block(self, k: int, block: dict[str, Any]) -> dict[str, Any]:
        """执行一块，返回 ``out error seconds figs``。"""
        handlers = {"python": self._python, "bash": self._bash, "console": self._console, "pycon": self._pycon}
        deadline = time.monotonic() + block["timeout"]
        os.write(self.progress, f"{k} {deadline}\n".encode())
        self.current = block
        error = None
        start = time.perf_counter()
        try:
            sandbox.limit_memory(block["memory"])
            signal.setitimer(signal.ITIMER_REAL, block["timeout"])
            # C 里的死循环收不到 SIGALRM：由看门狗线程打印位置后结束进程
            faulthandler.dump_traceback_later(block["timeout"] + 1, exit=True, file=sys.stderr)
            handlers[block["lang"]](block)
        except BaseException as exception:
            if not (isinstance(exception, SystemExit) and exception.code in (None, 0)):
                error = self._describe(exception, block)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
        seconds = time.perf_counter() - start
        text, overflow = self._take_output()
        entry = {"out": text, "error": error, "seconds": round(seconds, 4), "figs": []}
        if overflow and not error:
            message = f"输出超过 {MAX_OUTPUT >> 10} KiB"
            entry["error"] = self._error("R308", "OutputTooLarge", message, *self._start(block))
        if not entry["error"]:
            try:
                entry["figs"] = self._take_figures()
            except Exception as exception:
                entry["error"] = self._describe(exception, block)
        return entry

    # ---- 变异检查 ----

    def hunt(self) -> dict[str, list[int]]:
        """返回没有被发现的变异（``survived``）与所在行根本没执行到的变异（``idle``）的序号。

        跑到第 k 块之前，为第 k 块的每个变异 fork 一份现场；改被 import 的模块的变异从头跑。
        """
        blocks, mutants = self.job["blocks"], self.job["mutants"]
        total = sum(b["seconds"] for b in blocks)
        # 监督者按最后一行的截止时刻收人：整页的变异一起算
        os.write(self.progress, f"0 {time.monotonic() + 60 + len(mutants) * (30 + 6 * total)}\n".encode())
        self.progress = os.open(os.devnull, os.O_WRONLY)
        idle = self._idle(mutants)
        survived = []
        for k, block in enumerate(blocks):
            here = [i for i, mutant in enumerate(mutants) if mutant["block"] == k and i not in idle]
            survived += self._survivors(here)
            if all(m["block"] <= k for m in mutants):
                break
            self._run_block(k, block)
        return {"survived": survived, "idle": sorted(idle)}

    def _idle(self, mutants: list[dict[str, Any]]) -> set[int]:
        """改在模块里、而这一页执行不到的行上的变异。"""
        files = {os.path.join(self.root, m["module"]): m["module"] for m in mutants if m["module"]}
        if not files:
            return set()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            lines: set[tuple[str, int]] = set()

            def trace(frame: types.FrameType, event: str, _: object):
                module = files.get(frame.f_code.co_filename)
                if module is None:
                    return None
                lines.add((module, frame.f_lineno))
                return trace

            try:
                self._private_output()
                sys.settrace(trace)
                for k, block in enumerate(self.job["blocks"]):
                    self._run_block(k, block | {"timeout": 10 * _patience(block)})
                sys.settrace(None)
                with os.fdopen(write, "w") as f:
                    json.dump(sorted(lines), f)
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read) as f:
            text = f.read()
        os.waitpid(pid, 0)
        ran = {tuple(item) for item in json.loads(text)}
        return {i for i, m in enumerate(mutants) if m["module"] and (m["module"], m["line"]) not in ran}

    def _survivors(self, chosen: list[int]) -> list[int]:
        """并行地试这些变异，返回没有变红的。"""
        waiting, survived = list(chosen), []
        running: dict[int, tuple[int, float]] = {}
        while waiting or running:
            while waiting and len(running) < self.job["parallel"]:
                i = waiting.pop(0)
                mutant = self.job["mutants"][i]
                pid = os.fork()
                if pid == 0:
                    try:
                        os._exit(1 if self._goes_red(mutant) else 0)
                    except BaseException:
                        os._exit(1)
                patience = sum(_patience(self.job["blocks"][k]) + 2 for k in mutant["affects"])
                running[pid] = (i, time.monotonic() + patience)
            for pid, (i, deadline) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if not done and time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                    done, status = os.waitpid(pid, 0)
                if done:
                    del running[pid]
                    if status == 0:
                        survived.append(i)
            time.sleep(0.002)
        return survived

    def _private_output(self) -> None:
        self.output = os.memfd_create("mutant") if hasattr(os, "memfd_create") else os.open(
            tempfile.mktemp(), os.O_RDWR | os.O_CREAT
        )
        self.read_from = 0
        os.dup2(self.output, 1)
        os.dup2(self.output, 2)

    def _goes_red(self, mutant: dict[str, Any]) -> bool:
        from zhixing.blocks import Block, Expected
        from zhixing.verify import verify

        _die_with_parent()
        self._private_output()
        if mutant["module"]:
            _overlay(os.path.join(self.job["root"], mutant["module"]), mutant["source"])
        for i in mutant["affects"]:
            block = self.job["blocks"][i]
            if i == mutant["block"] and not mutant["module"]:
                block = block | {"source": mutant["source"]}
            entry = self._run_block(i, block | {"timeout": _patience(block)})
            declared = block["declared"]
            expected = declared["expected"]
            claim = Block(
                file=block["file"], line=block["line"], end=0, lang=block["lang"], source="",
                raises=declared["raises"], fig=declared["fig"],
                expected=None if expected is None else Expected(expected, 0, 0, "", declared["tol"]),
            )  # fmt: skip
            if verify(claim, entry):
                return True
        return False

    def _on_alarm(self, *_: object) -> None:
        raise BlockTimeout(f"超过 {self.current['timeout']:g} 秒")

    # ---- 四种语言 ----

    def _python(self, block: dict[str, Any]) -> None:
        file, line = self._start(block)
        tree = ast.parse("\n" * (line - 1) + block["source"], file)
        tail = None
        if block.get("echo") and tree.body and isinstance(tree.body[-1], ast.Expr):
            tail = ast.Expression(tree.body.pop().value)
        exec(compile(tree, file, "exec", dont_inherit=True), self.globals)
        if tail is not None:  # 示例的单元格像 notebook 一样显示最后一个表达式
            value = eval(compile(tail, file, "eval", dont_inherit=True), self.globals)
            if value is not None:
                print(repr(value))

    def _bash(self, block: dict[str, Any]) -> None:
        file, line = self._start(block)
        # 前缀占一行，行号加回来；ERR 陷阱报告出错的那一行
        script = "set -Eeuo pipefail; trap 'printf \"%s\" \"$LINENO\" >&@ERR@' ERR\n" + block["source"] + "\n"
        code, where = self._shell(script)
        if code:
            at = int(where) - 1 if where.isdigit() else 1
            raise Failure("exit " + str(code), f"退出码 {code}", file, line + max(at, 1) - 1)

    def _console(self, block: dict[str, Any]) -> None:
        file, line = self._start(block)
        commands = parse_console(block["source"])
        if not commands:
            raise Failure("Console", "没有以 $ 开头的命令", file, line)
        marker = "\x1e"
        script = "".join(f"{c}\nprintf '%s%d\\n' $'\\x1e' $?\n" for _, c, _ in commands)
        code, _ = self._shell("set -uo pipefail\n" + script)
        text, _ = self._take_output()
        parts = text.split(marker)
        for i, (at, command, expected) in enumerate(commands):
            if i + 1 >= len(parts):
                raise Failure("Console", f"{command!r} 让 shell 提前结束（退出码 {code}）\n{parts[-1]}", file, line + at)
            got = parts[i] if i == 0 else parts[i].partition("\n")[2]
            status = int(parts[i + 1].partition("\n")[0])
            if not outputs_match(expected, got):
                raise Failure("Mismatch", f"{command!r} 的输出与期望不符\n期望：\n{expected}\n实际：\n{got}", file, line + at)
            if status and not expected.strip():
                raise Failure("Console", f"{command!r} 退出码 {status}", file, line + at)

    def _shell(self, script: str) -> tuple[int, str]:
        """执行脚本，返回 ``(退出码, ERR 陷阱写到 @ERR@ 的行号)``。"""
        read, write = os.pipe()
        # 匿名文件：代码块里的 find、ls 看不到脚本自己
        with tempfile.TemporaryFile() as source:
            source.write(script.replace("@ERR@", str(write)).encode())
            source.seek(0)
            process = subprocess.Popen(
                ["bash", "--noprofile", "--norc", f"/dev/fd/{source.fileno()}"],
                cwd=self.job["cwd"],
                pass_fds=(source.fileno(), write),
            )
        os.close(write)
        try:
            process.wait()
            where = os.read(read, 64).decode() if process.returncode else ""
        except BlockTimeout:
            process.kill()
            raise
        finally:
            os.close(read)
        return process.returncode, where

    def _pycon(self, block: dict[str, Any]) -> None:
        file, line = self._start(block)
        examples = doctest.DocTestParser().get_examples(block["source"])
        if not examples:
            raise Failure("Pycon", "没有 >>> 开头的语句", file, line)
        test = doctest.DocTest(examples, {}, file, file, line - 1, block["source"])
        test.globs = self.globals  # 与本页的 python 块共享变量
        failures: list[tuple[int, str]] = []
        checker = doctest.OutputChecker()
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

        class Runner(doctest.DocTestRunner):
            def report_failure(self, out, test, example, got):
                failures.append((example.lineno, checker.output_difference(example, got, flags)))

            def report_unexpected_exception(self, out, test, example, exc_info):
                if issubclass(exc_info[0], BlockTimeout):
                    raise exc_info[1]
                failures.append((example.lineno, "".join(traceback.format_exception_only(*exc_info[:2]))))

        Runner(checker, verbose=False, optionflags=flags).run(test, out=lambda _: None, clear_globs=False)
        if failures:
            at, message = failures[0]
            raise Failure("Mismatch", message, file, line + at)

    # ---- 结果 ----

    @staticmethod
    def _start(block: dict[str, Any]) -> tuple[str, int]:
        return block["file"], block["line"]

    @staticmethod
    def _error(code: str, kind: str, message: str, file: str, line: int, detail: str = "") -> dict[str, Any]:
        return {"code": code, "type": kind, "message": message, "file": file, "line": line, "detail": detail}

    def _describe(self, exception: BaseException, block: dict[str, Any]) -> dict[str, Any]:
        if isinstance(exception, Failure):
            code = {"Mismatch": "R302"}.get(exception.kind, "R301")
            head, _, rest = str(exception).partition("\n")
            return self._error(code, exception.kind, head, exception.file, exception.line, rest)
        trace = traceback.TracebackException.from_exception(exception)
        for part in _chain(trace):
            part.stack = traceback.StackSummary.from_list(
                [f for f in part.stack if not f.filename.startswith(_HERE)]
            )
        own = {b["file"] for b in self.job["blocks"]}
        # 指到最靠近抛出点的、属于本页或项目里的那一行
        file, line = self._start(block)
        if isinstance(exception, SyntaxError) and exception.filename in own:
            line = exception.lineno or line
        else:
            line = next((f.lineno for f in reversed(trace.stack) if f.filename in own), line)
            file = next((f.filename for f in reversed(trace.stack) if f.filename in own), file)
        detail = "".join(trace.format()).replace(self.root, "")
        text = str(exception)
        code = "R301"
        if isinstance(exception, BlockTimeout):
            code = "R304"
        elif isinstance(exception, MemoryError) or "can't allocate memory" in text:
            code = "R306"
        elif isinstance(exception, OSError) and exception.errno == 27:  # EFBIG：输出或文件超过上限
            code = "R308"
        name = type(exception).__qualname__
        module = type(exception).__module__
        full = name if module in ("builtins", "__main__", __name__) else f"{module}.{name}"
        return self._error(code, full, text.split("\n")[0], file, line, detail) | {
            "mro": [c.__name__ for c in type(exception).__mro__],
            "text": text,
        }

    def _take_output(self) -> tuple[str, bool]:
        sys.stdout.flush()
        sys.stderr.flush()
        ctypes.CDLL(None).fflush(None)
        end = os.fstat(self.output).st_size
        size = min(end - self.read_from, MAX_OUTPUT)
        data = os.pread(self.output, size, self.read_from)
        overflow = end - self.read_from > MAX_OUTPUT
        self.read_from = end
        return re.sub(r"\x1b\[[0-9;]*m", "", data.decode("utf-8", "replace")), overflow

    def _take_figures(self) -> list[str]:
        if "matplotlib.pyplot" not in sys.modules:
            return []
        from zhixing.figures import to_svg

        plt = sys.modules["matplotlib.pyplot"]
        figures = [to_svg(plt.figure(number)) for number in plt.get_fignums()]
        plt.close("all")
        return figures

    def dependencies(self) -> list[str]:
        """读过的项目文件：被 import 的本地模块与打开过的文件，相对项目根目录。"""
        found = set(self.opened)
        for name in set(sys.modules) - self.before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and os.path.abspath(file).startswith(self.root):
                found.add(os.path.abspath(file))
        relative = (os.path.relpath(path, self.root) for path in found)
        own = {self.job["file"]}
        return sorted(
            p for p in relative if p not in own and not p.startswith((".", "node_modules/")) and not p.endswith(".pyc")
        )


def _chain(trace: traceback.TracebackException):
    seen = set()
    stack = [trace]
    while stack:
        part = stack.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        stack += [part.__cause__, part.__context__]


def _die_with_parent() -> None:
    """父进程一死就跟着死（Linux）：构建被 SIGKILL 时不留下还在跑的页。"""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def _patience(block: dict[str, Any]) -> float:
    """改坏之后最多等多久：平时的五倍，至少两秒。"""
    return max(2.0, 5 * block["seconds"])


def _overlay(path: str, source: str) -> None:
    """此后 import ``path`` 时读到的是 ``source``，磁盘上的文件不动。"""
    from importlib.machinery import SourceFileLoader

    original = SourceFileLoader.get_data

    def get_data(self: SourceFileLoader, name: str) -> bytes:
        if os.path.abspath(name) == path:
            return source.encode()
        if name.endswith(".pyc") and os.path.abspath(self.path) == path:
            raise OSError("字节码缓存对应的是没改过的源文件")
        return original(self, name)

    SourceFileLoader.get_data = get_data


def _seed() -> None:
    import random

    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_num_threads(1)
        torch.manual_seed(0)


def parse_console(source: str) -> list[tuple[int, str, str]]:
    """把 ``$ 命令`` 与输出拆开，返回 ``(行偏移, 命令, 期望输出)``；``> `` 是续行。"""
    commands: list[tuple[int, list[str], list[str]]] = []
    for i, line in enumerate(source.split("\n")):
        if line.startswith("$ "):
            commands.append((i, [line[2:]], []))
        elif commands and line.startswith("> ") and not commands[-1][2]:
            commands[-1][1].append(line[2:])
        elif commands:
            commands[-1][2].append(line)
    return [(i, "\n".join(cmd), "\n".join(out)) for i, cmd, out in commands]


_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def outputs_match(expected: str, got: str, tol: float | None = None) -> bool:
    """逐行比较（忽略行尾空白与首尾空行）。

    ``...`` 匹配任意内容；给了 ``tol`` 时，两边的数字相差在 ``tol`` 之内（绝对或相对）即算相同。
    """
    want, have = (
        "\n".join(line.rstrip() for line in text.strip("\n").split("\n")).strip("\n") for text in (expected, got)
    )
    if want == have:
        return True
    if tol is None:
        return "..." in want and _ellipsis(want).fullmatch(have) is not None
    numbers = [float(n) for n in _NUMBER.findall(want)]
    pattern = _ellipsis(_NUMBER.sub("\x00", want)).pattern.replace("\x00", f"({_NUMBER.pattern})")
    match = re.fullmatch(pattern, have, re.S)
    if not match:
        return False
    return all(
        abs(a - float(b)) <= tol * max(1.0, abs(a)) for a, b in zip(numbers, match.groups(), strict=True)
    )


def _ellipsis(text: str) -> re.Pattern[str]:
    return re.compile(".*?".join(re.escape(part) for part in text.split("...")), re.S)
