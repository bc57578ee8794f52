# ---
# zhixing:
#   id: cfg
#   title: 无分类器引导：从二维混合到迷你 Stable Diffusion
#   needs: [clip, vae, base]
#   timeout: 900
# ---

# %% [markdown]
# 两组实验。先在二维高斯混合上训练小网络，看训练时**丢不丢条件**对 $\varepsilon_\varnothing$ 的影响：那里的答案有闭式。再用图像基座扫引导强度 $s$（$s=1$ 为不引导），训好的与欠训练的检查点各扫一遍，量准确率、多样性、颜色误差；最后试负提示词与两种压过饱和的办法。
#
# **预计耗时与内存**：单线程、机器空闲时约一分钟，峰值内存约 0.8 GB。二维的网络太小，有 GPU 也用 CPU。

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

import zhixing
from minisd import guidance, judge, mixture, pipeline, samplers, schedule, unet, world

# %% [markdown]
# ## 训练时丢不丢条件
#
# 三个类别，每类两个高斯。网络的输入是 $x_t$、步号与类别；第 4 个类别编号是“空”。三种丢弃率各训 3 个种子，再与解析的条件期望比。

# %%
torch.manual_seed(0)
s = schedule.cosine(1000)
CENTERS = torch.tensor([[-1.1, 0.2], [0.1, -0.7], [0.8, 0.9], [1.2, -0.4], [0.0, 0.3], [-0.3, 1.2]])
LABEL, STD, NULL = torch.tensor([0, 0, 1, 1, 2, 2]), 0.3, 3
everything = mixture.Mixture(CENTERS, STD)
exact = [mixture.Mixture(CENTERS[LABEL == c], STD) for c in range(3)] + [everything]      # 最后一个是无条件


class Net(nn.Module):
    """v_θ(x_t, t, c)：x (B, 2)，t (B,)，c (B,) ∈ {0, 1, 2, 空} → (B, 2)。"""

    def __init__(self, width=64):
        super().__init__()
        self.register_buffer("freq", torch.tensor([1.0, 2.0, 4.0]))
        self.label = nn.Embedding(4, width)
        self.enter = nn.Linear(2 + 6, width)
        self.body = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width),
                                  nn.SiLU(), nn.Linear(width, 2))  # fmt: skip

    def forward(self, x, t, c):
        u = (t / 1000 * torch.pi)[:, None] * self.freq                       # (B, 3)
        return self.body(self.enter(torch.cat([x, u.sin(), u.cos()], 1)) + self.label(c))


def fit(drop, seed, steps=1500, batch=256):
    """训练一个网络；每个样本以概率 drop 把类别换成“空”。"""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 4e-3, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x0, k = everything.sample(batch, g)
        c = torch.where(torch.rand(batch, generator=g) < drop, NULL, LABEL[k])
        t = torch.randint(1000, (batch,), generator=g)
        eps = torch.randn(batch, 2, generator=g)
        v = schedule.velocity(s, x0, t, eps)
        loss = (net(schedule.q_sample(s, x0, t, eps), t, c) - v).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return net


g = torch.Generator().manual_seed(9)
x0_test, k_test = everything.sample(4000, g)
t_test = torch.randint(1000, (4000,), generator=g)
x_test = schedule.q_sample(s, x0_test, t_test, torch.randn(4000, 2, generator=g))


@torch.no_grad()
def miss(net, c, truth):
    """与解析最优预测的均方差（v 的尺度）。"""
    want = schedule.convert(s, x_test, t_test, truth, "x0", "v")
    return (net(x_test, t_test, c) - want).square().mean().item()


best_null = everything.x0(s, x_test, t_test)
best_class = torch.stack([m.x0(s, x_test, t_test) for m in exact[:3]])[LABEL[k_test], torch.arange(4000)]


def walk(denoise, scale, n=600):
    """从固定的初始噪声出发，生成第 2 类（DDIM 25 步），(n, 2)。"""
    c = torch.full((n,), 2)
    start = torch.randn(n, 2, generator=torch.Generator().manual_seed(5))
    return samplers.sample(s, guidance.guided(denoise, c, torch.full((n,), NULL), scale), start, 25, "ddim", "v")


def perfect(x, t, c):
    """解析的去噪器，接口与网络相同：x (B, 2)，t (B,)，c (B,) → v (B, 2)。"""
    x0 = torch.stack([m.x0(s, x, t) for m in exact])[c, torch.arange(len(x))]
    return schedule.convert(s, x, t, x0, "x0", "v")


goal = {scale: walk(perfect, scale) for scale in (1, 3)}
astray = lambda net, scale: (walk(net, scale) - goal[scale]).norm(dim=1).mean().item()    # 同一噪声，终点差多远
DROPS, table = (0.0, 0.1, 0.5), {}
for drop in DROPS:
    nets = [fit(drop, seed) for seed in range(3)]
    table[drop] = torch.tensor([
        [miss(n, torch.full((4000,), NULL), best_null), miss(n, LABEL[k_test], best_class), astray(n, 1), astray(n, 3)]
        for n in nets
    ])                                                                       # (3, 4)
    key = f"{drop:g}".replace(".", "")
    for name, value in zip(("null", "cond", "plain", "guided"), table[drop].mean(0)):
        zhixing.metric(f"drop{key}_{name}", value)
    print(f"丢弃率 {drop}：", [[round(v, 3) for v in row] for row in table[drop].tolist()])
assert table[0.0][:, 0].min() > 8 * table[0.1][:, 0].max()                   # 不丢：空条件从没训过，ε_∅ 是乱的
assert table[0.0][:, 2].max() < 1.5 * table[0.1][:, 2].max()                 # 不引导时看不出问题
assert table[0.0][:, 3].min() > 2 * table[0.1][:, 3].max()                   # 拿乱的 ε_∅ 做引导，样本就走错了
assert table[0.5][:, 1].mean() > table[0.1][:, 1].mean()                     # 丢太多：有条件的一支学得少

# %% [markdown]
# ## 图像基座：扫引导强度
#
# 75 句完整描述，DPM-Solver++ 10 步，初始噪声固定，只变 $s$。颜色误差：判分器读到的颜色与标准色的距离（0–1 的 RGB 空间），读图时超出范围的像素先截断。多样性：同一句描述 16 个种子，量图形大小与位置的标准差，除以真实数据的同一个量。

# %%
trained = pipeline.StableDiffusion.load(*map(zhixing.input_path, ("clip/clip.safetensors", "vae/vae.safetensors", "base/unet.safetensors")))
rough = pipeline.load_weights(unet.UNet(), zhixing.input_path("base/early.safetensors"))
models = {"训好的": trained, "欠训练的": pipeline.StableDiffusion(trained.text_encoder, trained.vae, rough)}
device = "cuda" if torch.cuda.is_available() else "cpu"
for m in models.values():
    m.to(device)
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0)
probe = world.ALL[torch.randperm(150, generator=torch.Generator().manual_seed(3))[:75]]
repeated = world.ALL[torch.randperm(150, generator=torch.Generator().manual_seed(5))[:5]].repeat_interleave(16, 0)


def draw(model, attrs, scale, seed=7, negative=None, prompts=None, post=None):
    """文生图，引导用的是 guidance.guided；post(v, v_c) 可改写合成后的预测。→ (N, 3, 24, 24)"""
    prompts = prompts or world.captions(attrs)
    cond, null = model.encode(prompts), model.encode(negative or [""] * len(prompts))
    net = lambda x, t, c: model.unet(x, t, *c)
    denoise = guidance.guided(net, cond, null, scale)
    if post:
        plain = guidance.guided(net, cond, null, 1)
        merged = denoise
        denoise = lambda x, t: post(merged(x, t), plain(x, t))
    z = samplers.sample(model.schedule, denoise, model.noise(len(prompts), torch.Generator().manual_seed(seed)), 10, "dpm++")
    return model.vae.to_image(z).cpu()


def color_gap(images, attrs):
    """读到的颜色与描述里的标准色差多少，(N,)。"""
    return (judge.read(images).color - world.PALETTE[attrs[:, 0]]).norm(dim=1)


def spread(images):
    """同一句描述的 16 张图之间，图形大小（等效半径）与位置的标准差。"""
    m = judge.read(images).mask[:, 0]                                        # (80, S, S)
    grid = (torch.arange(m.shape[1]) + 0.5) / m.shape[1]
    place = torch.stack([(m.sum(1) * grid).sum(1), (m.sum(2) * grid).sum(1)], 1) / m.sum((1, 2))[:, None]
    within = lambda v: v.view(5, 16, -1).std(1).mean().item()
    return torch.tensor([within(m.mean((1, 2)).sqrt()), within(place)])


real = spread(world.draw(repeated, torch.Generator().manual_seed(0)).image)
curves, pictures = {}, {}
for name, model in models.items():
    rows = []
    for scale in SCALES:
        images, many = draw(model, probe, scale), draw(model, repeated, scale, seed=8)
        score = judge.score(images, probe)
        variety = (spread(many) / real).tolist()
        rows.append([score["all"], score["shape"], score["color"], color_gap(images, probe).mean().item(), *variety])
        pictures[name, scale] = images[:8]
        print(name, scale, [round(v, 3) for v in rows[-1]])
    curves[name] = dict(zip(("全对", "形状", "颜色", "颜色误差", "大小", "位置"), torch.tensor(rows).T))

at = {scale: i for i, scale in enumerate(SCALES)}
good, poor = curves["训好的"], curves["欠训练的"]
assert good["全对"][at[2.0]] >= 0.97 and good["全对"][at[1.0]] >= 0.85       # 训好的：不引导也大半对，没多少可涨
assert good["全对"].max() - good["全对"][at[1.0]] < poor["全对"].max() - poor["全对"][at[1.0]]   # 欠训练的涨得多
assert poor["形状"][at[2.0]] > poor["形状"][at[1.0]] + 0.1                   # 涨在形状上
for c in (good, poor):
    assert c["全对"][at[7.5]] < c["全对"].max() - 0.3                        # 7.5 在这里是灾难
    assert c["颜色误差"][at[7.5]] > 2 * c["颜色误差"][at[1.0]]               # 掉在颜色上
    assert (c["位置"].diff() < 0).all()                                      # 位置的多样性单调变小
    assert c["大小"][at[7.5]] < 0.6 * c["大小"][at[1.0]]
for name, key in (("训好的", "good"), ("欠训练的", "poor")):
    for scale in (1.0, 1.5, 2.0, 5.0, 7.5):
        tag = f"{scale:g}".replace(".", "")
        for column, label in (("全对", "all"), ("形状", "shape"), ("颜色", "color"), ("颜色误差", "gap"), ("位置", "place"), ("大小", "size")):
            zhixing.metric(f"{key}_{label}_{tag}", curves[name][column][at[scale]].item())

# %%
fig, axes = plt.subplots(1, 3, figsize=(8.6, 2.9), sharex=True)
for color, name in (("C0", "训好的"), ("C1", "欠训练的")):
    c = curves[name]
    axes[0].plot(SCALES, c["全对"], "o-", ms=3, color=color, label=name)
    axes[0].plot(SCALES, c["形状"], ":", color=color)
    axes[1].plot(SCALES, c["位置"], "o-", ms=3, color=color)
    axes[1].plot(SCALES, c["大小"], ":", color=color)
    axes[2].plot(SCALES, c["颜色误差"], "o-", ms=3, color=color)
axes[0].set(xlabel="引导强度 s", ylabel="正确率", title="实线：全对；点线：只看形状", ylim=(0, 1.05))
axes[1].set(xlabel="引导强度 s", ylabel="相对真实数据", title="实线：位置；点线：大小", ylim=(0, 1.05))
axes[2].set(xlabel="引导强度 s", ylabel="RGB 距离", title="颜色误差", ylim=(0, None))
axes[2].axhline(judge.COLOR_LIMIT, color="k", lw=0.8, ls="--")
axes[0].legend()
for ax in axes:
    ax.title.set_fontsize(9.5)
zhixing.figure("curves", fig)

# %%
SHOWN = (1.0, 2.0, 3.0, 5.0, 7.5, 10.0)
fig, axes = plt.subplots(6, 17, figsize=(9, 3.6), width_ratios=[1] * 8 + [0.6] + [1] * 8)
for r, scale in enumerate(SHOWN):
    for half, name in enumerate(models):
        for c in range(8):
            ax = axes[r, 9 * half + c]
            ax.imshow(((pictures[name, scale][c] + 1) / 2).clamp(0, 1).permute(1, 2, 0))
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if r == 0 and c == 3:
                ax.set_title(name, fontsize=10, loc="left")
    axes[r, 8].axis("off")
    axes[r, 0].set_ylabel(f"{scale:g}", rotation=0, ha="right", va="center")
zhixing.figure("grid", fig)

# %% [markdown]
# 每个 $s$ 单独画大一点：正文里拖滑条看。

# %%
for scale in SHOWN:
    fig, axes = plt.subplots(2, 8, figsize=(7.2, 2.1))
    for row, name in zip(axes, models):
        for ax, picture in zip(row, pictures[name, scale]):
            ax.imshow(((picture + 1) / 2).clamp(0, 1).permute(1, 2, 0))
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        row[0].set_ylabel(name)
    zhixing.figure(f"s_{scale:g}".replace(".", ""), fig)

# %% [markdown]
# ## 负提示词
#
# “一个圆”没说颜色和位置。把空条件换成“红色的圆”或“圆在左上”，数一数画出来的是什么。

# %%
N = 96
counts = {}
for name, negative in (("空", ""), ("红色的圆", "红色的圆"), ("圆在左上", "圆在左上")):
    images = draw(trained, None, 2.0, seed=3, prompts=["一个圆"] * N, negative=[negative] * N)
    attrs = judge.read(images).attrs
    counts[name] = {
        "颜色": attrs[:, 0][attrs[:, 0] >= 0].bincount(minlength=6) / N,
        "位置": attrs[:, 2][attrs[:, 2] >= 0].bincount(minlength=5) / N,
        "圆": (attrs[:, 1] == 0).float().mean().item(),
        "图": images[:8],
    }
    print(name, *([round(v, 3) for v in counts[name][key].tolist()] for key in ("颜色", "位置")), round(counts[name]["圆"], 3))
RED, CYAN, TOP_LEFT = 0, 5, 0
assert counts["空"]["颜色"].min() > 0.05                                      # 没说颜色：六种都有
assert counts["空"]["颜色"][RED] > 0.1 and counts["红色的圆"]["颜色"][RED] < 0.04          # 红的没了
assert counts["空"]["位置"][TOP_LEFT] > 0.07 and counts["圆在左上"]["位置"][TOP_LEFT] < 0.02
assert counts["红色的圆"]["圆"] > 0.95                                       # “圆”两边都有，抵消，不受影响
assert counts["红色的圆"]["颜色"][CYAN] > 2 * counts["空"]["颜色"][CYAN]      # 不是“随便换一种”，是推到反面
assert counts["圆在左上"]["颜色"].max() < 0.4                                # 位置的负提示不动颜色
for name, key in (("空", "none"), ("红色的圆", "red"), ("圆在左上", "corner")):
    zhixing.metric(f"negative_{key}_red", counts[name]["颜色"][RED].item())
    zhixing.metric(f"negative_{key}_cyan", counts[name]["颜色"][CYAN].item())
    zhixing.metric(f"negative_{key}_corner", counts[name]["位置"][TOP_LEFT].item())
    zhixing.metric(f"negative_{key}_circle", counts[name]["圆"])

fig, axes = plt.subplots(3, 8, figsize=(7, 2.8))
for row, (name, c) in zip(axes, counts.items()):
    for ax, image in zip(row, c["图"]):
        ax.imshow(((image + 1) / 2).clamp(0, 1).permute(1, 2, 0))
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    row[0].set_ylabel("负：" + name, rotation=0, ha="right", va="center")
zhixing.figure("negative", fig)

# %% [markdown]
# ## 压过饱和
#
# 同样是 7.5：一种按样本把预测的标准差拉回有条件预测的水平（`guidance.rescale`）；另一种只在中间一段噪声水平上引导，两头不引导。

# %%
def windowed(attrs, scale):
    """只在 0.05 < SNR < 5 的步上引导。"""
    cond, null = trained.encode(world.captions(attrs)), trained.encode([""] * len(attrs))
    net = lambda x, t, c: trained.unet(x, t, *c)
    strong, plain = guidance.guided(net, cond, null, scale), guidance.guided(net, cond, null, 1)
    denoise = lambda x, t: strong(x, t) if 0.05 < trained.schedule.snr[t[0]] < 5 else plain(x, t)
    z = samplers.sample(trained.schedule, denoise, trained.noise(len(attrs), torch.Generator().manual_seed(7)), 10, "dpm++")
    return trained.vae.to_image(z).cpu()


fixes = {
    "原样": draw(trained, probe, 7.5),
    "rescale 0.7": draw(trained, probe, 7.5, post=lambda v, c: guidance.rescale(v, c, 0.7)),
    "rescale 1": draw(trained, probe, 7.5, post=lambda v, c: guidance.rescale(v, c, 1)),
    "只在中段": windowed(probe, 7.5),
}
fixed = {name: (judge.score(x, probe)["all"], color_gap(x, probe).mean().item()) for name, x in fixes.items()}
for (name, (right, gap)), key in zip(fixed.items(), ("plain", "rescale07", "rescale1", "window")):
    print(f"{name}：全对 {right:.2f}，颜色误差 {gap:.3f}")
    zhixing.metric(f"fix_{key}_all", right)
    zhixing.metric(f"fix_{key}_gap", gap)
for name in ("rescale 0.7", "rescale 1", "只在中段"):
    assert fixed[name][0] > fixed["原样"][0] + 0.2 and fixed[name][1] < 0.8 * fixed["原样"][1]
