"""高斯混合：每个噪声水平上的分布都还是高斯混合，所以最优的去噪器有闭式。

用它代替网络，采样结果里就没有“网络没学好”的误差，剩下的全是采样器自己的。

约定：``mean`` (K, D)，``std`` 一个正数（各分量同方差、各向同性），``weight`` (K,)，缺省等权。
步号 t 是整数或整型张量 () 或 (B,)，与 schedule 相同。
"""

# --8<-- [start:mixture]
import torch

from minisd.schedule import take


class Mixture:
    """p(x_0) = Σ_k w_k N(x_0; μ_k, σ²I)。"""

    def __init__(self, mean, std, weight=None):
        mean = torch.as_tensor(mean)
        weight = torch.ones(len(mean)).to(mean) if weight is None else torch.as_tensor(weight).to(mean)
        if mean.ndim != 2 or not mean.is_floating_point() or weight.shape != mean.shape[:1]:
            got = tuple(mean.shape), tuple(weight.shape)
            raise ValueError(f"mean 的形状必须是 (K, D)、weight 必须是 (K,)，收到 {got[0]}、{got[1]}")
        if not std > 0 or not (weight > 0).all():
            raise ValueError("std 与每个 weight 都必须大于 0")
        self.mean, self.std, self.weight = mean, std, weight / weight.sum()

    def sample(self, n, generator=None):
        """抽 n 个点 (n, D) 与各自的分量编号 (n,)。"""
        k = torch.multinomial(self.weight, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.mean.shape[1], generator=generator, dtype=self.mean.dtype)
        return self.mean[k] + self.std * noise, k

    def terms(self, s, x, t):
        """各分量的对数密度 log w_k + log N(x_t; a μ_k, (a²σ²+b²)I)，(B, K)，差一个公共常数。"""
        a = take(s, s.alpha_bar.sqrt(), t, x)                              # () 或 (B, 1)
        var = a**2 * self.std**2 + 1 - a**2                                # a²σ² + b²
        gap = x[:, None] - a[..., None] * self.mean                        # (B, K, D)
        return self.weight.log() - gap.square().sum(2) / (2 * var) - x.shape[1] / 2 * var.log()

    def x0(self, s, x, t):
        """E[x_0 | x_t]：先算 x_t 属于各分量的概率，再对各分量的后验均值加权。(B, D) → (B, D)"""
        a = take(s, s.alpha_bar.sqrt(), t, x)
        share = torch.softmax(self.terms(s, x, t), 1)                      # (B, K)
        center = share @ self.mean                                         # (B, D) Σ_k r_k μ_k
        gain = a * self.std**2 / (a**2 * self.std**2 + 1 - a**2)           # 单个高斯的维纳增益
        return center + gain * (x - a * center)
# --8<-- [end:mixture]
