"""修复（inpainting）：只重画掩码里的部分。掩码 (B, 1, S, S)：1 重画，0 保留。

两种做法：
* 9 通道：掩码与被遮图的潜变量拼到 U-Net 的输入上，微调（``condition`` 配 ``minisd.concat``）。
* 替换：网络不动，每步把已知区域换成“原图加噪到这一步”（``replace``；resample > 1 就是 RePaint，arXiv:2201.09865）。
"""

from minisd import samplers, schedule

# --8<-- [start:mask]
import torch
from torch.nn import functional as F


def check_mask(mask, images):
    """掩码必须是 (B, 1, S, S)、只含 0 与 1、与图同大。"""
    want = (len(images), 1, *images.shape[2:])
    if mask.shape != want:
        raise ValueError(f"掩码的形状必须是 {want}，收到 {tuple(mask.shape)}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("掩码只能含 0（保留）与 1（重画）；软掩码请先取阈值")


def latent_mask(mask, factor=4):
    """像素掩码 → 潜变量掩码 (B, 1, S/4, S/4)：格子里只要有一个像素要重画，整格重画。"""
    return F.max_pool2d(mask, factor)


def condition(vae, images, mask):
    """9 通道模型多出的 5 个通道：潜变量掩码 1 + 被遮图的潜变量 4。→ (B, 5, S/4, S/4)

    先遮再编码：被遮的像素填 0（中灰）。编码器的感受野跨格子，先编码再遮会把要擦掉的内容漏给网络。
    """
    check_mask(mask, images)
    return torch.cat([latent_mask(mask), vae.to_latent(images * (1 - mask))], 1)


def paste(images, generated, mask):
    """掩码外贴回原图：保留区逐像素不变。"""
    return mask * generated + (1 - mask) * images
# --8<-- [end:mask]


# --8<-- [start:replace]
def renoise(s, x, t_next, t, eps):
    """q(x_t | x_t')：从步号 t' = t_next 加噪回更大的 t，√(ᾱ_t/ᾱ_t') x + √(1-ᾱ_t/ᾱ_t') ε。"""
    ratio = (s.alpha_bar[t] / s.alpha_bar[t_next]).item()
    return ratio**0.5 * x + (1 - ratio) ** 0.5 * eps


@torch.no_grad()
def replace(s, denoise, z, m, ts, generator, resample=1, eta=0.0, kind="v"):
    """替换式修复：z (B, C, h, w) 是原图的潜变量，m (B, 1, h, w)，ts 是从大到小的步号。→ (B, C, h, w)

    每步先照常走到 t_next，再把已知区域换成原图加噪到 t_next 的样子；末步换成原图本身，所以 m = 0 处逐位等于 z。
    ``resample``：每一步来回几遍。来：走一步；回：整张图再加噪回原来的 t，让两边互相看见（RePaint 算法 1）。
    """
    if isinstance(resample, bool) or not isinstance(resample, int) or resample < 1:
        raise ValueError(f"resample 必须是不小于 1 的整数，收到 {resample!r}")
    ts = samplers.check_path(s, ts, "trailing")

    def noise():
        return torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)

    x = noise()
    for t, t_next in zip(ts, [*ts[1:], -1]):
        rounds = resample if t_next >= 0 else 1
        for r in range(rounds):
            pred = denoise(x, torch.full((len(x),), t, device=x.device))
            x = samplers.ddim_step(s, x, t, t_next, pred, kind, eta, noise() if eta else None)
            known = schedule.q_sample(s, z, t_next, noise()) if t_next >= 0 else z
            x = torch.where(m > 0, x, known)
            if r < rounds - 1:
                x = renoise(s, x, t_next, t, noise())
    return x
# --8<-- [end:replace]
