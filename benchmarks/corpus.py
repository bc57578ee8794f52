"""合成语料：40 页 × 5 块，后面的块用前面的名字；一份代码，写成各工具要的样子。

每页第 3 块有一行 ``tweak = 0``，“改一块”就是改它；最后一块打印 ``页面 编号 通过``
（这串字只出现在输出里），用来核对每一页真的执行了。
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Block:
    """一个代码块；``fig`` 非空表示它画了一张图。"""

    code: str
    fig: str = ""


def _torch(i: int) -> list[str]:
    return [
        f"""
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed({i})
x = torch.randn(16000, 48)
target = (x @ torch.randn(48, 1)).tanh()
print(tuple(x.shape), tuple(target.shape))
""",
        """
model = nn.Sequential(nn.Linear(48, 64), nn.SiLU(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)


def train_step(start):
    batch = slice(start, start + 512)
    loss = F.mse_loss(model(x[batch]), target[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


before = train_step(0)
assert before > 0
""",
        """
tweak = 0
losses = [train_step(512 * (k % 30)) for k in range(90)]
assert losses[-1] < before
print("下降", losses[-1] < before)
""",
        """
def causal_attention(q, k, v):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ v


q, k, v = torch.randn(3, 4, 8, 128, 32)
for _ in range(10):
    out = causal_attention(q, k, v)
print(tuple(out.shape))
""",
        f"""
reference = F.scaled_dot_product_attention(q, k, v, is_causal=True)
assert torch.allclose(out, reference, atol=1e-5)
print("页面", {i}, "通过")
""",
    ]


def _numpy(i: int) -> list[str]:
    return [
        f"""
import numpy as np
from matplotlib import pyplot as plt

rng = np.random.default_rng({i})
data = rng.normal(size=(400, 240)) * np.linspace(3, 0.1, 240)
print(data.shape)
""",
        """
centered = data - data.mean(0)
u, s, vt = np.linalg.svd(centered, full_matrices=False)
assert np.allclose((u * s) @ vt, centered)
""",
        f"""
tweak = 0
fig, ax = plt.subplots(figsize=(4, 2.5))
ax.plot(np.cumsum(s**2) / np.sum(s**2))
ax.set_xlabel("components")
ax.set_title("explained variance {i}")
assert len(ax.lines) == 1
""",
        """
def dominant(matrix, steps=1500):
    vector = np.ones(matrix.shape[0])
    for _ in range(steps):
        vector = matrix @ vector
        vector /= np.linalg.norm(vector)
    return vector @ matrix @ vector


top = dominant(centered.T @ centered)
assert abs(top / s[0] ** 2 - 1) < 1e-3
""",
        f"""
logits = data[:64, :64] + 1000
weights = np.exp(logits - logits.max(-1, keepdims=True))
weights /= weights.sum(-1, keepdims=True)
assert np.allclose(weights.sum(-1), 1)
print("页面", {i}, "通过")
""",
    ]


def _stdlib(i: int) -> list[str]:
    return [
        f"""
import heapq
import random
from collections import Counter, OrderedDict

random.seed({i})
text = "".join(random.choices("abcdefgh", weights=range(1, 9), k=20000))
print(len(text))
""",
        """
def huffman(counts):
    heap = [(n, j, {symbol: ""}) for j, (symbol, n) in enumerate(sorted(counts.items()))]
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, _, left), (b, order, right) = heapq.heappop(heap), heapq.heappop(heap)
        merged = {s: "0" + c for s, c in left.items()} | {s: "1" + c for s, c in right.items()}
        heapq.heappush(heap, (a + b, order, merged))
    return heap[0][2]


codes = huffman(Counter(text))
bits = "".join(codes[c] for c in text)
assert len(bits) < 3 * len(text)
""",
        """
tweak = 0
symbols, decoded, word = {c: s for s, c in codes.items()}, [], ""
for bit in bits:
    word += bit
    if word in symbols:
        decoded.append(symbols[word])
        word = ""
assert "".join(decoded) == text
""",
        """
def subsequence(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


common = subsequence(text[:400], text[400:800])
assert 0 < common < 400
""",
        f"""
cache, hits = OrderedDict(), 0
for j in range(len(text) - 3):
    piece = text[j : j + 3]
    hits += piece in cache
    cache[piece] = True
    cache.move_to_end(piece)
    if len(cache) > 100:
        cache.popitem(last=False)
assert 0 < hits < len(text)
print("页面", {i}, "通过")
""",
    ]


KINDS = {"torch": _torch, "numpy": _numpy, "标准库": _stdlib}
FIG = "前几个主成分占了多少方差"


def pages(count: int = 40) -> dict[str, list[Block]]:
    """页名 -> 代码块；三类页面轮着来，40 页是 14 / 13 / 13。"""
    makers = list(KINDS.values())
    return {
        f"p{i:02d}": [Block(code.strip("\n"), FIG if "plt.subplots" in code else "") for code in makers[i % 3](i)]
        for i in range(count)
    }


def edit_target(kind: str) -> str:
    """“改一块”改哪一页：这一类的第二页。"""
    return f"p{3 + list(KINDS).index(kind):02d}"


def _prose(k: int) -> str:
    return f"第 {k} 步先看代码，再看结果。记 $a_{{ij}} = \\mathrm{{softmax}}(q_i k_j)$，下标从 0 数起。"


def _markdown(name: str, blocks: list[Block], info: Callable[[int, Block], str], head: str) -> str:
    parts = [head]
    for k, block in enumerate(blocks, 1):
        parts.append(f"## 第 {k} 步 {{#step-{k}}}\n\n{_prose(k)}\n\n```{info(k, block)}\n{block.code}\n```\n")
    return "\n".join(parts)


def write_markdown(directory: Path, corpus: dict[str, list[Block]], info: Callable[[str, int, Block], str]) -> None:
    """普通 Markdown；``info(页名, 第几块, 块)`` 给出围栏后的文字。"""
    directory.mkdir(parents=True)
    for name, blocks in corpus.items():
        text = _markdown(name, blocks, lambda k, b, name=name: info(name, k, b), f"# 页面 {name}\n")
        (directory / f"{name}.md").write_text(text, "utf-8")


def write_questions(directory: Path, corpus: dict[str, list[Block]], figures: bool = True) -> None:
    """知行的题目页：带 front matter，画图的块写 ``fig``（没有引擎时不认这个选项，``figures=False`` 去掉它）。"""
    directory.mkdir(parents=True)
    for name, blocks in corpus.items():
        head = (
            f"---\nid: {name}\ntitle: 页面 {name}\nsection: {directory.name}\nlevel: 入门\norigin: 预测\n"
            "tags: [合成语料]\nbrief: 只用来测速。\n"
            'questions:\n  - q: 结果对吗？\n    a: "#step-5"\nrefs: [合成语料]\n---\n'
        )
        text = _markdown(name, blocks, lambda k, b: f'python fig="{b.fig}"' if b.fig and figures else "python", head)
        (directory / f"{name}.md").write_text(text, "utf-8")


def write_notebooks(directory: Path, corpus: dict[str, list[Block]]) -> None:
    """每页一个 ``.ipynb``。"""
    import nbformat
    from nbformat import v4

    directory.mkdir(parents=True)
    for name, blocks in corpus.items():
        cells = [v4.new_markdown_cell(f"# 页面 {name}", id="title")]
        for k, block in enumerate(blocks, 1):
            cells.append(v4.new_markdown_cell(f"## 第 {k} 步\n\n{_prose(k)}", id=f"prose-{k}"))
            cells.append(v4.new_code_cell(block.code, id=f"code-{k}"))
        book = v4.new_notebook(cells=cells)
        book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(book, directory / f"{name}.ipynb")
