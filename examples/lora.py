# ---
# zhixing:
#   id: lora
#   title: 用 LoRA 教会基座一种新纹理
#   needs: [clip, vae, base]
#   timeout: 1800
# ---

# %% [markdown]
# 基座从没见过横条纹。给 U-Net 的线性层加 LoRA，用 200 张条纹图教会它，再拧旋钮、换秩、量内存、合并。训好的 $A$、$B$ 存下来，供别的示例叠加使用。
#
# **预计耗时与内存**：单线程、机器空闲时约一分钟，峰值内存约 0.8 GB。

# %%
import copy

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file, save_file

import zhixing
from minisd import adapters, judge, latents, lora, memory, pipeline, stripes, train, world

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cudnn.allow_tf32 = False                         # GPU 上卷积也用完整的单精度，下面才对得上
paths = [zhixing.input_path(p) for p in ("clip/clip.safetensors", "vae/vae.safetensors", "base/unet.safetensors")]
sd = pipeline.StableDiffusion.load(*paths).to(device)
base = sd.unet


def gen(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## 数据与尺子
#
# 条纹两行亮、两行暗。**对比度**是 1 减去暗行与亮行的亮度之比，只数图形里的像素；纯色图约为 0。颜色、形状、位置照旧由判分器读，但它按纯色图形写成，所以先把条纹抹平再判。三个参照：训练图、VAE 重建一遍的训练图、纯色图。

# %%
IMAGES, BATCH = 200, 24
g = gen(3)
scenes = world.draw(world.SEEN[torch.randint(len(world.SEEN), (IMAGES,), generator=g)], g, paint=stripes.paint)
plain = world.sample(100, g)
target = stripes.contrast(scenes.image).mean().item()
rebuilt = sd.vae.to_image(sd.vae.to_latent(scenes.image.to(device))).cpu()
assert stripes.score(scenes.image, scenes.attrs)["all"] == 1 == stripes.score(plain.image, plain.attrs)["all"]
assert stripes.contrast(plain.image).abs().mean() < 0.05 and judge.score(scenes.image, scenes.attrs)["all"] < 0.5
zhixing.metric("images", IMAGES)
zhixing.metric("target", target)
zhixing.metric("vae_contrast", stripes.contrast(rebuilt).mean())

exam = world.ALL[torch.randint(150, (48,), generator=gen(9))]  # 考 48 句完整的描述


def draw(unet):
    """48 句描述各一张，初始噪声总是同一组。→ (48, 3, 24, 24)"""
    return pipeline.StableDiffusion(sd.text_encoder, sd.vae, unet)(world.captions(exam), gen(4), steps=10).cpu()


def grade(unet):
    """（条纹对比度，抹平之后三项全对的比例）"""
    images = draw(unet)
    return stripes.contrast(images).mean().item(), stripes.score(images, exam)["all"]


base_images = draw(base)
base_contrast, base_all = grade(base)
assert abs(base_contrast) < 0.1 and base_all > 0.95             # 基座不会画条纹
zhixing.metric("base_contrast", base_contrast)
zhixing.metric("base_all", base_all)

# %% [markdown]
# ## 训练
#
# 只加在线性层上：自注意力与交叉注意力的四个投影、前馈、文本块的输出。卷积不动。描述里没有“条纹”二字：学到的是“从此都这样画”，强弱由旋钮管。

# %%
TARGETS = adapters.LORA_TARGETS
RANK, ALPHA, STEPS, LR = 4, 4, 150, 1e-2
data = latents.LatentData(sd, scenes)                           # 照常丢一成描述


def loss_of(net, size=BATCH):
    def loss_fn(generator):
        x0, text, valid = data.batch(size, generator)
        return latents.diffusion_loss(lambda x, t: net(x, t, text, valid), sd.schedule, x0, generator)

    return loss_fn


def attach(r):
    """基座的拷贝，接上秩 r 的 LoRA；α 固定为 4，换秩不改学习率。"""
    net = copy.deepcopy(base)
    torch.manual_seed(0)
    lora.add_lora(net, TARGETS, r, ALPHA)
    return net


def fit(net, steps, lr=LR, size=BATCH, watch=None):
    return train.fit(net, loss_of(net, size), steps, train.adamw(net, lr, 0.0), generator=gen(0), watch=watch)


net, curve = attach(RANK), {0: (base_contrast, base_all)}
assert torch.equal(draw(net), base_images)                      # 步 0：整条采样轨迹与基座逐位相同
broken = attach(RANK)
torch.nn.init.normal_(next(iter(lora.lora_layers(broken).values())).B)
assert not torch.equal(draw(broken), base_images)               # 只要有一个 B 不从零开始就不再相同


def watch(step, net):
    if (step + 1) in (25, 50, 100):
        curve[step + 1] = grade(net)


frozen = copy.deepcopy({k: v for k, v in net.state_dict().items() if not k.endswith((".A", ".B"))})
fit(net, STEPS, watch=watch)
assert all(torch.equal(net.state_dict()[k], v) for k, v in frozen.items())     # 基座一个数也没变
sizes = lora.count_parameters(net)
zhixing.metric("layers", len(lora.lora_layers(net)))
zhixing.metric("rank", RANK)
zhixing.metric("steps", STEPS)
zhixing.metric("trainable", sizes["trainable"])
zhixing.metric("fraction", sizes["trainable"] / (sizes["total"] - sizes["trainable"]))

weights = zhixing.output_path("stripes.safetensors")
save_file({k: v.half().cpu().contiguous() for k, v in lora.lora_state(net).items()}, str(weights))
lora.load_lora(net, {k: v.float() for k, v in load_file(str(weights)).items()})        # 以下都用存下的半精度
zhixing.metric("kilobytes", weights.stat().st_size / 1e3)

contrast, right = curve[STEPS] = grade(net)
zhixing.metric("contrast", contrast)
zhixing.metric("reached", contrast / target)
zhixing.metric("all", right)
assert contrast >= 0.82 * target, contrast / target
assert right >= 0.93, right

# %% [markdown]
# ## 旋钮：0 到 1.5 连续可调

# %%
knob = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
pictures, marks = [], []
for s in knob:
    lora.set_scale(net, s)
    pictures.append(draw(net))
    marks.append((stripes.contrast(pictures[-1]).mean().item(), stripes.score(pictures[-1], exam)["all"]))
lora.set_scale(net, 1)
assert torch.equal(pictures[0], base_images)                    # 旋钮为 0 逐位等于基座
assert all(b[0] > a[0] + 0.02 for a, b in zip(marks, marks[1:]))       # 对比度一路变大
zhixing.metric("contrast_half", marks[2][0])
zhixing.metric("contrast_most", marks[-1][0])
zhixing.metric("all_most", marks[-1][1])

fig = plt.figure(figsize=(8.2, 3.3))
grid = fig.add_gridspec(5, 7, width_ratios=[1] * 6 + [6], wspace=0.05, hspace=0.05)
for r, i in enumerate((0, 2, 4, 5, 6)):
    for c in range(6):
        ax = fig.add_subplot(grid[r, c])
        ax.imshow(((pictures[i][c] + 1) / 2).clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        if c == 0:
            ax.set_ylabel(f"{knob[i]:g}", rotation=0, ha="right", va="center")
ax = fig.add_subplot(grid[:, -1])
ax.plot(knob, [m[0] for m in marks], "o-", label="条纹对比度")
ax.plot(knob, [m[1] for m in marks], "s--", label="描述正确率")
ax.axhline(target, color="C2", lw=0.8, ls=":", label="训练图的对比度")
ax.set(xlabel="旋钮 scale", ylim=(-0.05, 1.03))
ax.legend(loc="center left")
zhixing.figure("scale", fig)

# %% [markdown]
# ## 合并
#
# 把增量加进权重、卸下外壳，得到一个普通的 U-Net：结构与基座相同，前向与合并前一致（只差舍入）。

# %%
g = gen(7)
x, t = torch.randn(16, 4, 6, 6, generator=g).to(device), torch.randint(1000, (16,), generator=g).to(device)
cond = sd.encode(world.captions(exam[:16]))
with torch.no_grad():
    separate = net(x, t, *cond)
    merged = lora.merge_and_unload(copy.deepcopy(net))
    gap = (merged(x, t, *cond) - separate).abs().max().item()
    assert (separate - base(x, t, *cond)).abs().max() > 0.05
assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
assert gap < 1e-4, gap
zhixing.metric("merge_gap", gap)
zhixing.metric("merged_contrast", grade(merged)[0])

# %% [markdown]
# ## 秩：效果与参数量
#
# 五个秩各训 100 步、批 16，学习率与数据都相同；再加一条全量微调作参照（学习率 0.001，同样 100 步）。

# %%
RANKS, SHORT, SMALL = [1, 2, 4, 8, 16], 100, 16
counts, effect = [], []
for r in RANKS:
    student = attach(r)
    fit(student, SHORT, size=SMALL)
    counts.append(lora.count_parameters(student)["trainable"])
    effect.append(grade(student))
full = copy.deepcopy(base).requires_grad_(True)
fit(full, SHORT, lr=1e-3, size=SMALL)
whole = grade(full)
for r, n, (c, a) in zip(RANKS, counts, effect):
    zhixing.metric(f"params_r{r}", n)
    zhixing.metric(f"reached_r{r}", c / target)
    zhixing.metric(f"all_r{r}", a)
zhixing.metric("reached_full", whole[0] / target)
zhixing.metric("all_full", whole[1])
zhixing.metric("params_full", sum(p.numel() for p in full.parameters()))
assert counts == [r * counts[0] for r in RANKS]                 # 参数量与秩成正比
assert all(c > base_contrast + 0.1 for c, _ in effect), effect             # 最小的秩也学到了一些

fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3))
left.plot(curve.keys(), [m[0] / target for m in curve.values()], "o-", label="对比度 / 训练图")
left.plot(curve.keys(), [m[1] for m in curve.values()], "s--", label="描述正确率")
left.axhline(0.85, color="C2", lw=0.8, ls=":")
left.set(xlabel="训练步数", title=f"秩 {RANK}", ylim=(-0.1, 1.05))
left.legend(loc="lower right")
right.plot(counts, [c / target for c, _ in effect], "o-", label="对比度 / 训练图")
right.plot(counts, [a for _, a in effect], "s--", label="描述正确率")
right.axhline(whole[0] / target, color="C0", lw=0.8, ls=":", label="全量微调")
for n, r, (c, _) in zip(counts, RANKS, effect):
    right.annotate(f"r={r}", (n, c / target), xytext=(0, -14), textcoords="offset points", ha="center")
right.set(xlabel="可训练参数", xscale="log", title=f"各训 {SHORT} 步", ylim=(-0.1, 1.05))
right.legend(loc="lower right")
zhixing.figure("rank", fig)

# %% [markdown]
# ## 一步训练占的内存
#
# 同一批数据、AdamW，全量微调与 LoRA 各真的走一步。

# %%
parts = {}
for name, student in (("full", copy.deepcopy(base).requires_grad_(True)), ("lora", attach(RANK))):
    optimizer = train.adamw(student, 1e-4)[0]
    loss_fn, g = loss_of(student, 64), gen(1)
    parts[name] = memory.step_memory(student, lambda: loss_fn(g), optimizer)
full_, lora_ = parts["full"], parts["lora"]
for name, usage in parts.items():
    for key, short in (("参数", "param"), ("梯度", "grad"), ("优化器状态", "optim"), ("激活", "act")):
        zhixing.metric(f"{name}_{short}", usage[key] / 2**20)
    zhixing.metric(f"{name}_sum", sum(usage.values()) / 2**20)
assert lora_["梯度"] + lora_["优化器状态"] < 0.05 * (full_["梯度"] + full_["优化器状态"])
assert lora_["参数"] > full_["参数"] and lora_["激活"] > 0.7 * full_["激活"]

fig, ax = plt.subplots(figsize=(7, 1.9))
start = [0.0, 0.0]
for key in full_:
    width = [full_[key] / 2**20, lora_[key] / 2**20]
    ax.barh(["全量微调", f"LoRA 秩 {RANK}"], width, left=start, label=key)
    start = [a + b for a, b in zip(start, width)]
ax.invert_yaxis()
ax.set_xlabel("MiB")
ax.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
zhixing.figure("memory", fig)
