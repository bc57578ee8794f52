"""迷你 Stable Diffusion 的性质与坏输入：图形世界、判分器、CLIP、VAE、U-Net、训练循环、管线。"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minisd import clip, judge, pipeline, schedule, train, unet, vae, world
from minisd.muon import Muon, orthogonalize


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# ── 图形世界 ─────────────────────────────────────────────────────

def test_held_out_combinations_are_never_trained_but_every_pair_is():
    seen, held = {tuple(a) for a in world.SEEN.tolist()}, {tuple(a) for a in world.HELD_OUT.tolist()}
    assert len(held) == 15 and len(seen) == 135 and not seen & held
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(a[i], a[j]) for a in seen} == {(a[i], a[j]) for a in world.ALL.tolist()}
    drawn = world.sample(4000, gen()).attrs
    assert not held & {tuple(a) for a in drawn.tolist()}


def test_captions_follow_the_declared_proportions_and_match_the_attributes():
    attrs = torch.tensor([[0, 0, 0]]).repeat(4000, 1)
    counts = {}
    for text in world.captions(attrs, gen()):
        counts[text] = counts.get(text, 0) + 1
    want = {template.format(c="红", s="圆", p="左上"): share for template, share in world.TEMPLATES.items()}
    assert counts.keys() == want.keys()
    assert all(abs(counts[text] / 4000 - share) < 0.03 for text, share in want.items())
    assert world.caption((4, 2, 3)) == "紫色的三角在右下"
    assert len({world.caption(a) for a in world.ALL}) == 150


@given(st.integers(0, 4), st.integers(12, 48), st.floats(0.15, 0.3), st.floats(-3.2, 3.2))
def test_mask_is_a_coverage_fraction_that_scales_with_the_canvas(shape, size, radius, angle):
    args = torch.tensor([shape]), torch.tensor([[0.5, 0.5]]), torch.tensor([radius]), torch.tensor([angle])
    m = world.mask(*args, size)
    assert m.shape == (1, 1, size, size) and 0 <= m.min() and m.max() <= 1
    assert abs(m.mean() - judge.UNIT_AREA[shape] * radius**2) < 0.02      # 面积占比与画布大小、转角无关


def test_drawing_is_reproducible_and_bounded():
    a, b = world.sample(20, gen(3)), world.sample(20, gen(3))
    assert torch.equal(a.image, b.image) and torch.equal(a.attrs, b.attrs)
    assert a.image.abs().max() <= 1 and world.broad(50, gen()).abs().max() <= 1


@pytest.mark.parametrize("attrs", [[[6, 0, 0]], [[0, 5, 0]], [[0, 0, -1]], [[0, 0]], [[0.0, 0.0, 0.0]]])
def test_bad_attributes(attrs):
    with pytest.raises(ValueError, match="attrs|属性编号"):
        world.draw(torch.tensor(attrs), gen())


def test_canvas_must_be_large_enough():
    with pytest.raises(ValueError, match="12 像素"):
        world.draw(torch.tensor([[0, 0, 0]]), gen(), size=8)


# ── 判分器：对的判对，任何一种弄错都判错 ─────────────────────────────

@pytest.fixture(scope="module")
def scenes():
    return world.draw(world.ALL.repeat(4, 1), gen(1))


def test_judge_reads_every_real_scene(scenes):
    assert judge.score(scenes.image, scenes.attrs) == {"color": 1.0, "shape": 1.0, "place": 1.0, "all": 1.0}
    noisy = scenes.image + 0.05 * torch.randn(scenes.image.shape, generator=gen())
    assert judge.score(noisy, scenes.attrs)["all"] > 0.99


def test_judge_reads_larger_canvases():
    big = world.draw(world.ALL, gen(), size=32)
    assert judge.score(big.image, big.attrs)["all"] == 1


SPOILERS = {
    "打乱像素": lambda x: x.flatten(2)[:, :, torch.randperm(24 * 24, generator=gen())].view_as(x),
    "换通道": lambda x: x[:, [1, 2, 0]],
    "平移三分之一": lambda x: x.roll(8, 3),
    "反色": lambda x: -x,
    "全白": torch.ones_like,
    "纯噪声": lambda x: torch.randn(x.shape, generator=gen()),
    "糊掉": lambda x: nn.functional.avg_pool2d(x, 11, 1, 5, count_include_pad=False),
    "过饱和": lambda x: (x * 3).clamp(-1, 1),
    "只剩上半": lambda x: torch.cat([x[:, :, :12], torch.full_like(x[:, :, 12:], 0.8)], 2),
    "与下一张对换": lambda x: x.roll(1, 0),
    "叠两张": lambda x: torch.minimum(x, x.roll(1, 0)),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_judge_rejects_spoiled_scenes(scenes, name):
    score = judge.score(SPOILERS[name](scenes.image), scenes.attrs)
    assert score["all"] < {"过饱和": 0.35, "只剩上半": 0.45, "叠两张": 0.1}.get(name, 0.05), score


def test_each_attribute_is_judged_on_its_own(scenes):
    for column, name in enumerate(("color", "shape", "place")):
        wrong = scenes.attrs.clone()
        wrong[:, column] = (wrong[:, column] + 1) % 5
        score = judge.score(scenes.image, wrong)
        assert score.pop(name) < 0.2 and score.pop("all") < 0.2 and set(score.values()) == {1.0}


def test_unmentioned_attributes_do_not_count(scenes):
    attrs = scenes.attrs.clone()
    attrs[:, 0] = -1
    assert judge.score(scenes.image[:, [1, 2, 0]], attrs)["all"] > 0.99   # 颜色全错，但没人问颜色


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 24, 24), torch.zeros(3, 24, 24), torch.full((1, 3, 24, 24), torch.nan)])
def test_judge_rejects_bad_input(images):
    with pytest.raises(ValueError):
        judge.read(images)


def test_score_needs_one_row_of_attributes_per_image(scenes):
    with pytest.raises(ValueError, match="attrs 的形状"):
        judge.score(scenes.image[:3], scenes.attrs[:2])


def test_psnr():
    x = torch.zeros(1, 3, 4, 4)
    assert judge.psnr(x + 0.2, x) == pytest.approx(20, abs=1e-4)          # 20·log10(2 / 0.2)


# ── 文本编码器与 CLIP ───────────────────────────────────────────────

def test_tokenize_round_trips_and_pads():
    ids = clip.tokenize(["红色的圆在左上", ""])
    assert ids.shape == (2, clip.LENGTH)
    assert [*clip.CHARACTERS][ids[0, 1] - 3] == "红" and ids[0, 8] == clip.END and ids[0, 9:].eq(clip.PAD).all()
    assert ids[1, :2].tolist() == [clip.BEGIN, clip.END]
    for text in (world.caption(a, t) for a in world.ALL for t in world.TEMPLATES):
        assert "".join([*clip.CHARACTERS][i - 3] for i in clip.tokenize([text])[0] if i > 2) == text


@pytest.mark.parametrize("text, reason", [("橙色的圆", "词表外的字：橙"), ("red circle", "词表外的字：r"), ("红" * 11, "最多 10 个")])
def test_tokenize_refuses_what_it_cannot_represent(text, reason):
    with pytest.raises(ValueError, match=reason):
        clip.tokenize([text])


def test_text_features_ignore_padding_and_see_order():
    encoder = clip.TextEncoder().eval()
    h, valid = encoder(clip.tokenize(["红色的圆", "圆的色红"]))
    assert valid.sum(1).tolist() == [6, 6] and not torch.allclose(h[0, 5], h[1, 5], atol=1e-3)
    nn.init.constant_(encoder.token.weight.data[clip.PAD], 7.0)
    again, _ = encoder(clip.tokenize(["红色的圆", "圆的色红"]))
    assert torch.equal(h[valid], again[valid])


def test_image_encoder_checks_size():
    with pytest.raises(ValueError, match="24, 24"):
        clip.ImageEncoder()(torch.zeros(1, 3, 32, 32))


# ── VAE ────────────────────────────────────────────────────────

def test_latents_are_standardized_and_decode_back():
    model, x = vae.VAE().eval(), world.broad(64, gen())
    model.measure(x)
    z = model.to_latent(x)
    assert z.shape == (64, 4, 6, 6)
    assert z.mean((0, 2, 3)).abs().max() < 1e-4 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-4
    assert torch.allclose(model.to_image(z), model.decoder(model.encode(x)[0]), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 22, 24), (1, 3, 24, 25), (1, 1, 24, 24), (3, 24, 24)])
def test_vae_refuses_indivisible_sizes(shape):
    with pytest.raises(ValueError, match="4 的倍数"):
        vae.VAE().encode(torch.zeros(shape))


def test_vae_loss_is_reconstruction_plus_kl():
    model, x = vae.VAE().eval(), world.broad(8, gen())
    mean, log_var = model.encode(x)
    noise = torch.randn(mean.shape, generator=gen())
    out = model.decoder(mean + (log_var / 2).exp() * noise)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (log_var / 2).exp()), normal(0.0, 1.0)).mean()
    want = (out - x).square().mean() + 0.2 * (out - x).abs().mean() + 0.5 * kl
    torch.testing.assert_close(vae.vae_loss(model, x, noise, beta=0.5), want)


# ── U-Net ───────────────────────────────────────────────────────

@pytest.fixture
def inputs():
    text, valid = clip.TextEncoder()(clip.tokenize(["红色的圆在左上", "一个三角"]))
    return torch.randn(2, 4, 6, 6, generator=gen()), torch.tensor([0, 999]), text.detach(), valid


def awake(**options):
    """末层不为零的 U-Net：零输出的网络什么都验证不了。"""
    torch.manual_seed(0)
    net = unet.UNet(**options).eval()
    for p in net.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.05)
    return net


def test_unet_starts_at_zero_and_has_the_stated_size(inputs):
    net = unet.UNet()
    assert not net(*inputs).any()
    assert sum(p.numel() for p in net.parameters()) == 1_228_580


def test_unet_uses_time_text_and_nothing_from_padding(inputs):
    net, (x, t, text, valid) = awake(), inputs
    out = net(x, t, text, valid)
    assert out.shape == x.shape
    assert not torch.allclose(out, net(x, t.flip(0), text, valid), atol=1e-4)
    assert not torch.allclose(out, net(x, t, text.flip(0), valid.flip(0)), atol=1e-4)
    garbage = torch.where(valid[..., None], text, 100.0)
    assert torch.allclose(out, net(x, t, garbage, valid), atol=1e-5)


def test_samples_in_a_batch_do_not_affect_each_other(inputs):
    net = awake()
    assert torch.allclose(net(*inputs)[:1], net(*(a[:1] for a in inputs)), atol=1e-5)


def test_residuals_are_added_to_skips_and_middle(inputs):
    net = awake()
    cond, h, shapes = net.embed(*inputs[1:]), inputs[0], []
    for block in net.encoder:
        h = block(h, cond)
        shapes.append(h)
    zeros = [torch.zeros_like(s) for s in [*shapes, net.middle(h, cond)]]
    assert torch.equal(net(*inputs), net(*inputs, residuals=zeros))
    for k in range(len(zeros)):
        bumped = [z + (i == k) for i, z in enumerate(zeros)]
        assert not torch.allclose(net(*inputs), net(*inputs, residuals=bumped), atol=1e-4), k
    with pytest.raises(ValueError, match="residuals 必须有 5 个"):
        net(*inputs, residuals=zeros[1:])


def test_controlnet_attaches_to_this_unet_and_starts_as_identity(inputs):
    from minisd.controlnet import Controlled, ControlNet, HintEncoder

    net = awake()
    control = ControlNet(net, HintEncoder(1, net.encoder[0].out_channels, down=2))
    hint = torch.rand(2, 1, 24, 24, generator=gen())
    assert torch.equal(net(*inputs), Controlled(net, control)(*inputs, hints=[hint]))


def test_wide_input_for_inpainting(inputs):
    x, *rest = inputs
    net = awake(in_channels=9)
    assert net(torch.cat([x, x, x[:, :1]], 1), *rest).shape == x.shape
    with pytest.raises(ValueError, match="9, H, W"):
        net(*inputs)


def test_unet_refuses_indivisible_sizes(inputs):
    with pytest.raises(ValueError, match="2 的倍数"):
        unet.UNet()(inputs[0][:, :, :5], *inputs[1:])


# ── 训练循环 ─────────────────────────────────────────────────────

def regression(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))

    def loss(generator):
        x = torch.randn(16, 3, generator=generator)
        return (model(x) - x.prod(1, keepdim=True)).square().mean()

    return model, loss


OPTIMIZERS = {"adamw": lambda m: train.adamw(m, 1e-2), "muon": lambda m: train.muon(m, 0.02, 1e-2)}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resuming_is_bitwise_identical_to_one_go(kind, tmp_path):
    class Killed(Exception):
        pass

    def stop_at(step):
        def watch(k, _):
            if k == step:
                raise Killed
        return watch

    def run(watch=None, resume=None):
        model, loss = regression()
        ema = train.EMA(model)
        losses = train.fit(model, loss, 60, OPTIMIZERS[kind](model), generator=gen(5), ema=ema, resume=resume, save_every=20, watch=watch)
        return losses, [*model.state_dict().values(), *ema.model.state_dict().values()]

    whole, weights = run()
    path = tmp_path / "state.pt"
    with pytest.raises(Killed):
        run(stop_at(47), path)
    resumed, again = run(None, path)
    assert torch.equal(whole, resumed) and all(map(torch.equal, weights, again))
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]            # 没有半写的文件


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_unusable_checkpoint(content, tmp_path):
    path = tmp_path / "state.pt"
    if content is None:
        torch.save({"losses": [0.0] * 99}, path)
    else:
        path.write_bytes(content)
    model, loss = regression()
    with pytest.raises(ValueError, match="检查点 .* 不能用"):
        train.fit(model, loss, 10, train.adamw(model, 1e-2), resume=path)


def test_nan_loss_stops_training():
    model, loss = regression()
    with pytest.raises(FloatingPointError, match="第 0 步的损失是 nan"):
        train.fit(model, lambda g: loss(g) * torch.nan, 5, train.adamw(model, 1e-2))


def test_training_learns_and_schedules():
    for make in OPTIMIZERS.values():
        model, loss = regression()
        losses = train.fit(model, loss, 300, make(model))
        assert losses[-50:].mean() < 0.5 * losses[:50].mean()
    assert train.warmup_cosine(0, 1000) == pytest.approx(1 / 50, rel=1e-3)
    assert train.warmup_cosine(49, 1000) == pytest.approx(1, abs=0.01)
    assert train.warmup_cosine(1000, 1000) == pytest.approx(0.02)


def test_ema_tracks_a_constant_and_averages_an_oscillation():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = train.EMA(model, decay=0.99)
    for k in range(2000):
        nn.init.constant_(model.weight, 3.0 + (-1) ** k)
        ema.update(model)
    assert ema.model.weight.item() == pytest.approx(3.0, abs=0.02)


def test_orthogonalize_keeps_directions_and_flattens_singular_values():
    for shape in ((8, 8), (4, 20), (20, 4)):
        g = torch.randn(shape, generator=gen(), dtype=torch.float64)
        u, _, v = torch.linalg.svd(g, full_matrices=False)
        core = u.T @ orthogonalize(g) @ v.T
        assert (core - core.diag().diag()).abs().max() < 1e-6              # 只动奇异值，不动方向
        assert 0.5 < core.diag().min() and core.diag().max() < 1.3


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="矩阵与卷积核"):
        Muon([torch.zeros(3, requires_grad=True)])


# ── 管线 ────────────────────────────────────────────────────────

@pytest.fixture
def sd():
    return pipeline.StableDiffusion(clip.TextEncoder().eval(), vae.VAE().eval(), awake(), schedule.cosine())


def test_pipeline_is_deterministic_and_guidance_one_is_conditional(sd):
    prompts = ["红色的圆在左上", "一个三角"]
    a, b = (sd(prompts, gen(1), steps=3) for _ in range(2))
    assert a.shape == (2, 3, 24, 24) and torch.equal(a, b)
    x, t = sd.noise(2, gen()), torch.tensor([500, 500])
    c = sd.denoiser(prompts, 1.0)(x, t)
    assert torch.allclose(c, sd.unet(x, t, *sd.encode(prompts)), atol=1e-5)
    v0, v3 = sd.unconditional(2)(x, t), sd.denoiser(prompts, 3.0)(x, t)
    assert torch.allclose(v3, v0 + 3 * (c - v0), atol=1e-5)
    assert torch.allclose(sd.denoiser(prompts, 0.0, negative=prompts)(x, t), c, atol=1e-5)


@pytest.mark.parametrize("options, reason", [
    ({"prompts": ["红色的圆", ""]}, "第 .1. 条描述是空的"),
    ({"prompts": ["橙色的圆"]}, "词表外的字：橙"),
    ({"prompts": ["一个圆"], "steps": 1001}, "1 到训练步数"),
    ({"prompts": ["一个圆"], "steps": 0}, "1 到训练步数"),
    ({"prompts": ["一个圆"], "method": "euler"}, "采样方法"),
])
def test_pipeline_bad_input(sd, options, reason):
    with pytest.raises(ValueError, match=reason):
        sd(**{"generator": gen(), "steps": 2} | options)


def test_pipeline_refuses_broken_networks_and_sizes(sd):
    with pytest.raises(ValueError, match="8 的倍数"):
        sd.noise(1, gen(), size=20)
    nn.init.constant_(sd.unet.out.bias, torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        sd(["一个圆"], gen(), steps=2)


def test_weights_round_trip_in_half_precision(tmp_path):
    model = vae.VAE()
    model.measure(world.broad(16, gen()))
    pipeline.save_weights(model, tmp_path / "vae.safetensors")
    again = pipeline.load_weights(vae.VAE(), tmp_path / "vae.safetensors")
    for a, b in zip(model.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a.half().float(), b)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert (tmp_path / "vae.safetensors").stat().st_size < 2.1 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("damage, reason", [
    (lambda b: b"", "读不出"), (lambda b: b[: len(b) // 2], "读不出"), (lambda b: b"\0" * len(b), "读不出"),
])
def test_damaged_weights(tmp_path, damage, reason):
    path = tmp_path / "w.safetensors"
    pipeline.save_weights(vae.VAE(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=reason):
        pipeline.load_weights(vae.VAE(), path)


def test_mismatched_missing_and_nan_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    pipeline.save_weights(vae.VAE(), path)
    with pytest.raises(ValueError, match="与 UNet 对不上"):
        pipeline.load_weights(unet.UNet(), path)
    with pytest.raises(ValueError, match="读不出"):
        pipeline.load_weights(vae.VAE(), tmp_path / "none.safetensors")
    broken = vae.VAE()
    nn.init.constant_(broken.decoder[0].bias, torch.inf)
    pipeline.save_weights(broken, path)
    with pytest.raises(ValueError, match="NaN 或无穷大：decoder.0.bias"):
        pipeline.load_weights(vae.VAE(), path)
