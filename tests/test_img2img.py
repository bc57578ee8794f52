"""图生图、修复、通道拼接：与 diffusers 对照起始步号、加噪、掩码与替换循环；步 0 逐位等于基座；坏输入。"""

import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minisd import clip, concat, img2img, inpaint, pipeline, samplers, schedule, unet, vae

S = schedule.cosine()


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def tame(x, t):
    """一个随便的、光滑的去噪器。"""
    return 0.3 * x.sin() + 0.01 * (t.view(-1, *[1] * (x.ndim - 1)) % 7)


@pytest.fixture(scope="module")
def sd():
    """没训练过的三件套；U-Net 的末层不再是零，输出才有内容。"""
    torch.manual_seed(0)
    net = unet.UNet()
    for p in net.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return pipeline.StableDiffusion(clip.TextEncoder().eval(), vae.VAE().eval(), net.eval())


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 24, 24, generator=gen(1)) * 2 - 1


PROMPTS = ["红色的圆在左上", "蓝色的方块", "一个星星"]


# ── 图生图：strength 与起始步号 ─────────────────────────────────────

@given(st.integers(1, 60), st.floats(0, 1))
def test_remaining_is_the_diffusers_rule(steps, strength):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    pipe = types.SimpleNamespace(scheduler=scheduler)
    theirs, count = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(pipe, steps, strength, "cpu")
    ours = img2img.remaining(scheduler.timesteps.tolist(), strength)
    assert ours == theirs.tolist() and len(ours) == count


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_start_is_the_diffusers_add_noise(strength):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(trained_betas=S.beta.tolist())
    z, start = torch.randn(2, 4, 6, 6, generator=gen()), []
    ts = img2img.remaining(samplers.timesteps(1000, 20), strength)

    def spy(x, t):
        if not start:
            start.append((x, t))
        return tame(x, t)

    img2img.from_latent(S, spy, z, strength, gen(3), steps=20, method="ddim")
    x, t = start[0]
    assert (t == ts[0]).all()
    eps = torch.randn(z.shape, generator=gen(3))
    torch.testing.assert_close(x, scheduler.add_noise(z, eps, torch.tensor([ts[0]])), atol=1e-5, rtol=0)


def test_the_rest_of_the_walk_is_the_ordinary_sampler():
    z, ts = torch.randn(2, 4, 6, 6, generator=gen()), samplers.timesteps(1000, 20)
    for method in ("ddim", "dpm++"):
        ours = img2img.from_latent(S, tame, z, 0.4, gen(3), steps=20, method=method)
        start = schedule.q_sample(S, z, ts[12], torch.randn(z.shape, generator=gen(3)))
        assert torch.equal(ours, samplers.sample(S, tame, start, ts[12:], method))


def test_zero_strength_only_decodes_and_full_strength_forgets_the_image(sd, images):
    kept = img2img.img2img(sd, images, PROMPTS, 0.0, gen())
    assert torch.equal(kept, sd.vae.to_image(sd.vae.to_latent(images)))
    assert torch.equal(img2img.img2img(sd, images, PROMPTS, 0.04, gen(), steps=12), kept)     # int(12·0.04) = 0
    far = img2img.img2img(sd, images, PROMPTS, 1.0, gen(5))
    torch.testing.assert_close(far, img2img.img2img(sd, -images, PROMPTS, 1.0, gen(5)), atol=1e-2, rtol=0)
    torch.testing.assert_close(far, sd(PROMPTS, gen(5)), atol=1e-2, rtol=0)                    # 余弦日程的末端几乎没有信号


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan"), "0.5", True, None])
def test_bad_strength(strength):
    with pytest.raises(ValueError, match="strength 必须是 0 到 1"):
        img2img.remaining([9, 5, 1], strength)


def test_as_many_prompts_as_images(sd, images):
    with pytest.raises(ValueError, match="3 张图，2 句描述"):
        img2img.img2img(sd, images, PROMPTS[:2], 0.5, gen())


def test_steps_are_checked(sd, images):
    with pytest.raises(ValueError, match="采样步数"):
        img2img.img2img(sd, images, PROMPTS, 0.5, gen(), steps=1001)


# ── 通道拼接 ─────────────────────────────────────────────────────

@pytest.mark.parametrize("extra", [1, 3, 5])
def test_widened_unet_starts_identical_and_learns_from_the_new_channels(sd, extra):
    wide = concat.widen(sd.unet, extra)
    assert wide.in_channels == 4 + extra and wide.encoder[0].weight.shape[1] == 4 + extra
    assert sd.unet.in_channels == 4 and sd.unet.encoder[0].weight.shape[1] == 4               # 原来的没动
    text, valid = sd.encode(PROMPTS)
    x, t, c = torch.randn(3, 4, 6, 6, generator=gen()), torch.tensor([5, 400, 990]), torch.randn(3, extra, 6, 6, generator=gen(1))
    out = concat.Concat(wide, c)(x, t, text, valid)
    torch.testing.assert_close(out, sd.unet(x, t, text, valid), atol=2e-6, rtol=0)            # 加的都是零；只差求和次序
    out.square().sum().backward()
    assert wide.encoder[0].weight.grad[:, 4:].abs().min() > 0                                 # 第一步就有梯度
    assert all(p.requires_grad for p in wide.parameters())


def test_concat_repeats_the_condition_for_guidance(sd):
    c = torch.randn(2, 5, 6, 6, generator=gen())
    seen = []

    def fake(x, t, text, valid, **extra):
        seen.append((x, extra))
        return x[:, :4]

    concat.Concat(fake, c)(torch.zeros(4, 4, 6, 6), None, None, None, image=7)
    x, extra = seen[0]
    assert torch.equal(x[:, 4:], torch.cat([c, c])) and (x[:, :4] == 0).all() and extra == {"image": 7}


@pytest.mark.parametrize("extra", [0, -1, 1.0, True])
def test_bad_extra(sd, extra):
    with pytest.raises(ValueError, match="extra 必须是不小于 1 的整数"):
        concat.widen(sd.unet, extra)


@pytest.mark.parametrize("shape", [(3, 5, 6, 6), (2, 5, 3, 6), (2, 5, 6, 3)])
def test_condition_that_does_not_fit(sd, shape):
    with pytest.raises(ValueError, match="对不上"):
        concat.Concat(sd.unet, torch.zeros(shape))(torch.zeros(4, 4, 6, 6), None, None, None)


# ── 修复 ─────────────────────────────────────────────────────────

def blocks(*cells):
    """6×6 个 4 像素的格子里，哪些要重画。"""
    m = torch.zeros(1, 1, 24, 24)
    for r, c in cells:
        m[..., 4 * r:4 * r + 4, 4 * c:4 * c + 4] = 1
    return m


def test_nine_channels_match_the_diffusers_order(sd, images):
    """与 StableDiffusionInpaintPipeline 相同：掩码在前、被遮图的潜变量在后；被遮的像素填 0。"""
    import torch.nn.functional as F

    mask = blocks((0, 0), (2, 3), (2, 4)).expand(3, -1, -1, -1)
    c = inpaint.condition(sd.vae, images, mask)
    masked = images * (mask < 0.5)
    assert torch.equal(c[:, :1], F.interpolate(mask, size=(6, 6)))                            # 对齐的掩码：最近邻与取最大相同
    assert torch.equal(c[:, 1:], sd.vae.to_latent(masked))


def test_hidden_pixels_never_reach_the_network(sd, images):
    mask = blocks((1, 1), (1, 2)).expand(3, -1, -1, -1)
    changed = torch.where(mask > 0, torch.rand(images.shape, generator=gen(8)), images)
    assert torch.equal(inpaint.condition(sd.vae, images, mask), inpaint.condition(sd.vae, changed, mask))
    assert not torch.equal(sd.vae.to_latent(images), sd.vae.to_latent(changed))


def test_one_pixel_is_enough_to_repaint_a_latent_cell():
    mask = torch.zeros(1, 1, 24, 24)
    mask[0, 0, 5, 6] = 1
    m = inpaint.latent_mask(mask)
    assert m.sum() == 1 and m[0, 0, 1, 1] == 1


def test_paste_keeps_every_known_pixel(images):
    mask = blocks((3, 3)).expand(3, -1, -1, -1)
    out = inpaint.paste(images, torch.zeros_like(images), mask)
    assert torch.equal(out[:, :, :12], images[:, :, :12]) and (out[:, :, 12:16, 12:16] == 0).all()


@pytest.mark.parametrize("mask, message", [
    (torch.zeros(2, 1, 24, 24), "形状必须是"), (torch.zeros(3, 3, 24, 24), "形状必须是"),
    (torch.zeros(3, 1, 6, 6), "形状必须是"), (torch.full((3, 1, 24, 24), 0.5), "只能含 0"),
])
def test_bad_mask(sd, images, mask, message):
    with pytest.raises(ValueError, match=message):
        inpaint.condition(sd.vae, images, mask)


def test_replace_is_the_four_channel_loop_of_diffusers():
    """DDIM、固定的噪声：逐步对照 StableDiffusionInpaintPipeline 里 num_channels_unet == 4 的循环。"""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        trained_betas=S.beta.tolist(), prediction_type="v_prediction", timestep_spacing="trailing",
        set_alpha_to_one=True, clip_sample=False,
    )
    scheduler.set_timesteps(10)
    z, m = torch.randn(2, 4, 6, 6, generator=gen()), (torch.rand(2, 1, 6, 6, generator=gen(1)) > 0.5).float()
    ts, g = scheduler.timesteps.tolist(), gen(4)
    x = torch.randn(z.shape, generator=g)
    for i, t in enumerate(ts):
        x = scheduler.step(tame(x, torch.full((2,), t)), t, x).prev_sample
        known = z
        if i < len(ts) - 1:
            known = scheduler.add_noise(z, torch.randn(z.shape, generator=g), torch.tensor([ts[i + 1]]))
        x = (1 - m) * known + m * x
    torch.testing.assert_close(inpaint.replace(S, tame, z, m, ts, gen(4)), x, atol=1e-4, rtol=0)


@given(st.integers(1, 4), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 8))
def test_known_latents_come_back_bit_for_bit(resample, eta, steps):
    z = torch.randn(2, 4, 6, 6, generator=gen())
    m = (torch.rand(2, 1, 6, 6, generator=gen(1)) > 0.5).float()
    calls = []

    def spy(x, t):
        calls.append(int(t[0]))
        return tame(x, t)

    ts = samplers.timesteps(1000, steps)
    out = inpaint.replace(S, spy, z, m, ts, gen(2), resample, eta)
    assert torch.equal(torch.where(m > 0, 0.0, out), torch.where(m > 0, 0.0, z))
    assert calls == [t for t in ts[:-1] for _ in range(resample)] + ts[-1:]                   # 末步不用来回


def test_renoise_composes_with_the_closed_form():
    """先加噪到 t'、再加噪到 t，与一步加噪到 t 同分布：信号系数相同，方差相加。"""
    t_next, t = 200, 500
    one, zero = torch.ones(1), torch.zeros(1)
    signal = inpaint.renoise(S, schedule.q_sample(S, one, t_next, zero), t_next, t, zero)
    first = inpaint.renoise(S, schedule.q_sample(S, zero, t_next, one), t_next, t, zero)
    second = inpaint.renoise(S, zero, t_next, t, one)
    torch.testing.assert_close(signal, schedule.q_sample(S, one, t, zero))
    torch.testing.assert_close((first**2 + second**2).sqrt(), schedule.q_sample(S, zero, t, one))


@pytest.mark.parametrize("resample", [0, -1, 1.5, True])
def test_bad_resample(resample):
    z = torch.zeros(1, 4, 6, 6)
    with pytest.raises(ValueError, match="resample 必须是不小于 1 的整数"):
        inpaint.replace(S, tame, z, torch.zeros(1, 1, 6, 6), [500, 100], gen(), resample)


@pytest.mark.parametrize("ts", [[], [1, 5], [1000, 3], [5, -1]])
def test_bad_path(ts):
    with pytest.raises(ValueError, match="步号序列"):
        inpaint.replace(S, tame, torch.zeros(1, 4, 6, 6), torch.zeros(1, 1, 6, 6), ts, gen())
