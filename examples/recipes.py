# ---
# zhixing:
#   id: recipes
#   title: 怎样训得快：配方的公平对照
#   needs: [clip, vae]
#   timeout: 1800
# ---

# %% [markdown]
# 同样的图、同样的描述顺序、同样的步数与网络，每次只换配方里的一样：在哪个空间扩散、预测什么、用什么优化器、学习率怎样走、文本编码器从哪里来。每组两个种子，各按 96 句完整的描述画图（DPM-Solver++ 8 步，$w=2$），判分器打分。预算故意小，差别才看得见。
#
# **预计耗时与内存**：单线程、机器空闲时约三分钟，峰值内存约 0.6 GB。

# %%
import statistics
import time

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

import zhixing
from minisd import clip, judge, latents, pipeline, samplers, train, unet, world

SEEDS, STEPS, BATCH, WIDTHS = (0, 1), 150, 32, (32, 48)
device = "cuda" if torch.cuda.is_available() else "cpu"
sd = pipeline.StableDiffusion.load(zhixing.input_path("clip/clip.safetensors"), zhixing.input_path("vae/vae.safetensors")).to(device)
scenes = world.sample(6000, torch.Generator().manual_seed(1))
data = latents.LatentData(sd, scenes)                          # 潜变量、每句描述的编号与 CLIP 特征
ids = clip.tokenize(data.captions).to(device)
probe = world.SEEN[torch.randperm(135, generator=torch.Generator().manual_seed(99))[:96]]


# %% [markdown]
# ## 像素空间，位置数相同
#
# 原样的 24×24 像素上，同一个 U-Net 每步贵得多（stable_diffusion 示例量过）。这里让一步：每 4×4 个像素叠成 48 个通道，也是 6×6 个位置，运算量与潜空间几乎相同。剩下的差别只是：12 倍的数，压没压过。

# %%
packed = F.pixel_unshuffle(scenes.image, 4).to(device)         # (N, 48, 6, 6)
mean, std = packed.mean((0, 2, 3), keepdim=True), packed.std((0, 2, 3), keepdim=True)      # 与潜变量一样逐通道标准化
SPACES = {
    "latent": (data.latent, sd.vae.to_image),
    "pixel": ((packed - mean) / std, lambda z: F.pixel_shuffle(z * std + mean, 4)),
}


# %% [markdown]
# ## 训练一次

# %%
def build(seed, text):
    """同一个种子，网络的初值相同；文本编码器另外三选一。"""
    torch.manual_seed(seed)
    encoder = sd.text_encoder if text == "clip" else clip.TextEncoder().to(device)
    return encoder.requires_grad_(text == "joint")


def fit(seed, space="latent", kind="v", optimizer="muon", lr=0.02, rate="cosine", text="clip"):
    """→ 判分器的四个正确率、末段损失、每步的 CPU 秒数。"""
    x0, decode = SPACES[space]
    encoder = build(seed, text)
    torch.manual_seed(seed)
    net = unet.UNet(x0.shape[1], x0.shape[1], WIDTHS).to(device, memory_format=torch.channels_last)
    ema = train.EMA(net)
    optimizers = train.muon(net, lr, 2e-3) if optimizer == "muon" else train.adamw(net, lr)
    if text == "joint":
        optimizers += train.adamw(encoder, 4e-3)
    groups = [(group, group["lr"]) for opt in optimizers for group in opt.param_groups]
    params = [p for group, _ in groups for p in group["params"]]
    factor = (lambda step: train.warmup_cosine(step, STEPS, STEPS // 10)) if rate == "cosine" else (lambda step: 1.0)
    table = encoder(ids) if text != "joint" else None          # 冻结的编码器，每句话只算一次
    generator, losses = torch.Generator().manual_seed(seed), []
    begin = time.process_time()
    for step in range(STEPS):
        i, row = data.draw(BATCH, generator)
        condition = encoder(ids[row]) if table is None else (table[0][row], table[1][row])
        loss = latents.diffusion_loss(lambda x, t: net(x, t, *condition), sd.schedule, x0[i], generator, kind)
        net.zero_grad()
        encoder.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for group, peak in groups:
            group["lr"] = peak * factor(step)
        for opt in optimizers:
            opt.step()
        ema.update(net)
        losses.append(loss.item())
    seconds = time.process_time() - begin

    texts = world.captions(probe)
    with torch.no_grad():
        condition = encoder.eval()(clip.tokenize(texts + [""] * len(texts)).to(device))

    def denoise(x, t):
        pred, empty = ema.model(torch.cat([x, x]), torch.cat([t, t]), *condition).chunk(2)
        return empty + 2 * (pred - empty)

    x_T = torch.randn(len(texts), *x0.shape[1:], generator=torch.Generator().manual_seed(7)).to(device)
    path = samplers.timesteps(1000, 8, "trailing" if kind == "v" else "leading")    # ε 不能从 ᾱ ≈ 0 处起步
    image = decode(samplers.sample(sd.schedule, denoise, x_T, path, kind=kind)).clamp(-1, 1)
    return judge.score(image, probe) | {"loss": sum(losses[-50:]) / 50, "seconds": seconds / STEPS}


# %% [markdown]
# ## 结果
#
# 学习率事先各自粗扫过（一两个种子），每组取自己最好的：Muon 扫 0.01、0.02、0.04、0.08，AdamW 扫 0.002、0.004、0.008、0.016，常数学习率扫 0.01、0.02、0.04；像素与两种没预训练的文本编码器扫 0.02、0.04，一起训练的文本编码器自己的学习率扫 0.001、0.004。每训完一次记一笔，构建被打断时接着训。

# %%
RECIPES = {
    "base": ("基准：潜空间、v、Muon、余弦、冻结 CLIP", {}),
    "pixel": ("像素（4×4 打包）", {"space": "pixel", "lr": 0.04}),
    "eps": ("预测 ε", {"kind": "eps"}),
    "adamw": ("AdamW", {"optimizer": "adamw", "lr": 8e-3}),
    "constant": ("常数学习率", {"rate": "constant"}),
    "joint": ("文本编码器一起训练", {"text": "joint", "lr": 0.04}),
    "random": ("文本编码器随机、冻结", {"text": "random", "lr": 0.04}),
}
scratch = zhixing.scratch_path()
table = {}
for seed in SEEDS:                                             # 种子在外层：机器忙闲的变化由各组分摊
    for name, (label, change) in RECIPES.items():
        done = scratch / f"{name}-{seed}.pt"
        if not done.exists():
            torch.save(fit(seed, **change), scratch / "new.pt")
            (scratch / "new.pt").replace(done)
        for key, value in torch.load(done).items():
            table.setdefault((name, key), []).append(value)
        print(seed, label, {key: round(table[name, key][-1], 3) for key in ("color", "shape", "place", "all", "loss", "seconds")}, flush=True)

KEYS = {"color": "颜色", "shape": "形状", "place": "位置", "all": "全对"}
for name in RECIPES:
    table[name, "parts"] = [statistics.mean(v) for v in zip(*(table[name, k] for k in ("color", "shape", "place")))]
    for key in (*KEYS, "parts"):
        zhixing.metric(f"{name}_{key}", statistics.mean(table[name, key]))
        zhixing.metric(f"{name}_{key}_low", min(table[name, key]))
        zhixing.metric(f"{name}_{key}_high", max(table[name, key]))
    zhixing.metric(f"{name}_step_ms", 1000 * min(table[name, "seconds"]))
for name, value in {"steps": STEPS, "batch": BATCH, "seeds": len(SEEDS), "images": STEPS * BATCH}.items():
    zhixing.metric(name, value)

best, parts = table["base", "parts"], lambda name: table[name, "parts"]
assert min(best) > max(parts("adamw")) + 0.03                   # 同样步数：Muon 更快，差别在两个种子的范围之外
assert min(best) > max(parts("eps")) + 0.2 and min(best) > max(parts("pixel")) + 0.15       # v 与潜空间：差一大截
assert min(table["base", "place"]) > 0.9 and max(table["pixel", "shape"]) < 0.15 < min(table["base", "shape"])

# %%
fig, axes = plt.subplots(1, 4, figsize=(9, 3), sharey=True, layout="constrained")
for ax, (key, title) in zip(axes, KEYS.items()):
    for y, name in enumerate(RECIPES):
        values = table[name, key]
        ax.barh(y, statistics.mean(values), color="C0" if name == "base" else "C1", alpha=0.5)
        ax.plot(values, [y] * len(values), "k.", ms=4)
    ax.set(title=title, xlim=(0, 1.03), xticks=[0, 0.5, 1])
axes[0].set_yticks(range(len(RECIPES)), [label.split("：")[0] for label, _ in RECIPES.values()])
axes[0].invert_yaxis()
zhixing.figure("recipes", fig)
