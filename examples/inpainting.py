# ---
# zhixing:
#   id: inpainting
#   title: 修复与超分：把条件拼在输入通道上
#   needs: [clip, vae, base]
#   timeout: 900
# ---

# %% [markdown]
# 同一个迷你 Stable Diffusion 基座。修复比四种做法：文生图再贴、每步替换、替换并来回、9 通道微调；超分把低清图拼在输入上。
#
# **预计耗时与内存**：单线程、机器空闲时约一分钟，峰值内存约 0.5 GB。

# %%
import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

import zhixing
from minisd import concat, inpaint, judge, latents, pipeline, samplers, train, world
from minisd.gallery import show

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False                         # GPU 上卷积也用完整的单精度，下面才对得上
paths = [zhixing.input_path(p) for p in ("clip/clip.safetensors", "vae/vae.safetensors", "base/unet.safetensors")]
sd = pipeline.StableDiffusion.load(*paths).to(device)


def gen(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## 修复：9 通道
#
# 把基座的输入卷积加宽 5 个通道（掩码 1、被遮图的潜变量 4），新通道从零开始。步数很少，所以把拼上去的条件放大 16 倍，相当于给新通道更大的学习率。掩码是对齐到格子的随机矩形，一成全遮。

# %%
BOOST, BATCH, INPAINT_STEPS = 16, 32, 260


def rectangles(n, g):
    """随机矩形掩码 (n, 1, 24, 24)，对齐到 4 像素的格子；一成全遮。"""
    top, left = torch.randint(0, 5, (2, n), generator=g)
    height, width = torch.randint(2, 7, (2, n), generator=g)
    r = torch.arange(6)
    rows = (r >= top[:, None]) & (r < (top + height)[:, None])                    # (n, 6)
    columns = (r >= left[:, None]) & (r < (left + width)[:, None])
    m = rows[:, :, None] & columns[:, None, :]
    m[torch.rand(n, generator=g) < 0.1] = True
    return F.interpolate(m[:, None].float(), scale_factor=4)


def condition(images, mask):
    """掩码与被遮图的潜变量，5 个通道。"""
    return inpaint.condition(sd.vae, images.to(device), mask.to(device))


scenes = world.sample(3000, gen(11))
data = latents.LatentData(sd, scenes)
masks = rectangles(len(scenes.image), gen(12))
extra = torch.cat([condition(x, m) for x, m in zip(scenes.image.split(500), masks.split(500))])


def finetune(extra, steps, silent):
    """加宽基座并微调；silent 是不给文字的比例。→ (EMA 权重的网络, 损失)"""
    net = concat.widen(sd.unet, extra.shape[1])
    average = train.EMA(net, 0.98)

    def loss(g):
        i = torch.randint(len(extra), (BATCH,), generator=g)
        template = torch.multinomial(data.share, BATCH, replacement=True, generator=g)
        row = torch.where(torch.rand(BATCH, generator=g) < silent, 0, data.rows[i, template])
        c = BOOST * extra[i]
        return latents.diffusion_loss(
            lambda x, t: net(torch.cat([x, c], 1), t, data.text[row], data.valid[row]), sd.schedule, data.latent[i], g
        )

    losses = train.fit(net, loss, steps, train.muon(net, 0.01, 2e-3), generator=gen(0), ema=average)
    return average.model, losses


c = torch.randn(4, 5, 6, 6, generator=gen(0)).to(device)
x, t, (text, valid) = sd.noise(4, gen(1)), torch.tensor([10, 300, 700, 990], device=device), sd.encode(world.captions(world.ALL[:4]))
wide = concat.Concat(concat.widen(sd.unet, 5), c)
assert torch.allclose(wide(x, t, text, valid), sd.unet(x, t, text, valid), atol=1e-4)      # 步 0：与基座相同

nine, losses = finetune(extra, INPAINT_STEPS, 0.3)
zhixing.metric("inpaint_steps", INPAINT_STEPS)
zhixing.metric("boost", BOOST)
fig, ax = plt.subplots(figsize=(6, 2.6))
ax.plot(losses, lw=0.5, alpha=0.5)
ax.plot(range(19, INPAINT_STEPS), losses.unfold(0, 20, 1).mean(1), color="C0")
ax.set(xlabel="步数", ylabel="v 的均方误差", ylim=(0, None))
zhixing.figure("loss", fig)

# %% [markdown]
# ## 修复：四种做法
#
# 图形的左半或右半被遮住，提示词只说形状。颜色、位置、大小都要从露出的一半看出来。

# %%
M, RESAMPLE, WALK = 48, 4, 12
test = world.sample(M, gen(77), world.ALL)
middle = (world.CENTERS[test.attrs[:, 2], 0] * 6).round()[:, None]                # 图形中心所在的格线
right = torch.rand(M, 1, generator=gen(8)) < 0.5
columns = torch.where(right, torch.arange(6) >= middle, torch.arange(6) < middle)
half = F.interpolate(columns[:, None, None].expand(-1, 1, 6, -1).float(), scale_factor=4)
prompts = [f"一个{world.SHAPES[a[1]]}" for a in test.attrs]
ts = samplers.timesteps(len(sd.schedule), WALK)
calls = {}                                                                        # 做法 → 问了几次网络


def count(name, denoise):
    def ask(x, t):
        calls[name] = calls.get(name, 0) + 1
        return denoise(x, t)
    return ask


def by_replacing(name, texts, mask, resample):
    denoise = count(name, sd.denoiser(texts))
    z = sd.vae.to_latent(test.image.to(device))
    m = inpaint.latent_mask(mask.to(device))
    out = inpaint.replace(sd.schedule, denoise, z, m, ts, gen(5), resample, eta=1.0)
    assert torch.equal(out * (1 - m), z * (1 - m))                                # 已知的潜变量逐位不变
    return sd.vae.to_image(out).cpu()


def by_nine(name, texts, mask):
    net = concat.Concat(nine, BOOST * condition(test.image, mask))
    denoise = count(name, pipeline.StableDiffusion(sd.text_encoder, sd.vae, net).denoiser(texts))
    return sd.vae.to_image(samplers.sample(sd.schedule, denoise, sd.noise(M, gen(5)), WALK)).cpu()


drawn = {
    "text": sd.vae.to_image(samplers.sample(sd.schedule, count("text", sd.denoiser(prompts)), sd.noise(M, gen(5)), WALK)).cpu(),
    "replace": by_replacing("replace", prompts, half, 1),
    "repaint": by_replacing("repaint", prompts, half, RESAMPLE),
    "nine": by_nine("nine", prompts, half),
}
iou, right_all, pasted = {}, {}, {}
for name, image in drawn.items():
    pasted[name] = inpaint.paste(test.image, image, half)
    assert torch.equal(pasted[name] * (1 - half), test.image * (1 - half))        # 贴回之后掩码外逐像素相同
    iou[name] = judge.soft_iou(judge.read(pasted[name]).mask, test.mask).mean().item()
    right_all[name] = judge.score(pasted[name], test.attrs)["all"]
    zhixing.metric(f"{name}_all", right_all[name])
    zhixing.metric(f"{name}_iou", iou[name])
    zhixing.metric(f"{name}_psnr", judge.psnr(image * (1 - half), test.image * (1 - half)))
    zhixing.metric(f"calls_{name}", calls[name])
zhixing.metric("inpaint_images", M)
zhixing.metric("resample", RESAMPLE)
assert iou["text"] + 0.2 < iou["replace"] < iou["repaint"], iou
assert iou["nine"] > iou["text"] + 0.3, iou                                      # 9 通道确实看得见露出的一半
for other in ("replace", "repaint"):
    zhixing.metric(f"nine_vs_{other}", "高于" if right_all["nine"] > right_all[other] else "还不如")
print({name: (round(iou[name], 3), round(right_all[name], 3), calls[name]) for name in drawn})

hidden = torch.where(half > 0, 0.0, test.image)
fig, axes = plt.subplots(6, 9, figsize=(8.2, 5.4))
titles = {"text": "文生图再贴", "replace": "每步替换", "repaint": f"来回 {RESAMPLE} 遍", "nine": "9 通道"}
show(axes[0], hidden, "遮住的")
for line, (name, title) in zip(axes[1:], titles.items()):
    show(line, pasted[name], title)
show(axes[5], test.image, "原图")
zhixing.figure("inpaint", fig)

# %% [markdown]
# 再换一个任务：整个图形都遮住，换成另一种颜色、另一种形状，位置不变。

# %%
other = (test.attrs + torch.tensor([2, 1, 0])) % torch.tensor([6, 5, 5])
place = world.CENTERS[test.attrs[:, 2]] * 6
cells = torch.arange(6) + 0.5
box = ((cells - place[:, 1:]).abs() < 2.3)[:, :, None] & ((cells - place[:, :1]).abs() < 2.3)[:, None, :]
box = F.interpolate(box[:, None].float(), scale_factor=4)
for name, image in {
    "swap_replace": by_replacing("swap", world.captions(other), box, 1),
    "swap_nine": by_nine("swap", world.captions(other), box),
}.items():
    score = judge.score(inpaint.paste(test.image, image, box), other)["all"]
    zhixing.metric(name, score)
    assert score > 0.9, (name, score)

# %% [markdown]
# ## 超分：拼低清图
#
# 24×24 平均池化成 6×6×3，与潜变量同大，拼成 7 个通道。不给文字。

# %%
SR_STEPS = 140
low = F.avg_pool2d(scenes.image, 4)                                               # (N, 3, 6, 6)
upscaler, _ = finetune(low.to(device), SR_STEPS, 1.0)
small = F.avg_pool2d(test.image, 4)
net = concat.Concat(upscaler, BOOST * small.to(device))
silence = sd.encode([""] * M)
big = sd.vae.to_image(samplers.sample(sd.schedule, lambda x, t: net(x, t, *silence), sd.noise(M, gen(6)), WALK)).cpu()
bicubic = F.interpolate(small, scale_factor=4, mode="bicubic").clamp(-1, 1)
only_shape = torch.where(torch.tensor([False, True, False]), test.attrs, -1)
shape_right = {}
for name, image in {"sr": big, "bicubic": bicubic}.items():
    shape_right[name] = judge.score(image, only_shape)["shape"]
    zhixing.metric(f"{name}_shape", shape_right[name])
    zhixing.metric(f"{name}_psnr", judge.psnr(image, test.image))
    zhixing.metric(f"{name}_low", judge.psnr(F.avg_pool2d(image, 4), small))
zhixing.metric("sr_steps", SR_STEPS)
print({name: round(value, 3) for name, value in shape_right.items()})
assert shape_right["sr"] > shape_right["bicubic"] + 0.2, shape_right

fig, axes = plt.subplots(4, 9, figsize=(8.2, 3.7))
show(axes[0], small, "6×6 输入")
show(axes[1], bicubic, "双三次")
show(axes[2], big, "扩散")
show(axes[3], test.image, "原图")
zhixing.figure("sr", fig)
