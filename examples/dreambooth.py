# ---
# zhixing:
#   id: dreambooth
#   title: DreamBooth：教会基座一个新主体
#   needs: [clip, vae, base]
#   timeout: 900
# ---

# %% [markdown]
# 基座从没见过左半品红、右半嫩绿的圆。给它 5 张图、一个从没用过的字“犇”，微调，量三件事：主体像不像（**主体保真**）、“一个圆”还画不画得出各种颜色（**类别多样性**）、别的描述还听不听（**语言漂移**）。有先验保持与没有先验保持各训 3 个种子；再做四组对照：冻结词向量、LoRA、拿常用字“红”当标识符、把类别图真的当负样本。
#
# **预计耗时与内存**：单线程、机器空闲时两分多钟，峰值内存约 0.8 GB。

# %%
import copy
import time

import matplotlib.pyplot as plt
import torch

import zhixing
from minisd import clip, dreambooth, judge, lora, pipeline, train, world

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
V, SEEDS, STEPS, BATCH, CLASS_IMAGES = "犇", (0, 1, 2), 180, 8, 128
LR, ROW_LR, LORA_LR = 1e-3, 0.06, 5e-3                         # U-Net、标识符那一行词向量、LoRA 的学习率
base = pipeline.StableDiffusion.load(*map(zhixing.input_path, ("clip/clip.safetensors", "vae/vae.safetensors", "base/unet.safetensors"))).to(device)


def gen(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## 主体与类别图
#
# 五张实例图，五个位置各一张，描述全是“一个犇圆”。类别图由冻结的基座按“一个圆”自己画。主体得分沿像素算：左右两半各与该有的颜色比，取较差的一半；再除以“真实主体过一遍 VAE”的平均得分，这样 1 就是与真实主体过 VAE 的平均一样好（个别批次可以略高）。

# %%
instances = dreambooth.subject(torch.arange(5), gen(5))
with torch.no_grad():
    subject_latents = base.vae.to_latent(instances.image.to(device))
    fresh = dreambooth.subject(torch.arange(100) % 5, gen(6)).image
    ceiling = dreambooth.read(base.vae.to_image(base.vae.to_latent(fresh.to(device)))).score.mean().item()
begin = time.perf_counter()
prior = dreambooth.class_latents(base, [f"一个{dreambooth.CLASS}"] * CLASS_IMAGES, gen(50))
zhixing.metric("class_seconds", time.perf_counter() - begin)
zhixing.metric("ceiling", ceiling)
for name, value in {"instances": 5, "class_images": CLASS_IMAGES, "steps": STEPS, "batch": BATCH, "seeds": len(SEEDS)}.items():
    zhixing.metric(name, value)
print(f"VAE 重建真实主体的得分 {ceiling:.3f}；真实主体本身 {dreambooth.read(fresh).score.mean():.3f}")
assert 0.55 < ceiling < 0.9
ordinary = world.sample(200, gen(7), world.ALL)
assert dreambooth.read(ordinary.image).score.max() == 0        # 单色图形一律得 0

# %% [markdown]
# ## 怎样量
#
# 四组描述，DPM-Solver++ 8 步、$w=2$，初始噪声固定：
#
# * “犇圆在〈位置〉”40 张：主体得分与位置对不对；
# * “一个圆”40 张：主体得分就是**泄漏**；颜色两两之差的平均，除以基座的同一个量，就是**类别多样性**；
# * 30 句“〈颜色〉色的圆在〈位置〉”与 40 句别的形状：判分器读出三项全对的比例。

# %%
N = 40
PLACES = torch.arange(N) % 5
circles = world.ALL[world.ALL[:, 1] == 0]                       # 30 句同类的描述
others = world.ALL[world.ALL[:, 1] != 0]
others = others[torch.randperm(len(others), generator=gen(3))[:40]]


def spread(images):
    """颜色的多样性：图形颜色两两距离的平均。"""
    color = judge.read(images).color
    return (torch.cdist(color, color).sum() / (len(color) * (len(color) - 1))).item()


def placed(word=V):
    """40 句“〈标识符〉圆在〈位置〉”。"""
    return [f"{word}{dreambooth.CLASS}在{[*world.PLACES][p]}" for p in PLACES]


def draw(sd, prompts, seed):
    return sd(prompts, gen(seed), steps=8).cpu()


def measure(sd, word=V):
    """→ (各项指标, 各组图)"""
    sd.unet.eval()
    mine, plain = draw(sd, placed(word), 10), draw(sd, [f"一个{dreambooth.CLASS}"] * N, 20)
    same, rest = draw(sd, world.captions(circles), 30), draw(sd, world.captions(others), 40)
    reading = dreambooth.read(mine)
    right = [judge.correct(x, a).all(1) for x, a in ((same, circles), (rest, others))]
    values = {
        "fidelity": reading.score.mean().item() / ceiling,
        "placed": (reading.place == PLACES).float().mean().item(),
        "leak": dreambooth.read(plain).score.mean().item() / ceiling,
        "diversity": spread(plain),
        "same": right[0].float().mean().item(),
        "other": right[1].float().mean().item(),
        "right": torch.cat(right).float().mean().item(),
        "same_leak": dreambooth.read(same).score.mean().item() / ceiling,
    }
    return values, {"主体": mine, "一个圆": plain, "同类": same, "别的": rest}


start, base_pictures = measure(base)
base_spread = start["diversity"]
start["diversity"] = 1.0
print("基座：", {k: round(v, 3) for k, v in start.items()})
assert start["fidelity"] < 0.02 and start["leak"] == 0 and start["right"] >= 0.97

# %% [markdown]
# ## 微调
#
# 全部 U-Net 权重加一行词向量，AdamW。没有先验保持的一组只是把类别图拿掉（$\lambda=0$），其余逐字相同。

# %%
def personalize(seed=0, lam=1.0, steps=STEPS, word=V, learn_row=True, rank=None, watch=None):
    """从基座出发训一个模型。lam = 0 时不喂类别图。→ (模型, 秒数, 可训练参数量)"""
    torch.manual_seed(seed)
    encoder = dreambooth.add_identifier(base.text_encoder, word).requires_grad_(False)
    sd = pipeline.StableDiffusion(encoder, base.vae, copy.deepcopy(base.unet).train())
    if rank:
        names = [n for n, m in sd.unet.named_modules() if isinstance(m, torch.nn.Linear) and ".text." in n]
        lora.add_lora(sd.unet, names, rank)
    else:
        sd.unet.requires_grad_(True)
    optimizers = train.adamw(sd.unet, LORA_LR if rank else LR)
    if learn_row:
        row = encoder.token.row.requires_grad_(True)
        optimizers.append(torch.optim.AdamW([row], ROW_LR, weight_decay=0.0))
    images = subject_latents, [f"一个{word}{dreambooth.CLASS}"] * len(subject_latents)
    classes = (prior, [f"一个{dreambooth.CLASS}"] * CLASS_IMAGES) if lam else None
    loss_fn = dreambooth.objective(sd, images, classes, lam, BATCH)
    pause = []

    def look(step, _):
        if watch and step + 1 in watch:
            since = time.perf_counter()
            watch[step + 1] = measure(sd, word)[0]
            sd.unet.train()
            pause.append(time.perf_counter() - since)

    since = time.perf_counter()
    trained = torch.nn.ModuleList([sd.unet, encoder.token])      # 清零梯度时别漏了 U-Net 之外的那一行
    train.fit(trained, loss_fn, steps, optimizers, generator=gen(seed), watch=look)
    count = sum(p.numel() for opt in optimizers for group in opt.param_groups for p in group["params"])
    return sd, time.perf_counter() - since - sum(pause), count


ARMS = {"有先验保持": 1.0, "无先验保持": 0.0}
POINTS = (45, 90, 135)
runs, curves, models, pictures = {}, {}, {}, {}
for arm, lam in ARMS.items():
    for seed in SEEDS:
        watch = dict.fromkeys(POINTS) if seed == 0 else None
        sd, seconds, count = personalize(seed, lam, watch=watch)
        values, images = measure(sd)
        values["diversity"] /= base_spread
        runs[arm, seed] = values
        if seed == 0:
            for point in watch.values():
                point["diversity"] /= base_spread
            curves[arm] = {0: start, **watch, STEPS: values}
            models[arm], pictures[arm] = sd, images
            zhixing.metric("seconds_prior" if lam else "seconds_naive", seconds)
        print(arm, seed, f"{seconds:.0f} 秒", {k: round(v, 3) for k, v in values.items()}, flush=True)

zhixing.metric("parameters", count)

# %%
table = {arm: {k: torch.tensor([runs[arm, s][k] for s in SEEDS]) for k in start} for arm in ARMS}
kept, naive = table["有先验保持"], table["无先验保持"]
for key, arm in (("prior", kept), ("naive", naive)):
    for name, values in arm.items():
        zhixing.metric(f"{key}_{name}", values.mean().item())
        zhixing.metric(f"{key}_{name}_low", values.min().item())
        zhixing.metric(f"{key}_{name}_high", values.max().item())
assert naive["leak"].min() >= 0.85 and naive["leak"].mean() >= 0.9, naive        # λ = 0：类别整个变成了主体
assert naive["diversity"].max() < 0.35 and naive["right"].max() < 0.9, naive
assert kept["leak"].max() <= 0.05, kept                                          # λ = 1：不漏
assert kept["fidelity"].min() >= 0.8 and kept["right"].min() >= 0.9, kept
assert kept["placed"].min() >= 0.9 and kept["diversity"].min() > 0.75, kept

# %%
fig, axes = plt.subplots(1, 3, figsize=(8.8, 2.9), sharex=True)
for k, arm in enumerate(ARMS):
    steps = [*curves[arm]]
    line = lambda name: [curves[arm][s][name] for s in steps]
    axes[0].plot(steps, line("fidelity"), "o-", ms=3, color=f"C{k}", label=arm)
    axes[1].plot(steps, line("diversity"), "o-", ms=3, color=f"C{k}")
    axes[1].plot(steps, line("leak"), "x:", ms=4, color=f"C{k}")
    axes[2].plot(steps, line("same"), "o-", ms=3, color=f"C{k}")
    axes[2].plot(steps, line("other"), "x:", ms=4, color=f"C{k}")
    for ax, name in zip(axes, ("fidelity", "diversity", "same")):                # 三个种子的终点
        ax.plot([STEPS + 5] * len(SEEDS), table[arm][name], "_", ms=9, color=f"C{k}", clip_on=False)
axes[0].set(xlabel="步数", ylabel="主体得分", title="主体保真", ylim=(-0.03, 1.05))
axes[1].set(xlabel="步数", ylabel="相对基座；得分", title="实线：类别多样性；点线：泄漏", ylim=(-0.03, 1.15))
axes[2].set(xlabel="步数", ylabel="三项全对", title="实线：同类描述；点线：别的", ylim=(-0.03, 1.05))
axes[0].legend(loc="lower right")
for ax in axes:
    ax.title.set_fontsize(9.5)
zhixing.figure("curves", fig)

# %%
ROWS = {"“犇圆在…”": "主体", "“一个圆”": "一个圆", "“…色的圆在…”": "同类"}
fig, axes = plt.subplots(7, 10, figsize=(8.6, 6.2))
sheet = [("实例图", instances.image)]
sheet += [(f"{label}\n{arm[0]}先验", pictures[arm][key]) for label, key in ROWS.items() for arm in ARMS]
for line, (title, images) in zip(axes, sheet):
    if title.startswith("“…色"):
        images = images[::3]
    for c, ax in enumerate(line):
        ax.axis("off")
        if c < len(images):
            ax.imshow(((images[c] + 1) / 2).clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
    line[0].text(-4, 12, title, ha="right", va="center", fontsize=8)
zhixing.figure("grid", fig)

# %% [markdown]
# ## 把学到的东西拆开
#
# 只把学好的词向量装回基座；或者反过来，U-Net 用学好的、词向量用原来的。主体若是“存在某一条里”，总有一半能单独把它取出来。

# %%
best = models["有先验保持"]
row_only = pipeline.StableDiffusion(best.text_encoder, base.vae, base.unet)
net_only = pipeline.StableDiffusion(base.text_encoder, base.vae, best.unet)
for key, sd in (("row_only", row_only), ("net_only", net_only)):
    score = dreambooth.read(draw(sd, placed(), 10)).score.mean().item() / ceiling
    zhixing.metric(f"{key}_fidelity", score)
    print(key, round(score, 3))
    assert score < 0.6 * kept["fidelity"].min(), score                           # 缺了哪一半都画不出主体


def gap(sd, one, other):
    """两句描述的逐字特征（有效位取平均）的距离。"""
    text, valid = sd.encode([one, other])
    pooled = (text * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)                # (2, D)
    return (pooled[0] - pooled[1]).norm().item()


gaps = {
    "gap_before": gap(base, f"一个{V}圆", "一个圆"), "gap_after": gap(best, f"一个{V}圆", "一个圆"),
    "gap_colors": gap(base, "红色的圆", "蓝色的圆"),
}
for name, value in gaps.items():
    zhixing.metric(name, value)
print({name: round(value, 3) for name, value in gaps.items()})
assert gaps["gap_before"] < gaps["gap_colors"] / 2 and gaps["gap_after"] > 1.5 * gaps["gap_before"], gaps
moved = [
    ((p - q).norm() / q.norm()).item()
    for p, q in zip(best.unet.parameters(), base.unet.parameters()) if q.norm() > 0
]
zhixing.metric("moved_share", sum(m > 1e-3 for m in moved) / len(moved))
zhixing.metric("moved_median", torch.tensor(moved).median().item())
assert sum(m > 1e-3 for m in moved) / len(moved) > 0.9                           # 改动散在几乎每个张量里

# %% [markdown]
# ## 五组对照
#
# 都是种子 0，除了写明的一组都有类别图：冻结词向量；只在 U-Net 文本块的线性层上加 LoRA，带与不带先验保持各一组；标识符换成常用字“红”；$\lambda=-1$，即真的把类别图当负样本来推开（只训 60 步）。

# %%
def control(key, word=V, **options):
    sd, seconds, count = personalize(word=word, **options)
    values, images = measure(sd, word)
    values["diversity"] /= base_spread
    values |= {"seconds": seconds, "parameters": count}
    for name, value in values.items():
        zhixing.metric(f"{key}_{name}", value)
    print(key, f"{seconds:.0f} 秒，{count} 个参数", {k: round(v, 3) for k, v in values.items()}, flush=True)
    return sd, values, images


_, frozen, _ = control("frozen", learn_row=False)
assert frozen["fidelity"] < 0.7 * kept["fidelity"].min() and frozen["leak"] < 0.2, frozen                 # 词向量不动：学得慢得多

_, low_rank, _ = control("lora", rank=8)
zhixing.metric("lora_share", low_rank["parameters"] / count)
zhixing.metric("lora_lr_ratio", LORA_LR / LR)
assert low_rank["leak"] <= 0.05 and low_rank["right"] >= 0.9 and low_rank["fidelity"] >= 0.75, low_rank

_, low_rank_naive, _ = control("lora_naive", rank=8, lam=0.0)
assert low_rank_naive["leak"] >= max(0.5, 10 * low_rank["leak"]), low_rank_naive           # 低秩挡不住泄漏
assert low_rank_naive["diversity"] < 0.8 * low_rank["diversity"], low_rank_naive

red = circles[:, 0] == 0
common_sd, common, common_pictures = control("common", word="红")
own = judge.correct(common_pictures["同类"][red], circles[red]).all(1).float().mean().item()
subject_in_red = dreambooth.read(common_pictures["同类"][red]).score.mean().item() / ceiling
before = judge.correct(base_pictures["同类"][red], circles[red]).all(1).float().mean().item()
with_rare = judge.correct(pictures["有先验保持"]["同类"][red], circles[red]).all(1).float().mean().item()
for name, value in {"common_red": own, "common_red_leak": subject_in_red, "rare_red": with_rare, "base_red": before}.items():
    zhixing.metric(name, value)
print(f"“红色的圆在…”：基座 {before:.3f}，稀有字 {with_rare:.3f}，常用字 {own:.3f}，其中像主体 {subject_in_red:.3f}")
assert with_rare >= 0.8 and own <= 0.2, (with_rare, own)

_, negative, _ = control("negative", lam=-1.0, steps=60)
assert negative["right"] < 0.5, negative                                         # 推开类别图：类别先毁了
