"""二维点的去噪网络：一个认识步号的小 MLP。"""

# --8<-- [start:denoiser]
import torch
from torch import nn


def waves(x, freq):
    """正弦特征：x (B, D)，freq (F,) → (B, 2·D·F)。"""
    u = (x[:, :, None] * freq).flatten(1)                          # (B, D·F)
    return torch.cat([u.sin(), u.cos()], 1)


class Denoiser(nn.Module):
    """ε_θ(x_t, t)：x_t (B, 2)，t (B,) → (B, 2)。knows_time=False 时抹掉步号。

    坐标展开成高频的正弦特征，才画得出鱼眼那样的细节；步号展开后送进每一层。
    """

    def __init__(self, width=96, depth=3, knows_time=True):
        super().__init__()
        self.knows_time = knows_time
        self.register_buffer("freq_x", torch.tensor([1.0, 2.0, 4.0, 8.0]))
        self.register_buffer("freq_t", 10000.0 ** (-torch.arange(16) / 16))
        self.enter = nn.Linear(2 + 2 * 2 * 4 + 2 * 16, width)
        self.body = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.time = nn.ModuleList(nn.Linear(2 * 16, width) for _ in range(depth))
        self.leave = nn.Linear(width, 2)

    def forward(self, x, t):
        e = waves(t[:, None].float(), self.freq_t)                 # (B, 32) 时间嵌入
        if not self.knows_time:
            e = torch.zeros_like(e)
        h = self.enter(torch.cat([x, waves(x, self.freq_x), e], 1))   # (B, width)
        for body, time_proj in zip(self.body, self.time):
            h = h + body(nn.functional.silu(h + time_proj(e)))     # 每层都加一次时间
        return self.leave(nn.functional.silu(h))                   # (B, 2)
# --8<-- [end:denoiser]
