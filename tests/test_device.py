"""有 GPU 时示例会用上它：在假 GPU 上证明库与示例不会因设备不一致而崩，换设备也不换噪声。"""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import pretend_gpu
import zhixing
from minisd import clip, concat, controlnet, dreambooth, guidance, img2img, inpaint, ip_adapter, latents, lora
from minisd import micro, mimicbrush, pipeline, samplers, train, unclip, unet, vae, world

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPTS = ["红色的圆在左上", "一个星星"]


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def cuda():
    with pretend_gpu.gpu():
        yield "cuda"


def fresh():
    """随机权重的三件套；U-Net 末层从零开始，给它一点东西可画。"""
    torch.manual_seed(0)
    net = unet.UNet(widths=(16, 24))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return pipeline.StableDiffusion(clip.TextEncoder(), vae.VAE(widths=(16, 16)), net)


# ── 假 GPU 本身：该红的都红 ──────────────────────────────────────

def test_mixing_devices_is_an_error(cuda):
    x, y = torch.ones(2, 3, device=cuda), torch.ones(2, 3)
    layer = torch.nn.Linear(3, 3).to(cuda)
    index = torch.tensor([0], device=cuda)
    for wrong in (
        lambda: x + y, lambda: y @ x.T, lambda: torch.cat([x, y]), lambda: y.add_(x), lambda: y.mul_(x.sum()), lambda: layer(y),
        lambda: torch.where(y > 0, x, 0.0), lambda: y[index], lambda: y.index_add_(0, index, x[:1]), lambda: x.masked_fill_(y > 0, 0),
    ):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    for right in (x + torch.tensor(1.0), x[torch.tensor([1, 0])], x.to(y) + y, y.to(x) + x, x.cpu() + y, layer(x), x * 2):
        assert right.shape[0] == 2
    assert (x + torch.tensor(1.0)).device.type == "cuda" and x.cpu().device.type == "cpu" == y.device.type
    y.copy_(2 * x)                                                     # 拷贝可以跨设备
    assert y.sum() == 12 and (y.to(cuda) + x).device.type == "cuda"


def test_generators_numpy_and_plots_refuse_the_wrong_device(cuda):
    for wrong in (lambda: torch.randn(2, generator=gen(), device=cuda), lambda: torch.zeros(2, device=cuda).normal_(generator=gen())):
        with pytest.raises(RuntimeError, match="generator"):
            wrong()
    x, (_, ax) = torch.ones(3, device=cuda), plt.subplots()
    for wrong in (x.numpy, lambda: ax.plot(x), lambda: ax.imshow(torch.ones(2, 2, device=cuda)), lambda: ax.scatter(x, x)):
        with pytest.raises(TypeError, match="cuda"):
            wrong()
    plt.close("all")
    assert torch.cuda.is_available() and x.tolist() == [1, 1, 1] and f"{x.sum():.1f}" == "3.0"


def test_gradients_cross_devices(cuda):
    leaf = torch.ones(3, requires_grad=True)
    (leaf.to(cuda) ** 2).cpu().sum().backward()
    assert leaf.grad.tolist() == [2, 2, 2] and leaf.grad.device.type == "cpu"


def test_the_pretence_ends_with_the_context():
    with pretend_gpu.gpu():
        pass
    assert not torch.cuda.is_available() or torch.version.cuda
    assert not torch.__future__.get_overwrite_module_params_on_conversion()


# ── 库：两边画得一模一样 ─────────────────────────────────────────

def everything(device):
    """库里的每种做法各走两步，返回 {名字: CPU 上的结果}；噪声都来自 CPU 的生成器。"""
    sd = fresh().to(device)
    pictures = world.sample(2, gen(1)).image.to(device)
    mask = torch.zeros(2, 1, 24, 24)
    mask[:, :, :12] = 1
    out = {method: sd(PROMPTS, gen(), steps=3, method=method) for method in ("ddim", "dpm++", "pndm")}
    cond, null = sd.encode(PROMPTS), sd.encode(["", ""])
    z = sd.noise(2, gen(2))

    def walk(denoise, **options):
        return samplers.sample(sd.schedule, denoise, z, 2, **options)

    with torch.no_grad():
        latent = sd.vae.to_latent(pictures)
        out["ddpm"] = walk(sd.denoiser(PROMPTS), method="ddim", eta=1.0, generator=gen(3))
        out["guided"] = walk(guidance.guided(lambda x, t, c: sd.unet(x, t, *c), cond, null, 2.0))
        out["invert"] = samplers.invert(sd.schedule, sd.denoiser(PROMPTS, 1), latent, 2, refine=1)
        out["img2img"] = img2img.img2img(sd, pictures, PROMPTS, 0.5, gen(), steps=4)
        m = inpaint.latent_mask(mask.to(device))
        out["repaint"] = inpaint.replace(sd.schedule, sd.denoiser(PROMPTS), latent, m, [900, 400], gen(), resample=2, eta=1.0)
        nine = concat.Concat(concat.widen(sd.unet, 5), inpaint.condition(sd.vae, pictures, mask.to(device)))
        out["concat"] = walk(lambda x, t: nine(x, t, *cond))
        control = controlnet.ControlNet(sd.unet, controlnet.HintEncoder(1, 16, down=2)).to(device)
        both = controlnet.Controlled(sd.unet, control)
        hint = controlnet.edges(mask).to(device)
        out["controlnet"] = walk(lambda x, t: both(x, t, *cond, hints=[hint]))
        torch.manual_seed(1)
        adapter = ip_adapter.add_ip_adapter(sd.unet)
        vector = ip_adapter.with_null(torch.ones(2, 64, device=device))
        out["ip_adapter"] = walk(pipeline.StableDiffusion(sd.text_encoder, sd.vae, adapter).denoiser(PROMPTS, image=vector))
        told = micro.add_micro(sd.unet, 2)
        out["micro"] = walk(lambda x, t: told(x, t, *cond, image=torch.zeros(2, 2, device=device)))
        mimic = mimicbrush.Mimic(sd.unet, sd.unet)
        mimic.read(latent, *null, seen=torch.tensor([True, False]))
        out["mimicbrush"] = walk(lambda x, t: mimic(x, t, *cond))
        unit = torch.nn.functional.normalize(torch.ones(2, 64, device=device), dim=1)
        out["unclip"] = unclip.decode(sd, unclip.decoder_from(sd.unet, 64), unit, gen(), steps=2)
        out["prior"] = unclip.Prior(64).to(device).sample(sd.schedule, unit, gen(), steps=2)
        tuned = fresh().to(device).unet
        lora.add_lora(tuned, ["to_q", "ff.0"], 2)
        for layer in lora.lora_layers(tuned).values():
            layer.B.fill_(0.1)
        out["lora"] = walk(lambda x, t: tuned(x, t, *cond))
        merged = lora.merge_and_unload(tuned)
        out["merged"] = walk(lambda x, t: merged(x, t, *cond))
    return {name: value.detach().cpu() for name, value in out.items()}


def test_every_sampler_and_adapter_gives_the_same_picture_on_either_device():
    want = everything("cpu")
    with pretend_gpu.gpu():
        got = everything("cuda")
    for name, value in want.items():
        assert torch.allclose(got[name], value, atol=1e-4), name       # 同一个 CPU 在算，只差内存排布带来的舍入


def learn(device, directory):
    """训三步扩散模型（Muon、EMA、断点）与三步 DreamBooth，返回损失。"""
    sd = fresh().to(device)
    data = latents.LatentData(sd, world.sample(8, gen(1)))
    net = sd.unet.to(memory_format=torch.channels_last)
    ema = train.EMA(net)

    def loss_fn(generator):
        x0, text, valid = data.batch(4, generator)
        return latents.diffusion_loss(lambda x, t: net(x, t, text, valid), sd.schedule, x0, generator)

    losses = []
    for steps in (2, 3):                                               # 第二次从断点接着训
        optimizers = train.muon(net, 0.02, 2e-3)
        losses = train.fit(net, loss_fn, steps, optimizers, generator=gen(), ema=ema, resume=directory / f"{device}.pt", save_every=1)
    pipeline.save_weights(ema.model, directory / f"{device}.safetensors")
    encoder = dreambooth.add_identifier(sd.text_encoder, "犇")
    encoder.token.row.requires_grad_(True)
    personal = pipeline.StableDiffusion(encoder, sd.vae, net)
    instances = dreambooth.subject(torch.arange(2), gen(5))
    pair = sd.vae.to_latent(instances.image.to(device)).detach(), ["一个犇圆"] * 2
    prior = dreambooth.class_latents(sd, ["一个圆"] * 2, gen(6), steps=2), ["一个圆"] * 2
    objective = dreambooth.objective(personal, pair, prior, batch=2)
    return torch.cat([losses, train.fit(net, objective, 3, train.adamw(net, 1e-3), generator=gen())])


def test_training_resuming_and_saving_work_on_the_gpu(tmp_path):
    want = learn("cpu", tmp_path)
    with pretend_gpu.gpu():
        got = learn("cuda", tmp_path)
    assert torch.allclose(got, want, rtol=1e-3), (got, want)
    loaded = [pipeline.load_weights(unet.UNet(widths=(16, 24)), tmp_path / f"{d}.safetensors") for d in ("cpu", "cuda")]
    assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(*(m.state_dict().values() for m in loaded)))


# ── 示例 ─────────────────────────────────────────────────────────

SAMPLES = sorted(EXAMPLES.glob("*.py"))
NETWORKS = re.compile(r"unet\.UNet\(|clip\.CLIP\(|vae\.VAE\(|StableDiffusion|nn\.Conv2d|load_base")


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_examples_use_the_gpu_or_say_why_not(path):
    source = path.read_text("utf-8")
    if NETWORKS.search(source):
        uses = 'device = "cuda" if torch.cuda.is_available() else "cpu"' in source
        assert uses or re.search(r"预计耗时与内存.*有 GPU 也(用 CPU|不用)", source)


@pytest.mark.parametrize("name", ["clip", "vae"])
def test_the_examples_without_inputs_run_through_on_the_gpu(name, cuda, tmp_path, monkeypatch):
    source = (EXAMPLES / f"{name}.py").read_text("utf-8")
    short, count = re.subn(r"(SEED, STEPS, BATCH = 0), \d+, \d+", r"\1, 2, 16", source)
    short = short.replace("12_000", "400").replace("data[:4000]", "data[:400]")
    assert count == 1 and "12_000" in source
    monkeypatch.setattr(zhixing, "output_path", lambda name: tmp_path / name)
    monkeypatch.setattr(zhixing, "scratch_path", lambda: tmp_path)
    monkeypatch.setattr(zhixing, "metric", lambda name, value: float(value))
    monkeypatch.setattr(zhixing, "figure", lambda name, fig: None)
    exec(compile(short, str(EXAMPLES / f"{name}.py"), "exec", optimize=1), {"__name__": "__main__"})     # 只训两步：不查训练质量的断言
    plt.close("all")
    assert (tmp_path / f"{name}.safetensors").is_file()
