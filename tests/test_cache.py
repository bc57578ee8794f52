"""缓存：只在该重跑时重跑，绝不拿旧结果冒充新结果；坏了、没了、被杀了，结论都一样。"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zhixing import blocks, cache, cli
from zhixing.cache import Cache, file_hash, write_atomic
from zhixing.engine import Engine, Outcome, Unit
from zhixing.zygote import HEAVY

PAGE = """\
正文

```python
import os
import lib

data = open(os.environ["PYTHONPATH"] + "/../data/in.txt").read().strip()
print(lib.value(), data)
```

```text title="输出"
1 甲
```
"""


@pytest.fixture
def project(site):
    site.write("examples/lib.py", "from inner import core\n\n\ndef value():\n    return core.VALUE\n")
    site.write("examples/inner/__init__.py", "")
    site.write("examples/inner/core.py", "VALUE = 1\n")
    site.write("examples/unused.py", "x = 1\n")
    site.write("data/in.txt", "甲\n")
    site.write("docs/p.md", PAGE)
    return site


def check(engine: Engine, file: str = "docs/p.md") -> Outcome:
    scan = blocks.scan(engine.root / file, engine.root)
    assert scan.problems == []
    return engine.check([Unit(scan.file, [b for b in scan.blocks if b.runs])])[0]


def codes(outcome: Outcome) -> list[str]:
    return [p.code for p in outcome.problems]


def edit(project, file: str, old: str, new: str) -> None:
    path = project.root / file
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


# ── 何时重跑 ──────────────────────────────────────────────────────────


def test_second_check_does_not_run(project, engine) -> None:
    first, second = check(engine), check(engine)
    assert (first.cached, second.cached) == (False, True)
    assert codes(first) == codes(second) == []
    assert first.payload["blocks"] == second.payload["blocks"]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("docs/p.md", "正文", "正文改了\n\n多出两行"),
        ("docs/p.md", "```python", '```python title="a.py"'),
        ("docs/p.md", "```python", '```python timeout="60"'),
        ("docs/p.md", "```\n\n```text", "```\n\n\n```text"),
        ("examples/unused.py", "1", "2"),
        ("mkdocs.yml", "测试", "改名"),
    ],
    ids=["正文", "标题选项", "放宽时限", "空行", "没用到的模块", "站点设置"],
)
def test_edit_that_does_not_matter_keeps_the_cache(project, engine, file, old, new) -> None:
    check(engine)
    edit(project, file, old, new)
    assert check(engine).cached and codes(check(engine)) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        ("docs/p.md", "print(", "print( ", "代码、选项或环境变了"),
        ("docs/p.md", "```python", '```python memory="1GiB"', "代码、选项或环境变了"),
        ("docs/p.md", "正文", "```bash\ntrue\n```", "代码、选项或环境变了"),
        ("examples/lib.py", "return core.VALUE", "return core.VALUE + 0", "依赖 examples/lib.py 变了"),
        ("examples/inner/core.py", "1", "1 ", "依赖 examples/inner/core.py 变了"),
        ("data/in.txt", "甲", "甲 ", "依赖 data/in.txt 变了"),
    ],
    ids=["代码", "内存", "加一块", "import 的模块", "间接 import 的模块", "打开过的文件"],
)
def test_edit_that_matters_reruns(project, engine, file, old, new, reason) -> None:
    check(engine)
    edit(project, file, old, new)
    outcome = check(engine)
    assert not outcome.cached and outcome.why == reason
    assert codes(outcome) == [] and check(engine).cached


def test_edited_dependency_changes_the_verdict(project, engine) -> None:
    check(engine)
    edit(project, "examples/inner/core.py", "1", "2")
    outcome = check(engine)
    assert codes(outcome) == ["R302"] and "+2 甲" in outcome.problems[0].detail


def test_edit_that_keeps_size_and_mtime_reruns(project, engine) -> None:
    """判断靠内容的哈希，不靠大小与修改时间。"""
    path = project.root / "examples/inner/core.py"
    before = path.stat()
    check(engine)
    path.write_text("VALUE = 2\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert codes(check(engine)) == ["R302"]


def test_touching_a_dependency_keeps_the_cache(project, engine) -> None:
    check(engine)
    os.utime(project.root / "examples/lib.py")
    assert check(engine).cached


def test_deleted_and_created_dependencies_rerun(project, engine) -> None:
    project.write(
        "docs/p.md",
        "```python\nimport os\ntry:\n    print(open(os.environ['PYTHONPATH'] + '/../data/maybe.txt').read())\n"
        "except FileNotFoundError:\n    print('没有')\n```\n",
    )
    assert check(engine).payload["blocks"][0]["out"] == "没有\n"
    assert check(engine).cached
    project.write("data/maybe.txt", "有了")
    assert check(engine).payload["blocks"][0]["out"] == "有了\n"
    (project.root / "data/maybe.txt").unlink()
    assert check(engine).payload["blocks"][0]["out"] == "没有\n"


@pytest.mark.parametrize(
    "code",
    [
        'python3 -c "import lib; print(lib.value())"',
        'cat "$PYTHONPATH/inner/core.py"',
    ],
)
def test_file_read_by_a_subprocess_reruns(project, engine, code) -> None:
    project.write("docs/p.md", f"```bash\n{code}\n```\n")
    before = check(engine).payload["blocks"][0]["out"]
    assert check(engine).cached
    edit(project, "examples/inner/core.py", "1", "2")
    outcome = check(engine)
    assert not outcome.cached and outcome.payload["blocks"][0]["out"] == before.replace("1", "2")


def test_module_loaded_from_bytecode_reruns(project, engine) -> None:
    """经 importlib 导入、又有现成的字节码：源文件没有被打开过，但它仍是依据。"""
    import py_compile

    py_compile.compile(str(project.root / "examples/inner/core.py"))
    project.write(
        "docs/p.md", '```python\nimport importlib\nprint(importlib.import_module("inner.core").VALUE)\n```\n'
    )
    assert check(engine).payload["blocks"][0]["out"] == "1\n"
    assert check(engine).cached
    edit(project, "examples/inner/core.py", "1", "2  # 长度也变")
    assert check(engine).payload["blocks"][0]["out"] == "2\n"


def test_file_read_by_a_forked_child_reruns(project, engine) -> None:
    project.write(
        "docs/p.md",
        "```python\nimport multiprocessing as mp\n\n\ndef work(_):\n    import lib\n    return lib.value()\n\n\n"
        "with mp.get_context('fork').Pool(1) as pool:\n    print(pool.map(work, [0]))\n```\n",
    )
    assert check(engine).payload["blocks"][0]["out"] == "[1]\n"
    edit(project, "examples/inner/core.py", "1", "2")
    assert check(engine).payload["blocks"][0]["out"] == "[2]\n"


def test_included_file_reruns(project, engine) -> None:
    project.write("examples/shown.py", "# --8<-- [start:a]\nx = 1\n# --8<-- [end:a]\ny = 1\n")
    project.write("docs/p.md", '```python\n--8<-- "examples/shown.py:a"\n```\n\n```python\nassert x == 1\n```\n')
    check(engine)
    edit(project, "examples/shown.py", "y = 1", "y = 2")
    assert check(engine).cached
    edit(project, "examples/shown.py", "x = 1", "x = 2")
    assert codes(check(engine)) == ["R301"]


def test_expected_output_is_judged_without_running(project, engine) -> None:
    check(engine)
    edit(project, "docs/p.md", "1 甲\n", "1 乙\n")
    outcome = check(engine)
    assert outcome.cached and codes(outcome) == ["R302"]
    edit(project, "docs/p.md", "1 乙\n", "... 甲\n")
    assert check(engine).cached and codes(check(engine)) == []


def test_fig_is_judged_without_running(project, engine) -> None:
    check(engine)
    edit(project, "docs/p.md", "```python", '```python fig="看"')
    outcome = check(engine)
    assert outcome.cached and codes(outcome) == ["R307"]


def test_raises_message_is_judged_without_running(project, engine) -> None:
    project.write("docs/p.md", "```python raises=\"ValueError\"\nraise ValueError('秩')\n```\n")
    check(engine)
    edit(project, "docs/p.md", "ValueError\"\n", "ValueError: 维\"\n")
    outcome = check(engine)
    assert outcome.cached and codes(outcome) == ["R303"]


def test_tightened_timeout_reruns(project, engine) -> None:
    page = "```python timeout=\"5\"\nimport time\ntime.sleep(0.3)\n```\n"
    project.write("docs/p.md", page)
    assert codes(check(engine)) == []
    project.write("docs/p.md", page.replace('"5"', '"4"'))
    assert check(engine).cached
    project.write("docs/p.md", page.replace('"5"', '"0.1"'))
    assert codes(check(engine)) == ["R304"]


def test_page_moved_to_another_name_runs_again(project, engine) -> None:
    check(engine)
    (project.root / "docs/p.md").rename(project.root / "docs/q.md")
    assert not check(engine, "docs/q.md").cached


def test_dependency_edited_while_running_is_not_cached(project, engine, tmp_path) -> None:
    """跑到一半有人改了它：结果是旧内容的，不能记在新内容名下。"""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    project.write("docs/p.md", f"```python\nimport lib\nopen({str(gate)!r}).read()\nprint(lib.value())\n```\n")

    def author() -> None:
        with open(gate, "w"):  # 打开的那一刻，页面已经 import 过 lib
            edit(project, "examples/inner/core.py", "1", "2")

    editing = threading.Thread(target=author)
    editing.start()
    first = check(engine)
    editing.join()
    assert first.payload["blocks"][0]["out"] == "1\n"
    assert codes(first) == [] and not engine.cache.path("docs/p.md").exists()


# ── 失败 ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "page",
    [
        "```python\n1 / 0\n```\n",
        "```python\nimport os\nos._exit(1)\n```\n",
        "```bash\nfalse\n```\n",
        "```python raises=\"KeyError\"\n1 / 0\n```\n",
        "```pycon\n>>> 1\n2\n```\n",
        "```console\n$ echo a\nb\n```\n",
        "```python\nprint('x' * 300_000)\n```\n",
        "```python\nx = 1\n```\n\n```pycon\n>>> x\n2\n```\n",
        "```python timeout=\"0.1\"\nimport time; time.sleep(3)\n```\n",
    ],
    ids=["异常", "进程死", "bash", "raises 不符", "pycon", "console", "输出太大", "最后一块 pycon", "超时"],
)
def test_failure_is_never_cached(project, engine, page) -> None:
    project.write("docs/p.md", page)
    first, second = check(engine), check(engine)
    assert codes(first) == codes(second) != []
    assert not first.cached and not second.cached
    assert not engine.cache.path("docs/p.md").exists()


def test_failure_after_success_does_not_leave_the_old_result(project, engine) -> None:
    check(engine)
    edit(project, "examples/inner/core.py", "VALUE = 1", "raise RuntimeError")
    assert codes(check(engine)) == codes(check(engine)) == ["R301"]
    edit(project, "examples/inner/core.py", "raise RuntimeError", "VALUE = 1")
    assert codes(check(engine)) == []


# ── 损坏 ──────────────────────────────────────────────────────────────


def corruptions(data: bytes):
    middle = len(data) // 2
    yield "空文件", b""
    yield "截断", data[:middle]
    yield "只剩开头", data[:1]
    yield "换成别的 JSON", b"[1, 2]"
    yield "换成 null", b"null"
    yield "不是 UTF-8", b"\xff" + data
    yield "接了尾巴", data + b"}"
    yield "缺字段", json.dumps({**json.loads(data), "payload": None}).encode()
    yield "依赖换成列表", json.dumps({**json.loads(data), "deps": []}).encode()
    yield "依赖清空", json.dumps({**json.loads(data), "deps": {}}).encode()
    entry = json.loads(data)
    entry["payload"]["blocks"][0]["out"] = "9 甲\n"
    yield "改了输出", json.dumps(entry).encode()
    rng = random.Random(0)
    for _ in range(20):
        at = rng.randrange(len(data))
        yield f"第 {at} 字节", data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def test_corrupted_cache_heals(project, engine) -> None:
    path = engine.cache.path("docs/p.md")
    check(engine)
    good = path.read_bytes()
    for name, data in corruptions(good):
        path.write_bytes(data)
        outcome = check(engine)
        assert codes(outcome) == [], name
        assert outcome.payload["blocks"][0]["out"] == "1 甲\n", name
        if not outcome.cached:  # 碰巧改在无关紧要处也只能是逐字节等价的结果
            assert check(engine).cached, name


def test_cache_replaced_by_a_directory_heals(project, engine) -> None:
    path = engine.cache.path("docs/p.md")
    check(engine)
    path.unlink()
    (path / "sub").mkdir(parents=True)
    assert codes(check(engine)) == [] and check(engine).cached


def test_unwritable_cache_does_not_change_the_verdict(project, engine, capsys) -> None:
    directory = engine.cache.directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.write_text("占位")
    outcome = check(engine)
    assert codes(outcome) == [] and not check(engine).cached
    assert "写不了缓存" in capsys.readouterr().err


def test_deleting_the_cache_changes_nothing_but_time(project, engine) -> None:
    first = check(engine)
    engine.cache.path("docs/p.md").unlink()
    second = check(engine)
    assert not second.cached
    for entry in (*first.payload["blocks"], *second.payload["blocks"]):
        entry.pop("seconds")
    assert first.payload == second.payload


def test_no_cache_option_ignores_but_refreshes(project, engine, executor) -> None:
    check(engine)
    fresh = Engine(project.root, executor=executor, cache=False)
    assert not check(fresh).cached
    assert check(engine).cached


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_load_never_raises(tmp_path_factory, data) -> None:
    root = tmp_path_factory.mktemp("load")
    cache = Cache(root / "c", root)
    cache.path("docs/x.md").parent.mkdir()
    cache.path("docs/x.md").write_bytes(data)
    assert cache.load("docs/x.md", "k")[0] is None


# ── 中途被杀、并发 ────────────────────────────────────────────────────

_WRITER = """
import sys
from pathlib import Path
from zhixing.cache import Cache
cache = Cache(Path(sys.argv[1]) / "c", Path(sys.argv[1]))
print("go", flush=True)
while True:
    for letter in "ab":
        cache.store("docs/x.md", "k", {"blocks": [letter * 3_000_000]}, {})
"""


@pytest.mark.slow
def test_killed_while_writing_leaves_no_bad_result(tmp_path) -> None:
    cache = Cache(tmp_path / "c", tmp_path)
    rng = random.Random(0)
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, tmp_path], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.15))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        payload, why = cache.load("docs/x.md", "k")
        assert why in ("没有缓存", "代码、环境与依赖都没变")
        assert payload is None or payload["blocks"][0] in ("a" * 3_000_000, "b" * 3_000_000)


def test_store_failure_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    write_atomic(tmp_path / "f", "旧")

    def fail(*_: object) -> None:
        raise OSError("磁盘满")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="磁盘满"):
        write_atomic(tmp_path / "f", "新")
    monkeypatch.undo()
    assert (tmp_path / "f").read_text("utf-8") == "旧" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_two_processes_check_the_same_project(project) -> None:
    for i in range(6):
        project.write(f"docs/p{i}.md", f"```python\nimport lib\nprint({i} + lib.value())\n```\n\n```text title=\"输出\"\n{i + 1}\n```\n")
    command = [sys.executable, "-m", "zhixing.cli", "check", "-j", "1"]

    def both() -> list[tuple[int, str]]:
        running = [subprocess.Popen(command, cwd=project.root, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        return [(p.communicate(timeout=60)[1], p.returncode)[::-1] for p in running]

    for code, text in both():
        assert code == 0 and "7 块跑过" in text, text
    edit(project, "examples/inner/core.py", "1", "2")
    for code, text in both():
        assert code == 1 and text.count("R302") == 7, text
    edit(project, "examples/inner/core.py", "2", "1")
    assert [code for code, _ in both()] == [0, 0]
    assert not list((project.root / ".cache/zhixing/results").glob(".*.tmp"))


def test_interrupted_check_leaves_a_usable_cache(project) -> None:
    """跑到一半被 SIGKILL：已完成的页可用，没完成的重跑。"""
    project.write("docs/slow.md", "```python\nimport time\ntime.sleep(60)\n```\n")
    command = [sys.executable, "-m", "zhixing.cli", "check"]
    running = subprocess.Popen(command, cwd=project.root, stderr=subprocess.PIPE, text=True)
    assert "docs/p.md" in running.stderr.readline()
    time.sleep(0.1)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    running.stderr.close()
    (project.root / "docs/slow.md").unlink()
    done = subprocess.run(command, cwd=project.root, capture_output=True, text=True)
    assert done.returncode == 0 and "1 块用缓存" in done.stderr


# ── 装的包 ────────────────────────────────────────────────────────────


def test_only_packages_the_page_uses_matter(site, engine, monkeypatch, tmp_path) -> None:
    """装一个不相干的包不重跑；用到的升级了、想用却没有的装上了，要重跑。"""
    site.write("docs/p.md", "```python\nimport safetensors\ntry:\n    import nosuch\nexcept ImportError:\n    nosuch = None\n```\n")
    check(engine)
    assert check(engine).cached
    original = cache.version_of
    monkeypatch.setattr(cache, "version_of", lambda name: "9.9" if name == "pytest" else original(name))
    assert check(engine).cached
    monkeypatch.setattr(cache, "version_of", lambda name: "9.9" if name == "safetensors" else original(name))
    again = check(engine)
    assert (again.cached, again.why) == (False, "包 safetensors 变了")
    monkeypatch.setattr(cache, "version_of", original)
    (tmp_path / "nosuch.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert check(engine).why == "包 nosuch 变了"


def test_a_page_that_starts_processes_depends_on_every_package(site, engine, monkeypatch) -> None:
    site.write("docs/p.md", "```bash\ntrue\n```\n")
    check(engine)
    assert check(engine).cached
    monkeypatch.setattr(cache, "_installed", lambda: "另一套")
    assert check(engine).why == "包 （装了的全部） 变了"


def test_every_preloaded_package_is_in_the_key() -> None:
    """页进程 fork 出来就带着的包不会再触发 import：它们的版本要在键里。"""
    assert set(cache._PRELOADED) == HEAVY.keys()


# ── zhixing why ───────────────────────────────────────────────────────


def test_why_tells_the_truth(project, engine, monkeypatch, capsys) -> None:
    monkeypatch.chdir(project.root)

    def why() -> str:
        assert cli.main(["why", "docs/p.md"]) == 0
        return capsys.readouterr().out.strip()

    assert why() == "docs/p.md: 会重跑：没有缓存"
    check(engine)
    assert why() == "docs/p.md: 不用重跑：代码、环境与依赖都没变"
    edit(project, "docs/p.md", "print(", "print( ")
    assert why() == "docs/p.md: 会重跑：代码、选项或环境变了"
    edit(project, "docs/p.md", "print( ", "print(")
    edit(project, "data/in.txt", "甲", "乙")
    assert why() == "docs/p.md: 会重跑：依赖 data/in.txt 变了"
    edit(project, "data/in.txt", "乙", "甲")
    engine.cache.path("docs/p.md").write_bytes(b"{")
    assert why() == "docs/p.md: 会重跑：缓存文件损坏"


def test_why_for_an_example(project, monkeypatch, capsys) -> None:
    project.write("examples/e.py", "# ---\n# zhixing:\n#   id: e\n#   title: 例\n# ---\n\n# %%\nx = 1\n")
    monkeypatch.chdir(project.root)
    assert cli.main(["why", "examples/e.py"]) == 0
    assert capsys.readouterr().out.strip() == "examples/e.py: 会重跑：没有缓存"
    assert cli.main(["check", "examples/e.py"]) == 0
    capsys.readouterr()
    assert cli.main(["why", "examples/e.py"]) == 0
    assert "不用重跑" in capsys.readouterr().out


def test_file_hash(tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    assert file_hash(tmp_path / "a") == file_hash(tmp_path / "a") != file_hash(tmp_path / "b")
    assert file_hash(tmp_path / "b") is file_hash(tmp_path) is file_hash(tmp_path / "a" / "b") is None
