"""排整本书要多久：``.venv/bin/python benchmarks/book.py``，结果写进 README.md 的“排书”一节。

先 ``make print-site`` 建好打印版站点；这里只量合并与排版，不含建站。每一轮在新进程里跑，
墙钟与 CPU 一起记：机器忙的时候墙钟说明不了什么。
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from exec import ROOT, publish  # noqa: E402

TARGET = 60  # 秒 / 百页

_WORKER = """
import json, resource, sys, time
from pathlib import Path
from zhixing import book, epub, pdf
root, site, only, kind, output = sys.argv[1:]
start = time.perf_counter()
source = book.load(Path(root), Path(site), only)
merged = time.perf_counter() - start
made = {"pdf": pdf, "epub": epub}[kind].write(source, Path(output))
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({**vars(made), "merge": merged, "wall": time.perf_counter() - start,
                  "cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss / 1024}))
"""


def once(site: Path, only: str, kind: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as top:
        command = [sys.executable, "-c", _WORKER, str(ROOT), str(site), only, kind, f"{top}/book.{kind}"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr.strip().split("\n")[-1])
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--site", type=Path, default=ROOT / ".cache" / "print")
    parser.add_argument("--page", default="", help="只排一页或一章")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="只打印，不写 README.md")
    args = parser.parse_args()
    if not args.site.is_dir():
        sys.exit(f"没有打印版站点 {args.site}：先 make print-site")
    rows = []
    for kind in ("pdf", "epub"):
        runs = [once(args.site, args.page, kind) for _ in range(args.rounds)]
        middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        size = f"{middle['pages']:.0f} 页" if kind == "pdf" else f"{middle['files']:.0f} 节"
        walls = [run["wall"] for run in runs]
        rows.append(
            f"| {kind.upper()} | {size} | {middle['wall']:.1f}（{min(walls):.1f}–{max(walls):.1f}） | {middle['cpu']:.1f} "
            f"| {middle['merge']:.1f} | {middle['memory']:.0f} MiB | {middle['bytes'] / 2**20:.1f} MiB |"
        )
        if kind == "pdf":
            per = middle["wall"] / middle["pages"] * 100
            verdict = f"每百页 {per:.0f} 秒（CPU {middle['cpu'] / middle['pages'] * 100:.0f} 秒），目标 ≤ {TARGET} 秒："
            verdict += "达到" if per <= TARGET else "**未达到**"
    load = os.getloadavg()[1]
    text = "\n".join(
        [
            f"{datetime.date.today()}，`python benchmarks/book.py --rounds {args.rounds}`"
            f"{' --page ' + args.page if args.page else ''}；{platform.system()}，{os.cpu_count()} 核，"
            f"Python {platform.python_version()}，五分钟负载 {load:.1f}。时间单位秒，是中位数（最小–最大）。",
            "",
            "| 产物 | 大小 | 墙钟 | CPU | 其中读站点、合并 | 峰值内存 | 文件 |",
            "|---|--:|--:|--:|--:|--:|--:|",
            *rows,
            "",
            verdict,
        ]
    )
    print(text)
    if not args.dry:
        publish("排书", text)


if __name__ == "__main__":
    main()
