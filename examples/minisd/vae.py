"""迷你 VAE：24×24×3 的图 ↔ 6×6×4 的潜变量（边长 f = 4 倍压缩）。

与 Stable Diffusion 的 VAE 同一分工（arXiv:2112.10752 第 3.1 节）：感知压缩归它，生成归扩散模型；
KL 项的权重很小，只为不让潜变量的尺度跑飞。真实的 VAE 还有感知损失与对抗损失，这里只有 L1 + L2。
"""

# --8<-- [start:vae]
import torch
from torch import nn
from torch.nn import functional as F

from minisd.elbo import kl_standard_normal, reparameterize


class ResBlock(nn.Module):
    """(B, C, H, W) → 同形。第二个卷积从零开始，所以起点是恒等映射。"""

    def __init__(self, channels):
        super().__init__()
        self.net = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x):
        return x + self.net(x)


class VAE(nn.Module):
    """首尾用像素重排（space-to-depth）换掉全分辨率的卷积，CPU 上快得多。"""

    FACTOR = 4                                                         # 边长压缩倍数

    def __init__(self, latent=4, widths=(48, 64)):
        super().__init__()
        a, b = widths
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, a, 3, padding=1), ResBlock(a), nn.SiLU(),   # S/2
            nn.Conv2d(a, b, 4, 2, 1), ResBlock(b), nn.SiLU(), nn.Conv2d(b, 2 * latent, 1),  # S/4
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, b, 3, padding=1), ResBlock(b), ResBlock(b), nn.Upsample(scale_factor=2),
            nn.Conv2d(b, a, 3, padding=1), ResBlock(a), nn.SiLU(), nn.Conv2d(a, 12, 3, padding=1), nn.PixelShuffle(2),
        )
        # 潜变量逐通道的均值与标准差，训练完由 measure 填；作用同 SD 的缩放系数 0.18215
        self.register_buffer("mean", torch.zeros(1, latent, 1, 1))
        self.register_buffer("std", torch.ones(1, latent, 1, 1))

    def encode(self, images):
        """(B, 3, S, S) → 后验 q(z|x) 的均值与对数方差，各 (B, 4, S/4, S/4)。"""
        if images.ndim != 4 or images.shape[1] != 3 or any(n % self.FACTOR for n in images.shape[2:]):
            raise ValueError(f"图像的形状必须是 (B, 3, H, W) 且边长是 {self.FACTOR} 的倍数，收到 {tuple(images.shape)}")
        mean, log_var = self.encoder(images).chunk(2, 1)
        return mean, log_var.clamp(-12, 6)

    def to_latent(self, images):
        """图 → 标准化后的潜变量（取后验均值），逐通道均值 0、方差 1。"""
        mean, _ = self.encode(images)
        return (mean - self.mean) / self.std

    def to_image(self, latent):
        """标准化的潜变量 → 图。"""
        return self.decoder(latent * self.std + self.mean)

    @torch.no_grad()
    def measure(self, images):
        """用一批图量出潜变量的尺度，填进 ``mean`` 与 ``std``。"""
        z = torch.cat([self.encode(x)[0] for x in images.split(1000)])
        self.mean.copy_(z.mean((0, 2, 3), keepdim=True))
        self.std.copy_(z.std((0, 2, 3), keepdim=True))


def vae_loss(vae, images, noise, beta=2e-4):
    """重建（L2 + 0.2·L1）+ β·KL，KL 对全部元素取平均；noise 与潜变量同形。"""
    mean, log_var = vae.encode(images)
    out = vae.decoder(reparameterize(mean, log_var, noise))
    return F.mse_loss(out, images) + 0.2 * F.l1_loss(out, images) + beta * kl_standard_normal(mean, log_var).mean()
# --8<-- [end:vae]
