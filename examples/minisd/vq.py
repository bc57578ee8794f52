"""向量量化（vector quantization，VQ）：把连续的 z_e 换成码本里最近的一行。

约定
----
* 编码器输出 ``z_e``：(B, D, ...)，第二维是通道；``...`` 是任意个空间维，记每维大小之积为 P。
* 码本 ``e``：(K, D)；下标 ``k``：(B, ...) 的长整型；``z_q`` 与 ``z_e`` 同形状。
* 损失按元素取平均（论文写的是对 D 求和的平方范数，只差一个常数倍）。

出处：VQ-VAE（arXiv:1711.00937）式 1–3 与附录 A.1。形状或取值不合约定时抛 ValueError。
"""

# --8<-- [start:parts]
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


@torch.no_grad()
def nearest(z, e):
    """每个向量最近的码（式 1、2）：z (N, D)，e (K, D) → k (N,)。距离相同取下标小的。"""
    # ‖z - e‖² = ‖z‖² - 2 z·e + ‖e‖²；‖z‖² 对所有码相同，比大小时可省
    return (e.square().sum(1) - 2 * z @ e.T).argmin(1)


def straight_through(z_e, z_q):
    """直通估计：前向的值是 z_q，反向时 z_q 收到的梯度原样交给 z_e。两者同形状。"""
    return z_q.detach() + (z_e - z_e.detach())     # 括号里的值恰为 0，导数为 1


def perplexity(k, K):
    """码本困惑度 exp(-Σ p log p)：1 表示只用一个码，K 表示均匀地用了全部。k 是任意形状的下标，不能为空。"""
    if not k.numel():
        raise ValueError("下标是空的，困惑度没有定义")
    p = torch.bincount(k.flatten(), minlength=K) / k.numel()       # (K,) 用到每个码的频率
    return torch.special.entr(p).sum().exp().item()                # entr(p) = -p log p，entr(0) = 0
# --8<-- [end:parts]


# --8<-- [start:result]
class Quantized(NamedTuple):
    """一次量化的结果。"""

    z_q: torch.Tensor        # (B, D, ...) 送进解码器；值来自码本，梯度直通到 z_e
    loss: torch.Tensor       # () 码本项 + β · 承诺项（EMA 码本没有前一项）
    k: torch.Tensor          # (B, ...)    码的下标
# --8<-- [end:result]


# --8<-- [start:quantizer]
class VectorQuantizer(nn.Module):
    """码本与它的两种学法。

    参数
    ----
    K、D      码的个数与维数
    beta      承诺项的权重 β
    gamma     None：码本是参数，靠码本项的梯度学；否则是 EMA 的衰减率，码本不再有梯度
    patience  None：不重启；否则一个码连续这么多次 ``update`` 没被选中，就换成本批的一个 z_e
    """

    def __init__(self, K, D, beta=0.25, gamma=None, patience=None):
        super().__init__()
        _check_config(K, D, beta, gamma, patience)
        self.K, self.D, self.beta, self.gamma, self.patience = K, D, beta, gamma, patience
        e = torch.empty(K, D).uniform_(-1 / K, 1 / K)                  # (K, D)
        self.e = nn.Parameter(e, requires_grad=gamma is None)
        self.register_buffer("N", torch.zeros(K))                      # 每个码被选中次数的滑动平均
        self.register_buffer("m", torch.zeros(K, D))                   # 选中它的 z_e 之和的滑动平均
        self.register_buffer("idle", torch.zeros(K, dtype=torch.long)) # 连续多少次没被选中

    def forward(self, z_e):
        """z_e (B, D, ...) → Quantized。没有副作用：更新码本另由 ``update`` 做。"""
        _check_latent(z_e, self.D)
        k = nearest(_rows(z_e), self.e).view(z_e.shape[0], *z_e.shape[2:])
        z_q = self.lookup(k)                                           # (B, D, ...)
        codebook = F.mse_loss(z_q, z_e.detach())                       # ‖sg[z_e] - e‖²：只动码本
        commitment = F.mse_loss(z_e, z_q.detach())                     # ‖z_e - sg[e]‖²：只动编码器
        loss = self.beta * commitment + (codebook if self.gamma is None else 0)   # 式 3 的后两项
        return Quantized(straight_through(z_e, z_q), loss, k)

    def lookup(self, k):
        """按下标取码：k (B, ...) → (B, D, ...)。"""
        if k.dtype != torch.long or (k.numel() and (k.min() < 0 or k.max() >= self.K)):
            raise ValueError(f"下标必须是 0 到 {self.K - 1} 的长整型，收到 {k.dtype}；检查是否混用了别的码本")
        return self.e[k].movedim(-1, 1)

    @torch.no_grad()
    def update(self, z_e, k, generator=None):
        """EMA 更新与死码重启，放在 ``optimizer.step()`` 之后；返回重启了几个码。"""
        _check_latent(z_e, self.D)
        if k.shape != (z_e.shape[0], *z_e.shape[2:]):
            raise ValueError(f"下标 k 的形状必须与 z_e 去掉通道维一致，收到 {tuple(k.shape)} 与 {tuple(z_e.shape)}")
        z = _rows(z_e).to(self.e)                                      # (B·P, D)
        n = torch.bincount(k.flatten(), minlength=self.K).to(self.N)   # (K,) 本批选中次数
        hit = n > 0
        if self.gamma is not None:                                     # 附录 A.1 的三行
            total = torch.zeros_like(self.m).index_add_(0, k.flatten(), z)  # (K, D) 选中它的 z_e 之和
            self.N.mul_(self.gamma).add_((1 - self.gamma) * n)
            self.m.mul_(self.gamma).add_((1 - self.gamma) * total)
            self.e[hit] = self.m[hit] / self.N[hit, None]              # 没被选中的比值不变，不必算
        self.idle[hit] = 0
        self.idle[~hit] += 1
        dead = torch.zeros_like(hit) if self.patience is None else self.idle >= self.patience
        count = int(dead.sum())
        if count:
            pick = torch.randint(len(z), (count,), generator=generator)
            self.e[dead] = self.m[dead] = z[pick]
            self.N[dead], self.idle[dead] = 1.0, 0
        return count
# --8<-- [end:quantizer]


# --8<-- [start:check]
def _rows(z):
    """(B, D, ...) → (B·P, D)：每个位置一行。"""
    return z.movedim(1, -1).reshape(-1, z.shape[1])


def _check_config(K, D, beta, gamma, patience):
    for name, value in {"码的个数 K": K, "维数 D": D, "patience": 1 if patience is None else patience}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} 必须是不小于 1 的整数，收到 {value!r}")
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta < math.inf:
        raise ValueError(f"beta 必须是不小于 0 的有限数，收到 {beta!r}")
    if gamma is not None and not (isinstance(gamma, (int, float)) and 0 <= gamma < 1):
        raise ValueError(f"gamma 必须是 None 或 [0, 1) 内的数，收到 {gamma!r}；取 1 时码本永远不动")


def _check_latent(z_e, D):
    if not isinstance(z_e, torch.Tensor) or not z_e.is_floating_point():
        raise ValueError("z_e 必须是浮点张量")
    if z_e.ndim < 2 or z_e.shape[1] != D:
        raise ValueError(f"z_e 的形状必须是 (B, {D}, ...)，收到 {tuple(z_e.shape)}；通道在第二维")
    if not z_e.numel():
        raise ValueError(f"z_e 是空的，形状 {tuple(z_e.shape)}；损失没有定义")
    if not z_e.isfinite().all():
        raise ValueError("z_e 含 NaN 或无穷；多半是训练发散，检查学习率与承诺项")
# --8<-- [end:check]
