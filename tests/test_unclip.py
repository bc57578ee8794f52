"""微条件、迷你 unCLIP、U-Net 参数量：步 0 等于基座、与 diffusers 对照、坏输入。"""

import pytest
import torch
from torch.nn import functional as F

from minisd import clip, micro, pipeline, samplers, schedule, unclip, unet, unet_size, vae


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def sd():
    torch.manual_seed(0)
    net = unet.UNet()
    for p in net.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return pipeline.StableDiffusion(clip.TextEncoder().eval(), vae.VAE().eval(), net.eval())


@pytest.fixture
def batch(sd):
    text, valid = sd.encode(["红色的圆在左上", "蓝色的方块", "一个星星", "星星在中间"])
    return torch.randn(4, 4, 6, 6, generator=gen()), torch.tensor([3, 200, 600, 990]), text, valid


def units(n, dim=64, seed=0):
    return F.normalize(torch.randn(n, dim, generator=gen(seed)), dim=1)


# ── 参数量 ───────────────────────────────────────────────────────

def reference(channels, depths, middle, context, extra=0):
    """同样配置的 diffusers U-Net，只建在 meta 设备上，不占内存。"""
    diffusers = pytest.importorskip("diffusers")
    down = [f"{'CrossAttn' if d else ''}DownBlock2D" for d in depths]
    up = [f"{'CrossAttn' if d else ''}UpBlock2D" for d in depths[::-1]]
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": extra}
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(
            block_out_channels=channels, down_block_types=tuple(down), up_block_types=tuple(up), layers_per_block=2,
            cross_attention_dim=context, attention_head_dim=8, use_linear_projection=bool(extra),
            transformer_layers_per_block=[max(d, 1) for d in depths[:-1]] + [middle], **(added if extra else {}),
        )


@pytest.mark.parametrize("config", [
    unet_size.SD15, unet_size.SDXL,
    {"channels": (32, 64), "depths": (1, 2), "middle": 2, "context": 24},
    {"channels": (64, 64, 96), "depths": (0, 1, 3), "middle": 3, "context": 40, "extra": 288},
])
def test_parameters_match_diffusers(config):
    parts = unet_size.unet_parameters(**config)
    net = reference(**config)
    assert sum(parts.values()) == sum(p.numel() for p in net.parameters())
    text = sum(p.numel() for n, p in net.named_parameters() if "attentions" in n)
    res = sum(p.numel() for n, p in net.named_parameters() if "resnets" in n)
    assert parts["transformer"] == text and parts["resblock"] == res


def test_published_sizes():
    assert sum(unet_size.unet_parameters(**unet_size.SD15).values()) == 859_520_964
    assert sum(unet_size.unet_parameters(**unet_size.SDXL).values()) == 2_567_463_684


def test_bad_size():
    with pytest.raises(ValueError, match="一样长"):
        unet_size.unet_parameters((320, 640), (1,), 1, 768)


# ── 微条件 ───────────────────────────────────────────────────────

def test_micro_starts_identical_then_has_gradients_everywhere(sd, batch):
    net = micro.add_micro(sd.unet, 2)
    c = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 3.0], [5.0, 5.0]])
    out = net(*batch, image=c)
    assert torch.equal(out, sd.unet(*batch))
    out.square().sum().backward()
    first, last = net.embed.micro[0], net.embed.micro[2]
    assert last.weight.grad.abs().max() > 0 and (first.weight.grad == 0).all()     # 末层先动
    with torch.no_grad():
        last.weight -= 0.01 * last.weight.grad
    assert not torch.equal(net(*batch, image=c), net(*batch, image=c.flip(1)))     # 上与左是两个不同的条件
    assert type(sd.unet.embed) is unet.Embed                                       # 原来的网络没动


def test_micro_features_are_the_sdxl_ones():
    """各标量各自展开再拼：与 diffusers 的 Timesteps(flip_sin_to_cos=True, downscale_freq_shift=0) 逐元素。"""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    c = torch.tensor([[1024.0, 768.0, 0.0, 12.0, 1024.0, 1024.0], [512.0, 512.0, 3.0, 0.0, 1024.0, 896.0]])
    theirs = embeddings.Timesteps(256, True, 0)(c.flatten()).reshape(2, -1)
    torch.testing.assert_close(unet.time_features(c.flatten(), 256).view(2, -1), theirs, atol=1e-4, rtol=0)


def test_micro_repeats_for_guidance(sd, batch):
    net = micro.add_micro(sd.unet, 2)
    torch.nn.init.normal_(net.embed.micro[2].weight)
    c = torch.tensor([[0.0, 8.0], [4.0, 1.0]])
    assert torch.equal(net(*batch, image=c), net(*batch, image=torch.cat([c, c])))


@pytest.mark.parametrize("c", [None, torch.zeros(4, 3), torch.zeros(3, 2), torch.zeros(4)])
def test_bad_micro(sd, batch, c):
    with pytest.raises(ValueError, match="微条件的形状"):
        micro.add_micro(sd.unet, 2)(*batch, image=c)


# ── unCLIP ──────────────────────────────────────────────────────

def test_decoder_starts_identical_and_zero_means_unconditional(sd, batch):
    net = unclip.decoder_from(sd.unet, 64)
    assert torch.equal(net(*batch, image=units(4)), sd.unet(*batch))
    torch.nn.init.normal_(net.embed.project.weight)
    assert not torch.equal(net(*batch, image=units(4)), sd.unet(*batch))
    assert torch.equal(net(*batch, image=torch.zeros(4, 64)), net(*batch))         # 零向量 = 没有图像条件
    assert type(sd.unet.embed) is unet.Embed


def test_drop_hits_whole_vectors_at_the_given_rate():
    z = unclip.drop(units(4000), 0.1, gen(1))
    gone = (z == 0).all(1)
    assert abs(gone.float().mean() - 0.1) < 0.02 and torch.allclose(z[~gone].norm(dim=1), torch.ones(1))


def test_decode_is_guidance_around_the_zero_vector(sd):
    net = unclip.decoder_from(sd.unet, 64)
    torch.nn.init.normal_(net.embed.project.weight, std=0.1)
    z, text = units(3), sd.encode([""] * 3)

    def denoise(x, t):
        v, v0 = net(x, t, *text, image=z), net(x, t, *text)
        return v0 + 3.0 * (v - v0)

    want = sd.vae.to_image(samplers.sample(sd.schedule, denoise, sd.noise(3, gen(2)), 4))
    torch.testing.assert_close(unclip.decode(sd, net, z, gen(2), guidance=3.0, steps=4), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("z", [torch.zeros(2, 64), 2 * units(2), units(2)[0]])
def test_decode_wants_unit_vectors(sd, z):
    with pytest.raises(ValueError, match="单位向量"):
        unclip.decode(sd, unclip.decoder_from(sd.unet, 64), z, gen())


def test_prior_samples_are_unit_and_best_of_k():
    torch.manual_seed(0)
    s, prior, z_text = schedule.cosine(), unclip.Prior(16, width=32), units(5, 16)
    prior.measure(units(200, 16, seed=3))
    picked = prior.sample(s, z_text, gen(4), steps=3, candidates=4)
    assert torch.allclose(picked.norm(dim=1), torch.ones(5))
    g, every = gen(4), []
    for _ in range(4):                                                             # 同一串噪声，逐个采
        every.append(prior.sample(s, z_text, g, steps=3, candidates=1))
    dots = torch.stack([(e * z_text).sum(1) for e in every])
    torch.testing.assert_close((picked * z_text).sum(1), dots.max(0).values)
    assert (dots.max(0).values > dots.min(0).values).all()


def test_prior_standardizes():
    prior, z = unclip.Prior(16), units(500, 16)
    prior.measure(z)
    x = (z - prior.center) / prior.scale
    assert x.mean(0).abs().max() < 1e-5 and abs(x.std() - 1) < 0.01


def test_prior_loss_is_the_plain_regression_onto_the_clean_vector():
    """恒输出 c 的先验：损失就是 ‖c - x0‖² 的平均，与噪声无关。"""
    prior, z, z_text = unclip.Prior(16), units(8, 16), units(8, 16, seed=2)
    prior.measure(units(500, 16, seed=5))
    torch.nn.init.zeros_(prior.leave.weight)
    x0 = (z - prior.center) / prior.scale
    loss = unclip.prior_loss(prior, schedule.cosine(), z, z_text, gen())
    torch.testing.assert_close(loss, (prior.leave.bias - x0).square().mean())
