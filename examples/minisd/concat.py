"""通道拼接：与潜变量同样大小的条件，直接接在 U-Net 的输入上（修复、超分、深度；arXiv:2112.10752 第 3.3 节）。

修复多 5 个通道（掩码 1 + 被遮图的潜变量 4），超分多 3 个（低清图），深度多 1 个。
"""

# --8<-- [start:concat]
import copy

import torch
from torch import nn


def widen(unet, extra):
    """复制一个 U-Net，输入卷积多收 extra 个通道；新通道的权重从零开始，所以起点与原来的网络相同。

    要求 ``unet.encoder[0]`` 是输入卷积（``nn.Conv2d``），``unet.in_channels`` 是它的输入通道数。
    """
    if isinstance(extra, bool) or not isinstance(extra, int) or extra < 1:
        raise ValueError(f"extra 必须是不小于 1 的整数，收到 {extra!r}")
    wide = copy.deepcopy(unet).requires_grad_(True)
    conv = wide.encoder[0]
    new = conv.weight.new_zeros(conv.out_channels, extra, *conv.kernel_size)           # (C_out, extra, k, k)
    conv.weight = nn.Parameter(torch.cat([conv.weight.detach(), new], 1))
    conv.in_channels = wide.in_channels = conv.in_channels + extra
    return wide


class Concat(nn.Module):
    """带着一份条件的 U-Net：每次前向把 c (B, extra, h, w) 拼到 x (B, 4, h, w) 后面，其余照旧。

    无分类器引导把批翻成两倍，条件就跟着重复，所以它能直接当 ``pipeline.StableDiffusion`` 的 U-Net 用。
    """

    def __init__(self, unet, c):
        super().__init__()
        self.unet, self.c = unet, c

    def forward(self, x, t, text, valid, **extra):
        if len(x) % len(self.c) or x.shape[2:] != self.c.shape[2:]:
            raise ValueError(f"条件 {tuple(self.c.shape)} 与输入 {tuple(x.shape)} 对不上：批要整除，边长要相同")
        c = self.c.repeat(len(x) // len(self.c), 1, 1, 1)
        return self.unet(torch.cat([x, c], 1), t, text, valid, **extra)                # (B, 4, h, w)
# --8<-- [end:concat]
