"""站内搜索与同类的对照：``.venv/bin/python benchmarks/search.py``，结果写进 README.md 的“搜索”一节。

先 ``make site``。同一批页面、同一份查询（tests/data/search.tsv），同一个 Chromium 里轮流问：
Material 原版、Material 加 jieba、Pagefind、自己的 worker。原版的索引由同一份内容不挂
hooks/search.py 另建一次得到（与 ``--site`` 的页、小节对不上就报错），配置用 Material 缺省的；
jieba 的在它上面加分词标记。规模一项把索引复制到约 1000 页。
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gzip
import http.server
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import material
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent))
from exec import ROOT, bench_python, publish  # noqa: E402

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PAGES = 1000

_JIEBA = r"""
import json, re, sys
import jieba
jieba.setLogLevel(60)
cut = lambda text: re.sub(r"[\u3400-\u9fff]+", lambda m: "\u200b" + "\u200b".join(jieba.cut(m[0])) + "\u200b", text).strip("\u200b")
index = json.load(sys.stdin)
for doc in index["docs"]:
    doc["title"], doc["text"] = cut(doc["title"]), cut(doc["text"])
json.dump(index, sys.stdout)
"""

# 同一份内容、不改写索引的站点
_BUILD = """
import sys
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.utils import yaml_load
with open("mkdocs.yml", encoding="utf-8") as file:
    hooks = [name for name in yaml_load(file)["hooks"] if name != "hooks/search.py"]
config = load_config("mkdocs.yml", hooks=hooks, site_dir=sys.argv[1])
config.plugins.on_startup(command="build", dirty=False)
try:
    build(config)
finally:
    config.plugins.on_shutdown()
"""

# 与一个 worker 说话：装载毫秒、每条查询的毫秒与前十页
_ASK = """
async ([url, index, queries]) => {
  const data = await (await fetch(index)).json()
  const worker = new Worker(url)
  const ask = (message) => new Promise((done) => {
    worker.onmessage = (event) => event.data.type % 2 && done(event.data)
    worker.postMessage(message)
  })
  let start = performance.now()
  await ask({ type: 0, data: { ...data, options: { suggest: true } } })
  const setup = performance.now() - start
  const answers = []
  for (const query of queries) {
    start = performance.now()
    const { data } = await ask({ type: 2, data: query })
    const ms = performance.now() - start
    answers.push([ms, (data.items || data).slice(0, 10).map((group) => group[0].location.split("#")[0])])
  }
  return [setup, answers]
}
"""

_PAGEFIND = """
async ([base, queries]) => {
  let start = performance.now()
  const pagefind = await import(base + "pagefind/pagefind.js")
  await pagefind.init()
  const setup = performance.now() - start
  const answers = []
  for (const query of queries) {
    start = performance.now()
    const found = await pagefind.search(query)
    const top = await Promise.all(found.results.slice(0, 10).map((r) => r.data()))
    answers.push([performance.now() - start, top.map((r) => r.raw_url.replace(/^\\//, "").replace(/index\\.html$/, ""))])
  }
  return [setup, answers]
}
"""


def cases(index: dict) -> list[tuple[str, set[str]]]:
    known = {doc["location"].split("#")[0].rstrip("/").rpartition("/")[2] for doc in index["docs"]}
    lines = (ROOT / "tests/data/search.tsv").read_text("utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return [(query, wanted) for query, pages in rows if (wanted := set(pages.split(",")) & known)]


def stock(top: Path, ours: dict, separator: str) -> dict:
    """Material 缺省配置写出的索引。"""
    subprocess.run([sys.executable, "-c", _BUILD, str(top)], cwd=ROOT, check=True)
    docs = json.loads((top / "search/search_index.json").read_text("utf-8"))["docs"]
    if [doc["location"] for doc in docs] != [doc["location"] for doc in ours["docs"]]:
        sys.exit("站点与 docs/ 对不上：先 make site")
    fields = {"title": {"boost": 1000.0}, "text": {"boost": 1.0}, "tags": {"boost": 1000000.0}}
    return {"config": {"lang": ["zh"], "separator": separator, "pipeline": ["stemmer"], "fields": fields}, "docs": docs}


def grown(index: dict) -> dict:
    """复制到约 1000 页。"""
    pages = len({doc["location"].split("#")[0] for doc in index["docs"]})
    copies = range(-(-PAGES // pages))
    return index | {"docs": [doc | {"location": f"{i}/{doc['location']}"} for i in copies for doc in index["docs"]]}


def quality(answers: list, expected: list) -> tuple[float, float, list[str]]:
    """``(hit@5, MRR@10, 没进前五的查询)``。"""
    ranks = []
    for (_, found), (_, wanted) in zip(answers, expected, strict=True):
        names = [page.rstrip("/").rpartition("/")[2] for page in found]
        ranks.append(next((rank for rank, name in enumerate(names, 1) if name in wanted), None))
    missed = [query for (query, _), rank in zip(expected, ranks) if rank is None or rank > 5]
    hits = sum(rank is not None and rank <= 5 for rank in ranks)
    return hits / len(ranks), sum(1 / rank for rank in ranks if rank) / len(ranks), missed


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--site", type=Path, default=ROOT / "site")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="只打印，不写 README.md")
    args = parser.parse_args()
    if not (args.site / "search/docs.json").is_file():
        sys.exit(f"没有站点 {args.site}：先 make site")
    python = bench_python()
    theme = Path(material.__file__).parent / "templates"
    separator = json.loads(re.search(r'"search.config.separator": (".*?[^\\]")', (theme / "partials/languages/zh.html").read_text("utf-8"))[1])
    ours = json.loads((args.site / "search/docs.json").read_text("utf-8"))
    expected = cases(ours)
    queries = [query for query, _ in expected]
    with tempfile.TemporaryDirectory() as top:
        site = Path(top) / "site"
        shutil.copytree(args.site, site)
        (site / "assets/javascripts/workers").mkdir(parents=True, exist_ok=True)
        shutil.copy(next((theme / "assets/javascripts/workers").glob("search.*.min.js")), site / "assets/javascripts/workers/stock.js")
        shutil.copytree(theme / "assets/javascripts/lunr", site / "assets/javascripts/lunr", dirs_exist_ok=True)
        plain = stock(Path(top) / "stock", ours, separator)
        with_jieba = json.loads(subprocess.run([python, "-c", _JIEBA], input=json.dumps(plain), capture_output=True, text=True, check=True).stdout)
        entries = {
            "Material 原版": ("assets/javascripts/workers/stock.js", plain),
            "Material 加 jieba": ("assets/javascripts/workers/stock.js", with_jieba),
            "**知行**": ("assets/js/search-worker.js", ours),
        }
        sizes = {}
        for i, (name, (_, index)) in enumerate(entries.items()):
            text = json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode()
            sizes[name] = f"{len(text) / 1024:.0f} / {len(gzip.compress(text)) / 1024:.0f} KiB"
            (site / f"index-{i}.json").write_bytes(text)
            (site / f"large-{i}.json").write_text(json.dumps(grown(index), ensure_ascii=False), "utf-8")
        subprocess.run([python, "-m", "pagefind", "--site", str(site), "--force-language", "zh"], check=True, stdout=subprocess.DEVNULL)
        bundle = [p for p in (site / "pagefind").rglob("*") if p.is_file()]
        sizes["Pagefind"] = f"{sum(p.stat().st_size for p in bundle) / 1024:.0f} KiB（按需取）"
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=site))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}/"
        results: dict[str, list] = {name: [] for name in [*entries, "Pagefind"]}
        large: dict[str, list] = {name: [] for name in entries}
        with sync_playwright() as play:
            executable = next(filter(None, map(shutil.which, CHROMIUM)))
            browser = play.chromium.launch(executable_path=executable, args=["--no-sandbox"])
            for _ in range(args.rounds):
                for i, (name, (worker, _)) in enumerate(entries.items()):
                    for prefix, store in (("index", results), ("large", large)):
                        tab = browser.new_page()
                        tab.goto(base)
                        store[name].append(tab.evaluate(_ASK, [worker, f"{prefix}-{i}.json", queries]))
                        tab.close()
                tab = browser.new_page()
                tab.goto(base)
                results["Pagefind"].append(tab.evaluate(_PAGEFIND, [base, queries]))
                tab.close()
            browser.close()
        server.shutdown()
    median = statistics.median
    lines = [
        f"{datetime.date.today()}，`python benchmarks/search.py --rounds {args.rounds}`，{len(queries)} 条查询、"
        f"{len({d['location'].split('#')[0] for d in ours['docs']})} 页；五分钟负载 {os.getloadavg()[1]:.1f}。毫秒是中位数；首查是装载之后的第一条。",
        "",
        "| | hit@5 | MRR@10 | 装载 | 首查 | 其余查询（最慢） | 约 1000 页：装载 | 查询（最慢） | 索引 原样 / gzip |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, runs in results.items():
        hit, mrr, missed = quality(runs[0][1], expected)
        first = median(run[1][0][0] for run in runs)
        rest = [median(run[1][k][0] for run in runs) for k in range(1, len(queries))]
        big = "— | —"
        if name in large:
            each = [median(run[1][k][0] for run in large[name]) for k in range(len(queries))]
            big = f"{median(run[0] for run in large[name]):.0f} | {median(each):.1f}（{max(each):.1f}）"
        lines.append(
            f"| {name} | {hit:.3f} | {mrr:.3f} | {median(run[0] for run in runs):.0f} | {first:.1f} "
            f"| {median(rest):.1f}（{max(rest):.1f}） | {big} | {sizes[name]} |"
        )
        print(name, "没进前五：", "、".join(missed) or "无")
    text = "\n".join(lines)
    print(text)
    if not args.dry:
        publish("搜索", text)


if __name__ == "__main__":
    main()
