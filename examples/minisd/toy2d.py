"""二维玩具数据：太极图的线稿，由圆弧拼成，所以任何点到它的距离都有闭式。

五段弧：外圆、S 形中线的上下两个半圆、两只“鱼眼”。采样按弧长均匀。
"""

# --8<-- [start:taiji]
import math

import torch

# 每段弧：圆心 x、圆心 y、半径、起始角、转过的角（逆时针为正）
ARCS = torch.tensor([
    [0.0, 0.0, 1.00, 0.0, 2 * math.pi],            # 外圆
    [0.0, 0.5, 0.50, -math.pi / 2, math.pi],       # S 形上半：右侧半圆
    [0.0, -0.5, 0.50, math.pi / 2, math.pi],       # S 形下半：左侧半圆
    [0.0, 0.5, 0.20, 0.0, 2 * math.pi],            # 上方鱼眼
    [0.0, -0.5, 0.20, 0.0, 2 * math.pi],           # 下方鱼眼
])
SCALE = 1.5                                         # 放大后每一维的标准差接近 1


def taiji(n, generator=None):
    """按弧长均匀地采 n 个点，返回 (n, 2) 的 float32。"""
    length = ARCS[:, 2] * ARCS[:, 4]                                       # (5,) 弧长
    k = torch.multinomial(length, n, replacement=True, generator=generator)  # (n,) 哪段弧
    cx, cy, r, start, sweep = ARCS[k].T                                    # 各 (n,)
    a = start + sweep * torch.rand(n, generator=generator)                 # (n,) 角度
    return SCALE * torch.stack([cx + r * torch.cos(a), cy + r * torch.sin(a)], 1)


def distance(points):
    """每个点到最近那段弧的距离与弧的编号：(n, 2) → (n,)，(n,)。"""
    cx, cy, r, start, sweep = ARCS.to(points).T[..., None]                 # 各 (5, 1)
    dx, dy = points[:, 0] / SCALE - cx, points[:, 1] / SCALE - cy          # (5, n)
    angle = torch.remainder(torch.atan2(dy, dx) - start, 2 * math.pi)
    to_arc = (torch.hypot(dx, dy) - r).abs()                               # 垂足落在弧上时
    to_ends = torch.minimum(*(                                             # 否则是到端点的距离
        torch.hypot(dx - r * torch.cos(a), dy - r * torch.sin(a)) for a in (start, start + sweep)
    ))
    best = torch.where(angle <= sweep, to_arc, to_ends).min(0)
    return SCALE * best.values, best.indices
# --8<-- [end:taiji]
