"""最小二乘的三副面孔：最小范数解、岭回归、测试误差的闭式。

所有函数都可以成批：``X`` 是 (..., n, p)，``y`` 是 (..., n)，前面的维度是互不相干的许多份数据。
"""

# --8<-- [start:check]
import numpy as np


def _check(X, y):
    if X.ndim < 2 or X.shape[:-1] != y.shape:
        raise ValueError(f"X 要 (..., n, p)、y 要 (..., n)，收到 {X.shape} 与 {y.shape}")
# --8<-- [end:check]


# --8<-- [start:fit]
def least_norm(X, y):
    """最小二乘解里范数最小的那个：X (..., n, p), y (..., n) → β̂ (..., p)。

    p ≤ n 且列满秩时就是普通最小二乘；p > n 时有无穷多个解让训练误差为零，取其中 ‖β̂‖ 最小的。
    """
    _check(X, y)
    return (np.linalg.pinv(X) @ y[..., None])[..., 0]


def ridge(X, y, lam):
    """岭回归 argmin ‖y - Xβ‖² + λ‖β‖²，λ > 0；用 n × n 的那一半来解，p 很大也便宜。"""
    _check(X, y)
    if not lam > 0:
        raise ValueError(f"岭系数 lam 必须大于 0，收到 {lam}；要 λ = 0 请用 least_norm")
    Xt = np.swapaxes(X, -1, -2)                                    # (..., p, n)
    gram = X @ Xt + lam * np.eye(X.shape[-2])                      # (..., n, n)
    return (Xt @ np.linalg.solve(gram, y[..., None]))[..., 0]
# --8<-- [end:fit]


# --8<-- [start:theory]
def least_norm_theory(n, beta, p, noise):
    """只用前 p 个特征做最小范数回归，返回（偏差²，方差）的精确值。

    数据是 x ~ N(0, I_D)、y = x·β + ε、Var ε = noise，n 个样本。没用到的特征对模型来说就是噪声，
    合计 r = ‖β 的后半‖² + noise。|p - n| ≤ 1 时方差没有有限的期望，返回 inf。
    """
    if not 0 < p <= len(beta):
        raise ValueError(f"p 必须在 1 到 {len(beta)} 之间，收到 {p}")
    used, missed = (beta[:p] ** 2).sum(), (beta[p:] ** 2).sum()
    r = missed + noise
    if p < n - 1:                                                  # 参数少：无偏，E tr(XᵀX)⁻¹ = p/(n-p-1)
        return missed, r * p / (n - p - 1)
    if p > n + 1:                                                  # 参数多：只看得到 n 维的影子
        seen = n / p
        return missed + used * (1 - seen) ** 2, used * seen * (1 - seen) + r * n / (p - n - 1)
    return missed, np.inf
# --8<-- [end:theory]
