"""两个物体的世界：32×32，“红色的圆在蓝色的方块左边”，以及读它的判分器。

场景是 (N, 5) 的整型 ``attrs``：颜色一、形状一、颜色二、形状二、关系（前一个物体在后一个的哪一边）。
两个物体的颜色不同、形状也不同，所以“谁是红的”总有唯一的答案。图像 (N, 3, S, S)，取值 [-1, 1]，S 缺省 32。
"""

# --8<-- [start:world]
import itertools
import re
from typing import NamedTuple

import torch
from torch import nn

from minisd import clip, judge, world

SHAPES = world.SHAPES[:4]                                              # 小图上最难画的星星不在内
RELATIONS = ("左边", "右边", "上面", "下面")


def caption(attr):
    """一个场景的描述。"""
    c1, s1, c2, s2, r = (int(i) for i in attr)
    colors = [*world.COLORS]
    return f"{colors[c1]}色的{SHAPES[s1]}在{colors[c2]}色的{SHAPES[s2]}{RELATIONS[r]}"


def groups(new=10, swapped=30):
    """180 对物体分成三组，每组 (N, 4)：颜色一、形状一、颜色二、形状二。

    两种颜色、两种形状有两种搭配。``new`` 份两种搭配都不训练；``swapped`` 份只训练其中一种，
    另一种留作考题：词全见过，凑在一起也见过，只是“谁是红的”对调了。
    """
    bags = itertools.product(itertools.combinations(range(6), 2), itertools.combinations(range(4), 2))
    bags = torch.tensor([[(a, s, b, t), (a, t, b, s)] for (a, b), (s, t) in bags])          # (90, 2, 4)
    bags = bags[torch.randperm(len(bags), generator=torch.Generator().manual_seed(0))]
    fresh, half, both = bags.split([new, swapped, len(bags) - new - swapped])
    return {"seen": torch.cat([half[:, 0], both.flatten(0, 1)]), "swapped": half[:, 1], "new": fresh.flatten(0, 1)}


def scenes(pairs):
    """每对物体的全部八种说法：先说谁 × 四种关系。(N, 4) → (8N, 5)"""
    both = torch.cat([pairs, pairs[:, [2, 3, 0, 1]]])
    return torch.cat([both.repeat_interleave(4, 0), torch.arange(4).repeat(len(both))[:, None]], 1)


def layout(attrs):
    """→ 从左到右（或从上到下）的两个物体 (N, 2, 2)，以及是不是竖着排 (N,)。"""
    objects = attrs[:, :4].reshape(-1, 2, 2)
    later = (attrs[:, 4] % 2 == 1)[:, None, None]                      # “右边”“下面”：先说的在后
    return torch.where(later, objects.flip(1), objects), attrs[:, 4] >= 2


def draw(attrs, generator, size=32):
    """画出来；半径、转角、间距、整体位置、背景灰度都随机。→ (N, 3, S, S)"""
    objects, vertical = layout(check(attrs))
    n = len(objects)

    def uniform(low, high, *dims):
        return low + (high - low) * torch.rand(n, *dims, generator=generator)

    middle, half = 0.5 + uniform(-0.04, 0.04, 2), uniform(0.21, 0.25)
    picture = uniform(0.82, 1, 1, 1, 1).expand(n, 3, size, size)
    for k in range(2):
        along, across = half * (2 * k - 1), uniform(-0.05, 0.05)
        offset = torch.where(vertical[:, None], torch.stack([across, along], 1), torch.stack([along, across], 1))
        color, shape = objects[:, k].T
        m = world.mask(shape, middle + offset, uniform(0.15, 0.18), uniform(-0.17, 0.17), size)
        fill = (world.PALETTE[color] + uniform(-0.03, 0.03, 3)).clamp(0, 1)[:, :, None, None]
        picture = picture * (1 - m) + fill * m
    return picture * 2 - 1
# --8<-- [end:world]


# --8<-- [start:read]
class Reading(NamedTuple):
    """从一批图里读出的内容。"""

    objects: torch.Tensor    # (N, 2, 2) 从左到右（或从上到下）的颜色、形状，-1 表示读不出
    vertical: torch.Tensor   # (N,)      0 左右排，1 上下排，-1 读不出


def read(images):
    """不含学习：沿最空的一行或一列切成两半，每一半交给单物体的判分器读颜色与形状，再比两个重心。"""
    x = judge.read(torch.cat(split(images)))
    objects = torch.stack(x.attrs[:, :2].chunk(2), 1)                  # (N, 2, 2)
    grid = (torch.arange(images.shape[-1]) + 0.5) / images.shape[-1]
    m = x.mask[:, 0]
    center = torch.stack([(m.sum(1) * grid).sum(1), (m.sum(2) * grid).sum(1)], 1) / m.sum((1, 2)).clamp(min=1e-6)[:, None]
    first, second = center.chunk(2)
    gap, vertical = (second - first).max(1)                            # 沿哪个轴分开
    aside = (second - first).abs().amin(1)
    clear = (gap > 0.3) & (aside < 0.2) & (objects >= 0).any(2).all(1)
    return Reading(objects, torch.where(clear, vertical, -1))


def split(images):
    """在最空的一列或一行切开，切线两边各至少占图形的 15%。→ 两半，各 (N, 3, S, S)，另一半换成背景"""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or images.shape[2] < 16:
        raise ValueError(f"图像的形状必须是 (N, 3, S, S) 且 S ≥ 16，收到 {tuple(images.shape)}")
    images = images.detach().float().cpu()
    size = images.shape[-1]
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], 2)
    background = border.median(2).values[:, :, None, None]
    far = (images - background).norm(dim=1)                            # (N, S, S)
    far = torch.where(far < 0.2, 0.0, far)                             # 背景上的轻微起伏不算
    line = torch.stack([far.sum(1), far.sum(2)], 1)                    # (N, 2, S) 每列、每行的总量
    before = line.cumsum(2)
    share = torch.minimum(before - line, before[..., -1:] - before) / before[..., -1:].clamp(min=1e-6)
    cost = torch.where(share > 0.15, line, torch.inf).flatten(1)       # (N, 2S)
    cut = cost.argmin(1)
    horizontal, k = cut >= size, cut % size
    i = torch.arange(size)
    where = torch.where(horizontal[:, None, None], i[:, None], i[None, :])                   # (N, S, S) 行号或列号
    k = k[:, None, None]
    return [torch.where(keep[:, None], images, background) for keep in (where < k, where > k)]
# --8<-- [end:read]


# --8<-- [start:score]
def judged(images, attrs):
    """逐项判对错，每项 (N,) 布尔。颜色、形状不管归谁；绑定不管谁在哪边；关系只看谁在哪边。"""
    attrs = check(attrs)
    if len(attrs) != len(images):
        raise ValueError(f"每张图要有一行 attrs，收到 {len(images)} 张图、{len(attrs)} 行")
    want, vertical = layout(attrs)
    got, axis = read(images)
    straight, crossed = got == want, got == want.flip(1)               # (N, 2, 2)
    same_set = (got.sort(1).values == want.sort(1).values).all(1)      # (N, 2)
    right = {
        "color": same_set[:, 0],
        "shape": same_set[:, 1],
        "binding": straight.all((1, 2)) | crossed.all((1, 2)),
        "relation": (axis == vertical) & (straight.sum((1, 2)) > crossed.sum((1, 2))),
    }
    right["all"] = right["relation"] & straight.all((1, 2))
    return right


def score(images, attrs):
    """各项正确率；``bound`` 是颜色与形状都画对的图里，归属也对的比例（瞎配是 0.5）。"""
    right = judged(images, attrs)
    words = right["color"] & right["shape"]
    bound = (right["binding"] & words).sum() / words.sum().clamp(min=1)
    return {k: v.float().mean().item() for k, v in right.items()} | {"bound": bound.item()}
# --8<-- [end:score]


# --8<-- [start:text]
WORDS = {w: i for i, w in enumerate(["", "<始>", *world.COLORS, *SHAPES, *RELATIONS, "色的", "在"])}
LENGTH = 9                                                             # <始> 与八个词
_word = re.compile("|".join(w for w in WORDS if w and w[0] != "<"))


def tokenize(texts):
    """描述列表 → (B, 9) 的词编号；空串只有 <始>，即“无条件”。"""
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, text in zip(ids, texts):
        words = _word.findall(text)
        if "".join(words) != text or len(words) >= LENGTH:
            raise ValueError(f"描述 {text!r} 不是这个世界的说法，例如“{caption((0, 0, 2, 1, 0))}”")
        row[: len(words) + 1] = torch.tensor([WORDS["<始>"], *(WORDS[w] for w in words)])
    return ids


class TextEncoder(clip.TextEncoder):
    """结构同迷你 CLIP 的文本塔，换成这里的词表；词序要紧，所以位置嵌入与词嵌入一样大。"""

    def __init__(self, dim=64):
        super().__init__(dim)
        self.token = nn.Embedding(len(WORDS), dim)
        self.position = nn.Parameter(torch.randn(LENGTH, dim) * 0.5)
        nn.init.normal_(self.token.weight, std=0.5)
# --8<-- [end:text]


def check(attrs):
    """核对属性张量，返回 (N, 5) 的 long。"""
    attrs = torch.as_tensor(attrs)
    if attrs.ndim != 2 or attrs.shape[1] != 5 or attrs.is_floating_point():
        raise ValueError(f"attrs 必须是 (N, 5) 的整型张量，收到 {tuple(attrs.shape)}、{attrs.dtype}")
    limit = torch.tensor([6, 4, 6, 4, 4])
    if not ((attrs >= 0) & (attrs < limit)).all():
        raise ValueError("编号必须满足 0 ≤ 颜色 < 6、0 ≤ 形状 < 4、0 ≤ 关系 < 4")
    if (attrs[:, :2] == attrs[:, 2:4]).any():
        raise ValueError("两个物体的颜色与形状都必须不同，否则归属没有唯一答案")
    return attrs.long()
