# ---
# zhixing:
#   id: mimicbrush
#   title: 参考图局部编辑：把另一张图的 K、V 拼进来
#   needs: [clip, vae, base]
#   timeout: 1800
# ---

# %% [markdown]
# 同一个迷你 Stable Diffusion 基座。模仿 U-Net 是加宽到 9 通道的基座，参考 U-Net 是冻结的基座；自注意力的 K、V 拼在一起，从“同一段视频的两帧”自监督地学。然后遮住整个图形，看补上去的颜色与条纹是不是参考图的。
#
# **预计耗时与内存**：单线程、机器空闲时不到一分钟，峰值内存约 0.6 GB。

# %%
import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

import zhixing
from minisd import concat, inpaint, judge, latents, mimicbrush, pipeline, samplers, train, world
from minisd.gallery import show
from minisd.stripes import dark_rows

STEPS, BATCH, BOOST, DROP, GUIDANCE, M = 240, 32, 16, 0.1, 2.0, 48
device = "cuda" if torch.cuda.is_available() else "cpu"
paths = [zhixing.input_path(p) for p in ("clip/clip.safetensors", "vae/vae.safetensors", "base/unet.safetensors")]
sd = pipeline.StableDiffusion.load(*paths).to(device)


def gen(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## 两帧
#
# 同一个主体：颜色、形状、有没有条纹都相同；位置、大小、转角、背景各抽各的。条纹是基座没见过的纹理，文字里也没有，只能从参考图看来。

# %%
ROWS = dark_rows(24)                                                             # 条纹的暗行


def scene(attrs, striped, g):
    """按属性画图；striped (N,) 的那些加上横条纹。"""
    dark = striped[:, None, None, None] & ROWS[:, None]
    return world.draw(attrs, g, paint=lambda fill, mask, center: torch.where(dark, fill * 0.35, fill))


def frames(n, g, same_shape=True):
    """两帧 (源, 参考, 有没有条纹)。same_shape=False 时参考换一种形状，只剩颜色与条纹相同（纹理迁移）。"""
    attrs = world.ALL[torch.randint(len(world.ALL), (n,), generator=g)]
    other = attrs.clone()
    other[:, 2] = torch.randint(0, 5, (n,), generator=g)
    if not same_shape:
        other[:, 1] = (other[:, 1] + torch.randint(1, 5, (n,), generator=g)) % 5
    striped = torch.rand(n, generator=g) < 0.5
    return scene(attrs, striped, g), scene(other, striped, g), striped


def boxes(attrs):
    """把整个图形连同周围一起遮住的方框，对齐到 4 像素的格子。(N, 1, 24, 24)"""
    place, cells = world.CENTERS[attrs[:, 2]] * 6, torch.arange(6) + 0.5
    box = ((cells - place[:, 1:]).abs() < 2.3)[:, :, None] & ((cells - place[:, :1]).abs() < 2.3)[:, None, :]
    return F.interpolate(box[:, None].float(), scale_factor=4)


def masks(attrs, g):
    """训练用的掩码：多半遮住整个图形，其余随机遮一半的格子。"""
    cells = F.interpolate((torch.rand(len(attrs), 1, 6, 6, generator=g) < 0.5).float(), scale_factor=4)
    return torch.where(torch.rand(len(attrs), 1, 1, 1, generator=g) < 0.85, boxes(attrs), cells)


@torch.no_grad()
def encode(images):
    return torch.cat([sd.vae.to_latent(x.to(device)) for x in images.split(500)])


@torch.no_grad()
def condition(images, mask):
    """掩码与被遮图的潜变量，5 个通道；放大 BOOST 倍，相当于给新通道更大的学习率。"""
    parts = zip(images.split(500), mask.split(500))
    return BOOST * torch.cat([inpaint.condition(sd.vae, x.to(device), m.to(device)) for x, m in parts])


SAYINGS = [f"{s}在{p}" for s in world.SHAPES for p in world.PLACES]              # 文字只说形状与位置
text_table, valid_table = sd.encode(SAYINGS)
text_empty, valid_empty = sd.encode([""])


def said(attrs):
    row = attrs[:, 1] * 5 + attrs[:, 2]
    return text_table[row], valid_table[row]


def silence(n):
    """参考 U-Net 的文字：空串。"""
    return text_empty.expand(n, -1, -1), valid_empty.expand(n, -1)


source, reference, striped = frames(4000, gen(11))
z, z_ref, extra = encode(source.image), encode(reference.image), condition(source.image, masks(source.attrs, gen(12)))
text, valid = said(source.attrs)

fig, axes = plt.subplots(2, 9, figsize=(8.2, 2.2))
show(axes[0], source.image, "源")
show(axes[1], reference.image, "参考")
zhixing.figure("frames", fig)

# %% [markdown]
# ## 训练
#
# 目标就是把源图补回来；一成的样本看不见参考，给引导留一支无条件的预测。参考 U-Net 冻结，动的只有模仿 U-Net。

# %%
model = mimicbrush.Mimic(concat.widen(sd.unet, 5), sd.unet)
model.reference.requires_grad_(False)
model.imitative.requires_grad_(True)
zhixing.metric("parameters", sum(p.numel() for p in model.parameters()))
zhixing.metric("trainable", sum(p.numel() for p in model.parameters() if p.requires_grad))
average = train.EMA(model, 0.98)


def loss(g):
    i = torch.randint(len(z), (BATCH,), generator=g)
    model.read(z_ref[i], *silence(BATCH), seen=torch.rand(BATCH, generator=g) >= DROP)
    denoise = lambda x, t: model(torch.cat([x, extra[i]], 1), t, text[i], valid[i])
    return latents.diffusion_loss(denoise, sd.schedule, z[i], g)


losses = train.fit(model, loss, STEPS, train.muon(model, 0.02, 2e-3), generator=gen(0), ema=average)
model = average.model
zhixing.metric("steps", STEPS)

fig, ax = plt.subplots(figsize=(6, 2.4))
ax.plot(losses, lw=0.5, alpha=0.5)
ax.plot(range(19, STEPS), losses.unfold(0, 20, 1).mean(1), color="C0")
ax.set(xlabel="步数", ylabel="v 的均方误差", ylim=(0, None))
zhixing.figure("loss", fig)

# %% [markdown]
# ## 补上去的是谁的颜色、谁的条纹
#
# 图形连同周围全部遮住，掩码外一点颜色也没有。四种问法：给对的参考；不给参考（同一个网络）；给别人的参考；给颜色与条纹相同、形状不同的参考（纹理迁移）。颜色看亮行，条纹看亮行与暗行的反差。

# %%
def texture(images):
    """图形内部亮行的颜色 (N, 3) 与条纹反差 1 - 暗/亮 (N,)。内部：与背景（边框的中位数）差得够远的像素。"""
    x = (images + 1) / 2                                                         # (N, 3, S, S)
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2)
    inside = (x - border.median(2).values[:, :, None, None]).norm(dim=1, keepdim=True) > 0.35

    def fill(rows):                                                              # 轮廓上的像素掺了背景、偏亮，取偏暗的四分位避开
        return torch.where(inside & rows[:, None], x, torch.nan).flatten(2).nanquantile(0.25, 2).nan_to_num()

    light, dark = fill(~ROWS), fill(ROWS)
    return light, 1 - dark.mean(1) / light.mean(1).clamp(min=0.05)


@torch.no_grad()
def edit(scenes, mask, z_ref, seed):
    """按参考补上掩码里的部分，掩码外贴回原图。z_ref 为 None 就是没有参考。"""
    n = len(mask)
    if z_ref is None:
        model.read(None)
    else:
        model.read(torch.cat([z_ref, z_ref]), *silence(2 * n), seen=torch.arange(2 * n) < n)     # 后一半看不见参考
    net, (words, there) = concat.Concat(model, condition(scenes.image, mask)), said(scenes.attrs)
    words, there = torch.cat([words, words]), torch.cat([there, there])

    def denoise(x, t):
        v, v0 = net(torch.cat([x, x]), torch.cat([t, t]), words, there).chunk(2)
        return v0 + GUIDANCE * (v - v0)

    drawn = sd.vae.to_image(samplers.sample(sd.schedule, denoise, sd.noise(n, gen(seed)), 12)).cpu()
    pasted = inpaint.paste(scenes.image, drawn, mask)
    assert torch.equal(pasted * (1 - mask), scenes.image * (1 - mask))           # 掩码外逐像素不变
    return pasted


def measure(name, images, scenes, striped):
    """颜色对、条纹对、两样都对、形状对（只数没有条纹的，判分器认不得条纹）。"""
    light, contrast = texture(images)
    want, _ = texture(scenes.image)
    color = (light - want).norm(dim=1) < judge.COLOR_LIMIT
    stripe = (contrast > 0.3) == striped
    shape = judge.read(images).attrs[:, 1] == scenes.attrs[:, 1]
    found = {"color": color, "stripe": stripe, "both": color & stripe, "shape": shape[~striped]}
    result = {key: value.float().mean().item() for key, value in found.items()}
    for key, value in result.items():
        zhixing.metric(f"{name}_{key}", value)
    print(name, {key: round(value, 3) for key, value in result.items()})
    return result


test, ref, stripes = frames(M, gen(77))
_, contrast = texture(test.image)
assert ((contrast > 0.3) == stripes).all()                                       # 量法本身没问题
box, z_test = boxes(test.attrs), encode(ref.image)
assert (test.mask * (1 - box)).sum() == 0                                        # 掩码外没有图形的一个像素可抄
drawn = {
    "reference": edit(test, box, z_test, 5),
    "none": edit(test, box, None, 5),
    "wrong": edit(test, box, z_test.roll(1, 0), 5),
}
scores = {name: measure(name, pictures, test, stripes) for name, pictures in drawn.items()}
rolled = test._replace(image=ref.image.roll(1, 0))     # 给错参考时，听的是那张错的吗
followed = measure("followed", drawn["wrong"], rolled, stripes.roll(1))
other, other_ref, other_stripes = frames(M, gen(78), same_shape=False)
moved = edit(other, boxes(other.attrs), encode(other_ref.image), 6)
scores["transfer"] = measure("transfer", moved, other, other_stripes)
leaked = (judge.read(moved).attrs[:, 1] == other_ref.attrs[:, 1])[~other_stripes]      # 参考的形状漏过来了吗
zhixing.metric("transfer_leak", leaked.float().mean().item())
zhixing.metric("images", M)
assert scores["reference"]["both"] >= 0.75 and scores["none"]["both"] <= 0.3, scores          # 有参考才补得对
assert scores["wrong"]["both"] <= 0.35 and followed["both"] >= 0.55, (scores, followed)       # 给错参考就照错的画
assert scores["transfer"]["color"] >= 0.6 and scores["transfer"]["shape"] < scores["reference"]["shape"], scores

fig, axes = plt.subplots(6, 9, figsize=(8.2, 5.4))
rows = {"遮住的": test.image * (1 - box), "参考": ref.image, "有参考": drawn["reference"], "没有参考": drawn["none"], "给错参考": drawn["wrong"], "原图": test.image}
for line, (title, pictures) in zip(axes, rows.items()):
    show(line, pictures, title)
zhixing.figure("edit", fig)

fig, axes = plt.subplots(4, 9, figsize=(8.2, 3.7))
rows = {"遮住的": other.image * (1 - boxes(other.attrs)), "参考": other_ref.image, "结果": moved, "原图": other.image}
for line, (title, pictures) in zip(axes, rows.items()):
    show(line, pictures, title)
zhixing.figure("transfer", fig)
