"""训练扩散模型用的数据：图先编码成潜变量，描述先编码成文本特征，都只做一次。

VAE 与文本编码器在训练 U-Net 时是冻结的，重复编码是浪费；真实的训练也常这样预先算好。
"""

# --8<-- [start:latents]
import torch
from torch.nn import functional as F

from minisd import schedule, world


class LatentData:
    """一批场景的潜变量，和它们每种说法的文本特征。

    Args:
        sd: :class:`minisd.pipeline.StableDiffusion`，用到它的 VAE 与文本编码器。
        scenes: :class:`minisd.world.Scene`。
        drop: 把描述换成空串的概率；无分类器引导靠它学会“无条件”（arXiv:2207.12598 第 3.2 节）。
    """

    @torch.no_grad()
    def __init__(self, sd, scenes, drop=0.1):
        self.drop = drop
        self.latent = torch.cat([sd.vae.to_latent(x.to(sd.device)) for x in scenes.image.split(500)])          # (N, 4, S/4, S/4)
        numbers = {"": 0}                                        # 描述 → 它在表里的行号，0 号是空串
        self.rows = torch.tensor([
            [numbers.setdefault(world.caption(a, t), len(numbers)) for t in world.TEMPLATES] for a in scenes.attrs
        ])                                                       # (N, 5)
        self.captions = list(numbers)
        self.text, self.valid = sd.encode(self.captions)         # (M, L, D)、(M, L)
        self.share = torch.tensor([*world.TEMPLATES.values()])   # (5,)

    def draw(self, size, generator):
        """随机一批的编号：场景 (B,)，以及它的描述在表里的行号 (B,)。随机数在 CPU 上抽。"""
        i = torch.randint(len(self.latent), (size,), generator=generator)
        template = torch.multinomial(self.share, size, replacement=True, generator=generator)
        row = self.rows[i, template]
        return i, torch.where(torch.rand(size, generator=generator) < self.drop, 0, row)

    def batch(self, size, generator):
        """随机一批：潜变量 (B, 4, h, w)、文本特征 (B, L, D)、有效位 (B, L)。"""
        i, row = self.draw(size, generator)
        return self.latent[i], self.text[row], self.valid[row]


def diffusion_loss(denoise, s, x0, generator, kind="v"):
    """均方误差 E‖目标 - denoise(x_t, t)‖²，t 均匀（arXiv:2006.11239 式 14；v 见 arXiv:2202.00512）。

    denoise(x_t, t) 是已经接好条件的网络；x0 (B, ...)；kind 是预测类型 "v" 或 "eps"。
    """
    t = torch.randint(len(s), (len(x0),), generator=generator).to(x0.device)
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    x_t = schedule.q_sample(s, x0, t, eps)
    x_t = x_t.contiguous(memory_format=torch.channels_last) if x_t.ndim == 4 else x_t     # CPU 上卷积更快
    if kind == "v":
        target = schedule.velocity(s, x0, t, eps)
    elif kind == "eps":
        target = eps
    else:
        raise ValueError(f'预测类型必须是 "v" 或 "eps"，收到 {kind!r}')
    return F.mse_loss(denoise(x_t, t), target)
# --8<-- [end:latents]
