"""参考图局部编辑：两个 U-Net，一个读参考图，一个补被遮的图，自注意力的 K、V 拼在一起（MimicBrush，arXiv:2406.07547）。

* 参考 U-Net：吃参考图的潜变量，逐层留下自注意力的 K_r、V_r；
* 模仿 U-Net：修复用的 9 通道 U-Net，自注意力多看一份参考（论文式 1）：

    Attention = softmax( Q_i · cat(K_i, K_r)ᵀ / √d ) · cat(V_i, V_r)

训练不用标注：同一段视频的两帧，一帧遮住一块去补，另一帧作参考。没有参考（训练时随机丢掉）就只看自己。

两个网络的自注意力层数或宽度对不上、批大小不符时抛 ValueError。
"""

from minisd import unet

# --8<-- [start:attention]
import copy

import torch
from torch import nn
from torch.nn import functional as F


class SharedAttention(unet.Attention):
    """自注意力，会留下自己的 K、V，也会接上别人的。参数就是原来那一层的，名字不变。

    ``kept``：最近一次前向的 (K, V)，各 (B, heads, N, C/heads)。
    ``reference``：要接上的 (K_r, V_r, 看不看得见)，最后一项是 (B,) 布尔；None 表示没有参考，与原来的一层逐位相同。
    """

    def __init__(self, base):
        nn.Module.__init__(self)
        self.heads = base.heads
        self.to_q, self.to_k, self.to_v, self.to_out = base.to_q, base.to_k, base.to_v, base.to_out
        self.kept = self.reference = None

    def forward(self, x, context):                                     # 自注意力：context 就是 x，(B, N, C)
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(context)), self.split(self.to_v(context))
        self.kept, mask = (k, v), None
        if self.reference is not None:
            k_r, v_r, seen = self.reference
            k, v = torch.cat([k, k_r], 2), torch.cat([v, v_r], 2)      # (B, heads, N + N_r, C/heads)
            mask = torch.cat([seen.new_ones(len(x), x.shape[1]), seen[:, None].expand(-1, k_r.shape[2])], 1)[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # mask (B, 1, 1, N + N_r)：丢掉参考的样本只看自己
        return self.to_out(out.transpose(1, 2).flatten(2))             # (B, N, C)
# --8<-- [end:attention]


# --8<-- [start:mimic]
def share(net):
    """复制一个 U-Net，自注意力全部换成 SharedAttention；原来的网络不动，步 0 与它逐位相同。"""
    net = copy.deepcopy(net)
    for block in net.modules():
        if isinstance(block, unet.TextBlock):
            block.self_attention = SharedAttention(block.self_attention)
    return net


def attentions(net):
    """网络里全部的 SharedAttention，按定义的次序。"""
    return [m for m in net.modules() if isinstance(m, SharedAttention)]


class Mimic(nn.Module):
    """模仿 U-Net + 参考 U-Net。

    用法：``read(z)`` 让参考 U-Net 看一遍参考图，之后的每次前向都接着它的 K、V；``read(None)`` 忘掉参考。
    参考图只读一遍：它不随采样的步号变。
    """

    def __init__(self, imitative, reference):
        super().__init__()
        self.imitative, self.reference = share(imitative), share(reference)
        mine, theirs = ([m.to_k.out_features for m in attentions(n)] for n in (self.imitative, self.reference))
        if not mine or mine != theirs:
            raise ValueError(f"两个 U-Net 的自注意力对不上：{mine} 与 {theirs}")
        self.bank = None

    @property
    def in_channels(self):
        return self.imitative.in_channels

    def read(self, z, text=None, valid=None, seen=None):
        """参考图的潜变量 z (B, 4, h, w)，步号取 0；text、valid 是文字的编码。z 为 None 就是没有参考。

        ``seen`` (B,) 布尔：为假的样本看不见参考。训练时随机丢，推理时作引导的无条件一支。缺省全都看得见。
        """
        if z is None:
            self.bank = None
            return
        self.reference(z, z.new_zeros(len(z), dtype=torch.long), text, valid)
        seen = torch.ones(len(z), dtype=torch.bool) if seen is None else seen
        self.bank = [(*m.kept, seen.to(z.device)) for m in attentions(self.reference)]

    def forward(self, x, t, text, valid, **extra):
        for i, m in enumerate(attentions(self.imitative)):
            m.reference = None if self.bank is None else self.bank[i]
            if m.reference is not None and len(m.reference[0]) != len(x):
                raise ValueError(f"参考有 {len(m.reference[0])} 张，要画的有 {len(x)} 张：必须一样多")
        return self.imitative(x, t, text, valid, **extra)
# --8<-- [end:mimic]
