"""IP-Adapter：图像当提示词（image prompt），基座一个参数也不动（arXiv:2308.06721）。

新增的只有两样：
* 图像投影：CLIP 图像编码器给的一个全局向量 → 线性层 + LayerNorm → N 个 token（缺省 4 个）；
* 每个交叉注意力层旁边再放一对 K'、V'，专看图像 token，Q 与文本共用（解耦交叉注意力）：

    Z = Attention(Q, K, V) + λ · Attention(Q, K', V')

λ 是使用时的旋钮：训练时为 1；为 0 时逐位等于基座。没有图像就是向量取零（训练时随机置零，推理时作 CFG 的无条件一支）。

坏输入（重复接、没有交叉注意力、λ 不是有限的数、向量或检查点的形状不对）抛 ValueError，基座原封不动。
"""

from minisd import unet

# --8<-- [start:projection]
import copy
import math

import torch
from torch import nn
from torch.nn import functional as F


class ImageProjection(nn.Module):
    """图像向量 (B, D_image) → 图像 token (B, N, D)：与文本的逐字特征同宽，排在一起也分得开。"""

    def __init__(self, image_dim=64, text_dim=64, tokens=4):
        super().__init__()
        self.image_dim, self.tokens = image_dim, tokens
        self.linear = nn.Linear(image_dim, tokens * text_dim)
        self.norm = nn.LayerNorm(text_dim)

    def forward(self, image):
        return self.norm(self.linear(image).unflatten(1, (self.tokens, -1)))       # (B, N·D) → (B, N, D)
# --8<-- [end:projection]


# --8<-- [start:attention]
class DecoupledCrossAttention(unet.CrossAttention):
    """解耦交叉注意力：基座的四个投影原样留用（连参数名都不变），另加 K'、V'。

    K'、V' 从 K、V 的权重出发；``scale`` 就是 λ。
    """

    def __init__(self, base):
        nn.Module.__init__(self)
        self.heads = base.heads
        self.to_q, self.to_k, self.to_v, self.to_out = base.to_q, base.to_k, base.to_v, base.to_out
        self.to_k_image, self.to_v_image = copy.deepcopy(base.to_k), copy.deepcopy(base.to_v)
        self.scale = 1.0

    def forward(self, x, cond):                                        # x (B, HW, C)
        q = self.split(self.to_q(x))                                   # (B, heads, HW, C/heads) 两路共用
        k, v = self.split(self.to_k(cond.text)), self.split(self.to_v(cond.text))
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=cond.valid[:, None, None])
        if cond.image is not None:
            k, v = self.split(self.to_k_image(cond.image)), self.split(self.to_v_image(cond.image))
            z = z + self.scale * F.scaled_dot_product_attention(q, k, v)       # 各自 softmax，再相加
        return self.to_out(z.transpose(1, 2).flatten(2))               # (B, HW, C)
# --8<-- [end:attention]


# --8<-- [start:add]
class ImageEmbed(unet.Embed):
    """基座的嵌入再加图像投影：前向的 ``image=`` 收图像向量 (B, D_image)，各层看到的是 token (B, N, D)。"""

    def __init__(self, base, projection):
        nn.Module.__init__(self)
        self.width, self.time, self.projection = base.width, base.time, projection

    def forward(self, t, text, valid, image=None):
        if image is not None:
            want = (len(t), self.projection.image_dim)
            if image.shape != want:
                raise ValueError(f"图像向量的形状必须是 {want}，收到 {tuple(image.shape)}；用了引导就先过 with_null")
            image = self.projection(image)
        return super().forward(t, text, valid, image)


def add_ip_adapter(net, image_dim=64, tokens=4):
    """复制一个 U-Net，给每个交叉注意力层配上 K'、V'；只有投影与 K'、V' 可训练。原来的网络不动。"""
    if layers(net):
        raise ValueError("这个网络已经接过 IP-Adapter")
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens 必须是不小于 1 的整数，收到 {tokens!r}")
    net = copy.deepcopy(net).requires_grad_(False)
    found = [(m, name, c) for m in net.modules() for name, c in m.named_children() if isinstance(c, unet.CrossAttention)]
    if not found:
        raise ValueError("找不到交叉注意力层（unet.CrossAttention），没有地方接")
    if odd := {type(p).__name__ for _, _, c in found for p in (c.to_k, c.to_v) if type(p) is not nn.Linear}:
        raise ValueError(f"K、V 的投影已经换成 {'、'.join(sorted(odd))}：K'、V' 照原来的线性层复制，先接 IP-Adapter，再接 LoRA")
    for parent, name, cross in found:
        setattr(parent, name, DecoupledCrossAttention(cross))
    text_dim = found[0][2].to_k.in_features
    net.embed = ImageEmbed(net.embed, ImageProjection(image_dim, text_dim, tokens).to(found[0][2].to_k.weight))
    for p in adapter_parameters(net).values():
        p.requires_grad_(True)
    return net


def layers(net):
    """网络里全部的解耦交叉注意力层，按前向的次序。"""
    return [m for m in net.modules() if isinstance(m, DecoupledCrossAttention)]


def adapter_parameters(net):
    """{名字: 参数}，只含新增的：图像投影与各层的 K'、V'。"""
    return {n: p for n, p in net.named_parameters() if n.startswith("embed.projection.") or ".to_k_image." in n or ".to_v_image." in n}
# --8<-- [end:add]


# --8<-- [start:use]
def set_scale(net, scale):
    """λ：全部层一起调。0 是基座，1 是训练时的强度。"""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"λ 必须是有限的数，收到 {scale!r}")
    if not layers(net):
        raise ValueError("这个网络还没有接 IP-Adapter")
    for layer in layers(net):
        layer.scale = float(scale)


def with_null(image):
    """给无分类器引导用：(B, D) → (2B, D)，前一半照旧，后一半是零向量（没有图像）。"""
    return torch.cat([image, torch.zeros_like(image)])


def drop(image, text_row, generator, image_only=0.05, text_only=0.05, both=0.05):
    """训练时随机丢条件：图像丢弃即向量置零，文本丢弃即换成 0 号行（空串）。三种情况互斥。

    image (B, D)，text_row (B,) 是描述在表里的行号 → 同形的 (image, text_row)。
    """
    if not (min(image_only, text_only, both) >= 0 and image_only + text_only + both <= 1):
        raise ValueError(f"丢弃的概率必须不小于 0、合起来不超过 1，收到 {(image_only, text_only, both)}")
    u = torch.rand(len(image), generator=generator)
    no_image = (u < image_only) | (u >= 1 - both)
    no_text = ((u >= image_only) & (u < image_only + text_only)) | (u >= 1 - both)
    return torch.where(no_image[:, None], 0.0, image), torch.where(no_text, 0, text_row)


def adapter_state(net):
    """只含新增参数的检查点：换一个同结构的基座也能用。"""
    return {n: p.detach().clone() for n, p in adapter_parameters(net).items()}


@torch.no_grad()
def load_adapter(net, state):
    """载入 :func:`adapter_state` 存下的参数；键或形状对不上抛 ValueError，网络不动。"""
    own = adapter_parameters(net)
    if own.keys() != state.keys():
        raise ValueError(f"检查点与网络对不上：{'、'.join(sorted(own.keys() ^ state.keys()))}")
    for name, p in own.items():
        if p.shape != state[name].shape:
            raise ValueError(f"{name} 的形状必须是 {tuple(p.shape)}，收到 {tuple(state[name].shape)}")
    for name, p in own.items():
        p.copy_(state[name])
# --8<-- [end:use]
