# ---
# zhixing:
#   id: stable_diffusion
#   title: 拆开迷你 Stable Diffusion
#   needs: [clip, vae, base]
#   timeout: 900
# ---

# %% [markdown]
# 基座已经训好，这里不再训练，只把它拆开来量：像素空间要贵多少；采样途中每一步看到什么；每个词的注意力落在哪里，又是哪个词真正决定了颜色、形状、位置；走几步够用；没见过的组合难多少。
#
# **预计耗时与内存**：单线程、机器空闲时半分多钟，峰值内存约 0.8 GB。

# %%
import statistics
import time

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import zhixing
from minisd import judge, pipeline, samplers, schedule, unet, world

sd = pipeline.StableDiffusion.load(
    zhixing.input_path("clip/clip.safetensors"), zhixing.input_path("vae/vae.safetensors"), zhixing.input_path("base/unet.safetensors")
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def show(ax, picture, title=""):
    """画一张图：picture (3, S, S)，[-1, 1]。"""
    ax.imshow(((picture + 1) / 2).clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
    ax.set_title(title, fontsize=8)
    ax.axis("off")


# %% [markdown]
# ## 像素空间要贵多少
#
# 同一个 U-Net，一次在 6×6×4 的潜变量上，一次在 24×24×3 的像素上。浮点运算数在 meta 设备上数（只推形状，不算数；CPU 上的融合注意力算子不会被计数，meta 上拆成矩阵乘，才数得全）；时间是前向加反向的实测，两边交替着量，取中位数；显存的大头是为反向留下的激活，用 autograd 的钩子数字节。

# %%
def flops(channels, side):
    """一张图过一次 U-Net 的浮点运算数（一次乘加算两次）。"""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        words = torch.zeros(1, 12, 64), torch.ones(1, 12, dtype=torch.bool)
        unet.UNet(channels, channels)(torch.zeros(1, channels, side, side), torch.zeros(1), *words)
    return counter.get_total_flops()


def train_step(net, channels, side, batch=8):
    """前向加反向一次：(秒, 为反向保存的激活字节数)。"""
    text, valid = sd.encode(["红色的圆在左上"] * batch)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()     # 同一块内存只算一次
        return tensor

    begin = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(torch.randn(batch, channels, side, side), torch.randint(1000, (batch,)), text, valid).square().mean().backward()
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    return time.perf_counter() - begin, sum(size for where, size in kept.items() if where not in weights)


spaces = {"latent": (4, 6), "pixel": (3, 24)}
nets = {name: unet.UNet(c, c) for name, (c, _) in spaces.items()}
runs = {name: [] for name in spaces}
for _ in range(4):
    for name, (c, side) in spaces.items():
        runs[name].append(train_step(nets[name], c, side))
cost = {
    "flops": {name: flops(*spaces[name]) for name in spaces},
    "seconds": {name: statistics.median(s for s, _ in runs[name][1:]) for name in spaces},      # 第一次是热身
    "bytes": {name: runs[name][-1][1] for name in spaces},
}
for kind, value in cost.items():
    zhixing.metric(f"pixel_{kind}_ratio", value["pixel"] / value["latent"])
zhixing.metric("latent_mflops", cost["flops"]["latent"] / 1e6)
zhixing.metric("pixel_mflops", cost["flops"]["pixel"] / 1e6)
assert cost["flops"]["pixel"] > 16 * cost["flops"]["latent"]           # 位置多 16 倍；自注意力还要更贵
assert cost["bytes"]["pixel"] > 14 * cost["bytes"]["latent"]
assert cost["seconds"]["pixel"] > 4 * cost["seconds"]["latent"]        # 小网络有固定开销，实测比值小于运算量的比值

sides = [4, 8, 16, 32, 64]
by_side = torch.tensor([flops(4, side) for side in sides], dtype=torch.float64)
growth = (by_side[1:] / by_side[:-1]).tolist()
zhixing.metric("flops_growth_first", growth[0])
zhixing.metric("flops_growth_last", growth[-1])
assert growth == sorted(growth) and growth[0] < 4.2 and growth[-1] > 8     # 边长翻倍：从 4 倍涨到接近 16 倍

fig, (ax, bx) = plt.subplots(1, 2, figsize=(8, 2.9), layout="constrained")
names = ["浮点运算", "训练一步的时间", "留给反向的激活"]
ax.bar(names, [value["pixel"] / value["latent"] for value in cost.values()], color=["C0", "C1", "C2"])
ax.axhline(16, color="k", ls=":", lw=1)
ax.annotate("位置数：16 倍", (2.45, 16.3), ha="right", va="bottom", fontsize=8)
ax.set(ylabel="像素空间 ÷ 潜空间", title="24×24×3 对 6×6×4")
bx.loglog(sides, by_side / 1e6, marker="o", label="U-Net 前向")
bx.loglog(sides, by_side[0] / 1e6 * (torch.tensor(sides) / sides[0]) ** 2, "k:", lw=1, label="与位置数成正比")
bx.set(xlabel="输入边长", ylabel="百万次浮点运算", title="边长翻倍要贵几倍", xticks=sides, xticklabels=sides)
bx.minorticks_off()
bx.legend()
zhixing.figure("cost", fig)

# %% [markdown]
# ## 采样途中
#
# 上面量的是 CPU 上的时间；从这里起有 GPU 就用 GPU。
#
# 上一行是轨迹上的 $z_t$ 直接解码；下一行是网络在那一步猜的 $\hat z_0$ 解码出来。网络每一步都猜终点，日程决定往那里挪多少。

# %%
device = "cuda" if torch.cuda.is_available() else "cpu"
sd.to(device)
prompt = ["紫色的星星在右下"]
denoise = sd.denoiser(prompt, 2.0)
path, x, frames = samplers.timesteps(1000, 12), sd.noise(1, seeded(3)), []
with torch.no_grad():
    for t, t_next in zip(path, [*path[1:], -1]):
        v = denoise(x, torch.tensor([t], device=device))
        guess, _ = schedule.split(sd.schedule, x, t, v, "v")
        frames.append((t, *(sd.vae.to_image(z)[0].cpu() for z in (x, guess))))
        x = samplers.ddim_step(sd.schedule, x, t, t_next, v, "v")
final = sd.vae.to_image(x)
assert judge.score(final, world.ALL[torch.tensor([4 * 25 + 4 * 5 + 3])])["all"] == 1
# 从猜测的终点看，布局先定：第一步猜的就已经偏向右下
dark = lambda picture: (1 - picture.mean(0)).clamp(min=0)                        # 离白有多远 (S, S)
assert dark(frames[0][2])[12:, 12:].mean() > 1.2 * dark(frames[0][2])[:12, :12].mean()

picks = [0, 2, 4, 6, 8, 10, 11]
fig, axes = plt.subplots(2, len(picks), figsize=(8, 2.7), layout="constrained")
for (top, bottom), k in zip(axes.T, picks):
    t, noisy, guess = frames[k]
    show(top, noisy, f"t = {t}")
    show(bottom, guess)
zhixing.figure("trajectory", fig)

# %% [markdown]
# ## 每个词看哪里
#
# 采样时在七个交叉注意力层上挂钩子，取 softmax 之后的权重，平均到各层、各头，缩放到 6×6。为了逐词对齐，只用两个字的形状，描述就都是“紫色的星星在右下”这样的 8 个字，加首尾标记共 10 位。

# %%
WORDS = {"始": [0], "颜色字": [1], "色": [2], "的": [3], "形状词": [4, 5], "在": [6], "位置词": [7, 8], "终": [9]}
STEPS = 10


def two_characters(n, generator):
    """抽 n 个场景，形状都是两个字的。→ (n, 3)"""
    pool = world.ALL[world.ALL[:, 1] > 0]
    return pool[torch.randint(len(pool), (n,), generator=generator)]


def draw(text, valid, seed):
    """由文本特征直接画图，w = 1。text (B, L, D) → (B, 3, 24, 24)"""
    z = sd.noise(len(text), seeded(seed))
    return sd.vae.to_image(samplers.sample(sd.schedule, lambda x, t: sd.unet(x, t, text, valid), z, STEPS)).detach().cpu()


def attend(text, valid, seed):
    """边画边记注意力：图 (B, 3, 24, 24)、热力图 (步, 层, B, L, 6, 6)、第一张图逐头的 (步, 层, 头, L, 6, 6)。"""
    seen, heads = [], []

    def record(layer, inputs):
        x, cond = inputs
        w = layer.weights(x, cond.text, cond.valid).transpose(2, 3)                # (B, 头, L, HW)
        side = int(w.shape[-1] ** 0.5)
        w = w.unflatten(-1, (side, side)).detach().cpu()
        seen.append(F.interpolate(w.mean(1), size=(6, 6)))                         # (B, L, 6, 6) 各头平均
        heads.append(F.interpolate(w[0], size=(6, 6)))                             # (头, L, 6, 6) 第一张图的，不平均

    hooks = [m.register_forward_pre_hook(record) for m in sd.unet.modules() if isinstance(m, unet.CrossAttention)]
    images = draw(text, valid, seed)
    for hook in hooks:
        hook.remove()
    return images, *(torch.stack(each).unflatten(0, (STEPS, len(hooks))) for each in (seen, heads))


attrs = two_characters(60, seeded(3))
captions = world.captions(attrs)
images, maps, heads = attend(*sd.encode(captions), seed=0)
assert torch.allclose(heads.mean(2), maps[:, :, 0], atol=1e-6)       # 各头平均就是上面的热力图
assert judge.score(images, attrs)["all"] > 0.9
zhixing.metric("cross_attention_layers", maps.shape[1])

# %% [markdown]
# 两个读数。**内外比**：一个词分到的注意力里，落在物体上的占多少，除以物体占的面积；等于 1 就是里外一样。**位置相关**：热力图的重心与物体应在的位置，横纵坐标合起来的相关系数。

# %%
inside = F.adaptive_avg_pool2d(judge.read(images).mask, 6)[:, 0]                    # (B, 6, 6) 物体在哪些格子里
inside = inside / inside.mean((1, 2), keepdim=True)
grid = (torch.arange(6) + 0.5) / 6


def per_word(heat):
    """(B, L, 6, 6) → 每个词 (B, 6, 6)，和为 1。"""
    together = {word: heat[:, where].mean(1) for word, where in WORDS.items()}
    return {word: h / h.sum((1, 2), keepdim=True) for word, h in together.items()}


def focus(h):
    """内外比的平均。"""
    return (h * inside).sum((1, 2)).mean().item()


def follows(h):
    """热力图重心与物体位置的相关系数。"""
    center = torch.stack([h.sum(1) @ grid, h.sum(2) @ grid], 1)                     # (B, 2) 横、纵
    return torch.corrcoef(torch.stack([center.flatten(), world.CENTERS[attrs[:, 2]].flatten()]))[0, 1].item()


average = per_word(maps.mean((0, 1)))
ratio = {word: focus(h) for word, h in average.items()}
correlation = {word: follows(h) for word, h in average.items()}
for word in WORDS:
    print(f"{word}：内外比 {ratio[word]:.2f}，位置相关 {correlation[word]:+.2f}")
for key, word in {"color": "颜色字", "shape": "形状词", "place": "位置词", "end": "终", "of": "的"}.items():
    zhixing.metric(f"inside_{key}", ratio[word])
    zhixing.metric(f"follow_{key}", correlation[word])
best, least = max(ratio, key=ratio.get), min(ratio, key=ratio.get)
zhixing.metric("brightest_word", best)
zhixing.metric("brightest_ratio", ratio[best])
zhixing.metric("brightest_follow", correlation[best])
zhixing.metric("darkest_word", least)
zhixing.metric("darkest_ratio", ratio[least])
zhixing.metric("darkest_follow", correlation[least])
assert ratio[best] > 1.2 and correlation[best] > 0.5                # 有的词紧跟着物体
assert ratio[least] < 0.95 and correlation[least] < -0.5             # 有的词专看背景
assert ratio["颜色字"] > 1.1                                        # 颜色字偏向物体
assert correlation["位置词"] < 0.5 and ratio["位置词"] < 1.3   # 位置词不指着那个位置

# %%
fig, axes = plt.subplots(4, 11, figsize=(8.6, 3.7), layout="constrained")
for row, k in zip(axes, (0, 1, 4, 7)):
    show(row[0], images[k])
    heat = maps.mean((0, 1))[k]                                                     # (L, 6, 6)
    for ax, h, token in zip(row[1:], heat, ["始", *captions[k], "终"]):
        ax.imshow(h, cmap="viridis", vmin=0, vmax=heat.max())
        ax.set_title(token, fontsize=8)
        ax.axis("off")
zhixing.figure("heat", fig)

# %% [markdown]
# 平均之前，各头看的地方并不一样。第一张图，每个头一张：行是层（浅到深再到浅），列是字。

# %%
tokens = ["始", *captions[0], "终"]
for k, head in enumerate(heads.mean(0).transpose(0, 1), 1):                         # (层, L, 6, 6)
    fig, axes = plt.subplots(len(head), len(tokens), figsize=(6.2, 4.4), layout="constrained")
    for row, layer in zip(axes, head):
        for ax, h in zip(row, layer):
            ax.imshow(h, cmap="viridis", vmin=0, vmax=layer.max())
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    for ax, token in zip(axes[0], tokens):
        ax.set_title(token, fontsize=8)
    for n, ax in enumerate(axes[:, 0], 1):
        ax.set_ylabel(f"第 {n} 层", fontsize=7, rotation=0, ha="right", va="center")
    zhixing.figure(f"head_{k}", fig)
last = heads.mean(0)[:, :, 9]                                                        # (层, 头, 6, 6) “终”的
each = (last * inside[0]).mean((2, 3)) / last.mean((2, 3))                          # “终”在每层每头的内外比
zhixing.metric("head_ratio_low", each.min().item())
zhixing.metric("head_ratio_high", each.max().item())
assert each.max() > 1.5 * each.min()                                                # 头与头差得远

# %%
fig, (ax, bx) = plt.subplots(1, 2, figsize=(8, 2.9), layout="constrained")
every = [per_word(m.mean(0)) for m in maps]                                         # 每一步，各层平均
for word, color in {"颜色字": "C0", "形状词": "C1", "位置词": "C2", "的": "C4", "终": "C3"}.items():
    ax.plot(range(1, STEPS + 1), [focus(h[word]) for h in every], marker=".", color=color, label=word)
ax.axhline(1, color="k", ls=":", lw=1)
ax.set(xlabel="采样第几步", ylabel="内外比", title="随采样进行")
bx.bar(range(len(WORDS)), ratio.values(), color="C0", width=0.4, align="edge", label="内外比")
bx.bar([k - 0.4 for k in range(len(WORDS))], correlation.values(), color="C1", width=0.4, align="edge", label="位置相关")
bx.axhline(1, color="k", ls=":", lw=1)
bx.axhline(0, color="k", lw=0.6)
bx.set(xticks=range(len(WORDS)), xticklabels=WORDS, title="各步各层平均")
ax.legend(fontsize=7)
bx.legend(fontsize=7)
zhixing.figure("heat_steps", fig)

# %% [markdown]
# ## 哪个词真的管用
#
# 热力图只说“读了谁”，没说“读到了什么”。换一种问法：两句描述只差一个属性，把其中**一个词**的特征换成另一句里的，其余不动，再画一张，看这个属性变没变。

# %%
SIZES = {"颜色": (0, 6), "形状": (1, 5), "位置": (2, 5)}
original = two_characters(30, seeded(5))
kept, moved = {}, {}                                                # 换掉某个词后：保持原属性、变成新属性的比例
for name, (column, size) in SIZES.items():
    other = original.clone()
    step = torch.randint(1, size - (column == 1), (len(other),), generator=seeded(column))
    first = int(column == 1)                                        # 形状只在两个字的里面换
    other[:, column] = (original[:, column] - first + step) % (size - first) + first
    assert (other != original).sum() == len(other)
    (text, valid), (swapped, also) = sd.encode(world.captions(original)), sd.encode(world.captions(other))
    assert torch.equal(valid, also)                                 # 长度一样，逐位对得上
    for word, where in {"不换": [], **WORDS, "全换": list(range(10))}.items():
        mixed = text.clone()
        mixed[:, where] = swapped[:, where]
        got = judge.read(draw(mixed, valid, seed=1)).attrs[:, column]
        kept[name, word] = (got == original[:, column]).float().mean().item()
        moved[name, word] = (got == other[:, column]).float().mean().item()
    print(name, *(f"{word} {kept[name, word]:.2f}→{moved[name, word]:.2f}" for word in ["不换", *WORDS, "全换"]))

OWN = {"颜色": "颜色字", "形状": "形状词", "位置": "位置词"}
for key, name in {"color": "颜色", "shape": "形状", "place": "位置"}.items():
    assert kept[name, "不换"] > 0.85 and moved[name, "全换"] > 0.85
    assert min(WORDS, key=lambda word: kept[name, word]) == OWN[name]            # 换自己的词，掉得最多
    assert kept[name, OWN[name]] < 0.6
    zhixing.metric(f"swap_{key}_kept", kept[name, OWN[name]])
    zhixing.metric(f"swap_{key}_moved", moved[name, OWN[name]])
    zhixing.metric(f"swap_{key}_end", kept[name, "终"])
    zhixing.metric(f"swap_{key}_brightest", kept[name, best])
assert moved["位置", "位置词"] > 0.5                                # 热力图上看不出方向的词，恰恰决定位置

fig, ax = plt.subplots(figsize=(7.4, 2.8), layout="constrained")
for k, (name, color) in enumerate(zip(SIZES, ("C0", "C1", "C2"))):
    ax.bar([i + (k - 1) * 0.27 for i in range(len(WORDS))], [1 - kept[name, word] for word in WORDS], 0.27, color=color, label=f"{name}变了")
ax.set(xticks=range(len(WORDS)), xticklabels=WORDS, ylabel="属性改变的比例", ylim=(0, 1.05), xlabel="只换掉这个词的特征")
ax.legend()
zhixing.figure("swap", fig)

# %% [markdown]
# ## 走几步够用
#
# 60 句描述，$w=2$，同一批初始噪声。步数越少越快，质量从哪里开始掉？

# %%
budget = [1, 2, 3, 4, 6, 8, 12, 20]
probe = world.ALL[torch.randint(150, (60,), generator=seeded(21))]
quality = {method: [] for method in ("ddim", "dpm++")}
for method, scores in quality.items():
    for steps in budget:
        scores.append(judge.score(sd(world.captions(probe), seeded(22), steps=steps, method=method), probe))
for method, scores in quality.items():
    print(method, *(f"{steps} 步 {score['all']:.2f}" for steps, score in zip(budget, scores)))
full = {method: [score["all"] for score in scores] for method, scores in quality.items()}
enough = next(steps for k, steps in enumerate(budget) if all(min(full[m][k:]) >= 0.95 for m in full))
zhixing.metric("steps_enough", enough)
zhixing.metric("one_step_all", full["ddim"][0])
zhixing.metric("one_step_place", quality["ddim"][0]["place"])
assert full["ddim"][0] < 0.5 and enough <= 12
assert quality["ddim"][0]["place"] > full["ddim"][0] + 0.3          # 一步就定得下位置，颜色形状还不行

fig, (ax, bx) = plt.subplots(1, 2, figsize=(8, 2.9), layout="constrained")
for method, marker in {"ddim": "o", "dpm++": "s"}.items():
    ax.plot(budget, full[method], marker=marker, label=method)
for key, name in {"place": "位置", "shape": "形状", "color": "颜色"}.items():
    bx.plot(budget, [score[key] for score in quality["ddim"]], marker="o", label=name)
for axis, title in ((ax, "全对"), (bx, "DDIM，分项")):
    axis.set(xscale="log", xticks=budget, xticklabels=budget, xlabel="采样步数", ylim=(-0.03, 1.05), title=title)
    axis.minorticks_off()
    axis.legend()
ax.set_ylabel("正确率")
zhixing.figure("steps", fig)

# %% [markdown]
# ## 没见过的组合
#
# 训练完的基座在两组上都接近满分，看不出差别；拿 300 步的欠训练检查点来比，才看得出没见过的组合是不是更难。

# %%
rough = pipeline.StableDiffusion(sd.text_encoder, sd.vae, pipeline.load_weights(unet.UNet(), zhixing.input_path("base/early.safetensors"))).to(device)
groups = {"seen": world.SEEN, "held_out": world.HELD_OUT.repeat(5, 1)}
early = {}
for name, combos in groups.items():
    early[name] = judge.score(rough(world.captions(combos), seeded(31), steps=STEPS), combos)
    for key, value in early[name].items():
        zhixing.metric(f"early_{name}_{key}", value)
    print(name, {k: round(v, 2) for k, v in early[name].items()})
assert early["seen"]["all"] < 0.95                                  # 确实没训够，才比得出来
assert early["held_out"]["all"] > early["seen"]["all"] - 0.3        # 没见过的不是“完全不会”：瞎猜只有 1/150
