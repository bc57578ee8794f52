"""判分器：不用任何学出来的东西，从像素里确定地读出颜色、形状、位置。

读法：边框的中位数是背景色 → 与背景差得最多的那些像素是图形的核心，取它们的中位数作颜色 →
投影得到每个像素属于图形的程度 → 重心定位置 → 与每种形状的标准遮罩比软 IoU，最像的就是形状。
任何一项离标准太远都判“读不出”（-1），所以打乱、模糊、过饱和的图不会被误判为对。
"""

# --8<-- [start:read]
import math
from typing import NamedTuple

import torch

from minisd import world

COLOR_LIMIT, PLACE_LIMIT, SHAPE_LIMIT = 0.22, 0.11, 0.72     # 颜色距离、位置距离的上限，软 IoU 的下限


class Reading(NamedTuple):
    """从一批图里读出的内容；第一维都是 N。"""

    attrs: torch.Tensor      # (N, 3) 颜色、形状、位置的编号，-1 表示读不出
    iou: torch.Tensor        # (N,)   与最像的标准形状的软 IoU
    color: torch.Tensor      # (N, 3) 读到的颜色，[0, 1]
    mask: torch.Tensor       # (N, 1, S, S) 每个像素属于图形的程度


def soft_iou(a, b):
    """软 IoU：Σ min / Σ max。(..., S, S) → (...)。两边都空时为 0。"""
    return torch.minimum(a, b).sum((-2, -1)) / torch.maximum(a, b).sum((-2, -1)).clamp(min=1e-6)


def read(images):
    """images (N, 3, S, S)，[-1, 1] → :class:`Reading`。"""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"图像的形状必须是 (N, 3, S, S)，收到 {tuple(images.shape)}")
    if not torch.isfinite(images).all():
        raise ValueError("图像里有 NaN 或无穷大")
    parts = [_read(chunk) for chunk in ((images.detach().float().cpu() + 1) / 2).clamp(0, 1).split(32)]
    return Reading(*(torch.cat(column) for column in zip(*parts)))


def _read(x):
    n, _, size, _ = x.shape
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2)   # (N, 3, 4S)
    background = border.median(2).values[:, :, None, None]                            # (N, 3, 1, 1)
    far = (x - background).norm(dim=1).flatten(1)                                     # (N, S²)
    core = far > 0.7 * far.topk(max(4, size * size // 60)).values[:, -1:]             # (N, S²)
    pixels = torch.where(core[:, None], x.flatten(2), torch.nan)
    color = pixels.nanmedian(2).values                                                # (N, 3)
    v = color[:, :, None, None] - background
    m = (((x - background) * v).sum(1) / (v * v).sum(1).clamp(min=1e-6)).clamp(0, 1)  # (N, S, S)
    m = torch.where(m < 0.12, 0.0, m)
    area = m.sum((1, 2)).clamp(min=1e-6)
    grid = (torch.arange(size) + 0.5) / size
    center = torch.stack([(m.sum(1) * grid).sum(1), (m.sum(2) * grid).sum(1)], 1) / area[:, None]   # (N, 2)

    color_gap, c = (color[:, None] - world.PALETTE).norm(dim=2).min(1)
    place_gap, p = (center[:, None] - world.CENTERS).norm(dim=2).min(1)
    iou, s = _match(m, center, area / size**2).max(1)
    ok = torch.stack([color_gap < COLOR_LIMIT, iou > SHAPE_LIMIT, place_gap < PLACE_LIMIT], 1)
    ok &= far.amax(1, keepdim=True) > 0.2                                             # 空白图什么都读不出
    return torch.where(ok, torch.stack([c, s, p], 1), -1), iou, color, m[:, None]


def _unit_area(shape):
    """半径为 1 时的面积。"""
    one = torch.ones(1)
    return float(world.mask(torch.tensor([shape]), one[:, None].expand(1, 2) / 2, one * 0.3, one * 0, 96).mean()) / 0.09


UNIT_AREA = [_unit_area(k) for k in range(len(world.SHAPES))]


def _match(m, center, area):
    """与每种形状的标准遮罩比软 IoU：先定半径与转角，再试半像素的平移，取最大。→ (N, 5)"""
    n, size = len(m), m.shape[-1]
    zoom, turn = torch.cartesian_prod(torch.tensor([0.93, 1.0, 1.07]), torch.tensor([-0.15, 0.0, 0.15])).T   # (9,)
    shift = torch.tensor([(0, 0), (0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)]) / size                          # (5, 2)

    def compare(shape, where, radius, angle):
        """各 (N, K) 个标准遮罩与 m 的软 IoU。where (N, K, 2) → (N, K)"""
        k = radius.shape[1]
        template = world.mask(torch.full((n * k,), shape), where.flatten(0, 1), radius.flatten(), angle.flatten(), size)
        return soft_iou(template.view(n, k, size, size), m[:, None])

    best = []
    for shape, unit in enumerate(UNIT_AREA):
        radius = (area / unit).sqrt().clamp(min=1e-3)[:, None] * zoom                 # (N, 9)
        iou, i = compare(shape, center[:, None].expand(n, 9, 2), radius, turn.expand(n, 9)).max(1)
        moved = compare(shape, center[:, None] + shift, radius.gather(1, i[:, None]).expand(n, 5), turn[i, None].expand(n, 5))
        best.append(torch.maximum(iou, moved.amax(1)))
    return torch.stack(best, 1)
# --8<-- [end:read]


# --8<-- [start:score]
def correct(images, attrs):
    """逐项判对错：(N, 3) 的布尔张量，三列是颜色、形状、位置。attrs 里的 -1 表示描述没提，不计对错。"""
    attrs = torch.as_tensor(attrs)
    if attrs.shape != (len(images), 3):
        raise ValueError(f"attrs 的形状必须是 {(len(images), 3)}，收到 {tuple(attrs.shape)}")
    return (read(images).attrs == attrs) | (attrs == -1)


def score(images, attrs):
    """四个正确率：颜色、形状、位置、三项全对。"""
    right = correct(images, attrs).float()
    color, shape, place = right.mean(0).tolist()
    return {"color": color, "shape": shape, "place": place, "all": right.prod(1).mean().item()}
# --8<-- [end:score]


def psnr(images, reference):
    """峰值信噪比（分贝）；两边都是 [-1, 1]，峰值差为 2。"""
    return -10 * math.log10(((images - reference) / 2).square().mean().item())
