"""向量量化与变分下界的积木：与 diffusers、torch.distributions 逐元素对照，外加性质与坏输入。

误差按“差 / max(1, |参考值|)”计。实测：随机 3000 组，float64 时 z_q、损失、两个梯度都 ≤ 5e-15，上限 1e-12；
float32 时 ≤ 4e-6，上限 1e-5。参考实现前向写的是 z + (e - z)，比码本多一个舍入，所以逐位相等只对本实现成立。
"""

import math

import pytest
import torch
from diffusers import VQModel
from diffusers.models.autoencoders.vae import VectorQuantizer as Reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from minisd import elbo, vq

LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5}


def error(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return ((ours - theirs).abs() / theirs.abs().clamp(min=1)).max().item()


@st.composite
def problems(draw):
    """随机的 (z_e, 码本, 上游梯度, β)：批 1–3，D 1–6，图 1–5 见方，K 1–40，两种精度。"""
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    B, D, H, W, K = (draw(st.integers(1, n)) for n in (3, 6, 5, 5, 40))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0]))
    z = scale * torch.randn(B, D, H, W, generator=g, dtype=dtype)
    e = scale * torch.randn(K, D, generator=g, dtype=dtype)
    return z, e, torch.randn(B, D, H, W, generator=g, dtype=dtype), draw(st.sampled_from([0.0, 0.25, 1.0, 3.5]))


def quantizer(e, beta=0.25, **config):
    q = vq.VectorQuantizer(*e.shape, beta, **config).to(e.dtype)
    q.e.data.copy_(e)
    return q


def gradients(z_q, loss, z, e, upstream):
    """解码器传回 upstream，再加量化损失，得到 z_e 与码本收到的梯度。"""
    return torch.autograd.grad((z_q * upstream).sum() + loss, [z, e])


# ───────────────────────────── 与 diffusers 对照 ─────────────────────────────


@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_forward_and_gradients_match(problem):
    z, e, upstream, beta = problem
    z.requires_grad_()
    ours, theirs = quantizer(e, beta), Reference(*e.shape, beta, legacy=False).to(e.dtype)
    theirs.embedding.weight.data.copy_(e)
    a = ours(z)
    z_q, loss, (_, _, k) = theirs(z)
    # 距离几乎相同的两个码，两边的舍入可能选得不同：要求选中的一样近，其余逐个相同
    rows, mine = z.detach().movedim(1, -1).reshape(-1, z.shape[1]), a.k.flatten()
    gap = (rows - e[mine]).norm(dim=1) - (rows - e[k.flatten()]).norm(dim=1)
    assert (gap.abs() <= 1e-3 * (1 + rows.norm(dim=1))).all() if e.dtype == torch.float32 else gap.abs().max() < 1e-9
    if not torch.equal(mine, k.flatten()):
        assert e.dtype == torch.float32
        return
    assert a.k.shape == (z.shape[0], *z.shape[2:])
    assert error(a.z_q, z_q) < LIMIT[e.dtype] and error(a.loss, loss) < LIMIT[e.dtype]
    for got, want in zip(
        gradients(a.z_q, a.loss, z, ours.e, upstream), gradients(z_q, loss, z, theirs.embedding.weight, upstream)
    ):
        assert error(got, want) < LIMIT[e.dtype]


def test_matches_inside_a_whole_vqmodel():
    """嵌在 diffusers 的 VQModel 里：把它的量化层换成我们的，前向与全部参数的梯度不变。"""
    torch.manual_seed(0)
    model = VQModel(block_out_channels=(8, 8), latent_channels=4, num_vq_embeddings=16, norm_num_groups=4,
                    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2).double()  # fmt: skip
    model.quantize.legacy = False
    model.quantize.embedding.weight.data.normal_()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def run(module, weight):
        z_q, loss, rest = module(model.encode(x).latents)
        loss = (model.decoder(model.post_quant_conv(z_q)) - x).square().mean() + loss
        parts = [*model.encoder.parameters(), *model.quant_conv.parameters(), *model.decoder.parameters(), weight]
        return loss, torch.autograd.grad(loss, parts)

    ours = quantizer(model.quantize.embedding.weight.data)
    a, b = run(ours, ours.e), run(model.quantize, model.quantize.embedding.weight)
    assert error(a[0], b[0]) < 1e-12
    assert len(a[1]) == len(b[1]) and all(error(p, q) < 1e-10 for p, q in zip(a[1], b[1]))


def test_legacy_default_weights_the_other_term():
    """diffusers 的缺省 legacy=True 把 β 乘在码本项上：码本收到 β 倍、z_e 收到 1/β 倍的梯度。"""
    g = torch.Generator().manual_seed(0)
    z, e = torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64), torch.randn(8, 3, generator=g, dtype=torch.float64)
    z.requires_grad_()
    ours, theirs = quantizer(e, 0.25), Reference(8, 3, 0.25).double()
    theirs.embedding.weight.data.copy_(e)
    a = torch.autograd.grad(ours(z).loss, [z, ours.e])
    b = torch.autograd.grad(theirs(z)[1], [z, theirs.embedding.weight])
    assert error(b[0], 4 * a[0]) < 1e-12 and error(b[1], a[1] / 4) < 1e-12


# ───────────────────────────────── 性质 ─────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_nearest_straight_through_and_who_gets_which_gradient(problem):
    z, e, upstream, beta = problem
    q = quantizer(e, beta)
    z.requires_grad_()
    z_q, loss, k = q(z)
    z_q.retain_grad()
    dist = (z.detach().unsqueeze(1) - e.view(1, *e.shape, 1, 1)).square().sum(2)       # (B, K, H, W)
    best = dist.gather(1, k.unsqueeze(1)).squeeze(1) - dist.amin(1)
    assert (best <= (1e-9 if e.dtype == torch.float64 else 1e-4) * (1 + dist.amax(1))).all()
    assert torch.equal(z_q, q.lookup(k))                          # 逐位等于码本
    (z_q * upstream).sum().backward(retain_graph=True)
    assert torch.equal(z.grad, upstream) and torch.equal(z_q.grad, upstream)           # 直通：逐位
    assert q.e.grad is None                                       # 重建损失到不了码本
    grad_z, grad_e = torch.autograd.grad(loss, [z, q.e])
    want_z = 2 * beta * (z.detach() - z_q.detach()) / z.numel()
    want_e = torch.zeros_like(e).index_add_(0, k.flatten(), (2 * (z_q - z) / z.numel()).detach().movedim(1, -1).reshape(-1, e.shape[1]))
    assert error(grad_z, want_z) < LIMIT[e.dtype] and error(grad_e, want_e) < LIMIT[e.dtype]


@settings(max_examples=40, deadline=None)
@given(problem=problems(), gamma=st.sampled_from([0.0, 0.5, 0.99]), steps=st.integers(1, 4))
def test_ema_is_the_weighted_average_of_history(problem, gamma, steps):
    """走 steps 步之后，每个用过的码等于历史上选中它的 z_e 的指数加权平均；没用过的原封不动。"""
    z, e, _, _ = problem
    z, e = z.double(), e.double()
    q = quantizer(e, gamma=gamma)
    g = torch.Generator().manual_seed(0)
    history = []
    for _ in range(steps):
        batch = z + z.std(correction=0) * torch.randn(z.shape, generator=g, dtype=z.dtype)
        k = q(batch).k
        q.update(batch, k)
        history.append((batch.movedim(1, -1).reshape(-1, e.shape[1]), k.flatten()))
    weight, total = torch.zeros(len(e), dtype=z.dtype), torch.zeros_like(e)
    for age, (rows, k) in enumerate(reversed(history)):
        weight.index_add_(0, k, torch.full((len(k),), gamma**age, dtype=z.dtype))
        total.index_add_(0, k, gamma**age * rows)
    ever = torch.cat([k for _, k in history]).bincount(minlength=len(e)) > 0
    if gamma == 0:                                                # 只记最近一批：更早用过的码停在当时的均值
        ever = torch.zeros_like(ever).index_fill_(0, history[-1][1].unique(), True)
    else:
        assert torch.equal(q.e[~ever], e[~ever])
    assert error(q.e[ever], (total / weight.unsqueeze(1))[ever]) < 1e-9
    assert torch.isfinite(q.e).all()


def test_ema_survives_long_idleness():
    """一个码闲置几千步，计数衰减到次正规数，也不会变成 NaN，再被选中时仍然更新得动。"""
    q = quantizer(torch.tensor([[0.0], [100.0]]), gamma=0.9)
    far, near = torch.full((1, 1, 1), 90.0), torch.zeros(1, 1, 4)
    q.update(far, q(far).k)
    for _ in range(3000):
        q.update(near, q(near).k)
    assert q.N[1] < 1e-40 and q.e[1].item() == 90 and torch.isfinite(q.e).all()
    q.update(far + 5, q(far + 5).k)
    assert q.e[1].item() == 95


@pytest.mark.parametrize("gamma", [None, 0.99])
def test_restart_replaces_only_dead_codes_with_current_vectors(gamma):
    e = torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 50.0], [60.0, 60.0]])
    q = quantizer(e, gamma=gamma, patience=3)
    z = torch.rand(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    moved = []
    for _ in range(3):
        k = q(z).k
        moved.append(q.update(z, k, torch.Generator().manual_seed(1)))
    assert moved == [0, 0, 2]
    rows = z.movedim(1, -1).reshape(-1, 2)
    for i in (2, 3):
        assert (rows == q.e[i]).all(1).any()                      # 恰好是本批的一个 z_e
    if gamma is None:
        assert torch.equal(q.e[:2], e[:2])
    assert (q.idle == 0).all() and (q.N[2:] == 1).all() and torch.equal(q.m[2:], q.e[2:])
    assert vq.VectorQuantizer(4, 2).update(z, torch.zeros(2, 3, 3, dtype=torch.long)) == 0   # 缺省不重启


def test_forward_has_no_side_effects_and_update_needs_no_graph():
    q = vq.VectorQuantizer(8, 3, gamma=0.9, patience=1)
    z = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = {k: v.clone() for k, v in q.state_dict().items()}
    z_q, loss, k = q(z)
    assert all(torch.equal(v, before[name]) for name, v in q.state_dict().items())
    assert q.e.requires_grad is False and loss.requires_grad      # EMA：码本没有梯度，承诺项还在
    q.update(z, k)
    assert not q.e.requires_grad and set(before) == {"e", "N", "m", "idle"}   # 重启所需的状态都进检查点


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(sum))
def test_perplexity(counts):
    k = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    p = [c / sum(counts) for c in counts if c]
    got = vq.perplexity(k, len(counts))
    assert math.isclose(got, math.exp(-sum(x * math.log(x) for x in p)), rel_tol=1e-5)
    assert 1 - 1e-5 <= got <= len(p) * (1 + 1e-5)
    assert math.isclose(vq.perplexity(torch.arange(7).repeat(3), 7), 7, rel_tol=1e-5)


# ─────────────────────────── KL 闭式与重参数化 ───────────────────────────


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    spread=st.sampled_from([1e-6, 1.0, 5.0]),
    seed=st.integers(0, 2**31),
)
def test_kl_matches_torch_distributions(shape, spread, seed):
    mu, logvar = spread * torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours = elbo.kl_standard_normal(mu, logvar)
    theirs = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(torch.zeros_like(mu), torch.ones_like(mu)))
    assert ours.shape == mu.shape and (ours >= 0).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_kl_keeps_precision_near_zero():
    """σ² 接近 1 时 KL ≈ μ²/2 + (log σ²)²/4；直接写 σ² - 1 - log σ² 会被舍入吃掉。"""
    logvar = torch.tensor([1e-5, -1e-5], dtype=torch.float64)
    got = elbo.kl_standard_normal(torch.zeros_like(logvar), logvar)
    torch.testing.assert_close(got, logvar**2 / 4, rtol=1e-5, atol=0)
    assert (elbo.kl_standard_normal(torch.zeros(2), torch.zeros(2)) == 0).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_reparameterize_matches_rsample_and_its_gradient(seed):
    g = torch.Generator().manual_seed(seed)
    mu, logvar, eps, upstream = torch.randn(4, 3, 5, generator=g, dtype=torch.float64)
    mu.requires_grad_(), logvar.requires_grad_()
    z = elbo.reparameterize(mu, logvar, eps)
    sigma = (logvar / 2).exp()
    torch.testing.assert_close(Normal(mu, sigma).cdf(z), Normal(0.0, 1.0).cdf(eps), rtol=1e-10, atol=1e-12)
    grad_mu, grad_logvar = torch.autograd.grad(z, [mu, logvar], upstream)
    assert torch.equal(grad_mu, upstream)
    torch.testing.assert_close(grad_logvar, upstream * eps * sigma.detach() / 2)


# ──────────────────────────────── 坏输入 ────────────────────────────────


@pytest.mark.parametrize(
    "config, why",
    [
        *[(dict(K=bad), "码的个数 K") for bad in (0, -1, 2.5, True, "8", None)],
        *[(dict(D=bad), "维数 D") for bad in (0, True, 1.0)],
        *[(dict(beta=bad), "beta") for bad in (-0.1, math.nan, math.inf, "1", True, None)],
        *[(dict(gamma=bad), "gamma") for bad in (1, 1.0, -0.1, math.nan, "0.9")],
        *[(dict(patience=bad), "patience") for bad in (0, -1, 1.5, True)],
    ],
)
def test_bad_config(config, why):
    with pytest.raises(ValueError, match=why):
        vq.VectorQuantizer(**{"K": 4, "D": 2, **config})


@pytest.mark.parametrize(
    "z, why",
    [
        (torch.zeros(2, 3, 4, 4), r"\(B, 2, ...\)"),
        (torch.zeros(2, 4, 4, 3), "通道在第二维"),
        (torch.zeros(2), r"\(B, 2, ...\)"),
        (torch.zeros(0, 2, 4), "空的"),
        (torch.zeros(1, 2, 0), "空的"),
        (torch.zeros(1, 2, 4, dtype=torch.long), "浮点"),
        ([[0.0, 1.0]], "浮点"),
        (torch.tensor([[0.0, math.nan]]), "NaN"),
        (torch.tensor([[math.inf, 0.0]]), "NaN 或无穷"),
    ],
)
def test_bad_latents(z, why):
    q = vq.VectorQuantizer(4, 2)
    with pytest.raises(ValueError, match=why):
        q(z)
    with pytest.raises(ValueError, match=why):
        q.update(z, torch.zeros(1, dtype=torch.long))


def test_bad_indices():
    q = vq.VectorQuantizer(4, 2)
    for k in (torch.tensor([4]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([1], dtype=torch.int32)):
        with pytest.raises(ValueError, match="0 到 3 的长整型"):
            q.lookup(k)
    with pytest.raises(ValueError, match="去掉通道维"):
        q.update(torch.zeros(2, 2, 3), torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match="空的"):
        vq.perplexity(torch.zeros(0, dtype=torch.long), 4)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(2, 1), 0.0, None])
def test_bad_gaussians(bad):
    mu = torch.zeros(2)
    for call in (
        lambda: elbo.kl_standard_normal(mu, bad),
        lambda: elbo.reparameterize(mu, bad, mu),
        lambda: elbo.reparameterize(mu, mu, bad),
    ):
        with pytest.raises(ValueError, match="形状必须是"):
            call()
    with pytest.raises(ValueError, match="浮点"):
        elbo.kl_standard_normal(mu.long(), mu)
