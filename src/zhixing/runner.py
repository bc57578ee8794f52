"""在 fork 出来的子进程里执行一页（或一个示例）的代码块。

这里只产生事实：每块的输出、异常、图、耗时，以及读过哪些项目文件。
对不对由父进程里的 :mod:`zhixing.verify` 判断。
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import faulthandler
import importlib.util
import io
import json
import linecache
import mmap
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any

from zhixing import artifacts, checkpoint, judge, practice, sandbox
from zhixing.cache import file_hash, stamp

MAX_OUTPUT = 256 << 10
MAX_MESSAGE = 10_000
# 起子进程的审计事件：子进程读了哪些文件看不见
_SPAWNS = frozenset({"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"})
_HERE = os.path.dirname(os.path.abspath(__file__))


class BlockTimeout(BaseException):
    """代码块超时；继承 BaseException 以免被用户的 ``except Exception`` 吞掉。"""


_FAILURES = {"Mismatch": "R302", "OutputTooLarge": "R308", "UnknownSolution": "P702", "SolutionFails": "P703", "StarterPasses": "P704", "TooSlow": "P705"}
MAX_PRACTICE = 1.5  # 参考解跑完练习的测试最多用多少秒 CPU：浏览器里慢几倍，读者的限时是 10 秒


class Failure(Exception):
    """非 Python 代码块的失败：已经知道文件与行。"""

    def __init__(self, kind: str, message: str, file: str, line: int) -> None:
        super().__init__(message)
        self.kind, self.file, self.line = kind, file, line


def run(job: dict[str, Any], progress: int, output: int, result: int) -> None:
    """执行 ``job`` 并把结果写进 ``result``；不返回。

    Args:
        job: 见 :meth:`zhixing.engine.Engine.job`。
        progress: 每块开始时写一行 ``块序号 截止时刻``，死掉时父进程据此给出行号。
        output: 截获标准输出与标准错误的文件。
        result: 写结果 JSON 的文件。
    """
    os.setsid()
    sys.stdin = open(os.devnull)
    os.dup2(sys.stdin.fileno(), 0)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    page = _Page()
    page.attach(job, progress, output, result)
    faulthandler.enable(file=sys.stderr)
    isolation = sandbox.enter(job["root"], job.get("scratch"))
    page.begin()
    if "mutants" in job:
        payload = page.hunt()
    else:
        page.execute()
        payload = {
            "blocks": page.results,
            "deps": page.dependencies(),
            "modules": page.modules(),
            "figures": page.recorded.figures,
            "metrics": page.recorded.metrics,
            "inputs": page.inputs(),
            "isolation": isolation,
            "resumed": page.resumed,
        }
    with os.fdopen(page.result, "w", encoding="utf-8", errors="replace") as f:
        json.dump(payload, f, ensure_ascii=False)
    # 不走解释器的正常退出：torch 的收尾要 0.3–0.7 秒，而结果已经写好
    os._exit(0)


class _Page:
    def __init__(self) -> None:
        self.recorded = artifacts.recorded
        self.recorded.on_scratch = self._log_reads
        self.reads: int | None = None  # 用了断点目录之后，读过的文件随读随记
        self.results: list[dict[str, Any]] = []
        self.opened: dict[str, str] = {}  # 打开过的项目文件 -> 打开时的样子
        self.spawned = False
        self.escaped: BaseException | None = None  # 线程里没人接的异常
        self.imported: list[str] = []
        self.ours: frozenset[str] = frozenset()  # 不算第三方的顶层模块：标准库、examples/ 里的、引擎自己
        self.resumed = 0

    def attach(self, job: dict[str, Any], progress: int, output: int, result: int) -> None:
        """接上一个作业的文件与工作目录（从检查点继续时再接一次）。"""
        self.job, self.progress, self.output, self.result = job, progress, output, result
        self.root = os.path.join(job["root"], "")
        self.read_from = 0
        self.pid = os.getpid()
        _die_with_parent()
        _adopt_orphans()
        self._redirect()
        os.chdir(job["cwd"])
        os.environ.update(HOME=job["cwd"], TMPDIR=job["cwd"], PWD=job["cwd"])
        artifacts.begin(
            artifacts.Session(
                directory=f"{job['spool']}.d",
                store=os.path.join(job["root"], ".cache", "zhixing", "files"),
                inputs=job["inputs"],
                scratch=job.get("scratch"),
                example=job["example"],
            )
        )

    def _redirect(self) -> None:
        """接管标准输出与标准错误；每块之前再接一次，前一块关掉或换掉它们也不要紧。"""
        for name, fd in (("stdout", 1), ("stderr", 2)):
            os.dup2(self.output, fd)
            setattr(sys, name, io.TextIOWrapper(os.fdopen(fd, "wb", 0, closefd=False), "utf-8", write_through=True))

    def begin(self) -> None:
        sys.path.insert(0, os.path.join(self.root, "examples"))
        os.environ["PYTHONPATH"] = sys.path[0]
        # 页里的代码可能改坏 os 与 sys，收尾要用的先取好
        local = os.listdir(sys.path[0]) if os.path.isdir(sys.path[0]) else []
        self.ours = sys.stdlib_module_names | {name.removesuffix(".py") for name in local} | {"zhixing"}
        module = types.ModuleType("__main__")
        module.__file__ = self.job["file"]
        sys.modules["__main__"] = module
        self.globals = module.__dict__
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(self.job["threads"])
        _seed(self.job["threads"])
        self._line_cache()
        sys.addaudithook(self._on_audit)
        signal.signal(signal.SIGALRM, self._on_alarm)
        threading.excepthook = self._on_thread_exception

    def _on_audit(self, event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str | bytes) and not (args[2] or 0) & os.O_WRONLY:
            path = os.path.abspath(os.fsdecode(args[0]))
            if path.startswith(self.root) and path.endswith(".pyc"):
                with contextlib.suppress(ValueError):  # 读的是字节码，依据的是源文件
                    path = importlib.util.source_from_cache(path)
            if path.startswith(self.root) and path not in self.opened:
                self.opened[path] = stamp(path)
                if self.reads is not None:
                    self._log_reads()
        elif event == "import":
            self.imported.append(args[0])
        elif event in _SPAWNS:
            self.spawned = True
            if self.reads is not None:
                self._log_reads()

    def _log_reads(self) -> None:
        """把读过的文件与哈希记进断点目录：下次有一个变了，里面的进度就作废。"""
        if not self.job.get("scratch"):
            return
        if self.reads is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            self.reads = os.open(os.path.join(self.job["scratch"], "read"), flags, 0o600)
            self.logged: set[str] = set()
        fresh = self.dependencies().keys() - self.logged
        self.logged |= fresh
        lines = (json.dumps([path, file_hash(Path(self.root, path))]) + "\n" for path in sorted(fresh))
        os.write(self.reads, "".join(lines).encode())

    def _on_thread_exception(self, args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, SystemExit):
            self.escaped = self.escaped or args.exc_value or args.exc_type()

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
            if since >= checkpoint.WORTH and self._can_checkpoint():
                since = 0.0
                spawned = self.spawned
                woken = checkpoint.leave(self.job["spool"], k, self)
                self.spawned = spawned  # 留检查点的 fork 不算页里起的子进程
                if woken:
                    woken[0]["scratch"] = None  # 围栏里可写的还是留现场那次的目录
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
        self._check_outputs()

    def _check_outputs(self) -> None:
        """要过路径的产物都要真的写出来。"""
        own = {b["file"] for b in self.job["blocks"]}
        for name, callers in self.recorded.outputs.items():
            path = os.path.join(f"{self.job['spool']}.d", "outputs", name)
            if os.path.islink(path) or not os.path.isfile(path):
                last = self.job["blocks"][-1]
                file, line = next((c for c in callers if c[0] in own), self._start(last))
                self.results[-1]["error"] = self._error("R309", "MissingOutput", f"没有把产物文件 {name!r} 写成普通文件", file, line)

    def _can_checkpoint(self) -> bool:
        """现场能不能留：写过文件、要过产物或断点的路径就不能（下次目录不同），跑过多线程算子之后不能 fork。"""
        paths = self.recorded.outputs or self.recorded.scratch or os.listdir()
        return bool(self.job.get("checkpoints")) and self.job["threads"] == 1 and not paths

    def _run_block(self, k: int, block: dict[str, Any]) -> dict[str, Any]:
        """执行一块，返回 ``out error seconds figs``。"""
        handlers = {"python": self._python, "bash": self._bash, "console": self._console, "pycon": self._pycon}
        deadline = time.monotonic() + block["timeout"]
        os.write(self.progress, f"{k} {deadline}\n".encode())
        self.current, self.at = block, k
        self._redirect()
        error = None
        start = time.perf_counter()
        try:
            self.spare = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            sandbox.limit_memory(block["memory"])
            signal.setitimer(signal.ITIMER_REAL, block["timeout"])
            # C 里的死循环收不到 SIGALRM：由看门狗线程打印位置后结束进程
            faulthandler.dump_traceback_later(block["timeout"] + 1, exit=True, file=sys.stderr)
            (self._practice if block["practice"] else handlers[block["lang"]])(block)
            self._end_of_fork(None)
        except BaseException as exception:
            self.spare = None  # 可能正是内存用尽的时候，先腾出一点来记录错误
            signal.setitimer(signal.ITIMER_REAL, 0)
            sandbox.limit_memory(resource.RLIM_INFINITY)
            self._end_of_fork(exception)
            error = self._describe(exception, block)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
        seconds = time.perf_counter() - start
        text, overflow = self._take_output()
        escaped, self.escaped = self.escaped, None
        if escaped and not error:
            error = self._describe(escaped, block)
        if seconds >= block["timeout"] and not (error and error["code"] == "R304"):  # 超时的异常被代码自己吞了
            error = self._error("R304", "Timeout", f"超过 {block['timeout']:g} 秒", *self._start(block))
        shell = bool(error) and error["type"].startswith("exit ")
        if shell:
            error["detail"] = text[-MAX_MESSAGE:]  # bash 的错误信息在输出里
        if overflow and (shell or not error):
            error = self._error("R308", "OutputTooLarge", f"输出超过 {MAX_OUTPUT >> 10} KiB", *self._start(block))
        entry = {"out": text, "error": error, "seconds": round(seconds, 4), "figs": []}
        try:
            entry["figs"] = self._take_figures(keep=not error)
        except Exception as exception:
            entry["error"] = self._describe(exception, block)
        return entry

    def _end_of_fork(self, exception: BaseException | None) -> None:
        """代码块里 ``os.fork`` 出来的子进程跑到块尾就退出，不接着跑本页剩下的块。"""
        if os.getpid() == self.pid:
            return
        code = 0 if exception is None else 1
        if isinstance(exception, SystemExit):
            code = exception.code if isinstance(exception.code, int) else int(exception.code is not None)
        elif exception is not None:
            traceback.print_exception(exception)
        os._exit(code)

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
        self.pid = os.getpid()

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
                block = block | {"patch" if block["practice"] else "source": mutant["source"]}
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

    def _practice(self, block: dict[str, Any]) -> None:
        """起始代码只要求能执行；测试要求参考解通过、起始代码不通过。都不碰本页的变量与随机数。"""
        file, line = self._start(block)
        state = random.getstate()
        try:
            if block["practice"] == practice.STARTER:
                judge.load(block["source"], file, line)
                return
            exec(block.get("patch", ""), self.globals)  # 变异检查：换上改坏的参考解
            self._check_solution(block)
            # 静态扫描保证测试的前一块就是它的起始代码；没保证的页（P701）已经有错误
            starter = self.job["blocks"][self.at - 1]
            if starter["practice"] == practice.STARTER and "patch" not in block:
                self._check_starter(starter, block)
        finally:
            random.setstate(state)

    def _check_solution(self, block: dict[str, Any]) -> None:
        file, line = self._start(block)
        if block["solution"] not in self.globals:
            raise Failure("UnknownSolution", f"本页到这里还没有定义 {block['solution']!r}", file, line - 1)
        trial, start = judge.Trial(), time.process_time()
        try:
            judge.examine(block["source"], self.globals[block["solution"]], file, line, trial)
        except Exception as error:
            described = self._describe(error, block)
            if described["code"] != "R301":
                raise
            name = type(error).__name__
            reason = f"{block['solution']}：{name}: {error}" if str(error) else f"{block['solution']}：{name}"
            case = trial.case()
            known = [f"{label}：{case[k]}" for k, label in (("input", "输入"), ("expected", "期望"), ("actual", "实际")) if case[k]]
            detail = "\n".join([reason.replace("\n", " ")[:500], *known, described["detail"]])
            raise Failure("SolutionFails", detail, described["file"], described["line"]) from error
        if (spent := time.process_time() - start) > MAX_PRACTICE:
            reason = f"{block['solution']} 跑完测试用了 {spent:.1f} 秒 CPU，上限 {MAX_PRACTICE:g} 秒"
            raise Failure("TooSlow", reason, file, line - 1)

    def _check_starter(self, starter: dict[str, Any], block: dict[str, Any]) -> None:
        file, line = self._start(block)
        entry = practice.entry_of(starter["source"])
        namespace = judge.load(starter["source"], *self._start(starter))
        try:
            judge.examine(block["source"], namespace[entry], file, line)
        except Exception as error:
            described = self._describe(error, block)
            first, last = starter["line"], starter["line"] + starter["source"].count("\n")
            inside = described["file"] == starter["file"] and first <= described["line"] <= last
            if described["code"] != "R301" or isinstance(error, NameError) and inside:
                raise  # 内存不够、用了没定义的名字：不是“还没写”，是起始代码自己有错
            return
        raise Failure("StarterPasses", f"{entry} 什么都没写，测试却没有发现", file, line - 1)

    def _bash(self, block: dict[str, Any]) -> None:
        file, line = self._start(block)
        # 前缀占一行，行号减回去；ERR 陷阱报告出错的行，由里到外（函数、子 shell）每层一个
        script = "set -Eeuo pipefail; trap 'echo \"$LINENO\" >&@ERR@' ERR\n" + block["source"] + "\necho end >&@ERR@\n"
        code, where = self._shell(script)
        if not code and not where.endswith("end\n"):
            lines = block["source"].split("\n")
            at = next((i for i, text in enumerate(lines) if re.search(r"\b(exit|exec)\b", text)), 0)
            raise Failure("exit 0", "没有到块尾就以退出码 0 结束，后面的命令没有跑", file, line + at)
        if code:
            # 未定义变量与语法错不触发 ERR，但 bash 会说是第几行
            data = os.pread(self.output, MAX_OUTPUT, max(self.read_from, os.fstat(self.output).st_size - MAX_OUTPUT))
            said = re.search(rb"^/dev/fd/\d+: line (\d+): .*\n?\Z", data, re.M)
            at = int(where.split()[0] if where else said[1] if said else 2) - 1
            at = min(max(at, 1), block["source"].count("\n") + 1)
            raise Failure(f"exit {code}", f"退出码 {code}", file, line + at - 1)

    def _console(self, block: dict[str, Any]) -> None:
        file, line = self._start(block)
        commands = parse_console(block["source"])
        if not commands:
            raise Failure("Console", "没有以 $ 开头的命令", file, line)
        marker = "\x1e"
        script = "".join(f"{c}\nprintf '%s%d\\n' $'\\x1e' $?\n" for _, c, _ in commands)
        code, _ = self._shell("set -uo pipefail\n" + script)
        text, overflow = self._take_output()
        if overflow:
            raise Failure("OutputTooLarge", f"输出超过 {MAX_OUTPUT >> 10} KiB", file, line)
        parts = re.sub(r"^bash: line \d+: ", "bash: ", text, flags=re.M).split(marker)
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
        os.set_blocking(read, False)  # 后台进程可能还开着另一端
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
            where = ""
            with contextlib.suppress(BlockingIOError):
                where = os.read(read, 64).decode()
        except BlockTimeout:
            process.kill()
            raise
        finally:
            os.close(read)
        return process.returncode, where

    def _pycon(self, block: dict[str, Any]) -> None:
        import doctest  # 只有 pycon 块要用；它要带进 unittest 与 pdb

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
            code = _FAILURES.get(exception.kind, "R301")
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
        detail = re.sub(r"(.{2000}).+", r"\1……", detail)[-MAX_MESSAGE:]
        try:
            text = str(exception)[:MAX_MESSAGE]
        except BaseException:
            text = "（它的 __str__ 抛出异常）"
        code, note = "R301", ""
        if isinstance(exception, SystemExit):
            note = "（没有执行到块尾，后面的断言没有跑）"
        elif isinstance(exception, BlockTimeout):
            code = "R304"
        elif isinstance(exception, MemoryError) or "can't allocate memory" in text:
            code = "R306"
        elif isinstance(exception, OSError) and exception.errno == 27:  # EFBIG：输出或文件超过上限
            code = "R308"
        name = type(exception).__qualname__
        module = type(exception).__module__
        full = name if module in ("builtins", "__main__", __name__) else f"{module}.{name}"
        return self._error(code, full, text.split("\n")[0][:500] + note, file, line, detail) | {
            "mro": [c.__name__ for c in type(exception).__mro__],
            "text": text,
        }

    def _take_output(self) -> tuple[str, bool]:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # 代码块可能把它换成了 None，或者关了
                stream.flush()
        ctypes.CDLL(None).fflush(None)
        end = os.fstat(self.output).st_size
        size = min(end - self.read_from, MAX_OUTPUT)
        data = os.pread(self.output, size, self.read_from)
        overflow = end - self.read_from > MAX_OUTPUT
        self.read_from = end
        text = data.decode("utf-8", "replace").replace("\r\n", "\n")
        # bash 的报错不提脚本的临时名字（每次不同），行号从块的第一行数起
        text = re.sub(r"^/dev/fd/\d+: line (\d+): ", lambda m: f"bash: line {int(m[1]) - 1}: ", text, flags=re.M)
        # 去掉颜色；回车覆盖的进度条只留最后一次
        return re.sub(r"\x1b\[[0-9;]*m|^.*\r", "", text, flags=re.M), overflow

    def _take_figures(self, keep: bool) -> list[str]:
        if "matplotlib.pyplot" not in sys.modules:
            return []
        from zhixing.figures import to_svg

        plt = sys.modules["matplotlib.pyplot"]
        try:
            return [to_svg(plt.figure(number)) for number in plt.get_fignums()] if keep else []
        finally:
            plt.close("all")

    def modules(self) -> list[str]:
        """import 过的（包括没装的）第三方顶层模块；``*`` 表示全部：起过子进程的页，它用了什么看不见。"""
        if self.spawned:
            return ["*"]
        return sorted({name.partition(".")[0] for name in self.imported} - self.ours)

    def dependencies(self) -> dict[str, str]:
        """读过的项目文件（相对项目根目录）与读的时候的样子：被 import 的本地模块与打开过的文件。

        起过子进程的页，子进程读了什么看不见，``examples/`` 下的文件都算。
        """
        found = dict(self.opened)
        # 只看这一页新 import 的：挨个碰 zygote 的几千个模块，写时复制的代价是十毫秒
        for name in self.imported:
            file = getattr(sys.modules.get(name), "__file__", None)
            if isinstance(file, str):
                found.setdefault(os.path.abspath(file), stamp(file))
        if self.spawned:
            for directory, _, names in os.walk(os.path.join(self.root, "examples")):
                for name in names:
                    path = os.path.join(directory, name)
                    found.setdefault(path, stamp(path))
        relative = {os.path.relpath(path, self.root): seen for path, seen in found.items() if path.startswith(self.root)}
        return {
            path: relative[path]
            for path in sorted(relative)
            if path != self.job["file"] and not path.startswith((".", "node_modules/")) and not path.endswith(".pyc")
        }

    def inputs(self) -> dict[str, str | None]:
        """读过的上游产物；起过子进程的，声明过的都算。"""
        found = dict(self.recorded.inputs)
        if self.spawned:
            found |= {f"{need}/{name}": digest for need, files in self.job["inputs"].items() for name, digest in files.items()}
        return found


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


def _adopt_orphans() -> None:
    """页里留下的孤儿过继给页进程（Linux）：页还在跑时不会被当成别页的残留杀掉。"""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


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


def _seed(threads: int) -> None:
    import random

    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_num_threads(threads)
        torch.default_generator.manual_seed(0)  # 加速器的种子 zygote 预载时定过了


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
    """逐行比较（忽略行尾空白与首尾空行；制表符按 Markdown 的规矩展开成四格）。

    ``...`` 匹配任意内容；给了 ``tol`` 时，两边的数字相差在 ``tol`` 之内（绝对或相对）即算相同。
    """
    want, have = (
        "\n".join(line.expandtabs(4).rstrip() for line in text.strip("\n").split("\n")).strip("\n")
        for text in (expected, got)
    )
    if want == have:
        return True
    at: int | None = 0
    pieces = want.split("...")
    for i, piece in enumerate(pieces):  # 从左到右逐段找最靠前的：再多的 ... 也不会回溯爆炸
        at = _find(piece, have, at, tol, first=i == 0, last=i == len(pieces) - 1)
        if at is None:
            return False
    return True


def _find(piece: str, text: str, at: int, tol: float | None, *, first: bool, last: bool) -> int | None:
    """``piece`` 在 ``text`` 的 ``at`` 之后最靠前的一处的结尾；第一段贴着开头，最后一段贴着结尾。"""
    literals = [piece] if tol is None else _NUMBER.split(piece)
    numbers = [] if tol is None else list(map(float, _NUMBER.findall(piece)))
    pattern = re.compile(f"({_NUMBER.pattern})".join(map(re.escape, literals)) + (r"\Z" if last else ""))
    while match := (pattern.match if first else pattern.search)(text, at):
        if all(abs(a - float(b)) <= tol * max(1.0, abs(a)) for a, b in zip(numbers, match.groups(), strict=True)):
            return match.end()
        if first:
            break
        at = match.start() + 1
    return None
