"""基座从零训练的墙钟与成绩，换三个种子：``.venv/bin/python benchmarks/base.py``，机器要空闲。

每个种子在一个临时项目里用引擎真跑 ``examples/{clip,vae,base}.py``（只把 SEED 换掉），没有缓存；
计时从 ``zhixing check`` 开始到基座示例的全部断言通过，包括判分与画图。结果写进 README.md 的“基座”一节。
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from exec import ROOT, publish  # noqa: E402

EXAMPLES = ("clip", "vae", "base")


def one_seed(seed: int, work: Path) -> dict[str, float]:
    """在 ``work`` 里从零训一个种子，返回墙钟与示例写出的数字。"""
    shutil.copytree(ROOT / "examples", work / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (work / "examples").glob("*.py"):
        if path.stem not in EXAMPLES:
            path.unlink()
            continue
        text, found = re.subn(r"^SEED, (.*) = 0, ", rf"SEED, \1 = {seed}, ", path.read_text("utf-8"), flags=re.M)
        if found != 1:
            raise SystemExit(f"{path.name} 里没有找到 SEED")
        path.write_text(text, "utf-8")
    (work / "docs").mkdir()
    (work / "mkdocs.yml").write_text("site_name: base\n")
    command = [str(Path(sys.executable).parent / "zhixing"), "check", "examples/base.py", "--json", str(work / "report.json")]
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=work)
    wall = time.perf_counter() - begin
    metrics: dict[str, float] = {"wall": wall, "passed": float(done.returncode == 0)}
    for file in (work / ".cache" / "zhixing" / "results").rglob("*.json"):
        payload = json.loads(file.read_text("utf-8"))
        metrics |= payload.get("payload", payload).get("metrics", {})
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dry", action="store_true", help="只打印，不写 README.md")
    args = parser.parse_args()
    columns = {
        "wall": "总墙钟（秒）", "train_seconds": "U-Net 训练（秒）", "seen_all": "见过的组合", "held_out_all": "没见过的组合",
        "psnr": "VAE PSNR", "zero_shot_held_out": "CLIP 没见过的组合", "sample_16_seconds": "16 张采样（秒）", "weights_megabytes": "权重（MB）",
    }
    lines = [
        f"{datetime.date.today()}，`python benchmarks/base.py`。CLIP 与 VAE 各占一个核同时训，然后是 U-Net；总墙钟另含判分与画图。",
        "",
        f"| 种子 | 通过 | {' | '.join(columns.values())} | 开始时的负载 |",
        "|---|---|" + "--:|" * (len(columns) + 1),
    ]
    for seed in args.seeds:
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as directory:
            m = one_seed(seed, Path(directory) / "project")
        cells = " | ".join(f"{m[key]:.3f}" if key in m else "—" for key in columns)
        lines.append(f"| {seed} | {'是' if m['passed'] else '否'} | {cells} | {load:.1f} |")
        print(lines[-1], flush=True)
    if not args.dry:
        publish("基座", "\n".join(lines))


if __name__ == "__main__":
    main()
