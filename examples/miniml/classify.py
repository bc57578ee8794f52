"""一对“生成式—判别式”的分类器：高斯朴素贝叶斯与逻辑回归，判决都是 w·x + b > 0。

可以成批：``X`` 是 (S, n, d)，S 份互不相干的训练集；标签 ``y`` 是 (n,)，取 0、1，各份共用。
"""

# --8<-- [start:check]
import math

import numpy as np


def _check(X, y):
    if X.ndim != 3 or y.shape != X.shape[1:2]:
        raise ValueError(f"X 要 (S, n, d)、y 要 (n,)，收到 {X.shape} 与 {y.shape}")
    if set(np.unique(y)) != {0, 1}:
        raise ValueError("y 必须两类都有，取值只能是 0 与 1")
# --8<-- [end:check]


# --8<-- [start:bayes]
def naive_bayes(X, y):
    """高斯朴素贝叶斯，两类共用每一维的方差：返回 w (S, d)、b (S,)。

    生成式：估 p(x | y) = ∏_j N(x_j; μ_yj, σ_j²) 与 p(y)，再用贝叶斯公式；结果恰好是线性的。
    """
    _check(X, y)
    m0, m1 = X[:, y == 0].mean(1), X[:, y == 1].mean(1)            # (S, d) 两类的均值
    centered = np.where(y[:, None] == 1, X - m1[:, None], X - m0[:, None])
    var = (centered**2).mean(1)                                    # (S, d) 共用的方差
    prior = y.mean()
    w = (m1 - m0) / var
    b = ((m0**2 - m1**2) / (2 * var)).sum(1) + math.log(prior / (1 - prior))
    return w, b
# --8<-- [end:bayes]


# --8<-- [start:logistic]
def sigmoid(z):
    return 0.5 * (1 + np.tanh(0.5 * z))                            # 不会溢出的写法


def logistic(X, y, lam=1e-2, steps=50, tol=1e-6):
    """逻辑回归：最小化 Σ log(1+e^{-(2y-1)(w·x+b)}) + λ/2 ‖w‖²，牛顿法；返回 w (S, d)、b (S,)。

    判别式：直接估 p(y | x)。λ > 0 是必要的：样本少时两类常常线性可分，λ = 0 没有有限的解。
    从零出发、不带线搜索；steps 步内梯度降不到 tol 就抛 RuntimeError，不返回没收敛的结果。
    """
    _check(X, y)
    if not lam > 0:
        raise ValueError(f"lam 必须大于 0，收到 {lam}；可分的数据上 λ = 0 时 w 会跑到无穷大")
    A = np.concatenate([X, np.ones((*X.shape[:2], 1))], 2)         # (S, n, d+1) 末列是截距
    At = np.swapaxes(A, 1, 2)
    R = lam * np.diag(np.append(np.ones(X.shape[2]), 0))           # 截距不惩罚
    theta = np.zeros((len(X), len(R)))
    for _ in range(steps):
        p = sigmoid((A @ theta[..., None])[..., 0])                # (S, n) 现在的 p(y=1 | x)
        grad = (At @ (p - y)[..., None])[..., 0] + theta @ R       # (S, d+1)
        if np.abs(grad).max() < tol:
            return theta[:, :-1], theta[:, -1]
        hess = At @ (A * (p * (1 - p))[..., None]) + R             # (S, d+1, d+1)
        theta = theta - np.linalg.solve(hess, grad[..., None])[..., 0]
    raise RuntimeError(f"牛顿法 {steps} 步没有收敛，最大梯度 {np.abs(grad).max():.2e}")
# --8<-- [end:logistic]


# --8<-- [start:error]
def normal_cdf(z):
    return np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)), otypes=[float])(z)


def linear_error(w, b, mean, cov):
    """x | y ~ N(±mean, cov)、两类各半时，判决 w·x + b > 0 的精确错误率：w (S, d), b (S,) → (S,)。"""
    scale = np.sqrt(np.einsum("sd,de,se->s", w, cov, w))           # w·x 的标准差
    return 0.5 * normal_cdf((-w @ mean - b) / scale) + 0.5 * normal_cdf((-w @ mean + b) / scale)
# --8<-- [end:error]
