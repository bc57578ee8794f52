"""最小范数与岭回归对照 torch；误差的闭式对照蒙特卡罗；两个分类器对照 torch 的密度、自动求导与 L-BFGS；外加坏输入。

scikit-learn 不在依赖里，所以用 torch 与闭式作参照。
"""

import math

import numpy as np
import pytest
import torch

from miniml import classify, regression


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ───────────────────────────── 回归 ─────────────────────────────


@pytest.mark.parametrize("n, p", [(30, 5), (30, 29), (12, 40)])
def test_least_norm_matches_lstsq(rng, n, p):
    X, y = rng.standard_normal((4, n, p)), rng.standard_normal((4, n))
    ours = regression.least_norm(X, y)
    theirs = torch.linalg.lstsq(torch.tensor(X), torch.tensor(y)[..., None], driver="gelsd").solution[..., 0]
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-8, atol=1e-10)


def test_least_norm_interpolates_with_the_smallest_norm(rng):
    X, y = rng.standard_normal((12, 40)), rng.standard_normal(12)
    beta = regression.least_norm(X, y)
    np.testing.assert_allclose(X @ beta, y, atol=1e-10)
    null = np.linalg.svd(X)[2][12:]  # (28, 40) 零空间：加上它仍是插值解
    np.testing.assert_allclose(null @ beta, 0, atol=1e-10)
    assert np.linalg.norm(beta + null[0]) > np.linalg.norm(beta)


@pytest.mark.parametrize("n, p", [(30, 5), (12, 40)])
@pytest.mark.parametrize("lam", [1e-3, 1.0, 50.0])
def test_ridge_matches_augmented_least_squares(rng, n, p, lam):
    """岭回归等于在数据后面补 p 行 √λ·I 与 0 的普通最小二乘。"""
    X, y = rng.standard_normal((3, n, p)), rng.standard_normal((3, n))
    ours = regression.ridge(X, y, lam)
    for k in range(3):
        A = torch.tensor(np.vstack([X[k], math.sqrt(lam) * np.eye(p)]))
        b = torch.tensor(np.concatenate([y[k], np.zeros(p)]))
        np.testing.assert_allclose(ours[k], torch.linalg.lstsq(A, b).solution.numpy(), rtol=1e-8, atol=1e-10)


def test_ridge_tends_to_least_norm(rng):
    X, y = rng.standard_normal((12, 40)), rng.standard_normal(12)
    np.testing.assert_allclose(regression.ridge(X, y, 1e-9), regression.least_norm(X, y), atol=1e-8)


@pytest.mark.parametrize("p", [3, 10, 28, 60])
def test_theory_matches_monte_carlo(rng, p):
    n, noise, S = 20, 0.3, 2500
    beta = rng.standard_normal(60) / 5
    X = rng.standard_normal((S, n, 60))
    y = X @ beta + math.sqrt(noise) * rng.standard_normal((S, n))
    fits = regression.least_norm(X[..., :p], y)
    bias, variance = regression.least_norm_theory(n, beta, p, noise)
    assert ((fits.mean(0) - beta[:p]) ** 2).sum() + (beta[p:] ** 2).sum() == pytest.approx(bias, rel=0.05, abs=0.005)
    assert fits.var(0).sum() == pytest.approx(variance, rel=0.12)


def test_theory_is_infinite_only_at_the_threshold():
    beta = np.ones(40)
    infinite = [p for p in range(1, 41) if not np.isfinite(regression.least_norm_theory(20, beta, p, 1.0)[1])]
    assert infinite == [19, 20, 21]


@pytest.mark.parametrize(
    "call",
    [
        lambda: regression.least_norm(np.zeros((3, 2)), np.zeros(2)),
        lambda: regression.least_norm(np.zeros(3), np.zeros(3)),
        lambda: regression.ridge(np.zeros((3, 2)), np.zeros(3), 0.0),
        lambda: regression.ridge(np.zeros((3, 2)), np.zeros(3), float("nan")),
        lambda: regression.least_norm_theory(10, np.ones(5), 0, 1.0),
        lambda: regression.least_norm_theory(10, np.ones(5), 6, 1.0),
    ],
)
def test_regression_rejects(call):
    with pytest.raises(ValueError):
        call()


# ───────────────────────────── 分类 ─────────────────────────────


def data(rng, S=3, n=40, d=5):
    y = (np.arange(n) % 3 == 0).astype(int)  # 两类不等量：先验不是一半
    return rng.standard_normal((S, n, d)) + 0.8 * y[:, None], y


def test_naive_bayes_is_bayes_rule(rng):
    """w·x + b 等于两个高斯的对数密度之差加先验的对数比。"""
    X, y = data(rng)
    w, b = classify.naive_bayes(X, y)
    x = torch.tensor(rng.standard_normal((7, 5)))
    for k in range(len(X)):
        parts = [torch.tensor(X[k][y == c]) for c in (0, 1)]
        within = torch.cat([p - p.mean(0) for p in parts])
        std = within.square().mean(0).sqrt()
        score = [torch.distributions.Normal(p.mean(0), std).log_prob(x).sum(1) + math.log(len(p) / len(y)) for p in parts]
        np.testing.assert_allclose(x.numpy() @ w[k] + b[k], (score[1] - score[0]).numpy(), rtol=1e-10)


@pytest.mark.parametrize("lam", [1e-2, 1.0, 30.0])
def test_logistic_matches_torch(rng, lam):
    X, y = data(rng)
    w, b = classify.logistic(X, y, lam)
    for k in range(len(X)):
        A, target = torch.tensor(X[k]), torch.tensor(y).double()
        theta = torch.zeros(6, dtype=torch.float64, requires_grad=True)

        def loss():
            logits = A @ theta[:5] + theta[5]
            nll = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
            return nll + lam / 2 * theta[:5].square().sum()

        opt = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

        def closure():
            opt.zero_grad()
            value = loss()
            value.backward()
            return value

        opt.step(closure)
        np.testing.assert_allclose(np.append(w[k], b[k]), theta.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_logistic_converges_on_separable_data(rng):
    """六个样本、二十维，一定可分；弱正则下也要收敛。"""
    X = 5 * rng.standard_normal((50, 6, 20))
    w, b = classify.logistic(X, np.arange(6) % 2, 1e-2)
    assert ((np.einsum("snd,sd->sn", X, w) + b[:, None] > 0) == (np.arange(6) % 2 == 1)).all()


def test_sigmoid_is_stable():
    z = np.array([-1000.0, -3.0, 0.0, 3.0, 1000.0])
    np.testing.assert_allclose(classify.sigmoid(z), torch.sigmoid(torch.tensor(z)).numpy(), atol=1e-15)


def test_linear_error_matches_counting(rng):
    mean, root = np.array([0.5, -0.2, 0.1]), rng.standard_normal((3, 3))
    w, b = rng.standard_normal((2, 3)), np.array([0.3, -0.4])
    sign = np.where(np.arange(400_000) % 2, 1, -1)
    x = sign[:, None] * mean + rng.standard_normal((400_000, 3)) @ root.T
    wrong = ((x @ w.T + b > 0) != (sign[:, None] > 0)).mean(0)
    np.testing.assert_allclose(classify.linear_error(w, b, mean, root @ root.T), wrong, atol=5 * 0.5 / math.sqrt(400_000))


@pytest.mark.parametrize(
    "call",
    [
        lambda: classify.naive_bayes(np.zeros((2, 3)), np.array([0, 1])),
        lambda: classify.naive_bayes(np.zeros((1, 3, 2)), np.array([0, 1])),
        lambda: classify.naive_bayes(np.zeros((1, 3, 2)), np.array([0, 0, 0])),
        lambda: classify.logistic(np.zeros((1, 3, 2)), np.array([-1, 1, 1])),
        lambda: classify.logistic(np.zeros((1, 2, 2)), np.array([0, 1]), lam=0.0),
    ],
)
def test_classify_rejects(call):
    with pytest.raises(ValueError):
        call()
