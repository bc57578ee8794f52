# ---
# zhixing:
#   id: gan
#   title: 二维上的 GAN：收敛、坍塌与震荡
#   needs: []
#   timeout: 900
# ---

# %% [markdown]
# 数据是环上的八个高斯，每一团都看得见，所以“漏了几团”“准不准”可以直接数。把几十个小 GAN 并排训练，一次跑完整张消融表：哪一个因素让它收敛、坍塌、震荡；再训一个 WGAN-GP，看评论家的估计是不是真的跟着样本质量走。
#
# **预计耗时与内存**：单线程、机器空闲时约半分钟，峰值内存约 0.4 GB；网络太小，有 GPU 也用 CPU。大头是 51 个 GAN 各训 1200 步。

# %%
import itertools
import math
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch

import zhixing
from minisd import gan, parallel, ring

torch.set_num_threads(1)

STEPS, BATCH, HIDDEN, SEEDS, EVERY = 1200, 96, 64, 3, 100


# %% [markdown]
# ## 训练：与教科书上的算法逐行对应
#
# 每个配置有四个旋钮：Adam 的 β₁、潜变量维数、R1 的系数 γ、判别器的学习率。同一次调用里的 GAN 除了旋钮不同，其余完全一样；随机数各用各的。

# %%
class Config(NamedTuple):
    beta1: float
    latent: int
    gamma: float = 0.0       # R1 的系数
    lr_d: float = 1e-3       # 判别器的学习率；生成器恒为 1e-3


class Run(NamedTuple):
    losses: torch.Tensor     # (STEPS, 2) 判别器、生成器的损失，不含惩罚项
    shots: torch.Tensor      # (STEPS / EVERY, 1000, 2) 每隔 EVERY 步的样本


def train(configs, seed=0):
    """并排训练 R 个 GAN，返回 R 个 Run。潜变量的维数、用不用 R1 须相同（形状与计算图才一样）。"""
    R, latent, penalized = len(configs), configs[0].latent, configs[0].gamma > 0
    knob = lambda name: torch.tensor([getattr(c, name) for c in configs])  # (R,)
    gamma = knob("gamma")
    g = torch.Generator().manual_seed(seed)
    G = parallel.init(R, (latent, HIDDEN, HIDDEN, 2), g)
    D = parallel.init(R, (2, HIDDEN, HIDDEN, 1), g)
    opt_g = parallel.Adam(G, torch.full((R,), 1e-3), knob("beta1"))
    opt_d = parallel.Adam(D, knob("lr_d"), knob("beta1"))
    generate = lambda n: parallel.forward(G, torch.randn(R, n, latent, generator=g))   # (R, n, 2)
    logit = lambda x: parallel.forward(D, x).squeeze(-1)           # (R, n)
    losses, shots = [], []
    for step in range(STEPS):
        x = ring.ring((R, BATCH), g).requires_grad_(penalized)
        with torch.no_grad():                                      # 对判别器来说，假样本是常数
            y = generate(BATCH)
        real = logit(x)
        loss_d = gan.discriminator_loss(real, logit(y))            # (R,)
        opt_d.step(loss_d + gamma * gan.r1(real, x) if penalized else loss_d)
        loss_g = gan.generator_loss(logit(generate(BATCH)))        # (R,) 非饱和；重新抽一批
        opt_g.step(loss_g)
        losses.append(torch.stack([loss_d, loss_g], 1).detach())
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                shots.append(generate(1000))
    losses, shots = torch.stack(losses, 1), torch.stack(shots, 1)  # (R, STEPS, 2)，(R, S, 1000, 2)
    assert losses.isfinite().all()
    return [Run(*pair) for pair in zip(losses, shots)]


# %% [markdown]
# ## 消融表：β₁ × 潜变量维数 × R1
#
# 3 × 2 × 2 = 12 格，每格三个种子。另加一组判别器学得快四倍的，它是挑出来展示坍塌的；再逐个改回一个因素，看谁救得了它。最后一个配置 R1 的系数大到 100，留到“损失好看”那一节用。

# %%
grid = [Config(*knobs) for knobs in itertools.product((0.0, 0.5, 0.9), (2, 64), (0.0, 1.0))]
collapse = Config(0.5, 64, lr_d=4e-3)
rescue = {
    "collapse": collapse,                              # 原样
    "collapse_b0": collapse._replace(beta1=0.0),
    "collapse_lr": collapse._replace(lr_d=1e-3),
    "collapse_z2": collapse._replace(latent=2),
    "collapse_r1": collapse._replace(gamma=1.0),
}
pretty = Config(0.9, 64, gamma=100.0)
configs = list(dict.fromkeys([*grid, *rescue.values(), pretty]))                   # 去重
runs = {}
for latent, penalized in itertools.product((2, 64), (False, True)):                # 形状与计算图相同的一组
    chosen = [c for c in configs if (c.latent, c.gamma > 0) == (latent, penalized)]
    trained = train([c for c in chosen for _ in range(SEEDS)])
    runs |= {c: trained[i * SEEDS : (i + 1) * SEEDS] for i, c in enumerate(chosen)}


def late(run):
    """最后四次快照的平均模式数与好样本率。"""
    modes, good = ring.coverage(run.shots[-4:])
    return modes.float().mean().item(), good.mean().item()


def ending(run):
    """最后 200 步的平均损失（判别器、生成器）。"""
    return run.losses[-200:].mean(0).tolist()


def record(key, config):
    """把一格的模式数、好样本率、损失的范围记下来，并打印。"""
    modes, good = zip(*map(late, runs[config]))
    loss_d, loss_g = zip(*map(ending, runs[config]))
    for name, values in {"modes": modes, "good": good, "ld": loss_d, "lg": loss_g}.items():
        zhixing.metric(f"{key}_{name}_min", min(values))
        zhixing.metric(f"{key}_{name}_max", max(values))
    show = lambda values: "–".join(f"{v:.2f}" for v in (min(values), max(values)))
    print(f"{key}：模式数 {show(modes)}，好样本率 {show(good)}，损失 {show(loss_d)} / {show(loss_g)}")


for c in grid:
    record(f"b{round(10 * c.beta1)}_z{c.latent}_r{round(c.gamma)}", c)
for key, c in rescue.items():
    record(key, c)
record("pretty", pretty)

# %%
def average(keep):
    """满足条件的格子（12 格之内）的平均模式数。"""
    chosen = [late(run)[0] for c in grid if keep(c) for run in runs[c]]
    return sum(chosen) / len(chosen)


mean = {
    "b0": average(lambda c: c.beta1 == 0), "b5": average(lambda c: c.beta1 == 0.5), "b9": average(lambda c: c.beta1 == 0.9),
    "z2": average(lambda c: c.latent == 2), "z64": average(lambda c: c.latent == 64),
    "r0": average(lambda c: c.gamma == 0), "r1": average(lambda c: c.gamma > 0),
}
for name, value in mean.items():
    zhixing.metric(f"mean_{name}", value)
    print(f"{name}：{value:.2f}")
assert mean["b0"] > mean["b9"] + 3 and mean["r1"] > mean["r0"] + 1

for c in grid:
    modes, good = zip(*map(late, runs[c]))
    if c.beta1 == 0.9:
        assert max(modes) < 6 and max(good) < 0.2, c               # β₁ = 0.9：加不加 R1 都不行
    elif c.gamma:
        assert min(modes) > 6, c                                   # 有 R1：都行
    elif c.latent == 64:
        assert max(modes) < 7 and max(good) < 0.3, c               # 64 维、没有 R1：不行
saved = {name: [late(run)[0] for run in runs[c]] for name, c in rescue.items()}
assert max(saved["collapse"] + saved["collapse_b0"] + saved["collapse_lr"]) < 5
assert min(saved["collapse_z2"] + saved["collapse_r1"]) > 6

fig, axes = plt.subplots(1, 2, figsize=(7.6, 2.5), dpi=150)
for ax, gamma in zip(axes, (0.0, 1.0)):
    cells = torch.tensor([[sum(late(r)[0] for r in runs[Config(b, z, gamma)]) / SEEDS for b in (0.0, 0.5, 0.9)] for z in (2, 64)])
    ax.imshow(cells, vmin=0, vmax=8, cmap="viridis")
    for (i, j), value in zip(itertools.product(range(2), range(3)), cells.flatten().tolist()):
        ax.text(j, i, f"{value:.1f}", ha="center", va="center", color="#fdfdfd" if value < 5 else "#111111")
    ax.set(xticks=range(3), xticklabels=["0", "0.5", "0.9"], yticks=range(2), yticklabels=["2", "64"])
    ax.set(xlabel=r"Adam 的 $\beta_1$", ylabel="潜变量维数", title="无正则" if gamma == 0 else "R1，γ = 1")
zhixing.figure("ablation", fig)

# %% [markdown]
# ## 三种结局
#
# 从上面的格子里各挑一个：收敛（β₁=0、2 维、R1）、坍塌（判别器快四倍、64 维）、震荡（β₁=0.9、64 维）。

# %%
stories = {
    "收敛": runs[Config(0.0, 2, 1.0)][0],
    "坍塌": max(runs[collapse], key=lambda run: late(run)[1]),     # 三个种子里最准的
    "震荡": runs[Config(0.9, 64)][0],
}


def dots(ax, points):
    ax.plot(*ring.CENTERS.T, "x", color="C3", ms=3, mew=0.8)
    ax.plot(*points[:400].T, ".", color="C0", ms=1, rasterized=True)
    ax.set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), aspect="equal", xticks=[], yticks=[])


FRAMES = (0, 2, 4, 6, 8, 9, 10, 11)
fig, axes = plt.subplots(3, len(FRAMES), figsize=(9.2, 3.7), dpi=150)
for row, (name, run) in zip(axes, stories.items()):
    for ax, i in zip(row, FRAMES):
        dots(ax, run.shots[i])
        if row is axes[0]:
            ax.set_title(f"{(i + 1) * EVERY} 步", fontsize=9)
    row[0].set_ylabel(name)
zhixing.figure("frames", fig)

# %%
fig, axes = plt.subplots(1, 3, figsize=(9, 2.7), sharey=True)
for ax, (name, run) in zip(axes, stories.items()):
    averaged = run.losses.unfold(0, 10, 1).mean(-1)                                # (STEPS - 9, 2)
    ax.plot(averaged[:, 0], color="C0", lw=1, label="判别器")
    ax.plot(averaged[:, 1], color="C1", lw=1, label="生成器（非饱和）")
    ax.axhline(2 * math.log(2), color="C0", ls=":", lw=1)
    ax.axhline(math.log(2), color="C1", ls=":", lw=1)
    ax.set(title=name, xlabel="训练步", ylim=(0, 4))
axes[0].set_ylabel("损失（10 步滑动平均）")
axes[0].legend(frameon=False, fontsize=8)
zhixing.figure("losses", fig)

converged, collapsed, oscillating = stories.values()
assert late(converged)[0] > 7
assert abs(ending(converged)[0] - 2 * math.log(2)) < 0.05 and abs(ending(converged)[1] - math.log(2)) < 0.05
# 坍塌：样本都很像真的，却只有一团。最优判别器在那里给 1/9，损失可以手算
assert late(collapsed)[0] < 2 and late(collapsed)[1] > 0.8
theory_d = -1 / 8 * math.log(1 / 9) - math.log(8 / 9)                              # 其余七团上 D = 1，损失为 0
assert abs(ending(collapsed)[0] - theory_d) < 0.15 and abs(ending(collapsed)[1] - math.log(9)) < 0.6
for key, (loss_d, loss_g) in {"converged": ending(converged), "collapsed": ending(collapsed)}.items():
    zhixing.metric(f"{key}_ld", loss_d)
    zhixing.metric(f"{key}_lg", loss_g)
zhixing.metric("theory_ld", theory_d)
zhixing.metric("theory_lg", math.log(9))


def wander(run):
    """样本中心在相邻快照之间平均走多远（后半程）。"""
    return run.shots[5:].mean(1).diff(dim=0).norm(dim=1).mean().item()


def swing(run):
    """判别器损失（10 步平均）后半程的标准差。"""
    return run.losses[STEPS // 2 :, 0].unfold(0, 10, 1).mean(-1).std().item()


for key, run in zip(("converged", "collapsed", "oscillating"), stories.values()):
    zhixing.metric(f"{key}_wander", wander(run))
    zhixing.metric(f"{key}_swing", swing(run))
    zhixing.metric(f"{key}_modes", late(run)[0])
    zhixing.metric(f"{key}_good", late(run)[1])
assert wander(oscillating) > 5 * max(wander(converged), wander(collapsed))          # 整团绕着环跑
assert swing(oscillating) > 5 * swing(converged)

# %% [markdown]
# ## 损失一样漂亮，样本一团糟
#
# “收敛就是判别器损失上升、生成器损失下降，到 2 ln 2 与 ln 2”的反例。R1 的系数取 100，判别器被压得几乎是常数，对什么样本都说“一半一半”，两条损失不管生成器好坏都走向理论值；β₁ = 0.9 又让生成器停不下来。

# %%
def smooth(run, n=50):
    """n 步滑动平均的损失：(STEPS - n + 1, 2)。"""
    return run.losses.unfold(0, n, 1).mean(-1)


good, ugly = converged, min(runs[pretty], key=lambda run: late(run)[1])
goal = torch.tensor([2 * math.log(2), math.log(2)])
for run in runs[pretty]:
    low, high = smooth(run)[:, 0].min(), smooth(run)[:, 1].max()
    assert low + 0.01 < ending(run)[0] and high - 0.01 > ending(run)[1]            # 判别器从谷底升、生成器从峰顶降
    assert (torch.tensor(ending(run)) - goal).abs().max() < 0.05                   # 都到了理论值
    assert late(run)[0] < 4 and late(run)[1] < 0.2                                 # 样本一团糟
for key, run in {"good": good, "ugly": ugly}.items():
    zhixing.metric(f"off_{key}", (torch.tensor(ending(run)) - goal).abs().max())
    zhixing.metric(f"{key}_low", smooth(run)[:, 0].min())
    zhixing.metric(f"{key}_high", smooth(run)[:, 1].max())
    zhixing.metric(f"{key}_ld", ending(run)[0])
    zhixing.metric(f"{key}_lg", ending(run)[1])

fig, axes = plt.subplots(1, 3, figsize=(8, 2.6), dpi=150, width_ratios=[1.5, 1, 1])
for i, (name, run) in enumerate({"甲": good, "乙": ugly}.items()):
    axes[0].plot(smooth(run)[:, 0], color=f"C{i}", lw=1, label=f"{name}：判别器")
    axes[0].plot(smooth(run)[:, 1], color=f"C{i}", lw=1, ls="--", label=f"{name}：生成器")
    dots(axes[i + 1], run.shots[-1])
    axes[i + 1].set_title(f"{name}：模式数 {late(run)[0]:.1f}，好样本率 {late(run)[1]:.0%}", fontsize=9)
for level in goal.tolist():
    axes[0].axhline(level, color="k", ls=":", lw=1)
axes[0].set(xlabel="训练步", ylim=(0.4, 2), title="损失（50 步滑动平均）")
axes[0].legend(frameon=False, fontsize=7, ncols=2)
zhixing.figure("twins", fig)

# %% [markdown]
# ## WGAN-GP：评论家的估计跟着样本质量走
#
# 每更新一次生成器，评论家更新五次，梯度惩罚的系数取 1。用切片 Wasserstein 距离作独立的尺子：它只看样本，不看评论家。

# %%
def train_wgan(R=2, steps=400, critic_steps=5, weight=1.0, latent=2):
    """返回三个列表：步数、评论家的估计 (R,)、切片距离 (R,)，以及最后的样本 (R, 1000, 2)。"""
    g = torch.Generator().manual_seed(0)
    G, D = (parallel.init(R, (n, HIDDEN, HIDDEN, m), g) for n, m in ((latent, 2), (2, 1)))
    rates = torch.full((R,), 1e-3), torch.zeros(R)                                 # β₁ = 0
    opt_g, opt_d = parallel.Adam(G, *rates), parallel.Adam(D, *rates)
    generate = lambda n: parallel.forward(G, torch.randn(R, n, latent, generator=g))
    critic = lambda x: parallel.forward(D, x).squeeze(-1)
    at, estimates, distances = [], [], []
    for step in range(1, steps + 1):
        for _ in range(critic_steps):
            x = ring.ring((R, BATCH), g)
            with torch.no_grad():
                y = generate(BATCH)
            penalty = gan.gradient_penalty(critic, x, y, torch.rand(R, BATCH, 1, generator=g))
            opt_d.step(weight * penalty - gan.critic_estimate(critic(x), critic(y)))
        opt_g.step(-critic(generate(BATCH)).mean(-1))
        if step % 20 == 0:
            with torch.no_grad():
                x, y = ring.ring((R, 1000), g), generate(1000)
                at.append(step)
                estimates.append(gan.critic_estimate(critic(x), critic(y)))
                distances.append(torch.tensor([ring.sliced_wasserstein(a, b) for a, b in zip(x, y)]))
    return at, torch.stack(estimates, 1), torch.stack(distances, 1), y


at, estimates, distances, y = train_wgan()
correlation = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(estimates[:, 3:], distances[:, 3:])]
print("评论家的估计与切片距离的相关系数（80 步之后）", [f"{c:.2f}" for c in correlation])
assert min(correlation) > 0.6
zhixing.metric("wgan_correlation_min", min(correlation))
zhixing.metric("wgan_correlation_max", max(correlation))
modes, share = ring.coverage(y)
zhixing.metric("wgan_modes", modes.float().mean().item())
zhixing.metric("wgan_good", share.mean().item())
assert modes.min() >= 6

fig, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 2.7), width_ratios=[1.2, 1.2, 1])
left.plot(at[3:], estimates[0, 3:], "o-", ms=3, label="评论家的估计")
left.plot(at[3:], distances[0, 3:], "s-", ms=3, label="切片 Wasserstein 距离")
left.set(xlabel="生成器的步数", ylim=(0, None), title="WGAN-GP")
left.legend(frameon=False, fontsize=8)
shots = converged.shots
real = ring.ring((1000,), torch.Generator().manual_seed(5))
truth = [ring.sliced_wasserstein(real, shot) for shot in shots]
steps = range(EVERY, STEPS + 1, EVERY)
middle.plot(steps, converged.losses[EVERY - 1 :: EVERY, 0], "o-", color="C0", ms=3, label="判别器损失")
middle.plot(steps, truth, "s-", color="C1", ms=3, label="切片 Wasserstein 距离")
middle.set(xlabel="训练步", ylim=(0, None), title="收敛的普通 GAN")
middle.legend(frameon=False, fontsize=8)
dots(right, y[0])
right.set_title("WGAN-GP 的样本", fontsize=9)
zhixing.figure("wgan", fig)
