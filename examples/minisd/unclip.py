"""迷你 unCLIP（DALL·E 2，arXiv:2204.06125）：先验把文本变成 CLIP 图像向量，解码器把图像向量画成图。

CLIP 的向量都是单位长的 (B, D)，每一维只有 1/√D 左右；进网络前乘 √D，到 1 的量级。
"""

from minisd import samplers, schedule, unet

# --8<-- [start:decoder]
import copy

import torch
from torch import nn
from torch.nn import functional as F


class ImageEmbed(unet.Embed):
    """步号嵌入加上 CLIP 图像向量的投影（论文 2.1 节；论文另有四个额外的文本标记，这里没有）。投影从零开始。"""

    def __init__(self, width, dim):
        super().__init__(width)
        self.project = nn.Linear(dim, 4 * width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, t, text, valid, z=None):
        """z (B, D) 是单位向量；全零表示无条件，无分类器引导用它。"""
        cond = super().forward(t, text, valid)
        return cond if z is None else cond._replace(time=cond.time + self.project(z * z.shape[1] ** 0.5))


def decoder_from(net, dim):
    """复制文生图的 U-Net，换上收图像向量的嵌入；前向时以 ``image=`` 传入。原来的网络不动。"""
    net = copy.deepcopy(net).requires_grad_(True)
    embed = ImageEmbed(net.embed.width, dim).to(next(net.parameters()).device)
    embed.time.load_state_dict(net.embed.time.state_dict())
    net.embed = embed
    return net


def drop(z, p, generator):
    """以概率 p 把整个条件向量换成零（论文取 0.1），网络因此也学会无条件。"""
    return z * (torch.rand(len(z), 1, generator=generator) >= p)


@torch.no_grad()
def decode(sd, decoder, z, generator, guidance=2.0, steps=12):
    """图像向量 (B, D) → 图 (B, 3, 24, 24)。文字一律为空，条件只有 z；引导的“无条件”是零向量。

    z 必须是单位向量：文本向量也是，所以塞错了不会报错，只会画错。
    """
    if z.ndim != 2 or not torch.allclose(z.norm(dim=1), torch.ones(len(z), device=z.device), atol=1e-3):
        raise ValueError(f"z 必须是 (B, D) 的单位向量，收到形状 {tuple(z.shape)}")
    text, valid = sd.encode([""] * (2 * len(z)))
    both = torch.cat([z, torch.zeros_like(z)])

    def denoise(x, t):
        v, v0 = decoder(torch.cat([x, x]), torch.cat([t, t]), text, valid, image=both).chunk(2)
        return v0 + guidance * (v - v0)

    return sd.vae.to_image(samplers.sample(sd.schedule, denoise, sd.noise(len(z), generator), steps))
# --8<-- [end:decoder]


# --8<-- [start:prior]
class Prior(nn.Module):
    """扩散先验 p(z_i | z_t)：由加噪的图像向量、文本向量、步号，直接预测干净的图像向量（论文 2.2 节的式子）。

    论文用带因果掩码的 Transformer，还看逐字特征；这里是小 MLP。``center``、``scale`` 把图像向量化成均值 0、
    每维方差约 1，由 :meth:`measure` 填。
    """

    def __init__(self, dim, width=256, depth=3):
        super().__init__()
        self.dim = dim
        self.enter = nn.Linear(2 * dim + 64, width)                                            # 步号的正弦特征 64 维
        self.body = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth)
        )
        self.leave = nn.Linear(width, dim)
        self.register_buffer("center", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))

    def measure(self, z):
        """用一批图像向量 (N, D) 定下标准化的尺度。"""
        self.center.copy_(z.mean(0))
        self.scale.copy_((z - self.center).std())

    def forward(self, x, t, z_text):
        """x (B, D) 是标准化后加噪的图像向量，t (B,)，z_text (B, D) → 标准化的 ẑ_i (B, D)。"""
        h = self.enter(torch.cat([x, z_text * self.dim**0.5, unet.time_features(t, 64)], 1))
        for block in self.body:
            h = h + block(h)
        return self.leave(h)

    @torch.no_grad()
    def sample(self, s, z_text, generator, steps=12, candidates=2):
        """每句话采 candidates 个图像向量，留下与文本向量内积最大的（论文取 2）。→ (B, D) 单位向量"""
        found = []
        for _ in range(candidates):
            noise = torch.randn(z_text.shape, generator=generator).to(z_text.device)
            x = samplers.sample(s, lambda x, t: self(x, t, z_text), noise, steps, kind="x0")
            found.append(F.normalize(x * self.scale + self.center, dim=1))
        found = torch.stack(found)                                                             # (K, B, D)
        best = (found * z_text).sum(2).argmax(0)                                               # (B,)
        return found[best, torch.arange(len(z_text))]


def prior_loss(prior, s, z_image, z_text, generator):
    """E‖z_i - f(z_i^(t), t, z_t)‖²：直接预测干净的图像向量（论文 2.2 节）。z_image、z_text 是配对的 (B, D)。"""
    x0 = (z_image - prior.center) / prior.scale
    t = torch.randint(len(s), (len(x0),), generator=generator).to(x0.device)
    eps = torch.randn(x0.shape, generator=generator).to(x0.device)
    return F.mse_loss(prior(schedule.q_sample(s, x0, t, eps), t, z_text), x0)
# --8<-- [end:prior]
