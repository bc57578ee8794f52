# ---
# zhixing:
#   id: dalle
#   title: 迷你 unCLIP 与长短描述
#   needs: [clip, vae, base]
#   timeout: 1800
# ---

# %% [markdown]
# 两个实验。一，迷你 unCLIP（DALL·E 2）：解码器把 CLIP 图像向量画成图，先验把文本变成图像向量；再试试不要先验、直接把文本向量塞给解码器。二，DALL·E 3 的主张：同样的图、同样的预算，训练时用短描述还是长描述，差在哪里。
#
# **预计耗时与内存**：单线程、机器空闲时约两分钟，峰值内存约 0.6 GB。大头是解码器与三个描述模型的微调。

# %%
import copy

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

import zhixing
from minisd import clip, judge, latents, pipeline, train, unclip, unet, world
from minisd.gallery import show

device = "cuda" if torch.cuda.is_available() else "cpu"
paths = [zhixing.input_path(p) for p in ("clip/clip.safetensors", "vae/vae.safetensors", "base/unet.safetensors")]
sd = pipeline.StableDiffusion.load(*paths).to(device)
tower = pipeline.load_weights(clip.CLIP(), paths[0])             # 只编码几千张图，留在 CPU 上：向量都在 CPU


def gen(seed):
    return torch.Generator().manual_seed(seed)


def embed_texts(texts):
    """描述列表 → CLIP 文本向量 (N, D)。"""
    return torch.cat([tower.embed_text(clip.tokenize(texts[i:i + 1000])) for i in range(0, len(texts), 1000)])


data = world.sample(4000, gen(1))                                           # 只含见过的 135 种组合
z_image = torch.cat([tower.embed_image(x) for x in data.image.split(500)])  # (N, D) 单位向量
pairs = latents.LatentData(sd, data)                                        # 潜变量 (N, 4, 6, 6)，与每句描述的特征


def imagine(z, g):
    """图像向量 (N, D) → 图。"""
    return unclip.decode(sd, decoder, z.to(device), g).cpu()


def guess(z_text, g, **options):
    """文本向量 (N, D) → 先验给的图像向量。"""
    return prior.sample(sd.schedule, z_text.to(device), g, **options).cpu()


# %% [markdown]
# ## 模态间隙
#
# CLIP 的损失只要求“配对的比不配对的近”，没有要求文本向量落在图像向量中间。把两团向量投到“均值之差”与“图像向量的第一主成分”张成的平面上看：它们并不重合。

# %%
z_full = embed_texts(world.captions(data.attrs))                            # 每张图的完整描述
gap = z_image.mean(0) - z_full.mean(0)                                      # 两团的中心之差
zhixing.metric("cos_matched", (z_image * z_full).sum(1).mean())
zhixing.metric("gap", gap.norm())
axis = F.normalize(gap, dim=0)
residual = z_image - z_image.mean(0) - ((z_image - z_image.mean(0)) @ axis)[:, None] * axis
principal = torch.pca_lowrank(residual, 1, center=False)[2][:, 0]
fig, ax = plt.subplots(figsize=(5, 2.8))
for z, name in ((z_image, "图像向量"), (z_full, "文本向量")):
    ax.scatter(z[:600] @ axis, z[:600] @ principal, s=5, alpha=0.5, label=name)
ax.set(xlabel="沿均值之差", ylabel="沿图像的第一主成分")
ax.legend()
zhixing.figure("gap", fig)

threshold = ((z_image @ axis).mean() + (z_full @ axis).mean()) / 2          # 一条直线分得开多少
separable = (((z_image @ axis) > threshold).float().mean() + ((z_full @ axis) <= threshold).float().mean()) / 2
zhixing.metric("separable", separable)
assert separable > 0.9

# %% [markdown]
# ## 解码器
#
# 从文生图的基座出发，文字一律为空，图像向量投影后加到时间嵌入上；一成的样本把向量换成零，留给无分类器引导。

# %%
STEPS, BATCH = 160, 64
torch.manual_seed(0)
decoder = unclip.decoder_from(sd.unet, z_image.shape[1])
averaged = train.EMA(decoder, 0.98)
text, valid = sd.encode([""] * BATCH)


def decoder_loss(g):
    i = torch.randint(len(pairs.latent), (BATCH,), generator=g)
    z = unclip.drop(z_image[i], 0.1, g).to(device)
    return latents.diffusion_loss(lambda x, t: decoder(x, t, text, valid, image=z), sd.schedule, pairs.latent[i], g)


losses = train.fit(decoder, decoder_loss, STEPS, train.muon(decoder, 0.02, 2e-3), generator=gen(0), ema=averaged)
decoder = averaged.model
zhixing.metric("decoder_steps", STEPS)
pipeline.save_weights(decoder, zhixing.output_path("decoder.safetensors"))

# %% [markdown]
# ## 先验
#
# 小 MLP 扩散模型，直接预测干净的图像向量（论文 2.2 节），每句话采两个、留内积大的。训练用各种说法，“一个圆”也在内。

# %%
PRIOR_STEPS, PRIOR_BATCH = 700, 128
said = [embed_texts(world.captions(data.attrs, gen(40 + k))) for k in range(4)]     # 每张图四种随机说法
torch.manual_seed(0)
prior = unclip.Prior(z_image.shape[1])
prior.measure(z_image)
prior.to(device)                                                            # 量完再搬
prior_averaged = train.EMA(prior, 0.99)


def prior_loss(g):
    i, k = torch.randint(len(z_image), (PRIOR_BATCH,), generator=g), torch.randint(len(said), (1,), generator=g).item()
    return unclip.prior_loss(prior, sd.schedule, z_image[i].to(device), said[k][i].to(device), g)


prior_losses = train.fit(prior, prior_loss, PRIOR_STEPS, train.adamw(prior, 2e-3), generator=gen(0), ema=prior_averaged)
prior = prior_averaged.model
zhixing.metric("prior_steps", PRIOR_STEPS)

# %% [markdown]
# ## 有先验，没有先验
#
# 同一个解码器、同一批初始噪声，只换喂进去的向量：真图的向量（上限）、先验给的、文本向量本身、文本向量平移“均值之差”。一半的描述是解码器与先验都没见过的组合。

# %%
asked = torch.cat([world.SEEN[torch.randint(135, (64,), generator=gen(9))], world.HELD_OUT.repeat(5, 1)[:64]])
z_text = embed_texts(world.captions(asked))
vectors = {
    "true": tower.embed_image(world.draw(asked, gen(12)).image),
    "prior": guess(z_text, gen(3)),
    "text": z_text,
    "shift": F.normalize(z_text + gap, dim=1),
}
drawn = {name: imagine(z, gen(5)) for name, z in vectors.items()}
scores = {name: judge.score(x, asked) for name, x in drawn.items()}
for name, score in scores.items():
    zhixing.metric(f"{name}_cosine", (vectors[name] * vectors["true"]).sum(1).mean())
    for key, value in score.items():
        zhixing.metric(f"{name}_{key}", value)
zhixing.metric("asked", len(asked))
assert scores["prior"]["all"] > scores["text"]["all"] + 0.15, scores
assert scores["prior"]["all"] > scores["true"]["all"] - 0.1, scores

rows = {"真图的向量": "true", "先验": "prior", "文本向量": "text", "文本 + 均值之差": "shift"}
picked = torch.linspace(0, 127, 9).long()
fig, axes = plt.subplots(4, 9, figsize=(8, 4))
for line, (name, key) in zip(axes, rows.items()):
    show(line, drawn[key][picked])
    line[0].set_title(f"{name}（全对 {scores[key]['all']:.0%}）", loc="left")
zhixing.figure("prior", fig)

# %% [markdown]
# ## 一句话，许多种图
#
# “一个圆”没有说颜色与位置。先验采样出各种各样的图像向量；若只走一步，它给出的就是条件均值（回归的最优解），六种颜色、五个位置混在一起。

# %%
vague = [f"一个{name}" for name in world.SHAPES for _ in range(16)]
shape = torch.arange(5).repeat_interleave(16)
z_vague = embed_texts(vague)
several = {
    "sampled": guess(z_vague, gen(6)),
    "mean": guess(z_vague, gen(6), steps=1, candidates=1),
}
for name, z in several.items():
    images = imagine(z, gen(7))
    read = judge.read(images).attrs
    zhixing.metric(f"vague_{name}_readable", (read >= 0).all(1).float().mean())
    zhixing.metric(f"vague_{name}_shape", (read[:, 1] == shape).float().mean())
    kinds = [len({tuple(a) for a in read[16 * k:16 * k + 16, ::2].tolist() if min(a) >= 0}) for k in range(5)]
    zhixing.metric(f"vague_{name}_kinds", sum(kinds) / 5)               # 16 张里有几种（颜色，位置）
    several[name] = images, sum(kinds) / 5
assert several["sampled"][1] > several["mean"][1] + 3

fig, axes = plt.subplots(2, 10, figsize=(8, 2.1))
for line, name, title in zip(axes, ("sampled", "mean"), ("先验采样", "只走一步：条件均值")):
    show(line, several[name][0][:10])
    line[0].set_title(title, loc="left")
zhixing.figure("vague", fig)

# %% [markdown]
# ## 图像变体与插值
#
# 把一张图编码成向量再解码：颜色、位置留住，形状多半留住，半径、转角、背景灰度这些 CLIP 不看重的随机变。两张图的向量之间做球面插值，中间的向量也画得出图。

# %%
pair = world.draw(torch.tensor([[0, 0, 0], [2, 4, 3]]), gen(21))
ends = tower.embed_image(pair.image)
angle = torch.arccos((ends[0] @ ends[1]).clamp(-1, 1))
ratio = torch.linspace(0, 1, 8)[:, None]
path = F.normalize(torch.sin((1 - ratio) * angle) * ends[0] + torch.sin(ratio * angle) * ends[1], dim=1)      # slerp
between = imagine(path, gen(8))
variants = imagine(ends.repeat_interleave(16, 0), gen(9))           # 每张图 16 个变体
kept = judge.score(variants, pair.attrs.repeat_interleave(16, 0))
for key, value in kept.items():
    zhixing.metric(f"variants_{key}", value)
assert kept["color"] > 0.7 and kept["place"] > 0.8, kept

fig, axes = plt.subplots(2, 8, figsize=(8, 2.3))
show(axes[0], torch.cat([pair.image[:1], variants[:7]]))
show(axes[1], between)
axes[0, 0].set_title("原图", loc="left")
axes[0, 1].set_title("变体", loc="left")
axes[1, 0].set_title("球面插值", loc="left")
zhixing.figure("variations", fig)

# %% [markdown]
# ## 短描述与长描述
#
# 三个模型从同一个起点出发，图、步数、种子都相同，只有训练时配的描述不同。起点是“会画图、不听话”的基座：把每个交叉注意力重新初始化，画图的本事留着，听话的本事清零。
#
# * 短：只说形状，或颜色加形状，从不说位置；
# * 长：颜色、形状、位置都说；
# * 95% 长 + 5% 短：DALL·E 3 的配比。

# %%
CAPTION_STEPS, CAPTION_BATCH = 150, 32                                    # 下面的比例，次序同 world.TEMPLATES 的五种说法
shares = {"short": [0, 0, 0.4, 0.6, 0], "long": [0.5, 0.5, 0, 0, 0], "mix": [0.475, 0.475, 0.02, 0.03, 0]}


def deaf(seed):
    """基座的副本，交叉注意力重新初始化。"""
    torch.manual_seed(seed)
    net = copy.deepcopy(sd.unet).requires_grad_(True)
    for module in net.modules():
        if isinstance(module, unet.CrossAttention):
            for layer in (module.to_q, module.to_k, module.to_v, module.to_out):
                layer.reset_parameters()
    return net


def train_captions(share):
    net = deaf(0)
    average = train.EMA(net, 0.98)
    pairs.share = torch.tensor(share)

    def loss(g):
        x0, text, valid = pairs.batch(CAPTION_BATCH, g)
        return latents.diffusion_loss(lambda x, t: net(x, t, text, valid), sd.schedule, x0, g)

    train.fit(net, loss, CAPTION_STEPS, train.muon(net, 0.02, 2e-3), generator=gen(0), ema=average)
    return average.model


listeners = {name: train_captions(share) for name, share in shares.items()}
zhixing.metric("caption_steps", CAPTION_STEPS)

# %% [markdown]
# 三种考法：完整的长描述；只说形状的短描述；把短描述“改写”成长的（没说的属性随机补上，相当于 DALL·E 3 先让 GPT-4 把提示词写长）。后两种只核对短描述说到的形状。

# %%
graded = world.SEEN[torch.randint(135, (96,), generator=gen(30))]
only_shape = torch.full_like(graded, -1)
only_shape[:, 1] = graded[:, 1]
invented = graded.clone()
invented[:, 0], invented[:, 2] = torch.randint(6, (96,), generator=gen(31)), torch.randint(5, (96,), generator=gen(32))
exams = {
    "full": (world.captions(graded), graded),
    "brief": ([f"一个{world.SHAPES[a[1]]}" for a in graded], only_shape),
    "rewritten": (world.captions(invented), only_shape),
}
table, samples = {}, {}
for name, net in listeners.items():
    model = pipeline.StableDiffusion(sd.text_encoder, sd.vae, net)
    for exam, (prompts, want) in exams.items():
        if name == "short" and exam == "rewritten":
            continue
        images = model(prompts, gen(33), guidance=1.0).cpu()            # 不加引导：看训练本身学到了什么
        table[name, exam] = judge.score(images, want)
        samples[name, exam] = images
        for key, value in table[name, exam].items():
            zhixing.metric(f"{name}_{exam}_{key}", value)
        zhixing.metric(f"{name}_{exam}_readable", (judge.read(images).attrs >= 0).all(1).float().mean())

chance = 1 / len(world.PLACES)
assert table["short", "full"]["place"] < chance + 0.15, table                 # 没教过位置：与瞎猜差不多
assert table["long", "full"]["place"] > table["short", "full"]["place"] + 0.4, table
readable = {exam: (judge.read(samples["long", exam]).attrs >= 0).all(1).float().mean() for exam in ("brief", "rewritten")}
assert readable["rewritten"] > readable["brief"] + 0.2, readable                # 改写有用

fig, axes = plt.subplots(3, 8, figsize=(8, 3.4))
for line, (name, title) in zip(axes, {"short": "短描述训练", "long": "长描述训练", "mix": "95% 长 + 5% 短"}.items()):
    show(line, samples[name, "full"][:8])
    line[0].text(-2, 12, title, ha="right", va="center")
for ax, prompt in zip(axes[0], exams["full"][0]):
    ax.set_title(prompt, fontsize=7)
zhixing.figure("captions", fig)
