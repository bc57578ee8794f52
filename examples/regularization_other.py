# ---
# zhixing:
#   id: regularization_other
#   title: 正则化（二）：判别器、微调与自编码器
#   needs: [regularization]
#   timeout: 900
# ---

# %% [markdown]
# 示例 `regularization` 里的手段防过拟合、防坏批次、防抖动。这里的四种防别的：梯度惩罚与谱归一化防判别器太陡，先验保持防微调忘本，KL 项防潜空间失控。每个设置五个种子，画出区间。
#
# **预计耗时与内存**：单线程、机器空闲时几秒，峰值内存约 0.5 GB；网络太小，有 GPU 也用 CPU。

# %%
import math

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file
from torch import nn

import zhixing
from minisd import toy2d
from minisd.stacked2d import SEEDS, T, adam_state, adam_step, band, forward, mlp, per_member, sample

torch.set_num_threads(1)
torch.manual_seed(0)

truth = toy2d.taiji(SEEDS * 2000, torch.Generator().manual_seed(4)).view(SEEDS, 2000, 2)     # 真实的太极图

# %% [markdown]
# ## 判别器：梯度惩罚与谱归一化
#
# 真样本在半径 1 的圆上，假样本在半径 0.5 的圆上，完全分得开（训练初期的生成器就是这样）。只训判别器 400 步，看它在假样本处有多陡：那就是生成器收到的梯度的大小。

# %%
def critic(params, x):
    """x (M, B, 2) → 逻辑值 (M, B)。LeakyReLU 的斜率不超过 1。"""
    for k in range(0, len(params), 2):
        x = torch.baddbmm(params[k + 1], x, params[k])
        x = nn.functional.leaky_relu(x, 0.2) if k < len(params) - 2 else x
    return x[..., 0]


def train_critic(kind, steps=400):
    """返回每步的（假样本处的平均坡度，判别器损失），(steps, 2, SEEDS)。"""
    g = torch.Generator().manual_seed(5)
    params, log = mlp([2, 32, 32, 1], seed=4), []
    state = adam_state(params)
    left = [torch.randn(SEEDS, w.shape[1], 1, generator=g) for w in params[::2]]
    for _ in range(steps):
        used = params
        if kind == "谱归一化":                                                    # 每步一次幂迭代
            used = []
            for i, (w, b) in enumerate(zip(params[::2], params[1::2])):
                with torch.no_grad():
                    right = nn.functional.normalize(w.mT @ left[i], dim=1)
                    left[i] = nn.functional.normalize(w @ right, dim=1)
                used += [w / (left[i].mT @ w @ right), b]
        angle = 2 * math.pi * torch.rand(2, SEEDS, 64, generator=g)
        real, fake = torch.stack([angle.cos(), angle.sin()], -1).unbind(0)        # 各 (SEEDS, 64, 2)
        real, fake = real.requires_grad_(), (0.5 * fake).requires_grad_()
        on_real, on_fake = critic(used, real), critic(used, fake)
        loss = (nn.functional.softplus(-on_real) + nn.functional.softplus(on_fake)).mean(1)     # (SEEDS,)
        slope = torch.autograd.grad(on_fake.sum(), fake, retain_graph=True)[0].norm(dim=-1).mean(1)
        log.append(torch.stack([slope, loss.detach()]))
        if kind == "R1":
            pull = torch.autograd.grad(on_real.sum(), real, create_graph=True)[0]                # ∇D(真)
            loss = loss + 0.5 * pull.square().sum(-1).mean(1)                                    # γ/2 · ‖∇D‖²，γ = 1
        adam_step(params, torch.autograd.grad(loss.sum(), params), state, lr=2e-3)
    return torch.stack(log)


critics = {kind: train_critic(kind) for kind in ("无约束", "R1", "谱归一化")}
slope = {kind: log[-1, 0] for kind, log in critics.items()}
lost = {kind: log[-1, 1] for kind, log in critics.items()}
assert slope["无约束"].min() > 10 and lost["无约束"].max() < 0.05                  # 碾压：损失到 0，坡度还在涨
assert critics["无约束"][-1, 0].mean() > 1.2 * critics["无约束"][-200, 0].mean()
assert slope["R1"].max() < 1 and slope["谱归一化"].max() <= 1.001                  # 两种约束都压到 1 以下
assert min(lost["R1"].min(), lost["谱归一化"].min()) > 1                           # 于是损失停在 2ln2 附近
for kind, key in (("无约束", "free"), ("R1", "r1"), ("谱归一化", "sn")):
    print(f"{kind}：坡度 {slope[kind].mean():.2f}，损失 {lost[kind].mean():.3f}")
    zhixing.metric(f"slope_{key}", slope[kind].mean().item())
    zhixing.metric(f"critic_{key}", lost[kind].mean().item())

fig, axes = plt.subplots(1, 2, figsize=(8.4, 3))
for color, (kind, log) in zip(("C3", "C0", "C1"), critics.items()):
    for ax, row in zip(axes, (0, 1)):
        band(ax, range(len(log)), log[:, row], color, kind)
axes[0].set(xlabel="训练步数", ylabel="假样本处的坡度", yscale="log")
axes[1].set(xlabel="训练步数", ylabel="判别器损失", ylim=(0, None))
axes[1].axhline(2 * math.log(2), color="k", lw=0.6, ls=":")
axes[0].legend()
zhixing.figure("critic", fig)

# %% [markdown]
# ## 先验保持：微调五个点
#
# 从那里余弦退火的一组权重出发，用 5 个新点（右上角的一小团，条件 $c=1$）全参数微调。$c=0$ 是“类别”，它应当还画得出太极图。先验保持就是在损失里加一项：基座自己在 $c=0$ 下生成的样本。

# %%
saved = load_file(zhixing.input_path("regularization/base.safetensors"))
base = [saved[str(i)] for i in range(len(saved))]                                  # [W (SEEDS, i, o), b (SEEDS, 1, o), …]
g = torch.Generator().manual_seed(6)
subject = torch.tensor([1.9, 1.9]) + 0.05 * torch.randn(SEEDS, 5, 2, generator=g)     # (SEEDS, 5, 2)
prior = sample(base, 256, seed=7)                                                  # (SEEDS, 256, 2) 基座自己的样本
both = lambda z: z.repeat(2, *[1] * (z.ndim - 1))
strength = torch.tensor([0.0, 1.0]).repeat_interleave(SEEDS)                      # λ：前一半没有先验项
tuned = [both(p).requires_grad_() for p in base]
state = adam_state(tuned)
of = lambda z, n: z[:, torch.randint(z.shape[1], (n,), generator=g)]              # 随机抽 n 个
fixed = {"t": torch.randint(T, (SEEDS, 1024), generator=g), "eps": torch.randn(SEEDS, 1024, 2, generator=g)}
fixed = {name: both(v) for name, v in fixed.items()}
watch = {"类别": (both(truth[:, :1024]), 0.0), "主体": (both(of(subject, 1024)), 1.0)}
history = {name: [] for name in watch}
for k in range(401):
    if k % 20 == 0:
        with torch.no_grad():
            for name, (x0, c) in watch.items():
                value = per_member(tuned, x0, **fixed, c=torch.full(x0.shape[:2], c))
                history[name].append(value.view(2, SEEDS))
    t, eps = torch.randint(T, (2, SEEDS, 32), generator=g), torch.randn(2, SEEDS, 32, 2, generator=g)
    one, zero = torch.ones(2 * SEEDS, 32), torch.zeros(2 * SEEDS, 32)
    loss = per_member(tuned, both(of(subject, 32)), both(t[0]), both(eps[0]), c=one)
    loss = loss + strength * per_member(tuned, both(of(prior, 32)), both(t[1]), both(eps[1]), c=zero)
    adam_step(tuned, torch.autograd.grad(loss.sum(), tuned), state, lr=1e-3)

centre = both(subject.mean(1, keepdim=True))                                      # (2·SEEDS, 1, 2)
shown = {c: sample(tuned, 300, seed=8, c=c) for c in (0.0, 1.0)}
near = lambda x: (torch.cdist(x, centre)[..., 0] < 0.3).float().mean(-1)            # 落在主体附近的比例
leak = near(shown[0.0]).view(2, SEEDS)                               # 没说“主体”，也画出主体
made = near(shown[1.0]).view(2, SEEDS)                               # 说了“主体”，画对了
history = {name: torch.stack(v) for name, v in history.items()}                   # (记录次数, 2, SEEDS)
assert leak[0].min() > 0.5 and leak[1].max() < 0.1
assert made[1].mean() > 0.7 and made[0].mean() >= made[1].mean()                  # 代价：主体学得慢一点
assert history["类别"][-1, 0].min() > 1.5 * history["类别"][-1, 1].max()
for i, key in enumerate(("none", "prior")):
    zhixing.metric(f"leak_{key}", leak[i].mean().item())
    zhixing.metric(f"subject_{key}", made[i].mean().item())
print("泄漏", [round(v, 3) for v in leak.mean(1).tolist()], "主体", [round(v, 3) for v in made.mean(1).tolist()])

fig = plt.figure(figsize=(8.6, 2.9), dpi=150)
grid = fig.add_gridspec(1, 3, width_ratios=[1.5, 1, 1])
ax = fig.add_subplot(grid[0])
for i, (color, name) in enumerate((("C3", "不保持"), ("C0", "先验保持"))):
    band(ax, range(0, 401, 20), history["类别"][:, i], color, f"类别，{name}")
    band(ax, range(0, 401, 20), history["主体"][:, i], color, f"主体，{name}", ":")
ax.set(xlabel="微调步数", ylabel="噪声误差", ylim=(0, 2))
ax.legend(fontsize=8)
for i, name in enumerate(("不保持", "先验保持")):
    ax = fig.add_subplot(grid[i + 1])
    ax.scatter(*shown[0.0][i * SEEDS].T, s=2, color="C0", linewidths=0, rasterized=True)
    ax.scatter(*shown[1.0][i * SEEDS].T, s=2, color="C3", linewidths=0, rasterized=True)
    ax.set(title=name, xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), aspect="equal")
    ax.axis("off")
zhixing.figure("prior", fig)

# %% [markdown]
# ## KL 项：管住潜空间
#
# 二维的变分自编码器，潜变量也是二维，所以重建本来可以完美。只改 KL 项的权重 $\beta$，量四件事：重建误差、潜变量均值的标准差、后验的标准差，以及“从标准正态抽潜变量再解码”与数据的能量距离。

# %%
BETAS = (0.0, 1e-4, 1e-2, 0.1, 1.0)
K = len(BETAS)
every = lambda z: z.repeat(K, *[1] * (z.ndim - 1))
encoder, decoder = mlp([2, 32, 32, 4], seed=10, copies=K), mlp([2, 32, 32, 2], seed=11, copies=K)
beta = torch.tensor(BETAS).repeat_interleave(SEEDS)                                # (M,)
g, state = torch.Generator().manual_seed(12), adam_state(encoder + decoder)


def encode(x):
    """x (M, B, 2) → 后验的均值与对数方差，各 (M, B, 2)。"""
    return forward(encoder, x).chunk(2, -1)


scale_log = []
for k in range(800):
    x = every(toy2d.taiji(SEEDS * 64, g).view(SEEDS, 64, 2))
    mu, logvar = encode(x)
    z = mu + (logvar / 2).exp() * every(torch.randn(SEEDS, 64, 2, generator=g))    # 重参数化
    rebuilt = (forward(decoder, z) - x).square().sum(-1).mean(1)                   # (M,)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1).mean(1)           # (M,) KL(q ‖ N(0, I))
    adam_step(encoder + decoder, torch.autograd.grad((rebuilt + beta * kl).sum(), encoder + decoder), state, lr=4e-3)
    scale_log.append(mu.detach().std(1).mean(-1))                                  # (M,) 潜变量铺得多开


def energy_distance(a, b):
    """无偏的能量距离，同分布时期望为 0：a、b (M, n, 2) → (M,)。"""
    n = a.shape[1]
    within = lambda z: torch.cdist(z, z).sum((1, 2)) / (n * (n - 1))
    return 2 * torch.cdist(a, b).mean((1, 2)) - within(a) - within(b)


with torch.no_grad():
    x = every(truth[:, :1000])
    mu, logvar = encode(x)
    noise_z = every(torch.randn(SEEDS, 1000, 2, generator=g))
    made = forward(decoder, noise_z)                                               # 从先验生成
    back = forward(decoder, mu + (logvar / 2).exp() * noise_z)
    vae = {
        "重建误差": (back - x).square().sum(-1).mean(1),
        "均值的标准差": mu.std(1).mean(-1),
        "后验的标准差": (logvar / 2).exp().mean((1, 2)),
        "生成的能量距离": energy_distance(made, x),
    }
vae = {name: v.view(K, SEEDS) for name, v in vae.items()}
scale_log = torch.stack(scale_log).view(-1, K, SEEDS)
for name, v in vae.items():
    print(name, [round(u, 4) for u in v.mean(1).tolist()])

wide, gap, blur = vae["均值的标准差"], vae["生成的能量距离"], vae["重建误差"]
assert wide[0].min() > 2.5 and (wide[2] - 1).abs().max() < 0.15                    # β = 0：铺得很开；β = 0.01：接近 1
assert gap[0].min() > 10 * gap[2].max()                                            # 没有 KL：从先验抽的解码不出数据
assert blur[4].min() > 20 * blur[2].max() and wide[4].max() < 0.8                  # β = 1：重建坏了，后验往先验坍缩
for i, key in ((0, "0"), (2, "001"), (4, "1")):
    zhixing.metric(f"vae_rebuild_{key}", blur[i].mean().item())
    zhixing.metric(f"vae_scale_{key}", wide[i].mean().item())
    zhixing.metric(f"vae_gap_{key}", gap[i].mean().item())
    zhixing.metric(f"vae_posterior_{key}", vae["后验的标准差"][i].mean().item())

fig, axes = plt.subplots(1, 4, figsize=(9, 2.5), dpi=150, width_ratios=[1.5, 1, 1, 1])
for color, i, name in (("C3", 0, "0"), ("C0", 2, "0.01"), ("C1", 4, "1")):
    band(axes[0], range(800), scale_log[:, i], color, rf"$\beta$ = {name}")
axes[0].set(xlabel="训练步数", ylabel="潜变量均值的标准差", ylim=(0, None))
axes[0].legend()
for ax, i in zip(axes[1:], (0, 2, 4)):
    ax.scatter(*made[i * SEEDS].T, s=2, color="C0", linewidths=0, rasterized=True)
    ax.set(title=rf"从先验生成，$\beta$ = {BETAS[i]:g}", xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), aspect="equal")
    ax.title.set_fontsize(9)
    ax.axis("off")
zhixing.figure("kl", fig)
