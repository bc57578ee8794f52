"""ControlNet：锁定基座，训练一份编码器副本，用零卷积把它接回去（arXiv:2302.05543）。

对基座的全部要求（鸭子类型，不限定类）
--------------------------------------
``base.embed``      模块，``emb = base.embed(t, *cond)``。emb 可以是任何东西，只会原样传给各块。
``base.encoder``    ``nn.ModuleList``，逐块 ``h = block(h, emb)``，每块的输出就是一条跳连；
                    第 0 块把 x 变成特征（输入卷积）。每块有整数属性 ``out_channels``。
``base.middle``     中间块，``h = middle(h, emb)``，有 ``out_channels``。
``base(x, t, *cond, residuals=...)``
                    前向；``residuals`` 是长 n+1 的列表（n 条跳连在前，中间块在最后），
                    由基座加到跳连与中间块的输出上。缺省 ``None`` 表示不受控。

``cond`` 是基座自己的条件（类别、文本特征与掩码……），ControlNet 不解释它，只转交给副本的 embed。

``minisd.unet.UNet`` 满足这份约定；换成别的基座时这里不用改。

公式（第 3.1 节）：块 F 的输出 y = F(x; Θ) 变成 y_c = F(x; Θ) + Z(F(x + Z(c; Θ_z1); Θ_c); Θ_z2)，
Z 是零卷积，c 是条件，Θ 锁定，Θ_c 是副本。形状或接法不合约定时抛 ValueError。
"""

# --8<-- [start:zero]
import copy

from torch import nn
from torch.nn import functional as F


class ZeroConv(nn.Conv2d):
    """零卷积：1×1 卷积，权重与偏置都从零开始。(B, C, H, W) → (B, C', H, W)

    逐像素就是 y = W x + b（W 形状 C'×C）。改的是 ``reset_parameters``，
    所以任何“重新初始化一遍”的代码都不会破坏零起点。
    """

    def __init__(self, in_channels, out_channels=None):
        super().__init__(in_channels, out_channels or in_channels, kernel_size=1)

    def reset_parameters(self):
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
# --8<-- [end:zero]


# --8<-- [start:edges]
def edges(mask):
    """边缘图：3×3 邻域里遮罩的最大值与最小值之差过半的像素为 1。(N, 1, S, S) → 同形，取值 0 或 1"""
    return (F.max_pool2d(mask, 3, 1, 1) + F.max_pool2d(-mask, 3, 1, 1) > 0.5).float()
# --8<-- [end:edges]


# --8<-- [start:hint]
class HintEncoder(nn.Sequential):
    """条件图小网络：把像素条件图降到基座第 0 块输出的尺寸，末层是零卷积。

    (B, in_channels, H·2^down, W·2^down) → (B, out_channels, H, W)

    ``out_channels`` 是基座 ``encoder[0].out_channels``；``down`` 是步长 2 的次数，
    例如 8 倍压缩的潜空间取 3。
    """

    def __init__(self, in_channels, out_channels, down=0, width=16):
        layers = [nn.Conv2d(in_channels, width, 3, padding=1), nn.SiLU()]
        for _ in range(down):                                     # 每次边长减半，通道加倍
            layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.SiLU()]
            width = 2 * width
        super().__init__(*layers, nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), ZeroConv(width, out_channels))
        self.in_channels = in_channels

    def forward(self, hint):
        if hint.ndim != 4 or hint.shape[1] != self.in_channels:
            raise ValueError(f"条件图的形状必须是 (B, {self.in_channels}, H, W)，收到 {tuple(hint.shape)}")
        return super().forward(hint)
# --8<-- [end:hint]


# --8<-- [start:controlnet]
class ControlNet(nn.Module):
    """基座编码器与中间块的可训练副本。构造时复制权重，之后与基座互不影响。"""

    def __init__(self, base, hint_encoder):
        super().__init__()
        check_base(base)
        parts = copy.deepcopy((base.embed, base.encoder, base.middle))
        self.embed, self.encoder, self.middle = (part.requires_grad_(True).train() for part in parts)
        self.hint_encoder = hint_encoder
        self.zero_skips = nn.ModuleList(ZeroConv(block.out_channels) for block in base.encoder)   # n 个
        self.zero_middle = ZeroConv(base.middle.out_channels)                                     # 再加 1 个

    def forward(self, x, t, *cond, hint, scale=1.0):
        """返回残差列表，长 n+1：依次与各跳连、中间块的输出同形。

        x (B, C, H, W)，t (B,)，hint (B, C_hint, H_hint, W_hint)；
        scale 是一个数，或长 n+1 的序列（逐个残差的强度）。
        """
        zeros = [*self.zero_skips, self.zero_middle]
        scales = [scale] * len(zeros) if isinstance(scale, int | float) else list(scale)
        if len(scales) != len(zeros):
            raise ValueError(f"scale 必须是一个数或长 {len(zeros)} 的序列，收到长 {len(scales)}")
        emb = self.embed(t, *cond)
        h, features = x, []
        for i, block in enumerate(self.encoder):
            h = block(h, emb)                                     # (B, C_i, H_i, W_i)
            if i == 0:
                h = h + self.encode(hint, like=h)                 # 条件图只从这一个入口进来
            features.append(h)
        features.append(self.middle(h, emb))
        return [s * zero(f) for s, zero, f in zip(scales, zeros, features, strict=True)]

    def encode(self, hint, like):
        """条件图 → 与第 0 块输出同形的特征；不许靠广播蒙混过关。"""
        c = self.hint_encoder(hint)
        if c.shape != like.shape:
            raise ValueError(f"条件图编码后是 {tuple(c.shape)}，与基座第 0 块的输出 {tuple(like.shape)} 不符")
        return c
# --8<-- [end:controlnet]


# --8<-- [start:controlled]
class Controlled(nn.Module):
    """锁定的基座 + 一个或多个 ControlNet；多个 ControlNet 的残差直接相加。

    构造时把基座锁住（``requires_grad_(False)`` 且恒为 eval）。
    基座已经受控、同一个 ControlNet 接了两次、或 ControlNet 是给别的结构训的，抛 ValueError。
    """

    def __init__(self, base, *controls):
        super().__init__()
        check_base(base)
        if not controls:
            raise ValueError("至少要接一个 ControlNet")
        if len({id(c) for c in controls}) != len(controls):
            raise ValueError("同一个 ControlNet 接了两次，残差会翻倍；要加强请调 scale")
        want = [block.out_channels for block in [*base.encoder, base.middle]]
        for i, c in enumerate(controls):
            if (got := [z.out_channels for z in [*c.zero_skips, c.zero_middle]]) != want:
                raise ValueError(f"第 {i} 个 ControlNet 的残差通道是 {got}，这个基座要 {want}：它是给别的基座训的")
        self.base = base.requires_grad_(False).eval()
        self.controls = nn.ModuleList(controls)

    def train(self, mode=True):
        super().train(mode)
        self.base.eval()                    # 锁定也包括 dropout 与批归一化的统计量
        return self

    def forward(self, x, t, *cond, hints, scales=None):
        """hints：每个 ControlNet 一张条件图；scales：每个 ControlNet 一个强度，缺省全为 1。"""
        scales = [1.0] * len(self.controls) if scales is None else scales
        if not len(hints) == len(scales) == len(self.controls):
            raise ValueError(f"要 {len(self.controls)} 张条件图与强度，收到 {len(hints)} 张、{len(scales)} 个")
        each = [c(x, t, *cond, hint=h, scale=s) for c, h, s in zip(self.controls, hints, scales, strict=True)]
        return self.base(x, t, *cond, residuals=[sum(rs) for rs in zip(*each, strict=True)])
# --8<-- [end:controlled]


# --8<-- [start:check]
def check_base(base):
    """基座满足文件开头的约定吗；不改动任何东西。"""
    if isinstance(base, Controlled):
        raise ValueError("基座已经接过 ControlNet；要接多个，请写 Controlled(base, a, b)")
    for name in ("embed", "encoder", "middle"):
        if not isinstance(getattr(base, name, None), nn.Module):
            raise ValueError(f"基座缺少模块 {name!r}")
    if not isinstance(base.encoder, nn.ModuleList) or not len(base.encoder):
        raise ValueError("基座的 encoder 必须是非空的 nn.ModuleList，每块输出一条跳连")
    for name, block in [*((f"encoder[{i}]", b) for i, b in enumerate(base.encoder)), ("middle", base.middle)]:
        if not isinstance(getattr(block, "out_channels", None), int):
            raise ValueError(f"基座的 {name} 缺少整数属性 out_channels")
# --8<-- [end:check]
