"""示例之间的依赖与产物文件：按有向图执行，产物按内容寻址，丢了坏了就重来，断点能续。"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from zhixing import cli
from zhixing.engine import Engine, Outcome
from zhixing.execute import ZygoteExecutor
from zhixing.project import Project
from zhixing.questions import template


def example(name: str, code: str, **header: object) -> str:
    fields = "".join(f"#   {key}: {value}\n" for key, value in header.items())
    return f"# ---\n# zhixing:\n#   id: {name}\n#   title: {name}\n{fields}# ---\n\n# %%\nimport zhixing\n{code}"


BASE = example("base", 'zhixing.output_path("w.bin").write_bytes(b"1" * 10)\n')
DOWN = example("down", 'print(zhixing.input_path("base/w.bin").read_text())\n', needs="[base]")


@pytest.fixture
def pair(site):
    site.write("examples/base.py", BASE)
    site.write("examples/down.py", DOWN)
    return site


def check(engine: Engine) -> dict[str, Outcome]:
    """检查全站；键是示例 id 或页面路径。"""
    project = Project.load(engine.root)
    project.execute(engine)
    found = {name.removeprefix("examples/").removesuffix(".py"): o for name, o in project.outcomes.items()}
    check.problems = [(p.file, p.line, p.code) for p in sorted(set(project.problems))]
    check.reasons = " ".join(p.reason for p in project.problems)
    return found


def out(outcome: Outcome) -> str:
    return "".join(b["out"] for b in outcome.payload["blocks"])


def ran(found: dict[str, Outcome]) -> set[str]:
    return {name for name, outcome in found.items() if not outcome.cached}


# ── 次序与并行 ────────────────────────────────────────────────────────


def test_upstream_runs_first_and_its_file_arrives(pair, engine) -> None:
    found = check(engine)
    assert check.problems == [] and out(found["down"]) == "1111111111\n"
    assert ran(check(engine)) == set()


def test_diamond_runs_in_order_and_sides_in_parallel(site, engine, tmp_path) -> None:
    """名字的字母序与依赖序相反；两侧要同时在跑，才能互相等到对方。"""
    log, left, right = (tmp_path / n for n in ("log", "left", "right"))
    for fifo in (left, right):
        os.mkfifo(fifo)
    note = f'open({str(log)!r}, "a").write("%s ")\n'
    site.write("examples/z.py", example("z", note % "z" + 'zhixing.output_path("a").write_text("z")\n'))
    meet = 'open({!r}, "w").write("x")\nopen({!r}).read()\n'
    meets = {"m": meet.format(str(left), str(right)), "n": 'open({!r}).read()\nopen({!r}, "w").write("x")\n'.format(str(left), str(right))}
    for name in "mn":
        code = note % name + meets[name] + f'zhixing.output_path("a").write_text(zhixing.input_path("z/a").read_text() + "{name}")\n'
        site.write(f"examples/{name}.py", example(name, code, needs="[z]", timeout=20))
    code = note % "a" + 'print(*(zhixing.input_path(f"{n}/a").read_text() for n in "mn"))\n'
    site.write("examples/a.py", example("a", code, needs="[m, n]"))
    found = check(engine)
    assert check.problems == [] and out(found["a"]) == "zm zn\n"
    order = log.read_text().split()
    assert order[0] == "z" and order[3] == "a" and set(order[1:3]) == {"m", "n"}


def test_the_one_others_wait_for_goes_first(site, tmp_path) -> None:
    """只有一个执行槽：没有下游的排在后面，哪怕它早就可以跑、有下游的后来才轮到。"""
    log = tmp_path / "log"
    note = f'open({str(log)!r}, "a").write("%s ")\n'
    for name, needs in {"a": "[]", "b": "[]", "y": "[]", "x": "[y]", "c": "[x]"}.items():
        site.write(f"examples/{name}.py", example(name, note % name + 'zhixing.output_path("a").write_text("1")\n', needs=needs))
    one = Engine(site.root, workers=1)
    try:
        check(one)
    finally:
        one.close()
    assert check.problems == [] and log.read_text().split() == ["y", "x", "a", "b", "c"]


def test_unrelated_units_do_not_wait(site, engine, tmp_path) -> None:
    """上游还在跑的时候，与它无关的页要能跑完。"""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    site.write("examples/base.py", example("base", f'open({str(gate)!r}).read()\nzhixing.output_path("w.bin").write_text("x")\n', timeout=20))
    site.write("examples/down.py", DOWN)
    site.write("docs/free.md", f'```python timeout="20"\nopen({str(gate)!r}, "w").write("x")\n```\n')
    check(engine)
    assert check.problems == []


# ── 上游失败 ──────────────────────────────────────────────────────────


def test_downstream_of_a_failure_does_not_run(pair, engine, tmp_path) -> None:
    mark = tmp_path / "ran"
    pair.write("examples/base.py", example("base", "1 / 0\n"))
    pair.write("examples/down.py", example("down", f'open({str(mark)!r}, "w")\n', needs="[base]"))
    pair.write("examples/last.py", example("last", f'open({str(mark)!r}, "w")\n', needs="[down]"))
    found = check(engine)
    assert check.problems == [("examples/base.py", 9, "R301"), ("examples/down.py", 5, "E603"), ("examples/last.py", 5, "E603")]
    assert "因上游 base 没有成功" in check.reasons and "因上游 down 没有成功" in check.reasons
    assert not mark.exists() and found["down"].payload["blocks"] == []
    pair.write("examples/base.py", BASE)
    check(engine)
    assert check.problems == []


def test_missing_upstream_and_cycle(site, engine) -> None:
    site.write("examples/a.py", example("a", "x = 1\n", needs="[nope]"))
    check(engine)
    assert check.problems == [("examples/a.py", 5, "E602")]
    site.write("examples/a.py", example("a", "x = 1\n", needs="[b]"))
    site.write("examples/b.py", example("b", "x = 1\n", needs="[a]"))
    site.write("examples/c.py", example("c", "x = 1\n", needs="[b]"))
    check(engine)
    assert {code for _, _, code in check.problems} == {"E602", "E603"} and "成环" in check.reasons


def test_unreadable_upstream_is_the_only_root_cause(site, engine) -> None:
    site.write("examples/base.py", BASE.replace("title", "titel"))
    site.write("examples/down.py", DOWN)
    check(engine)
    assert check.problems == [("examples/base.py", 1, "E602"), ("examples/down.py", 5, "E603")]


# ── 页面 ──────────────────────────────────────────────────────────────

PAGE = template("control", "x").replace("refs:", "needs: [base]\nrefs:") + (
    '\n```python\nimport zhixing\nprint(zhixing.input_path("base/w.bin").read_text())\n```\n'
)


def test_page_reads_a_product(pair, engine) -> None:
    pair.write("docs/control/x.md", PAGE)
    found = check(engine)
    assert check.problems == [] and out(found["docs/control/x.md"]) == "1111111111\n"
    pair.write("examples/base.py", BASE.replace('b"1"', 'b"2"'))
    assert ran(check(engine)) == {"base", "down", "docs/control/x.md"}


@pytest.mark.parametrize(("needs", "says"), [("[nope]", "不存在：nope"), ("base", "应是文字列表"), ("[1]", "应是文字列表")])
def test_page_needs_are_checked(pair, engine, needs, says) -> None:
    page = template("control", "x").replace("refs:", f"needs: {needs}\nrefs:")
    pair.write("docs/control/x.md", page)
    check(engine)
    line = page.split("\n").index(f"needs: {needs}") + 1
    assert ("docs/control/x.md", line, "F102") in check.problems and says in check.reasons


def test_checking_one_page_brings_its_upstream(pair, monkeypatch, capsys) -> None:
    pair.write("docs/control/x.md", PAGE)
    monkeypatch.chdir(pair.root)
    assert cli.main(["check", "docs/control/x.md"]) == 0
    err = capsys.readouterr().err
    assert "examples/base.py" in err and "examples/down.py" not in err
    assert cli.main(["update", "docs/control/x.md"]) == 0


def test_mutate_uses_the_cached_product(pair, monkeypatch, capsys) -> None:
    page = PAGE.replace("print(zhixing", "size = 5 + len(zhixing").replace("read_text())", "read_text())\nassert size == 15")
    pair.write("docs/control/x.md", page)
    monkeypatch.chdir(pair.root)
    assert cli.main(["check"]) == 0
    before = (pair.root / ".cache/zhixing/results/examples__base.py.json").stat().st_mtime_ns
    assert cli.main(["mutate", "docs/control/x.md"]) == 0, capsys.readouterr()
    assert (pair.root / ".cache/zhixing/results/examples__base.py.json").stat().st_mtime_ns == before


# ── 何时重跑 ──────────────────────────────────────────────────────────


def test_same_bytes_do_not_rerun_downstream(pair, engine) -> None:
    check(engine)
    pair.write("examples/base.py", BASE.replace("* 10", "* (5 + 5)"))
    assert ran(check(engine)) == {"base"}


def test_changed_bytes_rerun_downstream(pair, engine) -> None:
    check(engine)
    pair.write("examples/base.py", BASE.replace("* 10", "* 11"))
    found = check(engine)
    assert ran(found) == {"base", "down"} and found["down"].why == "上游 base 的产物 w.bin 变了"
    assert out(found["down"]) == "1" * 11 + "\n"


def test_unread_product_does_not_matter(pair, engine) -> None:
    pair.write("examples/base.py", BASE + 'zhixing.output_path("other").write_text("a")\n')
    check(engine)
    pair.write("examples/base.py", BASE + 'zhixing.output_path("other").write_text("b")\n')
    assert ran(check(engine)) == {"base"}


def test_product_read_by_a_subprocess_counts(pair, engine) -> None:
    code = (
        "import subprocess, sys\n"
        "code = \"import zhixing; print(zhixing.input_path('base/w.bin').read_text())\"\n"
        "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)\n"
    )
    pair.write("examples/down.py", example("down", code, needs="[base]"))
    found = check(engine)
    assert "1111111111" in out(found["down"]) and check.problems == []
    assert found["down"].payload["inputs"] == {"base/w.bin": found["base"].payload["files"]["w.bin"]}
    pair.write("examples/base.py", BASE.replace('b"1"', 'b"2"'))
    assert "2222222222" in out(check(engine)["down"])


@pytest.mark.skipif(sys.platform != "linux", reason="检查点只在 Linux 上")
def test_checkpoint_is_not_resumed_over_a_new_product(pair) -> None:
    first = 'import time, zhixing\nw = zhixing.input_path("base/w.bin").read_text()\ntime.sleep(0.3)'
    page = template("control", "x").replace("refs:", "needs: [base]\nrefs:")
    engine = Engine(pair.root, workers=1, checkpoints=True)

    def run(last: str) -> dict:
        pair.write("docs/control/x.md", page + f"\n```python\n{first}\n```\n\n```python\n{last}\n```\n")
        payload = check(engine)["docs/control/x.md"].payload
        assert check.problems == []
        return payload

    try:
        run("print(w)")
        resumed = run("print(w, 1)")
        assert resumed["resumed"] and resumed["blocks"][-1]["out"] == "1111111111 1\n"
        assert resumed["inputs"].keys() == {"base/w.bin"}
        pair.write("examples/base.py", BASE.replace('b"1"', 'b"2"'))
        fresh = run("print(w, 2)")
        assert not fresh["resumed"] and fresh["blocks"][-1]["out"] == "2222222222 2\n"
    finally:
        engine.close()


def test_missing_product_is_remembered(pair, engine) -> None:
    code = 'try:\n    zhixing.input_path("base/late")\n    print("有")\nexcept ValueError:\n    print("没有")\n'
    pair.write("examples/down.py", example("down", code, needs="[base]"))
    assert out(check(engine)["down"]) == "没有\n"
    pair.write("examples/base.py", BASE + 'zhixing.output_path("late").write_text("x")\n')
    assert out(check(engine)["down"]) == "有\n"


@pytest.mark.parametrize("damage", ["删掉", "截断", "改一个字节", "换成目录"])
def test_lost_or_damaged_product_is_made_again(pair, engine, damage) -> None:
    check(engine)
    (path,) = (pair.root / ".cache/zhixing/files").iterdir()
    assert path.stat().st_mode & 0o222 == 0
    path.chmod(0o644)
    if damage == "截断":
        path.write_bytes(b"1" * 9)
    elif damage == "改一个字节":
        path.write_bytes(b"1" * 9 + b"2")
    else:
        path.unlink()
        if damage == "换成目录":
            path.mkdir()
    assert engine.explain(Project.load(pair.root).units()) == {
        "examples/base.py": ("会重跑", "产物文件 w.bin 丢了或损坏"),
        "examples/down.py": ("不一定", "上游 base 要先重跑，产物变了它才跟着重跑"),
    }
    found = check(engine)
    assert ran(found) == {"base"} and check.problems == [] and path.read_bytes() == b"1" * 10
    assert ran(check(engine)) == set()


def test_why_names_the_upstream(pair, engine, executor, monkeypatch, capsys) -> None:
    monkeypatch.chdir(pair.root)
    check(engine)
    pair.write("examples/base.py", BASE.replace("* 10", "* 11"))
    units = [u for u in Project.load(pair.root).units() if u.file == "examples/base.py"]
    assert [p for o in engine.check(units) for p in o.problems] == []
    assert cli.main(["why", "examples/down.py"]) == 0
    assert "examples/down.py: 会重跑：上游 base 的产物 w.bin 变了" in capsys.readouterr().out


def test_needs_and_threads_are_part_of_the_key(pair, engine) -> None:
    units = {u.file: u for u in Project.load(pair.root).units()}
    keys = [engine.unit_key(units["examples/down.py"])]
    for change in ("needs: []", "needs: [base]\n#   threads: 2"):
        pair.write("examples/down.py", DOWN.replace("needs: [base]", change))
        keys.append(engine.unit_key({u.file: u for u in Project.load(pair.root).units()}["examples/down.py"]))
    assert len(set(keys)) == 3


def test_unused_files_are_swept_only_when_old(pair, engine) -> None:
    check(engine)
    files = pair.root / ".cache/zhixing/files"
    (old,) = files.iterdir()
    fresh = files / ("a" * 64)
    fresh.write_text("别的构建刚收下的")
    os.utime(old, (0, 0))
    os.utime(fresh, (0, 0))
    pair.write("examples/base.py", BASE.replace("* 10", "* 11"))
    fresh.touch()
    check(engine)
    assert fresh.exists() and not old.exists() and len(list(files.iterdir())) == 2
    (used,) = {p for p in files.iterdir()} - {fresh}
    os.utime(used, (0, 0))  # 再旧，有结果引用就留着
    pair.write("examples/other.py", example("other", 'zhixing.output_path("x").write_text("x")\n'))
    assert ran(check(engine)) == {"other"} and used.exists()


# ── 用错 ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ('zhixing.input_path("other/w.bin")', "没有在 needs 里声明上游示例 'other'（已声明：base）"),
        ('zhixing.input_path("base/x.bin")', "上游示例 'base' 没有产物文件 'x.bin'，现有：w.bin"),
        ('zhixing.input_path("w.bin")', "应写成 上游示例/产物文件名"),
        ('zhixing.input_path("base/../w")', "应写成 上游示例/产物文件名"),
        ('zhixing.output_path("a/b")', "只能用字母、数字"),
        ('zhixing.output_path("../x")', "只能用字母、数字"),
        ('zhixing.output_path("a.tar.gz")', "只能用字母、数字"),
        ('zhixing.output_path("")', "只能用字母、数字"),
        ('zhixing.output_path("a"); zhixing.output_path("a")', "已经要过一次"),
        ('zhixing.input_path("base/w.bin").write_text("x")', "Read-only"),
    ],
)
def test_misuse_says_what_to_do(pair, engine, code, says) -> None:
    pair.write("examples/down.py", example("down", code + "\n", needs="[base]"))
    check(engine)
    assert check.problems == [("examples/down.py", 10, "R301")] and says in check.reasons


def test_promised_file_must_be_written(site, engine) -> None:
    site.write("examples/base.py", example("base", 'x = 1\nzhixing.output_path("w.bin")\n\n\n# %%\ny = 2\n'))
    check(engine)
    assert check.problems == [("examples/base.py", 10, "R309")] and "没有把产物文件 'w.bin' 写成普通文件" in check.reasons
    assert not engine.cache.path("examples/base.py").exists()


def test_directory_or_link_is_not_a_product(site, engine) -> None:
    site.write("examples/base.py", example("base", 'zhixing.output_path("w").mkdir()\n'))
    check(engine)
    assert check.problems == [("examples/base.py", 9, "R309")]
    site.write("examples/base.py", example("base", 'zhixing.output_path("w").symlink_to("/etc/passwd")\n'))
    check(engine)
    assert check.problems == [("examples/base.py", 9, "R309")]


@pytest.mark.parametrize("call", ['output_path("w")', "scratch_path()"])
def test_pages_cannot_produce(site, engine, call) -> None:
    site.write("docs/a.md", f"```python\nimport zhixing\nzhixing.{call}\n```\n")
    check(engine)
    assert check.problems == [("docs/a.md", 3, "R301")] and "只有示例" in check.reasons


def test_same_name_for_figure_metric_and_file(site, engine) -> None:
    site.write("examples/base.py", example("base", 'zhixing.metric("w", 1)\nzhixing.output_path("w").write_text("x")\n'))
    found = check(engine)
    assert check.problems == [] and found["base"].payload["metrics"] == {"w": 1} and set(found["base"].payload["files"]) == {"w"}


def test_failed_example_leaves_no_product_behind(site, engine) -> None:
    site.write("examples/base.py", example("base", 'zhixing.output_path("w").write_text("x")\nassert False\n'))
    check(engine)
    assert check.problems == [("examples/base.py", 10, "R301")] and not engine.cache.path("examples/base.py").exists()


def test_running_the_file_directly(pair, engine) -> None:
    def run(file: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, file], cwd=pair.root, capture_output=True, text=True)

    early = run("examples/down.py")
    assert early.returncode and "先运行 zhixing check examples/base.py" in early.stderr
    check(engine)
    assert run("examples/down.py").stdout == "1111111111\n"
    done = run("examples/base.py")
    assert done.returncode == 0 and "产物文件写到 " in done.stderr


# ── 多线程 ────────────────────────────────────────────────────────────

THREADS = """\
import json, os, time
import torch
x = torch.randn(300, 300)
start = time.monotonic()
while time.monotonic() - start < {seconds}:
    x @ x
with open({log!r}, "a") as f:
    f.write(json.dumps([start, time.monotonic(), torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]]) + "\\n")
"""


def test_threads_take_that_many_slots(site, tmp_path) -> None:
    """两个执行槽：两线程的示例独占，单线程的并排。"""
    import json

    logs = {name: tmp_path / name for name in ("one", "two", "wide")}
    seconds = {"one": 0.3, "two": 3, "wide": 0.3}  # one 先完：空出一个槽，wide 还要等 two
    for name, log in logs.items():
        code = THREADS.format(log=str(log), seconds=seconds[name])
        site.write(f"examples/{name}.py", example(name, code, threads=2 if name == "wide" else 1))
    executor = ZygoteExecutor(site.root, 2)
    try:
        check(Engine(site.root, executor=executor))
    finally:
        executor.shutdown()
    assert check.problems == []
    spans = {name: json.loads(log.read_text()) for name, log in logs.items()}
    assert [spans[n][2:] for n in ("one", "two", "wide")] == [[1, "1"], [1, "1"], [2, "2"]]

    def overlap(a: str, b: str) -> bool:
        return spans[a][0] < spans[b][1] and spans[b][0] < spans[a][1]

    assert overlap("one", "two") and not overlap("one", "wide") and not overlap("two", "wide")


def test_threads_on_a_single_worker(site, tmp_path) -> None:
    site.write("examples/wide.py", example("wide", THREADS.format(log=str(tmp_path / "log"), seconds=0.2), threads=2))
    executor = ZygoteExecutor(site.root, 1)
    try:
        check(Engine(site.root, executor=executor))
    finally:
        executor.shutdown()
    assert check.problems == [] and '2, "2"]' in (tmp_path / "log").read_text()


@pytest.mark.parametrize("value", ["0", "17", "1.5", "true", "两个"])
def test_bad_threads(site, engine, value) -> None:
    site.write("examples/a.py", example("a", "x = 1\n", threads=value))
    check(engine)
    assert check.problems == [("examples/a.py", 5, "E602")] and "threads 应是" in check.reasons


# ── 断点续训 ──────────────────────────────────────────────────────────

TRAIN = """\
import os, time
import minilib
path = zhixing.scratch_path() / "step"
done = int(path.read_text()) if path.exists() else 0
print("从", done, "接着")
for step in range(done, 3):
    path.with_suffix(".tmp").write_text(str(step + 1))
    os.replace(path.with_suffix(".tmp"), path)
    if step == 1 and os.path.exists({stop!r}):
        time.sleep(60)
zhixing.output_path("w").write_text("训好了")
"""


@pytest.fixture
def interrupted(site, tmp_path):
    """训到第二步被 SIGKILL 的一次构建。"""
    stop = tmp_path / "stop"
    stop.touch()
    site.write("examples/minilib.py", "x = 1\n")
    site.write("examples/train.py", example("train", TRAIN.format(stop=str(stop)), timeout=100))
    running = subprocess.Popen([sys.executable, "-m", "zhixing.cli", "check"], cwd=site.root, stderr=subprocess.DEVNULL)
    scratch = site.root / ".cache/zhixing/scratch"
    deadline = time.monotonic() + 30
    while not any(p.read_text() == "2" for p in scratch.glob("*/files/step")):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    stop.unlink()
    time.sleep(0.3)  # 页进程跟着死，锁随之放开
    return site


def test_training_resumes_after_a_kill(interrupted, engine) -> None:
    found = check(engine)
    assert check.problems == [] and out(found["train"]).startswith("从 2 接着\n")
    assert found["train"].payload["files"] and found["train"].payload["inputs"] == {}
    assert list((interrupted.root / ".cache/zhixing/scratch").iterdir()) == []
    assert ran(check(engine)) == set()


@pytest.mark.parametrize("change", ["代码", "import 的模块"])
def test_stale_progress_is_not_reused(interrupted, engine, change) -> None:
    if change == "代码":
        path = interrupted.root / "examples/train.py"
        path.write_text(path.read_text().replace("接着", "接着 "))
    else:
        interrupted.write("examples/minilib.py", "x = 2\n")
    assert out(check(engine)["train"]).startswith("从 0 接着")


def test_progress_locked_by_another_build_is_left_alone(interrupted, engine) -> None:
    """占着不放的那个构建等不来：等到时限就自己从头跑，它的进度一个字节也不动。"""
    path = interrupted.root / "examples/train.py"
    path.write_text(path.read_text().replace("timeout: 100", "timeout: 2"))
    (directory,) = (interrupted.root / ".cache/zhixing/scratch").iterdir()
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert out(check(engine)["train"]).startswith("从 0 接着") and check.problems == []
    assert (directory / "files/step").read_text() == "2"


WAIT = """\
import time
here = zhixing.scratch_path()
(here / "progress").touch()
while not (here / "go").exists():
    if (here / "fail").exists():
        (here / "fail").unlink()
        assert False
    time.sleep(0.02)
zhixing.output_path("w").write_text("训好了")
"""


@pytest.mark.parametrize("signal_file", ["go", "fail"])
def test_two_builds_at_once_run_an_example_once(site, engine, signal_file) -> None:
    """后来的等先来的，用它的结果；先来的失败了，后来的接手。"""
    site.write("examples/a.py", example("a", WAIT, timeout=30))
    command = [sys.executable, "-m", "zhixing.cli", "check"]
    first = subprocess.Popen(command, cwd=site.root, stderr=subprocess.DEVNULL)
    scratch = site.root / ".cache/zhixing/scratch"
    deadline = time.monotonic() + 30
    while not (started := list(scratch.glob("*/files"))):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.02)
    found: dict[str, Outcome] = {}
    second = threading.Thread(target=lambda: found.update(check(engine)))
    second.start()
    time.sleep(1)
    assert second.is_alive()
    (started[0] / signal_file).touch()
    assert first.wait() == (signal_file == "fail")
    if signal_file == "fail":
        (started[0] / "go").touch()
    second.join()
    assert check.problems == [] and found["a"].payload["files"]
    assert ran(found) == ({"a"} if signal_file == "fail" else set())


def test_failure_keeps_progress_but_success_of_nothing_leaves_no_trace(site, engine) -> None:
    site.write("examples/a.py", example("a", '(zhixing.scratch_path() / "x").write_text("1")\nassert False\n'))
    site.write("examples/b.py", example("b", "assert False\n"))
    check(engine)
    (kept,) = (site.root / ".cache/zhixing/scratch").iterdir()
    assert (kept / "files/x").read_text() == "1"
