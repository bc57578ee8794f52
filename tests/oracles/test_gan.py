"""GAN 的损失、正则与尺子：与 torch 自带实现、解析解逐元素对照，外加性质与坏输入。

float64 的误差都在 1e-10 以内；并排训练的 Adam 对 torch.optim.Adam 走 20 步，float64 上限 1e-12。
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minisd import gan, parallel, ring

torch_close = torch.testing.assert_close
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3)


def randn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ──────────────────────────────── 损失 ────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 3.0, 200.0]))
def test_losses_match_binary_cross_entropy(shape, seed, scale):
    real, fake = randn(2, *shape, seed=seed, scale=scale)
    bce = lambda a, label: F.binary_cross_entropy_with_logits(a, torch.full_like(a, label), reduction="none").mean(-1)
    torch_close(gan.discriminator_loss(real, fake), bce(real, 1.0) + bce(fake, 0.0), rtol=1e-10, atol=1e-12)
    torch_close(gan.generator_loss(fake), bce(fake, 1.0), rtol=1e-10, atol=1e-12)
    torch_close(gan.generator_loss(fake, saturating=True), -bce(fake, 0.0), rtol=1e-10, atol=1e-12)
    assert gan.discriminator_loss(real, fake).shape == tuple(shape[:-1])


def test_values_at_equilibrium_and_no_overflow():
    zero = torch.zeros(5, dtype=torch.float64)
    assert math.isclose(gan.discriminator_loss(zero, zero), 2 * math.log(2))
    assert math.isclose(gan.generator_loss(zero), math.log(2))
    assert math.isclose(gan.generator_loss(zero, saturating=True), -math.log(2))
    huge = torch.full((3,), 1e4)
    assert gan.discriminator_loss(-huge, huge) == 2e4 and gan.generator_loss(-huge) == 1e4


def test_batches_may_differ_in_size_between_real_and_fake():
    assert gan.discriminator_loss(randn(2, 7), randn(2, 3)).shape == (2,)


# ─────────────────────────────── 梯度惩罚 ───────────────────────────────


@settings(max_examples=30, deadline=None)
@given(R=st.integers(1, 3), B=st.integers(1, 6), d=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_r1_and_gradient_penalty_on_a_quadratic(R, B, d, seed):
    """f(x) = ½xᵀAx + bᵀx（A 对称）：∇f = Ax + b，惩罚与它对 A 的梯度都能手算。"""
    x, y = randn(2, R, B, d, seed=seed)
    half, b = randn(R, d, d, seed=seed + 1), randn(R, 1, d, seed=seed + 2)
    half.requires_grad_()
    A = half + half.mT
    f = lambda x: ((x @ A * x).sum(-1) / 2 + (x * b).sum(-1))
    slope = lambda x: x @ A + b                                            # (R, B, d)
    x.requires_grad_()
    got, want = gan.r1(f(x), x), slope(x.detach()).square().sum(-1).mean(-1) / 2
    torch_close(got, want, rtol=1e-10, atol=1e-12)
    grad = lambda loss: torch.autograd.grad(loss.sum(), half, retain_graph=True)[0]
    torch_close(grad(got), grad(want), rtol=1e-9, atol=1e-11)
    u = torch.rand(R, B, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    between = u * x.detach() + (1 - u) * y
    got = gan.gradient_penalty(f, x.detach(), y, u)
    want = (slope(between).square().sum(-1).sqrt() - 1).square().mean(-1)
    torch_close(got, want, rtol=1e-9, atol=1e-11)
    torch_close(grad(got), grad(want), rtol=1e-7, atol=1e-9)


def test_gradient_penalty_endpoints_and_critic_estimate():
    f = lambda x: x.square().sum(-1) / 2                                   # ‖∇f‖ = ‖x‖
    x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    assert gan.gradient_penalty(f, x, y, torch.ones(1, 1)) == 16 and gan.gradient_penalty(f, x, y, torch.zeros(1, 1)) == 1
    assert gan.critic_estimate(torch.tensor([1.0, 3.0]), torch.tensor([0.5])) == 1.5


# ─────────────────────────────── 谱归一化 ───────────────────────────────


@settings(max_examples=15, deadline=None)
@given(m=st.integers(1, 6), n=st.integers(1, 6), batch=st.lists(st.integers(1, 3), max_size=2), seed=st.integers(0, 2**31))
def test_spectral_norm_converges_to_the_largest_singular_value(m, n, batch, seed):
    W, u = randn(*batch, m, n, seed=seed), randn(*batch, m, seed=seed + 1)
    for _ in range(300):
        normalized, u = gan.spectral_normalize(W, u)
    torch_close(torch.linalg.matrix_norm(normalized, 2), torch.ones(batch, dtype=torch.float64), rtol=5e-3, atol=0)
    torch_close(normalized * torch.linalg.matrix_norm(W, 2)[..., None, None], W, rtol=5e-3, atol=1e-9)


def test_spectral_norm_matches_torch_step_by_step():
    """与 torch.nn.utils.parametrizations.spectral_norm 每次前向各走一步幂迭代：权重与梯度逐元素。

    torch 先更新 u 再更新 v，本实现相反，所以拿转置的 W 与它的 v 来对。
    """
    layer = nn.Linear(5, 7, bias=False, dtype=torch.float64)
    W = layer.weight.detach().clone().requires_grad_()
    nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=1, eps=1e-12)
    v = layer.parametrizations.weight[0]._v.clone()
    for step in range(5):
        ours, v = gan.spectral_normalize(W.T, v)
        ours = ours.T
        theirs = layer.weight                                              # 训练模式：读一次就迭代一次
        torch_close(ours, theirs, rtol=1e-10, atol=1e-12)
        upstream = randn(7, 5, seed=step)
        a, = torch.autograd.grad((ours * upstream).sum(), W)
        b, = torch.autograd.grad((theirs * upstream).sum(), layer.parametrizations.weight.original)
        torch_close(a, b, rtol=1e-9, atol=1e-11)


# ─────────────────────────────── 并排训练 ───────────────────────────────


def test_parallel_training_equals_separate_torch_training():
    """三个网络并排训练 20 步，与各自用 nn.Sequential + torch.optim.Adam 训练逐元素相同。"""
    R, lr, beta1 = 3, torch.tensor([1e-2, 3e-3, 1e-3], dtype=torch.float64), torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    params = [p.detach().double().requires_grad_() for p in parallel.init(R, (3, 5, 4, 2), torch.Generator().manual_seed(0))]
    nets, opts = [], []
    for r in range(R):
        net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
        for i, layer in enumerate(net[::2]):
            layer.weight.data.copy_(params[2 * i][r].T)
            layer.bias.data.copy_(params[2 * i + 1][r, 0])
        nets.append(net)
        opts.append(torch.optim.Adam(net.parameters(), lr[r].item(), betas=(beta1[r].item(), 0.9)))
    opt = parallel.Adam(params, lr, beta1)
    for step in range(20):
        x, y = randn(R, 6, 3, seed=step), randn(R, 6, 2, seed=100 + step)
        opt.step((parallel.forward(params, x) - y).square().mean((1, 2)))
        for r in range(R):
            opts[r].zero_grad()
            F.mse_loss(nets[r](x[r]), y[r]).backward()
            opts[r].step()
    for r in range(R):
        for i, layer in enumerate(nets[r][::2]):
            torch_close(params[2 * i][r], layer.weight.T, rtol=0, atol=1e-12)
            torch_close(params[2 * i + 1][r, 0], layer.bias, rtol=0, atol=1e-12)


def test_initialization_range():
    for W, b, n in zip(*[iter(parallel.init(4, (16, 64, 2), torch.Generator().manual_seed(0)))] * 2, (16, 64)):
        assert W.shape[:2] == (4, n) and b.shape[:2] == (4, 1) and W.shape[2] == b.shape[2]
        bound = n**-0.5
        assert 0.95 * bound < W.abs().max() <= bound and b.abs().max() <= bound and W.requires_grad
        assert abs(W.mean()) < 0.1 * bound


# ───────────────────────────────── 尺子 ─────────────────────────────────


def test_ring_and_coverage_of_known_sets():
    x = ring.ring((4000,), torch.Generator().manual_seed(0))
    assert x.shape == (4000, 2) and ring.ring((2, 3)).shape == (2, 3, 2)
    nearest = torch.cdist(x, ring.CENTERS).min(1)
    assert abs(nearest.values.square().mean() / (2 * ring.STD**2) - 1) < 0.1
    assert nearest.indices.bincount(minlength=8).min() > 400
    modes, good = ring.coverage(x)
    assert modes == 8 and good > 0.995
    torch_close(ring.CENTERS.norm(dim=1), torch.full((8,), ring.RADIUS))
    torch_close(ring.CENTERS[0], torch.tensor([2.0, 0.0]))

    points = ring.CENTERS[[0, 3]].repeat_interleave(50, 0)                 # 两团各 50 个
    stack = torch.stack([points, torch.zeros(100, 2), points + 4.1 * ring.STD / 2**0.5])
    modes, good = ring.coverage(stack)
    assert modes.tolist() == [2, 0, 0] and good.tolist() == [1, 0, 0]
    rare = torch.cat([points[:99], ring.CENTERS[5:6]])                     # 恰好 1%：算覆盖；再多一倍就不算
    assert ring.coverage(rare)[0] == 3 and ring.coverage(torch.cat([rare, points]))[0] == 2


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(5, 40))
def test_frechet_matches_the_matrix_square_root(seed, n):
    a, b = randn(n, 2, seed=seed) @ randn(2, 2, seed=seed + 1), randn(n, 2, seed=seed + 2, scale=2.0) + 1
    A, B = a.T.cov(), b.T.cov()

    def root(M):
        value, vector = torch.linalg.eigh(M)
        return vector * value.clamp(min=0).sqrt() @ vector.T

    want = (a.mean(0) - b.mean(0)).square().sum() + (A + B - 2 * root(root(A) @ B @ root(A))).trace()
    assert math.isclose(ring.frechet(a, b), want.item(), rel_tol=1e-6, abs_tol=1e-6)
    assert abs(ring.frechet(a, a)) < 1e-6
    assert math.isclose(ring.frechet(a, a + 3), 18, rel_tol=1e-6)


def test_precision_recall_of_known_sets():
    x, y = (ring.ring((500,), torch.Generator().manual_seed(s)) for s in (0, 1))
    precision, recall = ring.precision_recall(x, y)
    assert precision > 0.9 and recall > 0.9
    half = y[torch.cdist(y, ring.CENTERS).argmin(1) % 2 == 0]              # 只留一半的团
    precision, recall = ring.precision_recall(x, half)
    assert precision > 0.9 and 0.3 < recall < 0.7
    assert ring.precision_recall(x, y + 50) == (0.0, 0.0)
    line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])              # 手算：k=1 的半径是 1、1、2
    assert ring.precision_recall(line, torch.tensor([[-1.0, 0.0], [4.9, 0.0], [5.1, 0.0]]), k=1) == (pytest.approx(2 / 3), 1.0)


def test_sliced_wasserstein():
    a = randn(300, 2).float()
    assert ring.sliced_wasserstein(a, a) == 0
    # 平移 t：方向 θ 上的 W₁ 是 |t cos θ|，平均 2t/π
    assert math.isclose(ring.sliced_wasserstein(a, a + torch.tensor([3.0, 0.0])), 6 / math.pi, rel_tol=1e-3)
    assert math.isclose(ring.sliced_wasserstein(a, a[torch.randperm(300)] + torch.tensor([0.0, 3.0])), 6 / math.pi, rel_tol=1e-3)


# ──────────────────────────────── 坏输入 ────────────────────────────────


def test_bad_logits():
    good, empty = torch.zeros(2, 3), torch.zeros(2, 0)
    for call in (
        lambda: gan.discriminator_loss(good, torch.zeros(3, 3)),
        lambda: gan.discriminator_loss(good, empty),
        lambda: gan.generator_loss(empty),
        lambda: gan.generator_loss(torch.tensor(1.0)),
        lambda: gan.generator_loss([1.0]),
        lambda: gan.critic_estimate(good, torch.zeros(3)),
        lambda: gan.r1(good, torch.zeros(2, 3, 2)),                        # 没有 requires_grad
        lambda: gan.r1(good, torch.zeros(2, 4, 2, requires_grad=True)),
        lambda: gan.r1(empty, torch.zeros(2, 0, 2, requires_grad=True)),
        lambda: gan.gradient_penalty(lambda x: x.sum(-1), torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(3, 1)),
        lambda: gan.gradient_penalty(lambda x: x.sum(-1), torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3)),
    ):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(3, 3), torch.zeros(0, 2), None, torch.full((3, 2), math.nan)])
def test_bad_points(bad):
    good = torch.zeros(5, 2)
    for call in (
        lambda: ring.coverage(bad),
        lambda: ring.frechet(good, bad),
        lambda: ring.precision_recall(bad, good),
        lambda: ring.sliced_wasserstein(good, bad),
    ):
        with pytest.raises(ValueError, match="点集"):
            call()


def test_bad_pairs_and_parallel_shapes():
    with pytest.raises(ValueError, match="两两比较"):
        ring.frechet(torch.zeros(2, 5, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="一样大"):
        ring.sliced_wasserstein(torch.zeros(5, 2), torch.zeros(4, 2))
    for R, widths in ((0, (2, 2)), (3, (2,))):
        with pytest.raises(ValueError, match="至少一个网络"):
            parallel.init(R, widths)
    params = parallel.init(3, (2, 2))
    with pytest.raises(ValueError, match="网络个数"):
        parallel.Adam(params, torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="网络个数"):
        parallel.Adam(params, torch.ones(3), torch.ones(1))
