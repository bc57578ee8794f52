"""随机故障注入：``.venv/bin/python benchmarks/chaos.py --rounds 100``。

每一轮在一个小项目上随机地：中途 SIGKILL 构建、两个构建同时跑、构建途中改文件、
损坏／截断／清空／删除缓存与产物文件；然后老老实实构建一次，断言结果与从未出过故障的干净构建
逐字节一致（只有耗时除外），也没有留下进程。种子定了，故障的种类与位置就定了；
SIGKILL 落在哪一步还取决于机器的快慢，这正是要试的。
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

COMMAND = [sys.executable, "-m", "zhixing.cli", "check", "-j", "2"]
HEAD = "# ---\n# zhixing:\n#   id: {0}\n#   title: {0}\n#   needs: [{1}]\n# ---\n\n# %%\nimport time\n\nimport lib\nimport zhixing\n\n"
BASE = HEAD.format("base", "") + (
    'scratch = zhixing.scratch_path() / "step"\n'
    'step, total = map(int, scratch.read_text().split()) if scratch.exists() else (0, 0)\n'
    "while step < 4:\n"  # 断点续训：进度里有用旧代码、旧模块算出的东西，混进新结果就会被发现
    "    time.sleep(0.05)\n"
    "    step, total = step + 1, total + lib.VALUE\n"
    '    new = scratch.with_suffix(".new")\n'
    '    new.write_text(f"{step} {total}")\n'
    "    new.replace(scratch)\n"
    "weights = bytes([total, {variant}]) * 5000\n"
    'zhixing.output_path("w.bin").write_bytes(weights)\n'
    'zhixing.metric("size", len(weights) + lib.VALUE)\n'
)
DOWN = HEAD.format("down", "base") + (
    'weights = zhixing.input_path("base/w.bin").read_bytes()\n'
    "print(sum(weights))\n"
    'zhixing.output_path("sum.txt").write_text(str(sum(weights)))\n'
)
LAST = HEAD.format("last", "down") + 'print(zhixing.input_path("down/sum.txt").read_text())\n'
PAGE = "正文\n\n```python\nimport time\nimport lib\n\ntime.sleep({nap})\nprint({i} + lib.VALUE)\n```\n\n```bash\necho $((1 + {i}))\n```\n"


def write(root: Path, value: int, variant: int) -> None:
    """项目的一个版本；``value`` 影响全部页面，``variant`` 只影响基座与它的下游。"""
    files = {
        "mkdocs.yml": "site_name: x\n",
        "examples/lib.py": f"VALUE = {value}\n",
        "examples/base.py": BASE.replace("{variant}", str(variant)),
        "examples/down.py": DOWN,
        "examples/last.py": LAST,
    } | {f"docs/p{i}.md": PAGE.format(i=i, nap=0.02 * i) for i in range(4)}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


def result(root: Path) -> dict[str, object]:
    """缓存里的全部结果与它们引用的产物文件，去掉耗时。"""
    found: dict[str, object] = {}
    for path in sorted((root / ".cache/zhixing/results").glob("[!.]*.json")):
        entry = json.loads(path.read_text("utf-8"))
        del entry["digest"]
        for block in entry["payload"]["blocks"]:
            del block["seconds"]
        found[path.name] = entry
        for name, digest in entry["payload"]["files"].items():
            found[f"{path.name}:{name}"] = (root / ".cache/zhixing/files" / digest).read_bytes()
    return found


def start(root: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(COMMAND, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    text = process.communicate(timeout=120)[1].decode()
    return process.returncode, text


def strays(root: Path) -> list[int]:
    """工作目录在这个项目里的执行进程。"""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{entry}/cmdline").read_bytes()
            if b"zhixing.zygote" in command and os.readlink(f"/proc/{entry}/cwd") == str(root):
                found.append(int(entry))
        except OSError:
            continue
    return found


# ---- 故障 ----


def kill(root: Path, rng: random.Random, usual: float) -> str:
    running = start(root)
    time.sleep(rng.uniform(0, usual))
    running.send_signal(signal.SIGKILL)
    finish(running)
    return "中途 SIGKILL"


def together(root: Path, rng: random.Random, usual: float) -> str:
    """两个构建同时跑；一半的时候杀掉其中一个。"""
    pair = [start(root), start(root)]
    victim = rng.choice([None, 0])
    if victim is not None:
        time.sleep(rng.uniform(0, usual))
        pair[victim].send_signal(signal.SIGKILL)
    for i, process in enumerate(pair):
        code, text = finish(process)
        assert i == victim or code == 0, text
    return "两个构建同时跑" if victim is None else "同时跑，杀掉一个"


def edit(root: Path, rng: random.Random, usual: float) -> str:
    """构建途中改被 import 的模块；这次的结论对新旧都可能，但不能记错账。"""
    path = root / "examples/lib.py"
    before = path.read_text("utf-8")
    running = start(root)
    time.sleep(rng.uniform(0, usual))
    path.write_text(f"VALUE = {rng.randrange(10, 20)}\n", "utf-8")
    finish(running)
    path.write_text(before, "utf-8")
    return "途中改文件"


def damage(root: Path, rng: random.Random, usual: float) -> str:
    files = sorted(p for p in (root / ".cache").rglob("*") if p.is_file() and "matplotlib" not in p.parts)
    kinds = []
    for path in rng.sample(files, min(len(files), rng.randint(1, 3))):
        data = path.read_bytes()
        kind = rng.choice(["删除", "截断", "清空", "改一个字节", "换成垃圾", "换成目录"])
        kinds.append(kind)
        path.unlink()
        if kind == "截断":
            path.write_bytes(data[: rng.randrange(len(data) + 1)])
        elif kind == "清空":
            path.write_bytes(b"")
        elif kind == "改一个字节" and data:
            at = rng.randrange(len(data))
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :])
        elif kind == "换成垃圾":
            path.write_bytes(rng.randbytes(rng.randrange(300)))
        elif kind == "换成目录":
            path.mkdir()
    return "、".join(f"缓存{kind}" for kind in kinds) or "（没有缓存可坏）"


FAULTS = (kill, together, edit, damage, damage)


def run(rounds: int, seed: int, work: Path, say=print) -> Counter:
    """跑 ``rounds`` 轮；返回各种故障的次数。

    Raises:
        AssertionError: 某一轮之后的结果与干净构建不同，或留下了进程。
    """
    root, clean = work / "project", {}
    counts: Counter = Counter()
    usual = 1.0
    for turn in range(rounds):
        rng = random.Random(seed * 100_003 + turn)
        version = rng.randrange(1, 4), rng.randrange(1, 4)
        if version not in clean:
            fresh = work / f"clean-{version[0]}-{version[1]}"
            write(fresh, *version)
            before = time.monotonic()
            code, text = finish(start(fresh))
            assert code == 0, text
            usual = time.monotonic() - before
            clean[version] = result(fresh)
            shutil.rmtree(fresh)
        write(root, *version)
        faults = [rng.choice(FAULTS)(root, rng, usual) for _ in range(rng.randint(1, 3))]
        counts.update(kind for fault in faults for kind in fault.split("、"))
        code, text = finish(start(root))
        where = f"第 {turn} 轮（种子 {seed}）：{'；'.join(faults)}"
        assert code == 0, f"{where}\n{text}"
        got = result(root)
        wrong = [name for name in clean[version].keys() | got.keys() if clean[version].get(name) != got.get(name)]
        assert not wrong, f"{where}：与干净构建不同：{wrong}"
        deadline = time.monotonic() + 10
        while left := strays(root):
            assert time.monotonic() < deadline, f"{where}：留下了进程 {left}"
            time.sleep(0.05)
        say(f"  {turn + 1}/{rounds} {'；'.join(faults)}")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="zhixing-chaos-") as work:
        counts = run(args.rounds, args.seed, Path(work), lambda text: print(text, flush=True))
    print(f"{args.rounds} 轮（种子 {args.seed}）全部与干净构建逐字节一致，用时 {time.monotonic() - begin:.0f} 秒")
    for name, count in counts.most_common():
        print(f"  {count:4d} 次 {name}")


if __name__ == "__main__":
    main()
