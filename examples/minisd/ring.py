"""环上的八个高斯，以及二维上算得清的几把尺子：模式数、好样本率、弗雷歇距离、精确率与召回率。

点集一律是 (..., N, 2)；两两比较的尺子只收 (N, 2)。空的点集、维数不对时抛 ValueError。
"""

# --8<-- [start:ring]
import math

import torch

MODES, RADIUS, STD = 8, 2.0, 0.05
_angle = torch.arange(MODES) * 2 * math.pi / MODES
CENTERS = RADIUS * torch.stack([_angle.cos(), _angle.sin()], 1)            # (8, 2)


def ring(shape, generator=None):
    """从八个高斯的均匀混合里抽点：shape 是元组，返回 (*shape, 2)。"""
    k = torch.randint(MODES, shape, generator=generator)
    return CENTERS[k] + STD * torch.randn(*shape, 2, generator=generator)


def coverage(points):
    """(模式数, 好样本率)，各 (...)：离中心不到 4σ 的算好样本；一团至少收到 1% 的点才算覆盖。"""
    _check(points)
    distance, k = (points.unsqueeze(-2) - CENTERS).norm(dim=-1).min(-1)    # (..., N)
    good = distance < 4 * STD
    hits = (torch.nn.functional.one_hot(k, MODES) * good.unsqueeze(-1)).sum(-2)   # (..., 8)
    return (hits >= 0.01 * points.shape[-2]).sum(-1), good.float().mean(-1)
# --8<-- [end:ring]


# --8<-- [start:metrics]
def frechet(a, b):
    """弗雷歇距离 ‖μ_a - μ_b‖² + Tr(Σ_a + Σ_b - 2(Σ_aΣ_b)^½)。特征换成 Inception 网络的就是 FID。"""
    _check(a, b)
    cov_a, cov_b = a.T.cov(), b.T.cov()                                    # (2, 2)
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()     # Tr (Σ_aΣ_b)^½
    return ((a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b).trace() - 2 * root).item()


def precision_recall(real, fake, k=3):
    """k 近邻版的精确率与召回率（arXiv:1904.06991）：假点落在真流形里的比例，与反过来的比例。"""
    _check(real, fake)

    def inside(points, manifold):
        """points 里有多少落在 manifold 的某个点到它第 k 近邻的球里。"""
        reach = torch.cdist(manifold, manifold).kthvalue(k + 1, dim=1).values     # 第一近的是自己
        return (torch.cdist(points, manifold) <= reach).any(1).float().mean().item()

    return inside(fake, real), inside(real, fake)


def sliced_wasserstein(a, b, directions=64):
    """沿许多方向投影成一维，各自算 W₁ 再平均；一维的 W₁ 就是排序后逐个相减。两个点集须一样大。"""
    _check(a, b)
    if a.shape != b.shape:
        raise ValueError(f"两个点集须一样大，收到 {tuple(a.shape)} 与 {tuple(b.shape)}")
    angle = torch.arange(directions) * math.pi / directions
    axes = torch.stack([angle.cos(), angle.sin()])                         # (2, directions)
    return ((a @ axes).sort(0).values - (b @ axes).sort(0).values).abs().mean().item()
# --8<-- [end:metrics]


# --8<-- [start:check]
def _check(*sets):
    for points in sets:
        if not isinstance(points, torch.Tensor) or points.ndim < 2 or points.shape[-1] != 2 or not points.numel():
            raise ValueError("点集必须是形状 (..., N, 2) 的非空张量")
        if len(sets) > 1 and points.ndim != 2:
            raise ValueError(f"两两比较的点集必须是 (N, 2)，收到 {tuple(points.shape)}")
        if not points.isfinite().all():
            raise ValueError("点集含 NaN 或无穷；多半是训练发散")
# --8<-- [end:check]
