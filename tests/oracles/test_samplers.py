"""采样器：与 diffusers 的 DDIM、PNDM、DPM-Solver++、DDIM 反演逐步逐元素对照，外加解析解、性质与坏输入。

误差按“差 / max(1, |参考值|)”计，整条轨迹的每一步都比，分两档：

* 参考实现的系数换成 float64 后，公式必须一致到舍入误差：上限 1e-9（随机日程会把舍入放大几个数量级）。
* 参考实现原样（float32 系数）：上限 2e-5；唯一的例外写在 ``test_float32_matches`` 里。
"""

import math

import diffusers.schedulers.scheduling_dpmsolver_multistep as dpm_module
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from minisd import samplers, schedule

T = 1000
SCHEDULES = {"linear": schedule.linear, "squaredcos_cap_v2": schedule.cosine}
KINDS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
METHODS = ("ddim", "pndm", "dpm++")

# 参考实现内部的 numpy 用法，与对照无关
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def net(x, t):
    """假网络：随 x 与 t 平滑变化的任意函数。"""
    return torch.tanh(1.3 * x + (t.to(x) / 100).sin().reshape(-1, *[1] * (x.ndim - 1)))


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def error(ours, theirs):
    """最大相对误差，参考值小于 1 的按绝对误差算。"""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return ((ours - theirs).abs() / theirs.abs().clamp(min=1)).max().item()


# ───────────────────────────── 参考实现 ─────────────────────────────


def exact(reference, s):
    """只把参考实现的系数换成 float64，公式原封不动。"""
    reference.alphas_cumprod = s.alpha_bar
    for name in ("final_alpha_cumprod", "initial_alpha_cumprod"):
        if hasattr(reference, name):
            setattr(reference, name, torch.ones((), dtype=torch.float64))
    return reference


def build(cls, s, kind, ts, double, **config):
    """参考的 scheduler，走步号 ts。s 的 β 原样交给它（float32）。"""
    config |= {"prediction_type": KINDS[kind], "num_train_timesteps": len(s), "trained_betas": s.beta.tolist()}
    reference = cls(**config)
    if cls is DPMSolverMultistepScheduler:
        if double:
            reference.alphas_cumprod = s.alpha_bar
        reference.set_timesteps(timesteps=ts)
        if double:                                        # 它把 σ 存成 float32
            noise = torch.cat([((1 - s.alpha_bar) / s.alpha_bar).sqrt()[ts], torch.zeros(1, dtype=torch.float64)])
            reference.sigmas = noise
    else:
        exact(reference, s) if double else None
        reference.set_timesteps(len(ts))
        assert sorted(set(reference.timesteps.tolist()), reverse=True) == ts
    return reference


class Float64Torch:
    """DPMSolverMultistepScheduler.step 写死了 torch.float32；对照时换成 float64。"""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def their_path(method, s, x, ts, kind, eta=0.0, spacing="trailing", seed=0):
    """参考实现走出来的每一步（x 的精度决定用哪一档）。"""
    double = x.dtype == torch.float64
    if method == "dpm++":
        reference = build(DPMSolverMultistepScheduler, s, kind, ts, double)
    elif method == "pndm":
        config = {"skip_prk_steps": True, "set_alpha_to_one": True, "timestep_spacing": spacing}
        reference = build(PNDMScheduler, s, "eps", ts, double, **config)
    else:
        reference = build(DDIMScheduler, s, kind, ts, double, clip_sample=False, timestep_spacing=spacing)
    extra = {"eta": eta, "generator": torch.Generator().manual_seed(seed)} if method == "ddim" else {}
    path = []
    for t in reference.timesteps.tolist():
        pred = net(x, torch.full((len(x),), t))
        if method == "pndm":
            # 它的 v-预测直接组合 v（diffusers 的 issue 14816），x0-预测不支持；都先换成 ε 再交给它
            pred = schedule.convert(s, x, t, pred, kind, "eps")
        x = reference.step(pred, t, x, **extra).prev_sample
        path.append(x)
    if method == "pndm" and len(ts) > 1:                 # 第一次是试走：问了网络，还没有走
        path = path[1:]
    return path


def our_path(method, s, x, ts, kind, eta=0.0, seed=0):
    path = []
    samplers.sample(
        s, net, x, ts, method, kind, eta,
        generator=torch.Generator().manual_seed(seed), callback=lambda i, t, y: path.append(y),
    )  # fmt: skip
    return path


def worst(method, s, x, ts, kind, **options):
    ours = our_path(method, s, x, ts, kind, **{k: v for k, v in options.items() if k != "spacing"})
    theirs = their_path(method, s, x, ts, kind, **options)
    assert len(ours) == len(theirs) == len(ts)
    return max(error(a, b) for a, b in zip(ours, theirs))


@pytest.fixture
def float64_dpm(monkeypatch):
    monkeypatch.setattr(dpm_module, "torch", Float64Torch())


# ───────────────────────────── 与 diffusers 对照 ─────────────────────────────

@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 10, 50])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("method", METHODS)
def test_float32_matches(method, name, kind, steps):
    # 步数不整除 T 时，参考的 DDIM 退的步长只在 leading 下与步号序列一致；PNDM 按缺省用 leading
    leading = method == "pndm" or (method == "ddim" and T % steps)
    s, spacing = SCHEDULES[name](T), "leading" if leading else "trailing"
    ts = samplers.timesteps(T, steps, spacing)
    # PNDM 先把 x_0 换成 ε；t = 0 处参考实现的 1-ᾱ 由相近的数相减得到，只剩三四位有效数字（同 test_schedule.py）
    limit = 3e-3 if (method, kind) == ("pndm", "x0") else 2e-5
    assert worst(method, s, normal(3, 2, 4, dtype=torch.float32), ts, kind, spacing=spacing) < limit


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20, 1000])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("method", METHODS)
def test_float64_matches(method, name, kind, steps, float64_dpm):
    s, spacing = SCHEDULES[name](T), "leading" if T % steps else "trailing"
    ts = samplers.timesteps(T, steps, spacing)
    assert worst(method, s, normal(2, 3), ts, kind, spacing=spacing) < 1e-9


@st.composite
def cases(draw):
    """随机日程（长 1–40）、步号、形状、预测类型。leading 的步长恒为 ⌊T/n⌋，与参考实现的退步相同。"""
    beta = draw(st.lists(st.floats(1e-4, 0.3), min_size=1, max_size=40))
    steps = draw(st.integers(1, len(beta)))
    ts = samplers.timesteps(len(beta), steps, "leading")
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    x = normal(*shape, seed=draw(st.integers(0, 2**31)))
    return schedule.Schedule(beta), x, ts, draw(st.sampled_from([*KINDS]))


@settings(max_examples=80, deadline=None)
@given(case=cases(), eta=st.sampled_from([0.0, 0.3, 1.0]) | st.floats(0, 1), seed=st.integers(0, 99))
def test_ddim_matches_on_random_schedules(case, eta, seed):
    assert worst("ddim", *case, eta=eta, seed=seed, spacing="leading") < 1e-9


@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_pndm_matches_on_random_schedules(case):
    assert worst("pndm", *case, spacing="leading") < 1e-9


@settings(max_examples=80, deadline=None)
@given(case=cases(), data=st.data())
def test_dpm_solver_matches_on_random_schedules(case, data):
    """参考实现认得任意步号，所以步号也随机：不等距、两端可有可无。"""
    s, x, ts, kind = case
    ts = sorted(data.draw(st.sets(st.integers(0, len(s) - 1), min_size=1)), reverse=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpm_module, "torch", Float64Torch())
        assert worst("dpm++", s, x, ts, kind) < 1e-9


@settings(max_examples=60, deadline=None)
@given(case=cases(), eta=st.floats(0, 1))
def test_single_ddim_step_matches(case, eta):
    """每一步单独比，噪声显式给出；末步（t_next = -1）的噪声不起作用。"""
    s, x, ts, kind = case
    reference = build(DDIMScheduler, s, kind, ts, True, clip_sample=False, timestep_spacing="leading")
    pred, noise = normal(2, *x.shape, seed=9)
    for t, t_next in zip(ts, [*ts[1:], -1]):
        want = reference.step(pred, t, x, eta=eta, variance_noise=noise).prev_sample
        assert error(samplers.ddim_step(s, x, t, t_next, pred, kind, eta, noise), want) < 1e-10
        variance = reference._get_variance(t, t_next)
        assert abs(samplers.ddim_sigma(s, t, t_next) ** 2 - variance) < 1e-12
    quiet = samplers.ddim_step(s, x, ts[-1], -1, pred, kind, eta, torch.zeros_like(x))
    assert torch.equal(quiet, samplers.ddim_step(s, x, ts[-1], -1, pred, kind, eta, 100 * noise))


@pytest.mark.parametrize("steps", [1, 4, 20, 100])
@pytest.mark.parametrize("name", SCHEDULES)
def test_inversion_matches(name, steps):
    """refine = 0 与 DDIMInverseScheduler 相同。只比 ε-预测：

    另两种预测下它用低一级的 ᾱ 换算高一级步号的网络输出，我们用网络所在步号的 ᾱ。
    """
    s = SCHEDULES[name](T)
    ts = samplers.timesteps(T, steps)
    config = {"clip_sample": False, "timestep_spacing": "trailing", "set_alpha_to_one": True}
    reference = build(DDIMInverseScheduler, s, "eps", ts, True, **config)
    x = y = normal(4, 3)
    path = []
    samplers.invert(s, net, x, steps, "eps", callback=lambda i, t, z: path.append((t, z)))
    assert [t for t, _ in path] == reference.timesteps.tolist() == ts[::-1]
    for t, z in path:
        y = reference.step(net(y, torch.full((4,), t)), t, y).prev_sample
        assert error(z, y) < 1e-9


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 30, 999, 1000])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_spacing_matches(spacing, steps):
    reference = DDIMScheduler(timestep_spacing=spacing)
    reference.set_timesteps(steps)
    assert samplers.timesteps(T, steps, spacing) == reference.timesteps.tolist()[:steps]


@settings(deadline=None)
@given(length=st.integers(1, 2000), data=st.data(), spacing=st.sampled_from(["trailing", "leading", "linspace"]))
def test_spacing_is_a_path(length, data, spacing):
    steps = data.draw(st.integers(1, length))
    ts = samplers.timesteps(length, steps, spacing)
    assert len(ts) == steps and all(type(t) is int for t in ts)
    assert all(t > u for t, u in zip(ts, ts[1:])) and 0 <= ts[-1] <= ts[0] < length
    if spacing == "trailing" or (spacing == "linspace" and steps > 1):
        assert ts[0] == length - 1
    if spacing != "trailing":
        assert ts[-1] == 0
    assert samplers.timesteps(length, length, spacing) == [*reversed(range(length))]


# ───────────────────────────── η 与 DDPM ─────────────────────────────


@pytest.mark.parametrize("make", SCHEDULES.values())
@pytest.mark.parametrize("length", [1, 2, 50, 1000])
def test_eta_one_is_the_ddpm_posterior(make, length):
    """相邻步号之间 σ(1)² 就是 β̃；带上 η 则乘 η²。"""
    s = make(length)
    for t in range(length):
        for eta in (0.0, 0.5, 1.0):
            variance = samplers.ddim_sigma(s, t, t - 1, eta) ** 2
            assert variance == pytest.approx(eta**2 * s.beta_tilde[t].item(), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", SCHEDULES.values())
def test_full_ddim_with_eta_one_is_ddpm(make, kind):
    """走满 T 步、同一串噪声：逐元素相同，且误差不累积。"""
    s = make(T)
    x = normal(4, 3)
    theirs, g = x, torch.Generator().manual_seed(3)
    path = our_path("ddim", s, x, T, kind, eta=1.0, seed=3)
    for t in reversed(range(T)):
        noise = torch.randn(x.shape, generator=g, dtype=x.dtype)
        theirs = schedule.p_step(s, theirs, t, net(theirs, torch.full((4,), t)), noise, kind)
        assert error(path[T - 1 - t], theirs) < 1e-9


@settings(max_examples=60, deadline=None)
@given(case=cases(), eta=st.floats(0, 1), data=st.data())
def test_marginals_do_not_depend_on_eta(case, eta, data):
    """论文引理 1：知道真 x_0、ε 时，走一步之后仍是 q(x' | x_0)：均值系数 a'，方差 b'²，与 η 无关。"""
    s, x0, _, kind = case
    t = data.draw(st.integers(0, len(s) - 1))
    t_next = data.draw(st.integers(-1, t - 1))
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    step = lambda x, eps, z: samplers.ddim_step(s, x, t, t_next, eps, "eps", eta, z)
    a, b = samplers.level(s, t)
    a_next, b_next = samplers.level(s, t_next)
    mean = step(a * one, zero, zero)                                  # x_0 = 1、没有噪声
    variance = step(b * one, one, zero) ** 2 + step(zero, zero, one) ** 2
    assert mean.item() == pytest.approx(a_next, abs=1e-12)
    assert variance.item() == pytest.approx(b_next**2, abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_deterministic_methods_repeat_bitwise(method):
    s, x = schedule.cosine(T), normal(4, 3, dtype=torch.float32)
    first = samplers.sample(s, net, x, 10, method, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, samplers.sample(s, net, x, 10, method, generator=torch.Generator().manual_seed(2)))


def test_eta_draws_from_the_generator():
    s, x = schedule.cosine(T), normal(4, 3)
    run = lambda eta, seed: samplers.sample(
        s, net, x, 10, "ddim", eta=eta, generator=torch.Generator().manual_seed(seed)
    )
    assert torch.equal(run(0.5, 1), run(0.5, 1))
    assert not torch.equal(run(0.5, 1), run(0.5, 2))
    assert not torch.equal(run(0.5, 1), run(0.0, 1))


# ───────────────────────────── 解析解 ─────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", SCHEDULES.values())
def test_point_data_is_hit_exactly(make, method, kind):
    """数据只有一个点、网络完美：轨迹上 x̂_0、ε̂ 都不变，任何步数都恰好命中。"""
    s, point = make(T), normal(2, 3, seed=5)
    perfect = lambda x, t: schedule.convert(s, x, t, point, "x0", kind)
    for steps in (1, 2, 5, 17):
        got = samplers.sample(s, perfect, normal(2, 3), steps, method, kind)
        torch.testing.assert_close(got, point, rtol=0, atol=1e-9)


def gaussian(s, mean, std, kind):
    """数据是 N(mean, std²) 时的完美预测与概率流 ODE 的精确解。"""

    def perfect(x, t):
        a = schedule.take(s, s.alpha_bar.sqrt(), t, x)
        x0 = mean + a * std**2 / (a**2 * std**2 + 1 - a**2) * (x - a * mean)      # E[x_0 | x_t]
        return schedule.convert(s, x, t, x0, "x0", kind)

    def solution(x, t):
        a, b = samplers.level(s, t)
        return mean + std * (x - a * mean) / math.sqrt(a**2 * std**2 + b**2)

    return perfect, solution


def convergence(method, kind):
    """步数 20、40、80、160 时到精确解的最大距离。

    日程取 20000 步，使步号取整不影响阶；从 t = T/2 起走，避开起点处极大的一步。
    """
    s = schedule.cosine(20000)
    perfect, solution = gaussian(s, 0.7, 0.5, kind)
    x, start = normal(64, 1), len(s) // 2
    gap = []
    for n in (20, 40, 80, 160):
        ts = [round(start * (1 - i / n)) for i in range(n)]
        gap.append((samplers.sample(s, perfect, x, ts, method, kind) - solution(x, start)).abs().max().item())
    return gap, math.log2(gap[0] / gap[-1]) / 3


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_accuracy(kind):
    """DDIM 是一阶：步数翻倍误差减半。DPM-Solver++(2M) 是二阶。PNDM 的步号在 σ 上不等距，只比大小。"""
    ddim, first = convergence("ddim", kind)
    dpm, second = convergence("dpm++", kind)
    pndm, _ = convergence("pndm", kind)
    assert 0.9 < first < 1.1 and 1.7 < second < 2.3
    assert max(b / a for a, b in zip(ddim, dpm)) < 0.1
    assert max(b / a for a, b in zip(ddim, pndm)) < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_predictions_are_interchangeable(method):
    """同一个去噪器写成 ε、x_0 或 v，样本相同。"""
    s, x = schedule.cosine(T), normal(8, 2)
    results = []
    for kind in KINDS:
        perfect, _ = gaussian(s, 0.7, 0.5, kind)
        results.append(samplers.sample(s, perfect, x, 12, method, kind))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-9)


def test_pndm_should_not_start_from_pure_noise():
    """余弦日程的 T-1 处 ᾱ ≈ 2e-9：PNDM 从那里起步会发散，缺省的 leading 不会；DPM-Solver++ 不怕。"""
    s, x = schedule.cosine(T), normal(64, 1)
    perfect, solution = gaussian(s, 0.7, 0.5, "v")

    def gap(method, **options):
        start = samplers.timesteps(T, 10, options.get("spacing", "leading" if method == "pndm" else "trailing"))[0]
        return (samplers.sample(s, perfect, x, 10, method, **options) - solution(x, start)).abs().max()

    assert gap("pndm", spacing="trailing") > 1
    assert gap("pndm") < 0.02 and gap("dpm++") < 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", SCHEDULES.values())
def test_inversion_round_trip(make, kind):
    """反演再采样：步数多则误差小；不动点迭代收敛后与采样严格互逆。"""
    s = make(T)
    perfect, solution = gaussian(s, 0.7, 0.5, kind)
    data = 0.7 + 0.5 * normal(64, 1)
    gap = {}
    for steps in (10, 20, 40):
        back = lambda refine: samplers.sample(
            s, perfect, samplers.invert(s, perfect, data, steps, kind, refine=refine), steps, "ddim", kind
        )
        gap[steps] = (back(0) - data).abs().max().item()
        assert (back(20) - data).abs().max() < 1e-9
    assert gap[40] < 0.7 * gap[20] < 0.5 * gap[10]
    # 步数多时反演的终点就是 ODE 的解：data = solution(noise)
    noise = samplers.invert(s, perfect, data, 250, kind)
    torch.testing.assert_close(solution(noise, T - 1), data, rtol=0, atol=0.05)


# ───────────────────────────── 约定 ─────────────────────────────


@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("method", METHODS)
def test_denoise_and_callback_contract(method, steps):
    s, x = schedule.cosine(30), normal(5, 2, 3, dtype=torch.float32)
    asked, seen = [], []

    def denoise(y, t):
        assert y.shape == x.shape and y.dtype == x.dtype and not torch.is_grad_enabled()
        assert t.shape == (5,) and t.dtype == torch.long and (t == t[0]).all()
        asked.append(int(t[0]))
        return net(y, t)

    copy = x.clone()
    got = samplers.sample(s, denoise, x, steps, method, callback=lambda i, t, y: seen.append((i, t, y)))
    ts = samplers.timesteps(30, steps, "leading" if method == "pndm" else "trailing")
    assert [(i, t) for i, t, _ in seen] == [*enumerate(ts)] and torch.equal(seen[-1][2], got)
    assert torch.equal(x, copy) and not got.requires_grad
    if method == "pndm" and steps > 1:                    # 头一步试走，多问一次
        ts = [ts[0], ts[1], *ts[1:]]
    assert asked == ts


@pytest.mark.parametrize("method", METHODS)
def test_starting_halfway(method):
    """图生图：只走后半段步号，与整条轨迹的后半段是同一回事（单步法）。"""
    s, x = schedule.cosine(T), normal(4, 3)
    ts = samplers.timesteps(T, 20)
    got = samplers.sample(s, net, x, ts[8:], method)
    assert got.shape == x.shape and got.isfinite().all()
    if method == "ddim":
        path = our_path("ddim", s, x, 20, "v")
        torch.testing.assert_close(samplers.sample(s, net, path[7], ts[8:], "ddim"), path[-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_dtype_is_kept(method, dtype):
    s, x = schedule.cosine(T), normal(4, 3, dtype=dtype)
    wide = lambda y, t: net(y, t).double()                # 网络输出精度不同也不传染
    assert samplers.sample(s, wide, x, 5, method).dtype == dtype
    assert samplers.invert(s, wide, x, 5).dtype == dtype


def test_edges():
    for length, steps in [(1, 1), (2, 1), (2, 2)]:
        s = schedule.linear(length)
        for method in METHODS:
            assert samplers.sample(s, net, normal(3, 2), steps, method).isfinite().all()
    s = schedule.cosine(10)
    assert samplers.sample(s, net, torch.zeros(0, 3), 4).shape == (0, 3)
    assert torch.equal(samplers.sample(s, net, normal(2, 2), torch.tensor(4)), samplers.sample(s, net, normal(2, 2), 4))


# ──────────────────────────────── 坏输入 ────────────────────────────────

S, X = schedule.cosine(10), torch.ones(4, 2)


@pytest.mark.parametrize("steps, why", [
    (0, "1 到训练步数 T = 10"), (-2, "1 到训练步数"), (11, "1 到训练步数"), (2.0, "必须是整数"), ("5", "必须是整数"),
    (None, "必须是整数"), (True, "必须是整数"), (torch.tensor([5, 3]), "必须是整数"),
    ([], "严格递减"), ([3, 5], "严格递减"), ([5, 5], "严格递减"), ([10, 3], "0 到 9"), ([3, -1], "0 到 9"),
    ([5.0, 2.0], "必须是整数"), (["a"], "必须是整数"),
])  # fmt: skip
@pytest.mark.parametrize("call", [
    lambda steps: samplers.sample(S, net, X, steps),
    lambda steps: samplers.invert(S, net, X, steps),
])  # fmt: skip
def test_bad_steps(call, steps, why):
    with pytest.raises(ValueError, match=why):
        call(steps)


@pytest.mark.parametrize("options, why", [
    ({"method": "euler"}, "采样方法必须是"),
    ({"method": None}, "采样方法必须是"),
    ({"spacing": "even"}, "步号取法必须是"),
    ({"kind": "score"}, "预测类型必须是"),
    ({"eta": -0.1}, "eta 必须在 0 到 1"),
    ({"eta": 1.1}, "eta 必须在 0 到 1"),
    ({"eta": math.nan}, "eta 必须在 0 到 1"),
    ({"eta": "1"}, "eta 必须在 0 到 1"),
    ({"eta": True}, "eta 必须在 0 到 1"),
    ({"eta": 0.5, "method": "pndm"}, "是确定性的"),
    ({"eta": 0.5, "method": "dpm++"}, "是确定性的"),
])  # fmt: skip
def test_bad_options(options, why):
    with pytest.raises(ValueError, match=why):
        samplers.sample(S, net, X, 3, **{"method": "ddim"} | options)


@pytest.mark.parametrize("start, why", [
    (torch.ones(4, 2).long(), "浮点张量"), (torch.tensor(1.0), "浮点张量"), ([[1.0]], "浮点张量"), (None, "浮点张量"),
    (torch.full((4, 2), math.nan), "NaN"), (torch.full((4, 2), math.inf), "NaN"),
])  # fmt: skip
@pytest.mark.parametrize("call", [
    lambda x: samplers.sample(S, net, x, 3),
    lambda x: samplers.invert(S, net, x, 3),
])  # fmt: skip
def test_bad_start(call, start, why):
    with pytest.raises(ValueError, match=why):
        call(start)


@pytest.mark.parametrize("pred, why", [
    (lambda x, t: x[:, :1], r"形状必须是 \(4, 2\)，收到 \(4, 1\)"),
    (lambda x, t: x[0], "形状必须是"),
    (lambda x, t: None, "收到 NoneType"),
    (lambda x, t: x.log() * math.nan, "含有 NaN"),
    (lambda x, t: torch.where(t[:, None] < 5, math.inf, x), "t = 3 处的预测含有 NaN"),
])  # fmt: skip
@pytest.mark.parametrize("method", [*METHODS, "invert"])
def test_bad_predictions(method, pred, why):
    if method == "invert":
        why = why.replace("t = 3", "t = 0")              # 反演从小步号走起
    with pytest.raises(ValueError, match=why):
        if method == "invert":
            samplers.invert(S, pred, X, [9, 6, 3, 0])
        else:
            samplers.sample(S, pred, X, [9, 6, 3, 0], method)


def test_overflow_is_reported():
    """half 精度装不下余弦日程起点处的 x̂_0：报错，而不是交出一张 NaN 的图。"""
    with pytest.raises(ValueError, match="样本出现 NaN 或无穷"):
        samplers.sample(schedule.cosine(T), lambda x, t: -x, 50 * X.half(), 1, "ddim", "eps")


@pytest.mark.parametrize("refine", [-1, 1.5, True, None])
def test_bad_refine(refine):
    with pytest.raises(ValueError, match="refine"):
        samplers.invert(S, net, X, 3, refine=refine)


def test_noise_shape_is_checked():
    with pytest.raises(ValueError, match="noise 的形状"):
        samplers.ddim_step(S, X, 5, 3, X, "eps", 1.0, X[:, :1])
    with pytest.raises(ValueError, match="noise 的形状"):
        samplers.ddim_step(S, X, 5, 3, X, "eps", 1.0)
