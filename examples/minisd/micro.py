"""微条件：把训练图的元数据（裁剪坐标、原始尺寸……）也告诉网络（SDXL，arXiv:2307.01952 第 2.2 节）。

数据怎样被切、被缩，本来是要丢掉的信息；网络不知道，就只能把切过的图当成世界的样子来学。
"""

from minisd import unet

# --8<-- [start:micro]
import copy

import torch
from torch import nn


class MicroEmbed(unet.Embed):
    """步号嵌入再加上 count 个标量的嵌入：各自展成正弦特征，拼起来过一个小网络，加到时间嵌入上。

    末层从零开始，所以刚换上时与原来的嵌入逐位相同。
    """

    def __init__(self, width, count):
        super().__init__(width)
        self.count = count
        self.micro = nn.Sequential(nn.Linear(count * width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        nn.init.zeros_(self.micro[-1].weight)
        nn.init.zeros_(self.micro[-1].bias)

    def forward(self, t, text, valid, micro=None):
        """micro (B, count) 是各个标量（像素数）；无分类器引导把批翻倍时自动重复。"""
        cond = super().forward(t, text, valid)
        if micro is None or micro.ndim != 2 or micro.shape[1] != self.count or len(t) % len(micro):
            got = None if micro is None else tuple(micro.shape)
            raise ValueError(f"微条件的形状必须是 (B, {self.count})，B 整除批大小 {len(t)}，收到 {got}")
        micro = micro.repeat(len(t) // len(micro), 1)                                          # (B, K)
        waves = unet.time_features(micro.flatten(), self.width).view(len(t), -1)               # (B, K·C)
        return cond._replace(time=cond.time + self.micro(waves))                               # (B, 4C)


def add_micro(net, count):
    """复制一个 U-Net，把嵌入换成收 count 个微条件的；前向时以 ``image=`` 传入。原来的网络不动。"""
    net = copy.deepcopy(net).requires_grad_(True)
    embed = MicroEmbed(net.embed.width, count).to(next(net.parameters()).device)
    embed.time.load_state_dict(net.embed.time.state_dict())
    net.embed = embed
    return net
# --8<-- [end:micro]
