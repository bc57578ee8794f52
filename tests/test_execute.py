"""执行：每种故障都给出编号、文件与行号，限时内结束，不连累别的页，也不留下进程。

故障清单一次交给同一个引擎跑完（各页并行），再逐条断言。``# ←`` 标出报错应指到的行。
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from zhixing import blocks, execute, notebook
from zhixing.engine import Engine, Outcome, Unit, heavy_imports

MARK = "# ←"
NAP = f"9{os.getpid():07}"  # 页面里写作 987：同时跑的别的测试进程里的 sleep 不会混进来


@dataclass(frozen=True)
class Case:
    """一页与它应有的报错。

    Attributes:
        code: 编号；空串表示应当通过。
        at: ``(文件, 行)``；缺省是页面里带 ``# ←`` 的那一行。
        says: 原因或详情里必须出现的文字。
    """

    page: str
    code: str = ""
    at: tuple[str, int] | int | None = None
    says: tuple[str, ...] = ()
    figs: int = field(default=0, compare=False)

    def where(self, file: str) -> tuple[str, int]:
        if isinstance(self.at, tuple):
            return self.at
        lines = self.page.split("\n")
        return file, self.at or next(i for i, line in enumerate(lines, 1) if MARK in line)


def python(code: str, options: str = "", then: str = "") -> str:
    return f"正文\n\n```python{options and ' ' + options}\n{code}\n```\n{then}"


def bash(code: str, options: str = "", then: str = "") -> str:
    return f"正文\n\n```bash{options and ' ' + options}\n{code}\n```\n{then}"


def output(text: str, options: str = "") -> str:
    return f'\n```text title="输出"{options and " " + options}\n{text}\n```\n'


HELPER = """\
import threading


# --8<-- [start:boom]
def boom(x):
    y = x + 1
    raise ValueError(f"炸 {y}")
# --8<-- [end:boom]


# --8<-- [start:broken]
def broken(:
    pass
# --8<-- [end:broken]
"""

FAST: dict[str, Case] = {
    # ---- Python 异常 ----
    "语法错": Case(python("x = 1\ndef f(:  # ←\n    pass"), "R301", says=("SyntaxError",)),
    "缩进错": Case(python("if 1:\nx = 1  # ←"), "R301", says=("IndentationError",)),
    "函数外的 return": Case(python("x = 1\nreturn x  # ←"), "R301", says=("SyntaxError",)),
    "NameError": Case(python("x = 1\n\nprint(nope)  # ←"), "R301", says=("NameError", "nope")),
    "嵌套函数里抛": Case(
        python("def f():\n    return g()\n\n\ndef g():\n    raise ValueError('深处')  # ←\n\n\nf()"), "R301", says=("ValueError: 深处", "in f")
    ),
    "前一块定义后一块调用": Case(python("def f():\n    return 1 / 0  # ←", then="\n```python\nf()\n```\n"), "R301", says=("ZeroDivisionError",)),
    "提示框里的行号": Case("正文\n\n!!! note\n\n    ```python\n    x = '中文'\n    1 / 0  # ←\n    ```\n", "R301", says=("~~^~~",)),
    "引入的文件里抛": Case(
        python('--8<-- "examples/helper.py:boom"', then="\n```python\nboom(1)\n```\n"), "R301", ("examples/helper.py", 7), ("炸 2", 'raise ValueError(f"炸 {y}")')
    ),
    "引入的文件语法错": Case(python('--8<-- "examples/helper.py:broken"'), "R301", ("examples/helper.py", 12), ("SyntaxError",)),
    "import 的模块里抛": Case(python("import lib\n\nlib.fail(3)  # ←"), "R301", says=("KeyError", "examples/lib.py")),
    "import 不存在": Case(python("import os\nimport no_such_module  # ←"), "R301", says=("ModuleNotFoundError", "no_such_module")),
    "断言失败": Case(python("x = 2\nassert x == 3, f'得到 {x}'  # ←"), "R301", says=("AssertionError: 得到 2",)),
    "异常链": Case(python("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise KeyError('外') from e  # ←"), "R301", says=("ZeroDivisionError",)),
    "BaseException": Case(python("class Stop(BaseException): pass\nraise Stop('停')  # ←"), "R301", says=("Stop: 停",)),
    "KeyboardInterrupt": Case(python("raise KeyboardInterrupt  # ←"), "R301", says=("KeyboardInterrupt",)),
    "sys.exit(3)": Case(python("import sys\nsys.exit(3)  # ←"), "R301", says=("SystemExit",)),
    "递归爆栈": Case(python("def f(n):\n    return f(n + 1)  # ←\n\n\nf(0)"), "R301", says=("RecursionError",)),
    "异常消息里有孤立代理": Case(python("raise ValueError('坏\\udcff字')  # ←"), "R301", says=("ValueError: 坏",)),
    "异常的 __str__ 会抛": Case(python("class E(Exception):\n    def __str__(self): raise RuntimeError('内')\n\nraise E  # ←"), "R301", says=("E",)),
    "巨大的异常消息": Case(python("raise ValueError('x' * 10**7)  # ←"), "R301", says=("ValueError: xxx",)),
    "线程里抛": Case(python("import threading\n\n\ndef work():\n    raise ValueError('线程')  # ←\n\n\nt = threading.Thread(target=work)\nt.start()\nt.join()"), "R301", says=("ValueError: 线程",)),
    "等标准输入": Case(python("x = input('名字？')  # ←"), "R301", says=("EOFError",)),
    "源码里有空字符": Case(python("x = 'a\x00b'"), "R301", 4, ("null byte",)),
    "嵌套太深": Case(python("x = " + "(" * 500 + ")" * 500 + "  # ←"), "R301"),
    "很深的一元运算": Case(python("x = " + "-" * 100000 + "1  # ←"), "R306"),
    # ---- 进程死掉 ----
    "段错误": Case(python("import ctypes\nctypes.string_at(0)  # ←"), "R305", says=("信号 11",)),
    "sys.exit(0)": Case(python("import sys\nsys.exit(0)  # ←\nassert False"), "R301", says=("SystemExit", "没有执行到块尾")),
    "sys.exit()": Case(python("import sys\nsys.exit()  # ←"), "R301", says=("SystemExit",)),
    "raise SystemExit 在函数里": Case(python("def f():\n    raise SystemExit  # ←\nf()"), "R301", says=("SystemExit",)),
    "raises SystemExit(0)": Case(python("import sys\nsys.exit(0)", 'raises="SystemExit"')),
    "os._exit(0) 在最后一块": Case(python("x = 1", then="\n```python\nimport os\nos._exit(0)\n```\n"), "R305", 8, ("退出码 0",)),
    "os._exit(0)": Case(python("import os\nos._exit(0)"), "R305", 4, ("退出码 0",)),
    "os._exit(9)": Case(python("x = 1", then="\n```python\nimport os\nos._exit(9)\n```\n"), "R305", 8, ("退出码 9",)),
    "SIGKILL 自杀": Case(python("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"), "R305", 4, ("信号 9",)),
    "SIGTERM 自杀": Case(python("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)"), "R305", 4, ("信号 15",)),
    "abort": Case(python("import os\nos.abort()  # ←"), "R305", says=("信号 6",)),
    "前面的块都好最后一块死": Case(
        python("print(1)", then=output("1") + '\n```python raises="KeyError"\n{}[1]\n```\n\n```python fig="看"\nimport matplotlib.pyplot as plt\nplt.plot([1])\n```\n\n```python\nimport os\nos.abort()  # ←\n```\n\n```python\nprint(2)\n```\n' + output("2")),
        "R305",
    ),
    "关掉所有描述符": Case(python("import os\nos.closerange(3, 256)"), "R305", 4),
    # ---- 内存与输出 ----
    "一次要 20 GB": Case(python("x = 1\ny = bytearray(20 << 30)  # ←"), "R306", says=("MemoryError",)),
    "一点点占满": Case(python("for _ in iter(int, 1): x = [globals().get('x'), [0], [1]]  # ←", 'memory="64MiB"'), "R306", says=("MemoryError",)),
    "声明会爆内存": Case(python("x = bytearray(20 << 30)", 'raises="MemoryError"', "\n```python\nx = 1\n```\n")),
    "bash 爆内存": Case(bash("python3 -c 'x = bytearray(1 << 30)'  # ←", 'memory="256MiB"'), "R301", says=("MemoryError",)),
    "输出太大": Case(python("print('x' * 300_000)"), "R308", 4),
    "灌 1 GB 标准输出": Case(python("import os\nfor _ in range(1024):\n    os.write(1, b'x' * (1 << 20))  # ←"), "R308"),
    "bash 灌 1 GB": Case(bash("head -c 1G /dev/zero"), "R308", 4),
    # ---- 标准输出的把戏 ----
    "关掉 fd 1 之后再写": Case(python("import os\nos.close(1)\nprint(1)  # ←"), "R301", says=("OSError",)),
    "关掉 fd 1 不影响后一块": Case(python("import os\nos.close(1)\nos.close(2)", then="\n```python\nprint('还在')\n```\n" + output("还在"))),
    "sys.stdout 换成 None": Case(python("import sys\nsys.stdout = None", then="\n```python\nprint('还在')\n```\n" + output("还在"))),
    "sys.stdout 关掉": Case(python("import sys\nsys.stdout.close()\nsys.stderr.close()", then="\n```python\nprint('还在')\n```\n" + output("还在"))),
    "sys.stdout 换成 StringIO": Case(python("import io, sys\nsys.stdout = io.StringIO()\nprint('丢')", then="\n```python\nprint('还在')\n```\n" + output("还在"))),
    "子进程与 C 的输出都截获": Case(
        python("import ctypes, os, subprocess, sys\nprint('甲')\nos.system('echo 乙')\nsubprocess.run(['echo', '丙'])\nctypes.CDLL(None).puts('丁'.encode())\nctypes.CDLL(None).fflush(None)\nprint('戊', file=sys.stderr)", then=output("甲\n乙\n丙\n丁\n戊"))
    ),
    "输出不是 UTF-8": Case(python("import os\nos.write(1, b'a\\xffb\\n')", then=output("a\ufffdb"))),
    "输出里有制表符": Case(python("print('a\\tb')\nprint('中\\t文')", then=output("a\tb\n中\t文"))),
    # ---- bash ----
    "bash 非零退出": Case(bash("echo a\nfalse  # ←\necho b"), "R301", says=("exit 1",)),
    "bash exit 3": Case(bash("echo a\nexit 3"), "R301", 4, ("exit 3", "退出码 3")),
    "bash 未定义变量": Case(bash('echo a\necho "$NOPE_NOT_SET"  # ←'), "R301", says=("NOPE_NOT_SET",)),
    "bash 管道失败": Case(bash("echo a\nfalse | cat  # ←"), "R301", says=("exit 1",)),
    "bash 语法错": Case(bash("echo a\nif true; then\necho b\n"), "R301", 7, ("syntax error",)),
    "bash 中间语法错": Case(bash("echo a\necho )  # ←\necho b"), "R301", says=("syntax error",)),
    "bash 命令不存在": Case(bash("no_such_command_x  # ←"), "R301", says=("exit 127",)),
    "bash 函数里失败": Case(bash("f() {\n  false  # ←\n}\necho a\nf"), "R301"),
    "bash 子 shell 里失败": Case(bash("echo a\n(\n  false  # ←\n)"), "R301"),
    "bash 命令替换失败": Case(bash("echo a\nx=$(false)  # ←"), "R301"),
    "bash 失败但后台还开着": Case(bash("sleep 60 &\nexit 4"), "R301", 4, ("exit 4",)),
    "bash 声明的退出码": Case(bash("exit 3", 'raises="exit 3"')),
    "bash exit 0": Case(bash("echo a\nexit 0  # ←\nfalse"), "R301", says=("没有到块尾",)),
    "bash exec": Case(bash("exec true  # ←\nfalse"), "R301", says=("没有到块尾",)),
    "bash 声明的 exit 0": Case(bash("exit 0", 'raises="exit 0"')),
    "bash 子 shell 里 exit 0": Case(bash("(exit 0)\nbash -c 'exit 0'")),
    "bash 末行是注释": Case(bash("true\ntrue # 好")),
    "bash heredoc 结尾": Case(bash("cat <<EOF\n甲\nEOF")),
    "bash 关掉别的 fd": Case(bash("exec 3>&1\nexec 3>&-\ntrue")),
    "bash 退出码不符": Case(bash("exit 4", 'raises="exit 3"'), "R303", 3, ("exit 4",)),
    "bash 等标准输入": Case(bash("read -r x  # ←"), "R301"),
    "bash 报错的文字每次相同": Case(bash("echo a\nnope_x || true", then=output("a\nbash: line 2: nope_x: command not found"))),
    "console 报错的文字与终端里一样": Case("```console\n$ echo a\na\n$ nope_x\nbash: nope_x: command not found\n```\n"),
    "bash 多行命令": Case(bash("echo a \\\n  b\nfalse  # ←"), "R301"),
    # ---- console ----
    "console 通过": Case("```console\n$ x=1; echo $x\n1\n$ echo a > f\n$ cat f\na\n$ printf 'b\\n' \\\n>   | cat\nb\n$ ls /nope_x\n...No such file or directory\n```\n"),
    "console 输出不符": Case("正文\n\n```console\n$ echo a\na\n$ echo b  # ←\nc\n```\n", "R302", says=("期望", "实际")),
    "console 静默失败": Case("```console\n$ true\n$ false  # ←\n```\n", "R301", says=("退出码 1",)),
    "console 提前结束": Case("```console\n$ echo a\na\n$ exit 5  # ←\n$ echo b\nb\n```\n", "R301", says=("退出码 5",)),
    "console 没有命令": Case("```console\n只有输出\n```\n", "R301", 2),
    "console 没有结尾换行": Case("```console\n$ printf abc\nabc\n$ echo d\nd\n```\n"),
    # ---- pycon ----
    "pycon 通过": Case(python("base = 40", then="\n```pycon\n>>> base + 2\n42\n>>> def f():\n...     return 'x'\n>>> f()\n'x'\n>>> 1 / 0\nTraceback (most recent call last):\nZeroDivisionError: division by zero\n>>> list(range(99))\n[0, ..., 98]\n```\n\n```python\nassert f() == 'x'\n```\n")),
    "pycon 不符": Case("正文\n\n```pycon\n>>> 1 + 1\n2\n>>> 1 + 2  # ←\n4\n```\n", "R302", says=("Expected", "Got")),
    "pycon 意外的异常": Case("```pycon\n>>> x = 1\n>>> nope  # ←\n```\n", "R302", says=("NameError",)),
    "pycon 没有语句": Case("```pycon\n只有文字\n```\n", "R301", 2),
    "pycon 写法不对": Case("```pycon\n>>>1 + 1\n2\n```\n", "R301", 2, ("blank",)),
    # ---- raises ----
    "raises 符合": Case(python("raise ValueError('秩必须为正')", 'raises="ValueError: 秩必须"', "\n```python\nx = 1\n```\n")),
    "raises 写父类": Case(python("raise FileNotFoundError('x')", 'raises="OSError"')),
    "raises 写全名": Case(python("import json\njson.loads('{')", 'raises="json.decoder.JSONDecodeError"')),
    "raises SystemExit": Case(python("import sys\nsys.exit(2)", 'raises="SystemExit"')),
    "raises SyntaxError": Case(python("def f(:", 'raises="SyntaxError"')),
    "raises 类型不符": Case(python("1 / 0", 'raises="ValueError"'), "R303", 3, ("ZeroDivisionError",)),
    "raises 没抛": Case(python("x = 1", 'raises="ValueError"'), "R303", 3, ("没有异常",)),
    "raises 消息不符": Case(python("raise ValueError('甲')", 'raises="ValueError: 乙"'), "R303", 3, ("甲",)),
    "raises 之后的失败": Case(python("raise ValueError", 'raises="ValueError"', "\n```python\n1 / 0  # ←\n```\n"), "R301"),
    "raises 之前的输出也核对": Case(python("print(1)\nraise ValueError", 'raises="ValueError"', output("2  # ←")), "R302"),
    "raises 之前的输出符合": Case(python("print(1)\nraise ValueError", 'raises="ValueError"', output("1"))),
    # ---- 期望输出 ----
    "输出符合": Case(python("print('a')\nprint()\nprint('b  ')", then=output("a\n\nb"))),
    "输出不符指到那一行": Case(python("for i in range(4): print(i)", then=output("0\n1\n9 # ←\n3")), "R302", says=("-9", "+2")),
    "输出少一行": Case(python("print('a')", then=output("a\nb # ←")), "R302"),
    "输出多一行": Case(python("print('a # ←')\nprint('b')", then=output("a # ←")), "R302", 9),
    "期望空实际有": Case(python("print('a')", then='\n```text title="输出"\n```\n'), "R302", 8),
    "tol 之内": Case(python("print('loss 0.5004, n=1000.4')", then=output("loss 0.5, n=1000", 'tol="1e-3"'))),
    "tol 之外": Case(python("print('loss 0.502')", then=output("loss 0.5  # ←", 'tol="1e-3"')), "R302"),
    "tol 只管数字": Case(python("print('acc 0.5')", then=output("loss 0.5  # ←", 'tol="1e-1"')), "R302"),
    "省略号": Case(python("print('<object at 0x7f>')\nprint('尾')", then=output("<object at ...>\n尾"))),
    "省略号跨行": Case(python("for i in range(9): print(i)", then=output("0\n...\n8"))),
    "省略号不符": Case(python("print('<object at 0x7f>')", then=output("<thing at ...>  # ←")), "R302"),
    # ---- 图 ----
    "画了没写 fig": Case(python("import matplotlib.pyplot as plt\nplt.plot([1, 2])"), "R307", 3, ("没写 fig",)),
    "写了 fig 没画": Case(python("x = 1", 'fig="看什么"'), "R307", 3, ("没有画图",)),
    "图符合": Case(python("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.title('中文')", 'fig="看什么"'), figs=1),
    "抛异常的块画的图不算到下一块": Case(python("import matplotlib.pyplot as plt\nplt.plot([1])\nraise ValueError", 'raises="ValueError"', "\n```python\nx = 1\n```\n")),
    "图里缺字": Case(python("import matplotlib.pyplot as plt\nplt.title('\\u1BC0')", 'fig="看"'), "R301", 4, ("Glyph",)),
    # ---- 文件、网络、环境 ----
    "写项目目录": Case(python("import os\nroot = os.path.dirname(os.environ['PYTHONPATH'])\nopen(root + '/docs/new.md', 'w')  # ←"), "R301", says=("Error",)),
    "读项目文件": Case(python("import os\nroot = os.path.dirname(os.environ['PYTHONPATH'])\nassert open(root + '/mkdocs.yml').read()")),
    "连外网": Case(python("import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=3)  # ←"), "R301", says=("Error",)),
    "解析域名": Case(python("import urllib.request\nurllib.request.urlopen('http://example.com', timeout=3)  # ←"), "R301"),
    "回环可用": Case(python("import socket\ns = socket.create_server(('127.0.0.1', 0))\nc = socket.create_connection(s.getsockname(), timeout=3)\ns.accept()[0].sendall(b'hi')\nassert c.recv(9) == b'hi'")),
    "看不到令牌": Case(python("import os\nassert not [k for k in os.environ if 'TOKEN' in k or 'SECRET' in k or 'PROXY' in k.upper()], os.environ", then="\n```bash\n! env | grep -E 'TOKEN|ghp_'\n```\n")),
    "临时文件在本页目录": Case(python("import os, tempfile, matplotlib.pyplot\nwith tempfile.NamedTemporaryFile() as f:\n    assert os.path.dirname(f.name) == os.getcwd() == os.environ['HOME'], f.name")),
    "同页共享文件": Case(python("open('a.txt', 'w').write('中')", then="\n```bash\ncat a.txt\n```\n" + output("中"))),
    "输出超大文件": Case(python("with open('big', 'wb') as f:\n    f.truncate(1 << 20)\n    f.seek(1 << 30)\n    f.write(b'x')\n    f.flush()"), "R308", 4),
    "线程数与种子": Case(python("import random, numpy as np, os\nprint(random.random(), np.random.rand(), os.environ['OMP_NUM_THREADS'])", then=output("0.8444218515250481 0.5488135039273248 1"))),
    "pycon 里的种子": Case("```pycon\n>>> import numpy as np\n>>> float(np.random.rand())\n0.5488135039273248\n```\n"),
    # ---- 多进程 ----
    "子进程落到页面代码里": Case(python("import os\npid = os.fork()\nif pid:\n    assert os.waitpid(pid, 0)[1] == 0\n    print('父')", then=output("父") + "\n```python\nprint('只一次')\n```\n" + output("只一次"))),
    "子进程里抛异常": Case(python("import os\npid = os.fork()\nif not pid:\n    raise ValueError('子')\nassert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1")),
    "子进程里 sys.exit": Case(python("import os, sys\npid = os.fork()\nif not pid:\n    sys.exit(7)\nassert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7")),
    "进程池": Case(python("import multiprocessing as mp\n\n\ndef sq(x): return x * x\n\n\nwith mp.get_context('fork').Pool(2) as pool:\n    print(pool.map(sq, range(4)))", then=output("[0, 1, 4, 9]"))),
    "一堆子进程": Case(python("import subprocess\nfor _ in range(30):\n    subprocess.Popen(['sleep', '98761'])")),
    "setsid 逃逸": Case(python("import subprocess\nsubprocess.Popen(['sleep', '98762'], start_new_session=True)", then="\n```bash\nsetsid sh -c 'sleep 98763 & sleep 98764' &\n```\n")),
    "两次 fork 的守护进程": Case(python("import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        for fd in range(3): os.close(fd)\n        os.execvp('sleep', ['sleep', '98765'])\n    os._exit(0)\nos.wait()")),
    "后台服务活到下一块": Case(bash("nohup sh -c 'while :; do sleep 0.02; done' sh-98766 > /dev/null 2>&1 &\necho $! > pid", then="\n```python\nimport os, time\ntime.sleep(1.2)\nos.kill(int(open('pid').read()), 0)\n```\n")),
    # ---- 互不影响 ----
    "甲：改坏解释器": Case(python("import builtins, json, os, sys\nbuiltins.sum = lambda x: 42\njson.loads = None\nos.listdir = None\nsys.path.clear()\nimport numpy as np\nnp.zeros = None\nleaked = 1\nos.environ['LEAK'] = '1'\nopen('leak.txt', 'w').write('x')")),
    "乙：看不到甲": Case(python("import json, os, time\ntime.sleep(0.3)\nimport numpy as np\nassert sum([1]) == 1 and json.loads('1') == 1 and 'LEAK' not in os.environ\nassert os.listdir() == [] and np.zeros(1).sum() == 0 and 'leaked' not in globals()")),
    "__main__ 与 pickle": Case(python("import pickle, inspect\nfrom dataclasses import dataclass\n\n\n@dataclass\nclass P:\n    x: int\n\n\nassert pickle.loads(pickle.dumps(P(1))) == P(1)\nassert inspect.getsource(P).startswith('@dataclass')\nassert __name__ == '__main__'")),
}  # fmt: skip

SLOW: dict[str, Case] = {
    "死循环": Case(python("x = 0\nwhile True: x += 1  # ←", 'timeout="0.5"'), "R304", says=("0.5 秒",)),
    "C 里的死循环": Case(python("x = 1\nsum(range(10**13))  # ←", 'timeout="0.5"'), "R304"),
    "吞掉一切异常的死循环": Case(python("while True:\n    try:\n        while True: pass  # ←\n    except BaseException: pass", 'timeout="0.5"'), "R304"),
    "吞掉超时后正常结束": Case(python("import time\ntry: time.sleep(9)\nexcept: pass", 'timeout="0.5"'), "R304", 4),
    "关掉闹钟的死循环": Case(python("import signal\nsignal.setitimer(signal.ITIMER_REAL, 0)\nwhile True: pass  # ←", 'timeout="0.5"'), "R304"),
    "锁死": Case(python("import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()  # ←", 'timeout="0.5"'), "R304"),
    "bash 死循环": Case(bash("while :; do :; done", 'timeout="0.5"'), "R304", 4),
    "bash 睡着": Case(bash("sleep 98770", 'timeout="0.5"'), "R304", 4),
    "console 死循环": Case('```console timeout="0.5"\n$ sleep 98771\n```\n', "R304", 2),
    "pycon 死循环": Case('```pycon timeout="0.5"\n>>> while True: pass\n```\n', "R304", 2),
    "pycon 期望异常时超时": Case('```pycon timeout="0.5"\n>>> while True: pass\nTraceback (most recent call last):\nKeyError\n```\n', "R304", 2),
    "停住自己": Case(python("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", 'timeout="0.5"'), "R304", 4),
    "关掉看门狗": Case(python("import faulthandler, signal\nfaulthandler.cancel_dump_traceback_later()\nsignal.setitimer(signal.ITIMER_REAL, 0)\nwhile True: pass", 'timeout="0.5"'), "R304", 4),
    "超时留下的孙进程": Case(bash("sh -c 'sleep 98772; :'", 'timeout="0.5"'), "R304", 4),
    "raises 不掩盖超时": Case(python("while True: pass  # ←", 'timeout="0.5" raises="BaseException"'), "R304"),
    "第二块超时": Case(python("x = 1", then='\n```python timeout="0.5"\nimport time\ntime.sleep(98)  # ←\n```\n'), "R304"),
}  # fmt: skip


def stray_processes() -> list[str]:
    """还活着的、测试页面起的后台进程（参数里带 ``NAP``）。"""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if NAP in command:
            found.append(f"{entry.name}: {command}")
    return found


@dataclass
class Run:
    outcomes: dict[str, Outcome]
    seconds: float
    zygotes: tuple[int, int]
    strays: list[str]


@pytest.fixture(scope="module")
def run_cases(tmp_path_factory, executor):
    """把一组故障页放进同一个项目，一次检查完。"""

    def run(cases: dict[str, Case]) -> Run:
        root = tmp_path_factory.mktemp("execute")
        for file, text in {
            "mkdocs.yml": "site_name: x\n",
            "examples/helper.py": HELPER,
            "docs/old.md": "",
            "examples/lib.py": "def fail(key):\n    return {}[key]\n",
        }.items():
            (root / file).parent.mkdir(exist_ok=True)
            (root / file).write_text(text, "utf-8")
        units = []
        for name, case in cases.items():
            scan = blocks.scan_text(case.page.replace("987", NAP), f"docs/{name}.md", root)
            assert scan.problems == [], scan.problems
            units.append(Unit(scan.file, [b for b in scan.blocks if b.runs]))
        engine = Engine(root, executor=executor)
        probe = Unit("docs/probe.md", blocks.scan_text(python("assert 1"), "docs/probe.md", root).blocks)
        engine.check([probe])
        before = executor._process.pid
        start = time.monotonic()
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("九十秒还没有结束"))
        signal.alarm(90)
        outcomes = {o.unit.file.removeprefix("docs/").removesuffix(".md"): o for o in engine.check(units)}
        seconds = time.monotonic() - start
        signal.alarm(0)
        assert engine.check([Unit("docs/after.md", probe.blocks)])[0].problems == []
        return Run(outcomes, seconds, (before, executor._process.pid), stray_processes())

    return run


@pytest.fixture(scope="module")
def fast(run_cases) -> Run:
    return run_cases(FAST)


@pytest.fixture(scope="module")
def slow(run_cases) -> Run:
    return run_cases(SLOW)


def verdict(outcome: Outcome, case: Case) -> None:
    problems = outcome.problems
    if not case.code:
        assert problems == [], "\n".join(map(str, problems))
        assert len(outcome.payload["blocks"]) == len(outcome.unit.blocks)
        assert sum(len(b["figs"]) for b in outcome.payload["blocks"]) == case.figs
        return
    assert len(problems) == 1, "\n".join(map(str, problems))
    (problem,) = problems
    assert problem.code == case.code, str(problem)
    assert (problem.file, problem.line) == case.where(outcome.unit.file), str(problem)
    assert "\n" not in problem.reason and len(str(problem)) < 50_000
    assert all(text in str(problem) for text in case.says), str(problem)
    assert "/src/zhixing/" not in str(problem) or "退出码 70" in str(problem), str(problem)
    str(problem).encode()


@pytest.mark.parametrize("name", FAST)
def test_fault(fast: Run, name: str) -> None:
    verdict(fast.outcomes[name], FAST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_slow_fault(slow: Run, name: str) -> None:
    verdict(slow.outcomes[name], SLOW[name])


def test_engine_survives_every_fault(fast: Run) -> None:
    assert fast.zygotes[0] == fast.zygotes[1]
    assert fast.strays == []


@pytest.mark.slow
def test_engine_survives_every_timeout(slow: Run) -> None:
    assert slow.zygotes[0] == slow.zygotes[1]
    assert slow.strays == []
    assert slow.seconds < 30


def test_working_directories_are_removed(fast: Run) -> None:
    assert not list(Path(tempfile.gettempdir()).glob("zhixing-*/leak.txt"))


# ── 执行进程 ──────────────────────────────────────────────────────────


def units_of(root: Path, **pages: str) -> list[Unit]:
    scans = [blocks.scan_text(text, f"docs/{name}.md", root) for name, text in pages.items()]
    return [Unit(s.file, [b for b in s.blocks if b.runs]) for s in scans]


def test_isolation_is_reported(site, engine) -> None:
    (outcome,) = engine.check(units_of(site.root, a=python("x = 1")))
    assert outcome.payload["isolation"] in ("namespace", "audit")


def test_host_network_is_out_of_reach(site, engine) -> None:
    """代码块有自己的网络：本机别的进程开的端口也连不上。"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        socket.create_connection(address, timeout=5).close()
        (outcome,) = engine.check(units_of(site.root, a=python(f"import socket\nsocket.create_connection({address}, timeout=5)")))
    if outcome.payload["isolation"] != "namespace":
        pytest.skip("这台机器没有命名空间可用")
    assert [(p.code, p.line) for p in outcome.problems] == [("R301", 5)]


def test_results_keep_the_order_of_units(site, engine) -> None:
    pages = {f"p{i}": python(f"import time\ntime.sleep({(5 - i) / 50})\nprint({i})") for i in range(5)}
    outcomes = engine.check(units_of(site.root, **pages))
    assert [o.payload["blocks"][0]["out"] for o in outcomes] == [f"{i}\n" for i in range(5)]


def test_example_cells_echo_their_last_expression(site, engine) -> None:
    site.write("examples/e.py", "# ---\n# zhixing:\n#   id: e\n#   title: 例\n# ---\n\n# %%\nx = 20\nx + 1\n\n# %%\nNone\n\n# %%\ny = 1\n")
    example = notebook.load(site.root / "examples/e.py", site.root)
    (outcome,) = engine.check([Unit(example.file, example.blocks, "example")])
    assert outcome.problems == [] and [b["out"] for b in outcome.payload["blocks"]] == ["21\n", "", ""]


def test_heavy_imports(site) -> None:
    site.write("examples/lib.py", "from pkg import deep\n")
    site.write("examples/pkg/__init__.py", "")
    site.write("examples/pkg/deep.py", "import torch.nn as nn\n")
    assert heavy_imports(["import lib"], site.root) == ["torch"]
    assert heavy_imports(["from matplotlib import pyplot", "x = "], site.root) == ["matplotlib"]
    assert heavy_imports(["import torchvision, os"], site.root) == []
    (unit,) = units_of(site.root, a="```pycon\n>>> import numpy as np\n>>> for x in y:\n...     import torch\n文字\n```\n")
    assert Engine(site.root).job(unit, {})["imports"] == ["numpy", "torch"]


def test_examples_cannot_break_the_zygote(site, monkeypatch) -> None:
    """与标准库同名的示例、没有装的重模块：只影响用到它们的页。"""
    site.write("examples/selectors.py", "raise SystemExit('不该在 zygote 里执行')\n")
    fake = site.write("fake/torch.py", "raise ImportError('没有装 torch')\n").parent
    original = execute.clean_environment
    monkeypatch.setattr(execute, "clean_environment", lambda root: original(root) | {"PYTHONPATH": str(fake)})
    engine = Engine(site.root, workers=2, cache=False)
    try:
        good, bad = engine.check(units_of(site.root, a=python("x = 1"), b=python("import torch  # ←")))
    finally:
        engine.close()
    assert good.problems == []
    assert [(p.code, p.line) for p in bad.problems] == [("R301", 4)]


def test_pages_do_not_wait_for_imports_they_do_not_use(site) -> None:
    """只用标准库的页与 import 重模块同时进行，分身一个接一个，同时跑的页数不超过执行槽。"""
    stamp = "import time\nstart = time.monotonic()\ntime.sleep(0.6)\nprint(start, time.monotonic())"
    pages = {f"a{i}": python(stamp) for i in range(4)}
    pages |= {f"b{i}": python(f"import numpy\n{stamp}") for i in range(4)}
    pages |= {f"c{i}": python(f"import torch\n{stamp}") for i in range(3)}
    engine = Engine(site.root, workers=3, cache=False)
    try:
        outcomes = engine.check(units_of(site.root, **pages))
    finally:
        engine.close()
    assert [o.problems for o in outcomes] == [[]] * len(pages)
    spans = [tuple(map(float, o.payload["blocks"][0]["out"].split())) for o in outcomes]
    assert max(sum(a <= start < b for a, b in spans) for start, _ in spans) <= 3
    first_torch = min(start for start, _ in spans[8:])
    assert sum(start < first_torch for start, _ in spans[:8]) == 8  # 轻的页不等 torch


def test_zygote_killed_midway_is_reported_and_restarted(site) -> None:
    engine = Engine(site.root, workers=1, cache=False)
    try:
        pages = units_of(site.root, a=python("import time\ntime.sleep(60)"), b=python("x = 1"))
        threading.Timer(0.7, lambda: os.kill(engine.executor._process.pid, signal.SIGKILL)).start()
        outcomes = engine.check(pages)
        assert [[p.code for p in o.problems] for o in outcomes] == [["R305"], ["R305"]]
        assert engine.check(pages[1:])[0].problems == []
    finally:
        engine.close()


def test_killing_the_parent_leaves_nothing_running(site) -> None:
    page = python("import subprocess, time\nsubprocess.Popen(['sleep', '98780'], start_new_session=True)\ntime.sleep(98)")
    site.write("docs/a.md", page.replace("987", NAP))
    parent = subprocess.Popen([sys.executable, "-m", "zhixing.cli", "check"], cwd=site.root, stderr=subprocess.DEVNULL)
    try:
        wait_for(stray_processes)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not stray_processes())


def wait_for(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "等不到"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("action", "allowed"),
    [
        ("open(hole + '/a.txt', 'w')", True),
        ("open(hole + '2', 'w')", False),
        ("os.rename(hole + '/b', root + '/b.txt')", False),
        ("open(root + '/a.txt', 'w')", False),
        ("open(root + '/mkdocs.yml', 'r+')", False),
        ("os.open(root + '/a.txt', os.O_CREAT | os.O_WRONLY)", False),
        ("os.remove(root + '/mkdocs.yml')", False),
        ("os.rename('own.txt', root + '/b.txt')", False),
        ("shutil.rmtree(root + '/docs')", False),
        ("os.mkdir(root.encode() + b'/new')", False),
        ("open(root + '/mkdocs.yml').read()", True),
        ("open('own.txt', 'w').write('x')", True),
        ("socket.create_connection(('192.0.2.1', 80), timeout=1)", False),
        ("s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname())", True),
    ],
)
def test_audit_fallback(site, tmp_path, action, allowed) -> None:
    """没有命名空间可用时（别的系统、受限的容器），Python 层照样拦。"""
    (tmp_path / "own.txt").write_text("x")
    hole = site.root / "docs" / "hole"
    hole.mkdir()
    (hole / "b").touch()
    code = f"import os, shutil, socket, sys\nfrom zhixing import sandbox\nroot, hole = sys.argv[1:]\nsandbox._audit(root, hole)\n{action}"
    done = subprocess.run([sys.executable, "-c", code, site.root, hole], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == allowed, done.stderr
    assert allowed or "PermissionError" in done.stderr
    assert sorted(p.name for p in site.root.iterdir()) == ["docs", "examples", "mkdocs.yml"]


# ── 检查点（mkdocs serve） ────────────────────────────────────────────


@pytest.mark.skipif(sys.platform != "linux", reason="检查点只在 Linux 上")
def test_editing_the_last_block_resumes_from_a_checkpoint(site, monkeypatch) -> None:
    first = "import os, time\ntime.sleep(0.25)\nstate = [1]\npid = os.getpid()"
    engine = Engine(site.root, workers=1, cache=False, checkpoints=True)

    def run(last: str, head: str = first) -> Outcome:
        return engine.check(units_of(site.root, a=python(head, then=f"\n```python\n{last}\n```\n")))[0]

    try:
        assert run("print(state)").payload["resumed"] == 0
        for i in range(8):
            outcome = run(f"state.append({i})\nprint(state, os.getpid() != pid)")
            assert outcome.problems == [], outcome.problems
            assert outcome.payload["blocks"][1]["out"] == f"[1, {i}] True\n"
            assert outcome.payload["resumed"] == 1
        failed = run("1 / 0")
        assert [(p.code, p.line) for p in failed.problems] == [("R301", 11)]
        assert run("print(state)", first + "\nstate = [2]").payload["blocks"][1]["out"] == "[2]\n"
    finally:
        engine.close()
