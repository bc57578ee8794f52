"""迷你 U-Net：Stable Diffusion 的骨架按比例缩小（arXiv:2112.10752）。

输入卷积 → 下行（残差块 + 自注意力 + 对文本的交叉注意力）→ 中间 → 上行（拼接跳连）→ 输出卷积。
满足 ``minisd.controlnet`` 开头写明的基座约定（embed、encoder、middle、residuals=）。

约定：x (B, C, H, W)，t (B,) 步号，text (B, L, D) 逐字特征，valid (B, L) 有效位。
"""

# --8<-- [start:attention]
import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class Condition(NamedTuple):
    """传给每个块的条件。"""

    time: torch.Tensor             # (B, 4C) 时间嵌入
    text: torch.Tensor             # (B, L, D)
    valid: torch.Tensor            # (B, L) 布尔；<空> 不参与注意力
    image: Any = None              # 图像提示；基座不用，留给接在 cross 上的适配器


class Attention(nn.Module):
    """多头注意力：Q 来自 x，K、V 来自 context。(B, N, C)、(B, M, D) → (B, N, C)"""

    def __init__(self, channels, context_dim, heads=4):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def split(self, x):
        """(B, N, C) → (B, heads, N, C/heads)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, context, valid=None):
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(context)), self.split(self.to_v(context))
        mask = None if valid is None else valid[:, None, None]         # (B, 1, 1, M)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def weights(self, x, context, valid=None):
        """softmax(Q Kᵀ / √d)：(B, heads, N, M)，每行和为 1。前向不算它，画热力图时才用。"""
        q, k = self.split(self.to_q(x)), self.split(self.to_k(context))
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if valid is not None:
            logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
        return logits.softmax(-1)


class CrossAttention(Attention):
    """对文本的交叉注意力。单列一类，适配器（IP-Adapter）才有地方接：它拿得到整个 Condition。"""

    def forward(self, x, cond):
        return super().forward(x, cond.text, cond.valid)
# --8<-- [end:attention]


# --8<-- [start:blocks]
class ResBlock(nn.Module):
    """残差块：时间嵌入给出缩放与平移（scale-shift norm，arXiv:2105.05233）。(B, C_in, H, W) → (B, C_out, H, W)"""

    def __init__(self, c_in, c_out, time_dim):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(time)[:, :, None, None].chunk(2, 1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class TextBlock(nn.Module):
    """自注意力（像素看像素）→ 交叉注意力（像素看字）→ 前馈。(B, C, H, W) → 同形"""

    def __init__(self, channels, text_dim):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.norm_self, self.self_attention = nn.LayerNorm(channels), Attention(channels, channels)
        self.norm_cross, self.cross = nn.LayerNorm(channels), CrossAttention(channels, text_dim)
        self.norm_ff = nn.LayerNorm(channels)
        self.ff = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))
        self.out = nn.Linear(channels, channels)

    def forward(self, x, cond):
        h = self.norm(x).flatten(2).transpose(1, 2)                    # (B, HW, C)
        n = self.norm_self(h)
        h = h + self.self_attention(n, n)
        h = h + self.cross(self.norm_cross(h), cond)
        h = h + self.ff(self.norm_ff(h))
        return x + self.out(h).transpose(1, 2).unflatten(2, x.shape[2:])


class Stage(nn.Module):
    """一级：残差块 + 文本块。"""

    def __init__(self, c_in, c_out, time_dim, text_dim):
        super().__init__()
        self.out_channels = c_out
        self.res, self.text = ResBlock(c_in, c_out, time_dim), TextBlock(c_out, text_dim)

    def forward(self, x, cond):
        return self.text(self.res(x, cond.time), cond)


class Input(nn.Conv2d):
    """输入卷积；不看条件。"""

    def forward(self, x, cond):
        return super().forward(x)


class Down(nn.Conv2d):
    """边长减半；不看条件。"""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, cond):
        return super().forward(x)


class Middle(nn.Module):
    def __init__(self, channels, time_dim, text_dim):
        super().__init__()
        self.out_channels = channels
        self.stage = Stage(channels, channels, time_dim, text_dim)
        self.res = ResBlock(channels, channels, time_dim)

    def forward(self, x, cond):
        return self.res(self.stage(x, cond), cond.time)
# --8<-- [end:blocks]


# --8<-- [start:unet]
def time_features(t, dim):
    """步号的正弦特征：(B,) → (B, dim)，前一半余弦、后一半正弦。"""
    freq = 10000 ** (-torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None].float() * freq
    return torch.cat([angle.cos(), angle.sin()], 1)


class Embed(nn.Module):
    """条件 → 传给各块的 Condition；只有步号需要学。"""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width), nn.SiLU())

    def forward(self, t, text, valid, image=None):
        return Condition(self.time(time_features(t, self.width)), text, valid, image)


class UNet(nn.Module):
    """文本条件的 U-Net：边长 6 → 3 → 6，通道 48、64。

    ``in_channels`` 可以大于 ``out_channels``：修复模型把掩码与被遮的潜变量拼在输入上。
    """

    def __init__(self, in_channels=4, out_channels=4, widths=(48, 64), text_dim=64):
        super().__init__()
        self.in_channels = in_channels
        first, time_dim = widths[0], 4 * widths[0]
        self.embed = Embed(first)
        self.encoder = nn.ModuleList([Input(in_channels, first, 3, padding=1)])
        for level, width in enumerate(widths):
            if level:
                self.encoder.append(Down(self.encoder[-1].out_channels))
            self.encoder.append(Stage(self.encoder[-1].out_channels, width, time_dim, text_dim))
        self.middle = Middle(widths[-1], time_dim, text_dim)
        skips = [block.out_channels for block in self.encoder]         # 48, 48, 48, 64
        self.decoder, c = nn.ModuleList(), widths[-1]
        for level, width in reversed([*enumerate(widths)]):
            for _ in range(2):                                         # 每级比下行多一块，吃掉全部跳连
                self.decoder.append(Stage(c + skips.pop(), width, time_dim, text_dim))
                c = width
            if level:
                self.decoder.append(nn.Conv2d(c, c, 3, padding=1))     # 跟在最近邻放大之后
        self.norm, self.out = nn.GroupNorm(8, c), nn.Conv2d(c, out_channels, 3, padding=1)
        self.reset_outputs()

    def reset_outputs(self):
        """每条残差支路的末层与整个网络的末层从零开始：起步时各块是恒等映射，输出是 0，训练更稳。"""
        for module in self.modules():
            if isinstance(module, ResBlock):
                last = module.conv2
            elif isinstance(module, TextBlock | UNet):
                last = module.out
            else:
                continue
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x, t, text, valid, image=None, residuals=None):
        """x (B, C, H, W) → (B, C_out, H, W)。residuals 是加到各跳连与中间块输出上的残差（ControlNet）。"""
        scale = 2 ** sum(isinstance(block, Down) for block in self.encoder)
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] % scale or x.shape[3] % scale:
            want = f"(B, {self.in_channels}, H, W)，H、W 是 {scale} 的倍数"
            raise ValueError(f"U-Net 的输入形状必须是 {want}，收到 {tuple(x.shape)}")
        cond = self.embed(t, text, valid, image)
        h, skips = x, []
        for block in self.encoder:
            h = block(h, cond)
            skips.append(h)
        h = self.middle(h, cond)
        if residuals is not None:
            if len(residuals) != len(skips) + 1:
                raise ValueError(f"residuals 必须有 {len(skips) + 1} 个，收到 {len(residuals)} 个")
            *extra, last = residuals
            h, skips = h + last, [s + r for s, r in zip(skips, extra)]
        for block in self.decoder:
            if isinstance(block, Stage):
                h = block(torch.cat([h, skips.pop()], 1), cond)
            else:
                h = block(F.interpolate(h, scale_factor=2.0))
        return self.out(F.silu(self.norm(h)))
# --8<-- [end:unet]
