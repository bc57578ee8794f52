"""无分类器引导：与 diffusers 的管线对照、解析得分的核对、性质与坏输入。

组合式与 diffusers 是同一个算式，逐位相同；整条管线还隔着调度器，误差上限 1e-6。
"""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given, settings
from hypothesis import strategies as st

from minisd import guidance, mixture, schedule

scales = st.floats(-20, 20)


@st.composite
def pairs(draw):
    """随机形状的 (有条件, 无条件)。"""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    return torch.randn(2, *shape, generator=g).to(dtype).unbind()


# ───────────────────────────── 与 diffusers 对照 ─────────────────────────────


@settings(deadline=None)
@given(pair=pairs(), scale=scales)
def test_combine_is_the_diffusers_expression(pair, scale):
    noise_pred_text, noise_pred_uncond = pair
    want = noise_pred_uncond + scale * (noise_pred_text - noise_pred_uncond)
    got = guidance.combine(*pair, scale)
    assert torch.equal(got, want) and got.dtype == want.dtype


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(1, 8), (3, 4, 8, 8)])
def test_rescale_matches(shape, phi):
    cond, uncond = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    strong = guidance.combine(cond, uncond, 7.5)
    assert torch.equal(guidance.rescale(strong, cond, phi), rescale_noise_cfg(strong, cond, phi))


@pytest.fixture(scope="module")
def pipe():
    """随机权重的小管线；文本编码直接给，不需要分词器。"""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet.eval(), scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scale", [1.5, 2.0, 7.5, 15.0])
@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_whole_pipeline_matches(pipe, scale, phi):
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=g)
    positive, negative = torch.randn(2, 2, 5, 8, generator=g)
    want = pipe(
        prompt_embeds=positive, negative_prompt_embeds=negative, latents=latents, guidance_scale=scale, guidance_rescale=phi,
        num_inference_steps=4, output_type="latent", height=8, width=8,
    ).images  # fmt: skip

    net = lambda x, t, cond: pipe.unet(x, t, encoder_hidden_states=cond).sample
    merged, plain = guidance.guided(net, positive, negative, scale), guidance.guided(net, positive, negative, 1)
    x = latents
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            step = t.expand(len(x))
            pred = merged(x, step)
            if phi:
                pred = guidance.rescale(pred, plain(x, step), phi)
            x = pipe.scheduler.step(pred, t, x).prev_sample
    assert (x - want).abs().max() < 1e-6 * max(1, want.abs().max())


def test_diffusers_switches_guidance_off_at_one_and_below(pipe):
    """那里的 0 也是条件模型；这里的 0 是无条件。"""
    g = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 4, 8, 8, generator=g)
    positive, negative = torch.randn(2, 1, 5, 8, generator=g)
    run = lambda scale: pipe(prompt_embeds=positive, negative_prompt_embeds=negative, latents=latents, guidance_scale=scale,
                             num_inference_steps=2, output_type="latent", height=8, width=8).images  # fmt: skip
    assert torch.equal(run(0.0), run(1.0)) and not torch.equal(run(1.0), run(2.0))


# ───────────────────────────────── 解析得分 ─────────────────────────────────


@settings(deadline=None, max_examples=30)
@given(k=st.integers(1, 5), d=st.integers(1, 4), seed=st.integers(0, 2**31), t=st.sampled_from([0, 1, 50, 500, 998, 999]))
def test_mixture_score_matches_autograd_and_numeric(k, d, seed, t):
    """ε̂ = -√(1-ᾱ) ∇log p_t：一份用自动微分，一份用标准的高斯密度做中心差分。"""
    g = torch.Generator().manual_seed(seed)
    s, std = schedule.cosine(1000), 0.3 + torch.rand((), generator=g).item()
    mean, weight = torch.randn(k, d, dtype=torch.float64, generator=g), torch.rand(k, dtype=torch.float64, generator=g) + 0.1
    m = mixture.Mixture(mean, std, weight)
    x = torch.randn(6, d, dtype=torch.float64, generator=g)
    a2 = s.alpha_bar[t]
    _, eps = schedule.split(s, x, t, m.x0(s, x, t), "x0")

    def log_p(x):
        normal = torch.distributions.MultivariateNormal(a2.sqrt() * mean, (a2 * std**2 + 1 - a2) * torch.eye(d, dtype=x.dtype))
        return torch.logsumexp((weight / weight.sum()).log() + normal.log_prob(x[:, None]), 1)

    leaf = x.clone().requires_grad_()
    score = torch.autograd.grad(log_p(leaf).sum(), leaf)[0]
    # t 很小时 x0 → ε 要除以很小的 √(1-ᾱ)，把舍入放大
    torch.testing.assert_close(eps, -(1 - a2).sqrt() * score, rtol=1e-6, atol=1e-9)
    h = 1e-5
    shift = h * torch.eye(d, dtype=x.dtype)
    numeric = torch.stack([(log_p(x + e) - log_p(x - e)) / (2 * h) for e in shift], 1)
    torch.testing.assert_close(score, numeric, rtol=1e-5, atol=1e-6)


# ────────────────────────────────── 性质 ──────────────────────────────────


@settings(deadline=None)
@given(w=scales)
def test_conventions_round_trip(w):
    assert guidance.from_paper(w) == 1 + w
    assert abs(guidance.to_paper(guidance.from_paper(w)) - w) <= 4e-15       # 1 + w 自己要舍入一次


@settings(deadline=None)
@given(pair=pairs(), scale=scales)
def test_three_expressions_agree_up_to_rounding(pair, scale):
    cond, uncond = (v.float() for v in pair)
    ours, w = guidance.combine(cond, uncond, scale), scale - 1
    size = (scale * (cond - uncond)).abs() + (scale * cond).abs() + (w * uncond).abs() + ours.abs()
    for other in ((1 + w) * cond - w * uncond, scale * cond + (1 - scale) * uncond):
        assert ((ours - other).abs() <= 3 * 2.0**-24 * size + 1e-30).all()


@settings(deadline=None)
@given(pair=pairs(), scale=scales, t=st.integers(1, 998))
def test_any_prediction_kind_is_equivalent(pair, scale, t):
    s = schedule.cosine(1000)
    cond, uncond = (v.double() for v in pair)
    x = torch.randn(cond.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    want = guidance.combine(cond, uncond, scale)
    for kind in ("x0", "v"):
        other = [schedule.convert(s, x, t, e, "eps", kind) for e in (cond, uncond)]
        back = schedule.convert(s, x, t, guidance.combine(*other, scale), kind, "eps")
        torch.testing.assert_close(back, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale, cost", [(0, 1), (1, 1), (1.0, 1), (2, 2), (-1.0, 2), (0.5, 2)])
def test_wrapper_calls_the_network_once(scale, cost):
    sizes = []

    def net(x, t, cond):
        sizes.append(len(x))
        return x * cond + t[:, None]

    x, t = torch.randn(3, 2), torch.tensor([5, 6, 7])
    cond, null = torch.randn(2, 3, 2)
    got = guidance.guided(net, cond, null, scale)(x, t)
    assert sizes == [3 * cost]
    torch.testing.assert_close(got, x * (null + scale * (cond - null)) + t[:, None])


def test_tuple_conditions_keep_their_order_and_inputs_are_untouched():
    x, t = torch.randn(2, 3), torch.tensor([0, 9])
    cond, null = (torch.randn(2, 3), torch.ones(2)), (torch.randn(2, 3), torch.zeros(2))
    copies = [v.clone() for v in (x, *cond, *null)]
    net = lambda x, t, c: c[0] * c[1][:, None]
    assert torch.equal(guidance.guided(net, cond, null, 3.0)(x, t), 3 * cond[0])       # 空条件那支被有效位置零
    assert all(torch.equal(a, b) for a, b in zip((x, *cond, *null), copies))


# ──────────────────────────────── 坏输入 ────────────────────────────────

X, T = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
ECHO = lambda x, t, c: x


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), True, "7.5", None, torch.tensor(2.0)])
def test_bad_scale(bad):
    for call in (lambda: guidance.combine(X, X, bad), lambda: guidance.guided(ECHO, X, X, bad),
                 lambda: guidance.from_paper(bad), lambda: guidance.to_paper(bad)):  # fmt: skip
        with pytest.raises(ValueError, match="必须是有限的数"):
            call()


@pytest.mark.parametrize("bad", [X[:1], X[:, :1], torch.zeros(2, 3, 1), torch.zeros(3)])
def test_shapes_do_not_broadcast(bad):
    for call in (lambda: guidance.combine(X, bad, 2.0), lambda: guidance.rescale(X, bad, 0.5)):
        with pytest.raises(ValueError, match="形状必须相同"):
            call()
    with pytest.raises(ValueError, match="空条件的形状"):
        guidance.guided(ECHO, X, bad, 2.0)


@pytest.mark.parametrize("bad", [None, [], (), "红色的圆", [X, "红"], torch.tensor(1.0), 3])
def test_bad_condition(bad):
    with pytest.raises(ValueError, match="条件必须是"):
        guidance.guided(ECHO, bad, X, 2.0)


def test_mismatched_batches_and_bad_predictions():
    with pytest.raises(ValueError, match="空条件的形状"):
        guidance.guided(ECHO, (X, X), (X,), 2.0)
    for scale in (0, 1, 2):
        run = guidance.guided(ECHO, X, X, scale)
        for x, t in ((X[:1], T[:1]), (X, T[:1]), (X, T[:, None])):
            with pytest.raises(ValueError, match="批大小必须相同"):
                run(x, t)
        for net in (lambda x, t, c: x[:, :1], lambda x, t, c: None):
            with pytest.raises(ValueError, match="返回值形状必须是"):
                guidance.guided(net, X, X, scale)(X, T)
    for a, b in ((X.long(), X), (X, X.long()), (1.0, X), (X, None)):
        with pytest.raises(ValueError, match="浮点张量"):
            guidance.combine(a, b, 2.0)


@pytest.mark.parametrize("phi", [-0.1, 1.1, float("nan"), True, "0.7", None])
def test_bad_phi(phi):
    with pytest.raises(ValueError, match="phi 必须"):
        guidance.rescale(X, X, phi)
