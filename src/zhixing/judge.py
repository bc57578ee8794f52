"""判一道练习题：构建时证明参考解通过、起始代码不通过，浏览器里（Pyodide）判读者的代码，是同一份。

所以这里只用标准库，不 import 本项目的任何东西，也不用比 3.11 新的语法。
"""

import ast
import functools
import inspect
import linecache
import random
import reprlib
import time
import traceback

CODE, TESTS = "<你的代码>", "<测试>"
MAX_TRACE = 4000

_brief = reprlib.Repr()
_brief.maxlevel = 8
_brief.maxlist = _brief.maxtuple = _brief.maxset = _brief.maxfrozenset = _brief.maxdeque = _brief.maxdict = 40
_brief.maxstring = _brief.maxother = _brief.maxlong = 400


def brief(value):
    """给人看的一行：很长的容器与字符串截断；``__repr__`` 抛异常也不要紧。"""
    return _brief.repr(value)


class Trial:
    """一次判题的现场：最近一次调用的输入与返回值，最近一次不相等的两边。"""

    def __init__(self):
        self.calls = 0
        self.lines = []  # 最近的调用；函数只留一条，类从构造开始一条条记
        self.returned = False
        self.result = None
        self.unequal = None  # (实际, 期望)
        self._inside = False

    def equal(self, actual, expected):
        """代替测试里的 ``==``：结果一样，只是记下不相等的两边。"""
        outcome = actual == expected
        if not outcome:
            self.unequal = (brief(actual), brief(expected))
        return outcome

    def watch(self, target):
        """包住被测的函数或类，行为不变。"""
        if inspect.isclass(target):
            return self._watch_class(target)
        name = getattr(target, "__name__", "solution")

        @functools.wraps(target)
        def call(*args, **kwargs):
            return self._call(name, target, args, kwargs, args, fresh=True)

        return call

    def _watch_class(self, target):
        """子类，公开的方法都记一笔；方法之间的互相调用不记。"""

        def recorded(name, method):
            @functools.wraps(method)
            def call(this, *args, **kwargs):
                first = name == "__init__"
                return self._call(target.__name__ if first else name, method, (this, *args), kwargs, args, fresh=first)

            return call

        members = {
            name: recorded(name, inspect.getattr_static(target, name))
            for name in dir(target)
            if (name == "__init__" or not name.startswith("_")) and inspect.isfunction(inspect.getattr_static(target, name))
        }
        return type(target)(target.__name__, (target,), members | {"__doc__": target.__doc__})

    def _call(self, name, function, args, kwargs, shown, fresh):
        if self._inside:
            return function(*args, **kwargs)
        # 先写下输入：原地修改的解法会把它改掉
        pieces = [brief(a) for a in shown] + [f"{k}={brief(v)}" for k, v in kwargs.items()]
        self.lines = ([] if fresh else self.lines[-30:]) + [f"{name}({', '.join(pieces)})"]
        self.calls += 1
        self.returned, self.result, self.unequal = False, None, None
        self._inside = True
        try:
            self.result = function(*args, **kwargs)
        finally:
            self._inside = False
        self.returned = True
        return self.result

    def case(self):
        """出问题的那个用例：``input``、``actual``、``expected``，不知道的为空串。"""
        actual, expected = self.unequal or (brief(self.result) if self.returned else "", "")
        return {"input": "\n".join(self.lines), "actual": actual, "expected": expected}


class _Equalities(ast.NodeTransformer):
    """``assert a == b`` 改写成 ``assert 比较(a, b)``，好说出两边各是什么。"""

    def visit_Assert(self, node):
        test = node.test
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
            callee = ast.copy_location(ast.Name("_judge_equal", ast.Load()), test)
            node.test = ast.copy_location(ast.Call(callee, [test.left, *test.comparators], []), test)
        return node


def load(source, file, line=1):
    """在一个全新的命名空间里执行代码，返回它；第一行的行号是 ``line``。"""
    return _execute(_parse(source, file, line), file, {})


def examine(tests, solution, file=TESTS, line=1, trial=None):
    """跑一遍测试；通过就返回，不通过就抛出测试或解法抛出的异常。

    Args:
        tests: 测试代码，定义 ``check(solution)``。
        solution: 被测的函数或类。
        trial: 给了就把输入、实际、期望记在它上面。
    """
    trial = trial or Trial()
    tree = ast.fix_missing_locations(_Equalities().visit(_parse(tests, file, line)))
    random.seed(0)  # 每次判题用的随机例都一样
    namespace = _execute(tree, file, {"_judge_equal": trial.equal})
    answer = namespace["check"](trial.watch(solution))
    if answer is not None:  # 写成生成器或返回真假的 check 什么都没有核对
        raise TypeError(f"check 应当用 assert 核对、不返回值，实际返回了 {brief(answer)}")


def _parse(source, file, line):
    return ast.parse("\n" * (line - 1) + source, file)


def _execute(tree, file, namespace):
    namespace["__name__"] = "practice"
    exec(compile(tree, file, "exec", dont_inherit=True), namespace)
    return namespace


# ---- 下面只在浏览器里用 ----


def judge(code, tests, entry):
    """判读者的代码，返回可以 JSON 化的结果。

    ``status`` 是 ``pass``、``fail``（答案不对）或 ``error``（抛了异常）；``line`` 是编辑框里的行号，
    0 表示问题不在读者的代码里。
    """
    for name, source in ((CODE, code), (TESTS, tests)):
        lines = source.splitlines(keepends=True)
        linecache.cache[name] = (len(source), None, lines, name)
    trial, start = Trial(), time.perf_counter()
    try:
        namespace = load(code, CODE)
        if not callable(namespace.get(entry)):
            return _result("error", trial, start, kind="NameError", message=f"没有找到 {entry}：请保留起始代码里的这个名字")
        examine(tests, namespace[entry], trial=trial)
    except BaseException as error:
        return _failed(error, trial, start)
    return _result("pass", trial, start)


def _failed(error, trial, start):
    frames = traceback.extract_tb(error.__traceback__)
    own = [f.lineno for f in frames if f.filename == CODE]
    line = own[-1] if own else 0
    if isinstance(error, SyntaxError) and error.filename == CODE:
        line = error.lineno or 0
    wrong = isinstance(error, AssertionError) and not own
    try:
        message = str(error)
    except BaseException:
        message = "（它的 __str__ 抛出异常）"
    if isinstance(error, SyntaxError):
        message = error.msg
    shown = [f for f in frames if f.filename in (CODE, TESTS)]
    trace = "".join(traceback.format_list(shown)) + "".join(traceback.format_exception_only(error))
    if len(trace) > MAX_TRACE:
        trace = trace[: MAX_TRACE // 2] + "……\n" + trace[-MAX_TRACE // 2 :]
    return _result("fail" if wrong else "error", trial, start, type(error).__name__, message[:2000], line, trace)


def _result(status, trial, start, kind="", message="", line=0, trace=""):
    return {
        "status": status,
        "calls": trial.calls,
        "seconds": round(time.perf_counter() - start, 3),
        "kind": kind,
        "message": message,
        "line": line,
        "trace": trace,
        "case": trial.case(),
    }
