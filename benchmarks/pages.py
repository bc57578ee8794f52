"""页面性能与同内容的原版站并排：``.venv/bin/python benchmarks/pages.py``，结果写进 README.md 的“页面”一节。

先 ``make site``。原版站是同一份 Markdown，用 Material 的缺省做法：浏览器里的 KaTeX auto-render、
浏览器里的 Mermaid、lunr 搜索；两边都由同一个会 gzip 的本机服务提供，没有外部请求（原版平时要从
CDN 取 KaTeX、Mermaid 与字体，这里都放在本机，只会让它更快）。Lighthouse 轮流量，取中位数。
"""

from __future__ import annotations

import argparse
import datetime
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

sys.path.insert(0, str(Path(__file__).resolve().parent))
from exec import ROOT, publish  # noqa: E402

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NODE = ("lighthouse@13.5.0", "mermaid@11.17.2")  # 装在 .cache/bench-node，不进项目环境
PAGES = {"首页": "", "公式 + 图（ddpm）": "diffusion/ddpm/"}
CATEGORIES = ("performance", "accessibility", "best-practices", "seo")

_STOCK = """
site_name: 知行
site_url: http://127.0.0.1/
theme:
  name: material
  language: zh
  font: false
  features: [navigation.tabs, navigation.sections, navigation.tracking, navigation.top, toc.follow, search.suggest, search.highlight, content.code.copy]
plugins: [search, tags]
extra_css: [vendor/katex/katex.min.css]
extra_javascript: [vendor/katex/katex.min.js, vendor/katex/contrib/auto-render.min.js, vendor/start.js, vendor/mermaid.min.js]
markdown_extensions:
  abbr: {}
  admonition: {}
  attr_list: {}
  def_list: {}
  footnotes: {}
  md_in_html: {}
  tables: {}
  toc: { permalink: true }
  pymdownx.arithmatex: { generic: true }
  pymdownx.details: {}
  pymdownx.highlight: { pygments_lang_class: true }
  pymdownx.inlinehilite: {}
  pymdownx.tabbed: { alternate_style: true }
  pymdownx.superfences:
    custom_fences: [{ name: mermaid, class: mermaid, format: !!python/name:pymdownx.superfences.fence_code_format }]
"""

_AUTO_RENDER = """
document$.subscribe(({ body }) => renderMathInElement(body, { delimiters: [
  { left: "$$", right: "$$", display: true }, { left: "$", right: "$", display: false },
  { left: "\\\\(", right: "\\\\)", display: false }, { left: "\\\\[", right: "\\\\]", display: true } ] }))
"""


class Compressed(http.server.SimpleHTTPRequestHandler):
    """像静态托管那样压缩文本。"""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        path = path / "index.html" if path.is_dir() else path
        if not path.is_file():
            return self.send_error(404)
        body, kind = path.read_bytes(), self.guess_type(path)
        self.send_response(200)
        if kind.startswith("text/") or re.search("javascript|json|svg|xml", kind):
            body = gzip.compress(body, 6)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if kind.startswith("text/") else kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "max-age=600")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def serve(directory: Path) -> tuple[http.server.ThreadingHTTPServer, str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Compressed(*a, directory=str(directory)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


def node_modules() -> Path:
    top = ROOT / ".cache" / "bench-node"
    if not all((top / "node_modules" / name.partition("@")[0]).is_dir() for name in NODE):
        top.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(top), *NODE], check=True)
    return top / "node_modules"


def stock(top: Path, site: Path, modules: Path) -> Path:
    """同一份内容的原版站；自有的写法换成等价的普通 Markdown。"""
    docs = top / "docs"
    shutil.copytree(ROOT / "docs", docs, ignore=shutil.ignore_patterns("assets", "synonyms.txt", "tags.md"))
    pictures = {p.relative_to(site).as_posix(): p for p in (site / "assets/fig").rglob("*.svg")}
    for page in docs.rglob("*.md"):
        up = "../" * (len(page.relative_to(docs).parts) - 1)

        def picture(match: re.Match[str]) -> str:
            prefix = f"assets/fig/{match[2]}."
            found = next((p for p in pictures if p.startswith(prefix) and ".light." in p), None)
            return f"![{match[1]}]({up}{found})" if found else match[1]

        text = page.read_text("utf-8")
        text = re.sub(r"!\[([^\]]*)\]\(fig:([\w/-]+)\)", picture, text)
        text = re.sub(r"\{\{\s*m\.[^}]*\}\}", "0.123", text)
        text = re.sub(r'^(\s*)--8<-- "([^":]+):?(\w*)"$', lambda m: snippet(m[1], m[2], m[3]), text, flags=re.M)
        text = re.sub(r"^(\s*)(`{3,})(\w+) .*$", r"\1\2\3", text, flags=re.M)
        text = re.sub(r"\A---\n.*?^title: ([^\n]*)\n.*?^---\n", r"# \1\n", text, flags=re.M | re.S)
        page.write_text(text, "utf-8")
    for name, path in pictures.items():
        (docs / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, docs / name)
    shutil.copytree(ROOT / "node_modules/katex/dist", docs / "vendor/katex")
    shutil.copy(modules / "mermaid/dist/mermaid.min.js", docs / "vendor/mermaid.min.js")
    (docs / "vendor/start.js").write_text(_AUTO_RENDER, "utf-8")
    (top / "mkdocs.yml").write_text(_STOCK, "utf-8")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(top / "site")], cwd=top, check=True)
    return top / "site"


def snippet(indent: str, file: str, section: str) -> str:
    text = (ROOT / file).read_text("utf-8")
    if section:
        text = re.search(rf"\[start:{section}\]\n(.*?)\n[^\n]*\[end:{section}\]", text, re.S)[1]
    return "\n".join(indent + line for line in text.splitlines())


def audit(modules: Path, url: str, form: str) -> dict[str, float]:
    """Lighthouse 量一次：四项分数、CLS、LCP（毫秒）、TBT（毫秒）、传输 KB（不含图）、外部请求与控制台错误数。"""
    chromium = next(filter(None, map(shutil.which, CHROMIUM)))
    command = [
        "node", str(modules / "lighthouse/cli/index.js"), url, "--quiet", "--output=json", "--output-path=stdout",
        "--chrome-flags=--headless=new --no-sandbox", f"--only-categories={','.join(CATEGORIES)}",
        *(["--preset=desktop"] if form == "桌面" else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CHROME_PATH": chromium})
    try:
        report = json.loads(done.stdout)
    except ValueError:
        sys.exit(f"Lighthouse 没有给出报告：{done.stderr.strip()[-800:]}")
    audits = report["audits"]
    requests = audits["network-requests"]["details"]["items"]
    failed = {a["id"] for c in report["categories"].values() for a in c["auditRefs"] if a["weight"] and audits[a["id"]]["score"] not in (None, 1)}
    return {
        **{name: 100 * report["categories"][name]["score"] for name in CATEGORIES},
        "cls": audits["cumulative-layout-shift"]["numericValue"],
        "lcp": audits["largest-contentful-paint"]["numericValue"],
        "tbt": audits["total-blocking-time"]["numericValue"],
        "bytes": sum(r["transferSize"] for r in requests if r.get("resourceType") != "Image") / 1000,
        "external": sum(not r["url"].startswith((url.split("/", 3)[0] + "//127.0.0.1", "data:", "blob:")) for r in requests),
        "errors": len(audits["errors-in-console"].get("details", {}).get("items", [])),
        "failed": failed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--site", type=Path, default=ROOT / "site")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="只打印，不写 README.md")
    args = parser.parse_args()
    if not (args.site / "diffusion/ddpm/index.html").is_file():
        sys.exit(f"没有站点 {args.site}：先 make site")
    modules = node_modules()
    runs: dict[tuple[str, str, str], list[dict]] = {}
    with tempfile.TemporaryDirectory() as top:
        servers = {"知行": serve(args.site), "原版": serve(stock(Path(top), args.site, modules))}
        for _ in range(args.rounds):
            for page, path in PAGES.items():
                for form in ("手机", "桌面"):
                    for name, (_, url) in servers.items():
                        runs.setdefault((page, form, name), []).append(audit(modules, url + path, form))
        for server, _ in servers.values():
            server.shutdown()
    lines = [
        f"{datetime.date.today()}，`python benchmarks/pages.py --rounds {args.rounds}`，Lighthouse {NODE[0].partition('@')[2]}，"
        f"{args.rounds} 次的中位数；五分钟负载 {os.getloadavg()[1]:.1f}。传输不含图；原版的 KaTeX、Mermaid 也放在本机。",
        "",
        "| 页面 | | 站 | 性能 | 无障碍 | 最佳实践 | SEO | CLS | LCP 秒 | TBT 毫秒 | 传输 KB | 外部请求 | 控制台错误 |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (page, form, name), each in runs.items():
        m = {k: statistics.median(r[k] for r in each) for k in each[0] if k != "failed"}
        lines.append(
            f"| {page} | {form} | {f'**{name}**' if name == '知行' else name} | {m['performance']:.0f} | {m['accessibility']:.0f} | {m['best-practices']:.0f} "
            f"| {m['seo']:.0f} | {m['cls']:.3f} | {m['lcp'] / 1000:.1f} | {m['tbt']:.0f} | {m['bytes']:.0f} | {m['external']:.0f} | {m['errors']:.0f} |"
        )
        print(page, form, name, "没得满分的检查：", "、".join(sorted(set().union(*(r["failed"] for r in each)))) or "无")
    text = "\n".join(lines)
    print(text)
    if not args.dry:
        publish("页面", text)


if __name__ == "__main__":
    main()
