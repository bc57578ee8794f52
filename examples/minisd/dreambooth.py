"""DreamBooth：用三五张图教会文生图模型一个新主体（arXiv:2208.12242）。

公式
----
第 3.3 节的先验保持损失，这里写成 v 预测、w_t = 1（论文写的是预测 x̂_0 的一般形式）：

    L = E ‖v_θ(x_t, t, c) - v‖² + λ E ‖v_θ(x'_t', t', c_pr) - v'‖²

* 第一项：主体的实例图 x 配描述 c = “一个 [标识符][类别]”。
* 第二项：类别图 x_pr 由**冻结的原模型**按 c_pr = “一个 [类别]” 自己画出来。两项都是照常的去噪损失，都在最小化。
* λ = 1 是论文的取值，λ = 0 就是没有先验保持。

约定：B 批大小，L = 12 描述的最大长度，D = 64 特征维度；图 (N, 3, S, S)，[-1, 1]。
坏参数抛 ValueError。
"""

from minisd import clip, samplers, schedule, world

# --8<-- [start:loss]
import copy
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


def prior_preservation_loss(pred, target, instances, lam=1.0):
    """实例项 + λ·先验项，各自取平均再相加。pred、target (B, ...)：前 ``instances`` 个是实例图，其余是类别图。

    没有类别图（instances = B）时只剩实例项，与 λ = 0 相同。
    """
    if pred.shape != target.shape:
        raise ValueError(f"pred 与 target 的形状必须相同，收到 {tuple(pred.shape)} 与 {tuple(target.shape)}")
    if isinstance(instances, bool) or not isinstance(instances, int) or not 1 <= instances <= len(pred):
        raise ValueError(f"instances 必须是 1 到 {len(pred)} 之间的整数，收到 {instances!r}")
    if isinstance(lam, bool) or not isinstance(lam, int | float) or not math.isfinite(lam):
        raise ValueError(f"lam 必须是有限的数，收到 {lam!r}")
    instance = F.mse_loss(pred[:instances], target[:instances])
    if instances == len(pred):
        return instance
    return instance + lam * F.mse_loss(pred[instances:], target[instances:])
# --8<-- [end:loss]


# --8<-- [start:identifier]
class Identifier(nn.Module):
    """包住词嵌入表：只有标识符那一行 ``row`` (D,) 可训练，其余各行冻结。"""

    def __init__(self, table, index):
        super().__init__()
        self.table, self.index = table.requires_grad_(False), index
        self.row = nn.Parameter(table.weight[index].clone())                    # 起点就是原来那一行

    def forward(self, ids):                                                      # (B, L) → (B, L, D)
        return torch.where((ids == self.index)[..., None], self.row, self.table(ids))


def add_identifier(text_encoder, character):
    """复制一份冻结的文本编码器，只让 ``character`` 这一个字的词向量可训练。返回新的编码器，原来的不动。"""
    if character not in clip.INDEX:
        raise ValueError(f"标识符 {character!r} 不在词表里，或者不是一个字")
    encoder = copy.deepcopy(text_encoder).requires_grad_(False)
    if isinstance(encoder.token, Identifier):
        raise ValueError("这个文本编码器已经有一个可训练的标识符")
    encoder.token = Identifier(encoder.token, clip.INDEX[character])
    return encoder
# --8<-- [end:identifier]


# --8<-- [start:subject]
SUBJECT = torch.tensor([[0.95, 0.10, 0.60], [0.60, 0.95, 0.20]])                # 左半品红、右半嫩绿，基座都没见过
CLASS, PLACE_LIMIT = "圆", 0.11


def subject(places, generator, size=24):
    """主体的实例图：左右双色的圆，位置由 places (N,) 给出，其余随机。→ :class:`world.Scene`"""
    places = torch.as_tensor(places)
    zero = torch.zeros_like(places)
    attrs = torch.stack([zero, torch.full_like(places, world.SHAPES.index(CLASS)), places], 1)

    def paint(fill, mask, center):
        x = (torch.arange(size) + 0.5) / size
        left = x < center[:, :1, None, None]                                     # (N, 1, 1, S)
        return torch.where(left, SUBJECT[0][:, None, None], SUBJECT[1][:, None, None]).expand_as(fill)

    return world.draw(attrs, generator, size, paint)


@torch.no_grad()
def class_latents(sd, prompts, generator, steps=12, guidance=2.0, batch=64):
    """类别图：冻结的原模型按 prompts 自己画的潜变量 (N, 4, h, w)。不解码，训练时直接用。"""
    if not prompts:
        raise ValueError("至少要一句类别描述")
    parts = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    return torch.cat([
        samplers.sample(sd.schedule, sd.denoiser(p, guidance), sd.noise(len(p), generator), steps) for p in parts
    ])
# --8<-- [end:subject]


# --8<-- [start:fidelity]
class Reading(NamedTuple):
    """从一批图里读出的主体；第一维都是 N。"""

    score: torch.Tensor      # (N,) 0 到 1：像主体的程度
    place: torch.Tensor      # (N,) 位置编号，-1 表示读不出


def read(images):
    """沿像素的主体得分，不用任何学出来的东西。images (N, 3, S, S)，[-1, 1] → :class:`Reading`。

    找出前景 → 由面积与重心定出一个圆 → 圆的左半逐像素比左色、右半比右色，各取平均 → 取**较差**的一半。
    一个像素的相似度是 1 - 颜色距离 / (两色距离的一半)，小于 0 取 0。所以任何**单色**的图形恰好得 0：
    离两种颜色不可能都近于一半；形状不是圆、颜色左右颠倒、只有半边对，都会掉分。
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"图像的形状必须是 (N, 3, S, S)，收到 {tuple(images.shape)}")
    if not torch.isfinite(images).all():
        raise ValueError("图像里有 NaN 或无穷大")
    x = ((images.detach().float().cpu() + 1) / 2).clamp(0, 1)
    size = x.shape[-1]
    border = torch.cat([x[:, :, 0], x[:, :, :, 0]], 2)                                     # (N, 3, 2S) 第一行与第一列
    background = border.median(2).values[:, :, None, None]
    front = ((x - background).norm(dim=1) / 0.3 - 0.3).clamp(0, 1)                         # (N, S, S) 前景的程度
    area = front.sum((1, 2))                                                               # 空白图是 0，重心成 NaN，比较都为假
    grid = (torch.arange(size) + 0.5) / size
    center = torch.stack([(front.sum(1) * grid).sum(1), (front.sum(2) * grid).sum(1)], 1) / area[:, None]   # (N, 2)
    radius = (area / math.pi).sqrt() / size
    dx, dy = grid - center[:, :1, None], grid[:, None] - center[:, 1:, None]               # (N, 1, S)、(N, S, 1)
    inside = (dx**2 + dy**2).sqrt() < 0.85 * radius[:, None, None]                         # 去掉抗锯齿的边
    half = (SUBJECT[0] - SUBJECT[1]).norm() / 2
    scores = []
    for color, side in zip(SUBJECT, (dx < -0.5 / size, dx > 0.5 / size)):                  # 正中一列不算
        similar = (1 - (x - color[:, None, None]).norm(dim=1) / half).clamp(min=0)         # (N, S, S)
        region = (inside & side).float()
        scores.append((similar * region).sum((1, 2)) / region.sum((1, 2)).clamp(min=1))
    gap, place = (center[:, None] - world.CENTERS).norm(dim=2).min(1)
    return Reading(torch.minimum(*scores), torch.where(gap < PLACE_LIMIT, place, -1))
# --8<-- [end:fidelity]


# --8<-- [start:train]
def objective(sd, instances, prior, lam=1.0, batch=8):
    """拼出给 ``train.fit`` 的 loss_fn(generator)。

    Args:
        sd: 要微调的模型；``sd.text_encoder`` 若经过 :func:`add_identifier`，梯度会流到那一行。
        instances: (潜变量 (n, 4, h, w), n 句描述)，n 通常是 3 到 5。
        prior: 同样的一对，来自 :func:`class_latents`；None 表示没有类别图。
        lam: 先验项的权重 λ。
        batch: 每步实例图与类别图各取多少张。
    """
    sets = [instances] if prior is None else [instances, prior]
    for latent, prompts in sets:
        if len(latent) != len(prompts) or not prompts:
            raise ValueError(f"图与描述要一样多且不为空：{len(latent)} 张图，{len(prompts)} 句描述")
    ids = [clip.tokenize(prompts).to(sd.device) for _, prompts in sets]

    def loss_fn(generator):
        pick = [torch.randint(len(latent), (batch,), generator=generator) for latent, _ in sets]
        x0 = torch.cat([latent[i] for (latent, _), i in zip(sets, pick)])        # (B 或 2B, 4, h, w) 实例在前
        text, valid = sd.text_encoder(torch.cat([rows[i] for rows, i in zip(ids, pick)]))
        t = torch.randint(len(sd.schedule), (len(x0),), generator=generator).to(x0.device)
        eps = torch.randn(x0.shape, generator=generator).to(x0.device)
        pred = sd.unet(schedule.q_sample(sd.schedule, x0, t, eps), t, text, valid)
        return prior_preservation_loss(pred, schedule.velocity(sd.schedule, x0, t, eps), batch, lam)

    return loss_fn
# --8<-- [end:train]
