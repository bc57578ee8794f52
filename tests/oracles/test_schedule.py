"""噪声日程：与 diffusers 的 DDPMScheduler 逐元素对照，外加性质与坏输入。

误差按“差 / max(1, |参考值|)”计，分两档：

* 参考实现的系数换成 float64 后，公式必须一致到舍入误差：实测 ≤ 6e-13，上限 5e-12。
* 参考实现原样（float32 系数）：t ≥ 50 时实测 ≤ 1.4e-5，上限 5e-5；t < 50 时 1-ᾱ_t 由相近的数相减得到，
  它自己的系数只剩三四位有效数字，实测 ≤ 8.1e-4，上限 3e-3。
"""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from minisd import schedule

T = 1000
SCHEDULES = {"linear": schedule.linear, "squaredcos_cap_v2": schedule.cosine}
EDGES = (0, 1, 2, 5, 50, 499, 998, 999)  # 两端、紧挨两端、中间
KINDS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {"fixed_small": "beta_tilde", "fixed_large": "beta"}


def reference(name, double=False, **config):
    """参考实现；不裁剪 x_0，走满全部步。double=True 时只把它的系数换成 float64，公式原封不动。"""
    s = DDPMScheduler(num_train_timesteps=T, beta_schedule=name, clip_sample=False, **config)
    s.set_timesteps(T)
    if double:
        s.betas = SCHEDULES[name](T).beta
        s.alphas = 1 - s.betas
        s.alphas_cumprod = torch.cumprod(s.alphas, 0)
        s.one = s.one.double()
    return s


def error(ours, theirs):
    """最大相对误差，参考值小于 1 的按绝对误差算。"""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return ((ours - theirs).abs() / theirs.abs().clamp(min=1)).max().item()


@st.composite
def batches(draw):
    """随机形状的 (x_0, ε, t)：批 1–4，另有 0–3 个维度；t 常落在两端。"""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4).filter(lambda d: d[0] <= 4))
    step = st.one_of(st.sampled_from(EDGES), st.integers(0, T - 1))
    t = torch.tensor(draw(st.lists(step, min_size=shape[0], max_size=shape[0])))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g), t


# ───────────────────────────── 与 diffusers 对照 ─────────────────────────────


@pytest.mark.parametrize("steps", [1, 2, 10, 1000, 4000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_match(name, steps):
    ours, theirs = SCHEDULES[name](steps), DDPMScheduler(num_train_timesteps=steps, beta_schedule=name)
    torch.testing.assert_close(ours.beta.float(), theirs.betas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.alpha_bar.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_add_noise_and_velocity_match(name, batch):
    x0, eps, t = batch
    ours, theirs = SCHEDULES[name](T), reference(name)
    assert error(schedule.q_sample(ours, x0, t, eps), theirs.add_noise(x0, eps, t)) < 1e-5
    assert error(schedule.velocity(ours, x0, t, eps), theirs.get_velocity(x0, eps, t)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("prediction_type", KINDS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 3, 8, 8)])
def test_step_matches(name, prediction_type, variance_type, dtype, shape):
    double = dtype == torch.float64
    ours = SCHEDULES[name](T)
    theirs = reference(name, double, prediction_type=prediction_type, variance_type=variance_type)
    for t in EDGES:
        x, pred = torch.randn(2, *shape, dtype=dtype, generator=torch.Generator().manual_seed(t))
        # 与 step 内部抽到的是同一串噪声
        noise = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(7))
        want = theirs.step(pred, t, x, generator=torch.Generator().manual_seed(7)).prev_sample
        got = schedule.p_step(ours, x, t, pred, noise, KINDS[prediction_type], VARIANCES[variance_type])
        limit = 5e-12 if double else 5e-5 if t >= 50 else 3e-3
        assert error(got, want) < limit, t


@pytest.mark.parametrize("variance_type", VARIANCES)
def test_last_step_adds_no_noise(variance_type):
    ours, theirs = schedule.linear(T), reference("linear", variance_type=variance_type)
    x, eps = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    quiet = schedule.p_step(ours, x, 0, eps, torch.zeros_like(x), variance=VARIANCES[variance_type])
    loud = schedule.p_step(ours, x, 0, eps, 100 * torch.ones_like(x), variance=VARIANCES[variance_type])
    assert torch.equal(quiet, loud)
    for seed in (0, 1):
        want = theirs.step(eps, 0, x, generator=torch.Generator().manual_seed(seed)).prev_sample
        assert error(loud, want) < 1e-5
    # 而 t = 1 必须加
    assert not torch.equal(
        schedule.p_step(ours, x, 1, eps, torch.zeros_like(x)), schedule.p_step(ours, x, 1, eps, torch.ones_like(x))
    )


@pytest.mark.parametrize("variance_type", VARIANCES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_whole_trajectory_matches(name, variance_type):
    """同一个假网络、同一串噪声，走满 1000 步：误差不累积。"""
    ours, theirs = SCHEDULES[name](T), reference(name, double=True, variance_type=variance_type)
    a = b = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g, h = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for t in reversed(range(T)):
        noise = torch.randn(a.shape, dtype=a.dtype, generator=g) if t else torch.zeros_like(a)
        a = schedule.p_step(ours, a, t, torch.tanh(a), noise, variance=VARIANCES[variance_type])
        b = theirs.step(torch.tanh(b), t, b, generator=h).prev_sample
    assert error(a, b) < 1e-9


# ───────────────────────────────── 性质 ─────────────────────────────────

betas = st.lists(st.floats(1e-5, 0.999), min_size=1, max_size=40)


@settings(deadline=None)
@given(beta=betas)
def test_invariants(beta):
    s = schedule.Schedule(beta)
    assert len(s) == len(beta)
    assert ((s.alpha_bar > 0) & (s.alpha_bar < 1)).all()
    assert (s.alpha_bar.diff() < 0).all() and (s.snr.diff() < 0).all()
    assert s.beta_tilde[0] == 0 and (s.beta_tilde <= s.beta * (1 + 1e-12)).all()


@settings(deadline=None)
@given(beta=betas)
def test_steps_compose_to_closed_form(beta):
    """逐步走的均值系数与方差 = 一步到位的（系数层面，float64）。"""
    s = schedule.Schedule(beta)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    mean, var = one, zero
    for t in range(len(s)):
        mean = schedule.q_step(s, mean, t, zero)
        var = schedule.q_step(s, zero, t, one) ** 2 + s.alpha[t] * var
        torch.testing.assert_close(mean, schedule.q_sample(s, one, t, zero), rtol=1e-11, atol=0)
        torch.testing.assert_close(var, schedule.q_sample(s, zero, t, one) ** 2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("t", EDGES)
@pytest.mark.parametrize("make", SCHEDULES.values())
def test_posterior_is_bayes(make, t):
    """后验 ∝ q(x_{t-1}|x_0) q(x_t|x_{t-1})：按精度相加另算一遍。"""
    s = make(T)
    x0, x_t = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    mean, var = schedule.posterior(s, x0, x_t, t)
    if t == 0:  # x_{-1} 就是 x_0
        torch.testing.assert_close(mean, x0, rtol=0, atol=1e-12)
        assert var == 0
        return
    before = s.alpha_bar[t - 1]
    precision = 1 / (1 - before) + s.alpha[t] / s.beta[t]
    torch.testing.assert_close(var, 1 / precision, rtol=1e-9, atol=0)
    want = (before.sqrt() * x0 / (1 - before) + s.alpha[t].sqrt() * x_t / s.beta[t]) / precision
    torch.testing.assert_close(mean, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", SCHEDULES.values())
@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_p_step_mean_is_the_epsilon_form(make, batch):
    """换成 (x_t - β_t/√(1-ᾱ_t) ε)/√α_t 的写法，均值不变。"""
    x, eps, t = (v.double() if v.is_floating_point() else v for v in batch)
    s = make(T)
    pick = lambda c: c[t].reshape(-1, *[1] * (x.ndim - 1))
    want = (x - pick(s.beta / (1 - s.alpha_bar).sqrt()) * eps) / pick(s.alpha).sqrt()
    got = schedule.p_step(s, x, t, eps, torch.zeros_like(x))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", SCHEDULES.values())
@settings(max_examples=40, deadline=None)
@given(batch=batches())
def test_predictions_round_trip(make, batch):
    x0, eps, t = (v.double() if v.is_floating_point() else v for v in batch)
    s = make(T)
    x_t, v = schedule.q_sample(s, x0, t, eps), schedule.velocity(s, x0, t, eps)
    truth = {"x0": x0, "eps": eps, "v": v}
    torch.testing.assert_close(x_t**2 + v**2, x0**2 + eps**2, rtol=1e-10, atol=1e-12)  # 旋转不改变长度
    for source, pred in truth.items():
        for target, want in truth.items():
            got = schedule.convert(s, x_t, t, pred, source, target)
            # x_0 与 ε 互换要除以 √ᾱ_t 或 √(1-ᾱ_t)，余弦日程末端放大约 2e4 倍
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    s = schedule.linear(T)
    x, eps = torch.randn(2, 4, 3, dtype=dtype)
    t = torch.tensor([0, 1, 500, 999])
    mean, var = schedule.posterior(s, x, x, t)
    outputs = [
        schedule.q_step(s, x, t, eps),
        schedule.q_sample(s, x, t, eps),
        schedule.velocity(s, x, t, eps),
        *schedule.split(s, x, t, eps, "v"),
        schedule.p_step(s, x, t, eps, eps),
        mean,
        var,
    ]
    assert {y.dtype for y in outputs} == {dtype}


def test_float32_stays_close_to_float64():
    s = schedule.linear(T)
    x0, eps = torch.randn(2, len(s), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.arange(T)
    for f in (schedule.q_sample, schedule.velocity):
        assert (f(s, x0.float(), t, eps.float()) - f(s, x0, t, eps)).abs().max() < 2e-6


def test_scalar_and_batched_steps_agree():
    s = schedule.cosine(50)
    x, eps = torch.randn(2, 4, 3, 2)
    t = torch.tensor([0, 7, 48, 49])
    rows = [schedule.p_step(s, x[i : i + 1], int(t[i]), eps[i : i + 1], eps[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(schedule.p_step(s, x, t, eps, eps), torch.cat(rows))
    torch.testing.assert_close(schedule.q_sample(s, x, torch.tensor(7), eps), schedule.q_sample(s, x, 7, eps))


def test_inputs_are_not_modified():
    s = schedule.linear(20)
    before = {k: v.clone() for k, v in vars(s).items()}
    x, eps = torch.randn(2, 3, 2)
    copies = x.clone(), eps.clone()
    for variance in VARIANCES.values():
        schedule.p_step(s, x, 0, eps, eps, variance=variance)
    assert torch.equal(x, copies[0]) and torch.equal(eps, copies[1])
    assert all(torch.equal(getattr(s, k), v) for k, v in before.items())


def test_empty_batch_and_single_step():
    s = schedule.linear(1)
    assert len(s) == 1 and s.beta_tilde[0] == 0
    empty = torch.zeros(0, 3)
    assert schedule.q_sample(s, empty, torch.zeros(0, dtype=torch.long), empty).shape == (0, 3)


# ──────────────────────────────── 坏输入 ────────────────────────────────

X = torch.zeros(4, 2)


@pytest.mark.parametrize("bad", [0, -3, 2.5, True, "10", None])
@pytest.mark.parametrize("make", SCHEDULES.values())
def test_bad_step_count(make, bad):
    with pytest.raises(ValueError, match="步数 T 必须"):
        make(bad)


@pytest.mark.parametrize(
    "beta, why", [([], "T ≥ 1"), (0.1, "形状"), ([[0.1]], "形状"), ([0.0, 0.1], "0, 1"), ([1.0], "0, 1"),
                  ([0.1, -0.2], "0, 1"), ([math.nan], "0, 1"), ([math.inf], "0, 1")],
)  # fmt: skip
def test_bad_betas(beta, why):
    with pytest.raises(ValueError, match=why):
        schedule.Schedule(beta)


@pytest.mark.parametrize(
    "t, why",
    [
        (-1, "0 到 9 之间"),
        (10, "0 到 9 之间"),
        (torch.tensor([0, 1, 2, 10]), "0 到 9 之间"),
        (torch.tensor([-1, 1, 2, 3]), "0 到 9 之间"),
        (torch.tensor([0, 1]), "形状"),
        (torch.zeros(4, 1, dtype=torch.long), "形状"),
        (torch.tensor([0.0, 1.0, 2.0, 3.0]), "整型"),
        (torch.tensor([True, False, True, False]), "整型"),
        (True, "整"),
        (1.5, "整数"),
        ("3", "整数"),
        (None, "整数"),
    ],
)
@pytest.mark.parametrize("call", [
    lambda s, t: schedule.q_sample(s, X, t, X),
    lambda s, t: schedule.q_step(s, X, t, X),
    lambda s, t: schedule.velocity(s, X, t, X),
    lambda s, t: schedule.convert(s, X, t, X, "eps", "v"),
    lambda s, t: schedule.posterior(s, X, X, t),
    lambda s, t: schedule.p_step(s, X, t, X, X),
])  # fmt: skip
def test_bad_t(call, t, why):
    with pytest.raises(ValueError, match=why):
        call(schedule.linear(10), t)


@pytest.mark.parametrize("other", [torch.zeros(2), torch.zeros(4, 1), torch.zeros(4, 2, 1), 0.0, None])
def test_shape_mismatch_does_not_broadcast(other):
    s = schedule.linear(10)
    for call in (
        lambda: schedule.q_sample(s, X, 3, other),
        lambda: schedule.q_step(s, X, 3, other),
        lambda: schedule.velocity(s, X, 3, other),
        lambda: schedule.split(s, X, 3, other),
        lambda: schedule.posterior(s, other, X, 3),
        lambda: schedule.p_step(s, X, 3, X, other),
        lambda: schedule.p_step(s, X, 3, other, X),
    ):
        with pytest.raises(ValueError, match="形状必须是"):
            call()


def test_bad_names_and_integer_data():
    s = schedule.linear(10)
    for call in (
        lambda: schedule.split(s, X, 3, X, "noise"),
        lambda: schedule.convert(s, X, 3, X, "eps", "score"),
    ):
        with pytest.raises(ValueError, match="预测类型"):
            call()
    with pytest.raises(ValueError, match="方差取法"):
        schedule.p_step(s, X, 3, X, X, variance="fixed_small")
    with pytest.raises(ValueError, match="浮点"):
        schedule.q_sample(s, X.long(), 3, X.long())
