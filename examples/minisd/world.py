"""图形世界：中文描述与图像一一对应的小世界，迷你 Stable Diffusion 的全部数据都从这里画出来。

一个场景由三个属性决定：颜色（6 种）× 形状（5 种）× 位置（5 种），共 150 种组合；
其余（半径、转角、圆心抖动、背景灰度、颜色偏差）每次随机。

约定
----
* ``attrs``：(N, 3) 的整型张量，三列依次是颜色、形状、位置的编号。
* 图像：(N, 3, S, S)，取值 [-1, 1]，S 缺省 24；遮罩：(N, 1, S, S)，取值 [0, 1]。
* 坐标以画布边长为 1，x 向右、y 向下，原点在左上角。

属性编号越界、尺寸不合约定时抛 ValueError。
"""

# --8<-- [start:words]
import math
from typing import NamedTuple

import torch

COLORS = {
    "红": (220, 40, 40), "绿": (40, 170, 70), "蓝": (45, 80, 220),
    "黄": (240, 200, 40), "紫": (150, 60, 190), "青": (40, 190, 200),
}
SHAPES = ("圆", "方块", "三角", "十字", "星星")
PLACES = {"左上": (0.3, 0.3), "右上": (0.7, 0.3), "左下": (0.3, 0.7), "右下": (0.7, 0.7), "中间": (0.5, 0.5)}

PALETTE = torch.tensor(list(COLORS.values())) / 255                  # (6, 3)
CENTERS = torch.tensor(list(PLACES.values()))                        # (5, 2) 每个位置的 (x, y)

# 从不参与训练的 15 种组合：任意两个属性的搭配都见过，只是没见过三个凑在一起
HELD_OUT = torch.tensor([(c, s, (c + 2 * s) % 5) for c in range(6) for s in range(5) if (c + s) % 2 == 0])
_held = set(map(tuple, HELD_OUT.tolist()))
ALL = torch.cartesian_prod(torch.arange(6), torch.arange(5), torch.arange(5))    # (150, 3)
SEEN = torch.tensor([a for a in ALL.tolist() if tuple(a) not in _held])          # (135, 3)

# 五种说法及出现的比例；后三种不提某些属性，模型因此学会“没说的随意”
TEMPLATES = {"{c}色的{s}在{p}": 0.50, "{p}有一个{c}色的{s}": 0.25, "{c}色的{s}": 0.12, "一个{s}": 0.07, "{s}在{p}": 0.06}


def caption(attr, template="{c}色的{s}在{p}"):
    """一个场景的中文描述。attr 是三个编号 (颜色, 形状, 位置)。"""
    c, s, p = (int(i) for i in attr)
    if not (0 <= c < 6 and 0 <= s < 5 and 0 <= p < 5):
        raise ValueError(f"属性编号必须满足 0 ≤ 颜色 < 6、0 ≤ 形状 < 5、0 ≤ 位置 < 5，收到 {(c, s, p)}")
    return template.format(c=[*COLORS][c], s=SHAPES[s], p=[*PLACES][p])


def captions(attrs, generator=None):
    """每个场景一句描述；给了 generator 就按比例随机换说法，否则都用完整的说法。"""
    if generator is None:
        return [caption(a) for a in attrs]
    templates = [*TEMPLATES]
    k = torch.multinomial(torch.tensor([*TEMPLATES.values()]), len(attrs), replacement=True, generator=generator)
    return [caption(a, templates[i]) for a, i in zip(attrs, k)]
# --8<-- [end:words]


# --8<-- [start:render]
def outline(shape, x, y):
    """形状的符号距离（近似）：内部为负、外部为正，单位是半径。x、y 同形，已平移、旋转、缩放。"""
    ax, ay = x.abs(), y.abs()
    match SHAPES[shape]:
        case "圆":
            return (x * x + y * y).sqrt() - 0.95
        case "方块":
            return torch.maximum(ax, ay) - 0.84
        case "三角":                                                 # 三条边的法线：向下、左上、右上
            return torch.maximum(math.sqrt(0.75) * ax - y / 2, y) - 0.58
        case "十字":                                                 # 一横一竖两根 2 × 0.64 的条
            return torch.minimum(torch.maximum(ax - 1, ay - 0.32), torch.maximum(ay - 1, ax - 0.32))
        case "星星":                                                 # 折到一个 36° 的楔形里，只剩一条边
            turn, outer, inner = math.pi / 5, 1.15, 0.48
            angle = (torch.remainder(torch.atan2(x, -y) + turn, 2 * turn) - turn).abs()
            r = (x * x + y * y).sqrt()
            nx, ny = outer - inner * math.cos(turn), inner * math.sin(turn)      # 那条边的外法线
            return (r * angle.sin() * nx + (r * angle.cos() - outer) * ny) / math.hypot(nx, ny)


def mask(shape, center, radius, angle, size=24):
    """抗锯齿的形状遮罩：像素中心到轮廓的距离在半个像素内时线性过渡。

    shape (N,) 整型，center (N, 2)，radius (N,)，angle (N,) 弧度 → (N, 1, size, size)
    """
    grid = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(grid, grid, indexing="ij")                             # (S, S)
    r, a = radius[:, None, None], angle[:, None, None]
    dx, dy = (x - center[:, 0, None, None]) / r, (y - center[:, 1, None, None]) / r
    dx, dy = a.cos() * dx + a.sin() * dy, a.cos() * dy - a.sin() * dx            # (N, S, S)
    d = torch.empty_like(dx)
    for k in shape.unique().tolist():
        d[shape == k] = outline(k, dx[shape == k], dy[shape == k])
    return (0.5 - d * r * size).clamp(0, 1)[:, None]


class Scene(NamedTuple):
    """画好的一批场景。"""

    image: torch.Tensor      # (N, 3, S, S)，[-1, 1]
    mask: torch.Tensor       # (N, 1, S, S)，[0, 1]
    attrs: torch.Tensor      # (N, 3)


def draw(attrs, generator, size=24, paint=None):
    """按属性画图，其余随机。

    ``paint``：``paint(fill, scene_mask, center) -> fill`` 改写填充（条纹、双色……），
    fill 是 (N, 3, S, S)、取值 [0, 1]。
    """
    attrs = check(attrs)
    if size < 12:
        raise ValueError(f"画布至少 12 像素才认得出形状，收到 {size}")
    n = len(attrs)
    color, shape, place = attrs.T

    def uniform(low, high, *dims):
        return low + (high - low) * torch.rand(n, *dims, generator=generator)

    center = CENTERS[place] + uniform(-0.03, 0.03, 2)
    m = mask(shape, center, uniform(0.18, 0.245), uniform(-1, 1) * math.radians(10), size)
    fill = (PALETTE[color] + uniform(-0.03, 0.03, 3)).clamp(0, 1)[:, :, None, None].expand(-1, -1, size, size)
    if paint is not None:
        fill = paint(fill, m, center)
    background = uniform(0.82, 1.0, 1, 1, 1)
    return Scene((background * (1 - m) + fill * m) * 2 - 1, m, attrs)


def sample(n, generator, combos=SEEN, size=24):
    """从给定的组合里等概率抽 n 个场景并画出来。"""
    return draw(combos[torch.randint(len(combos), (n,), generator=generator)], generator, size)
# --8<-- [end:render]


def check(attrs):
    """核对属性张量，返回 (N, 3) 的 long。"""
    attrs = torch.as_tensor(attrs)
    if attrs.ndim != 2 or attrs.shape[1] != 3 or attrs.is_floating_point():
        raise ValueError(f"attrs 必须是 (N, 3) 的整型张量，收到 {tuple(attrs.shape)}、{attrs.dtype}")
    limit = torch.tensor([len(COLORS), len(SHAPES), len(PLACES)])
    if not ((attrs >= 0) & (attrs < limit)).all():
        raise ValueError("属性编号必须满足 0 ≤ 颜色 < 6、0 ≤ 形状 < 5、0 ≤ 位置 < 5")
    return attrs.long()


# --8<-- [start:broad]
def broad(n, generator, size=24):
    """更宽的图像分布，给 VAE 用：任意颜色、左右双色、横条纹都见过。返回 (N, 3, S, S)。

    真实的 Stable Diffusion 也是这样：VAE 的训练图比扩散模型的宽。否则之后微调出来的新纹理，
    潜变量里有、解码器却画不出来。
    """
    kind = torch.rand(n, 1, 1, 1, generator=generator)

    def paint(fill, m, center):
        wild = torch.rand(n, 3, 1, 1, generator=generator).expand_as(fill)
        other = torch.rand(n, 3, 1, 1, generator=generator).expand_as(fill)
        fill = torch.where(kind > 0.55, wild, fill)
        x = (torch.arange(size) + 0.5) / size
        left = x[None, None, None] < center[:, 0, None, None, None]
        fill = torch.where((kind > 0.75) & (kind <= 0.88) & left, other, fill)
        dark_rows = (torch.arange(size) // 2 % 2 == 1)[None, None, :, None]
        return torch.where(((kind > 0.88) | (kind < 0.06)) & dark_rows, fill * 0.4, fill)

    return draw(ALL[torch.randint(len(ALL), (n,), generator=generator)], generator, size, paint).image
# --8<-- [end:broad]
