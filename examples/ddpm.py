# ---
# zhixing:
#   id: ddpm
#   title: 从零训练一个二维 DDPM
#   needs: []
#   timeout: 900
# ---

# %% [markdown]
# 在圆弧拼成的太极图上从零训练一个 DDPM，再用它从纯噪声里把图“长”回来。一个点是一个样本。
#
# **预计耗时与内存**：单线程、机器空闲时半分多钟，峰值内存约 0.5 GB；网络太小，有 GPU 也用 CPU。
#
# 步号在代码里从 0 数到 T − 1，对应论文的 1 到 T。

# %%
import inspect
import time

import matplotlib.pyplot as plt
import torch
from safetensors.torch import save_file

import zhixing
from minisd import schedule, toy2d
from minisd.denoiser2d import Denoiser

torch.set_num_threads(1)
torch.manual_seed(0)

T = 1000
s = schedule.linear(T)                         # β 从 1e-4 线性升到 0.02，与原论文相同

# %% [markdown]
# ## 数据
#
# 五段弧：外圆、S 形中线的两个半圆、两只鱼眼。点到弧的距离有闭式，生成得准不准可以直接量。

# %%
N = 2000
data = toy2d.taiji(N, torch.Generator().manual_seed(1))   # (N, 2)
far, arc = toy2d.distance(data)                      # (N,) 到最近弧的距离、弧的编号

assert far.max() < 1e-5                              # 数据恰好在弧上
assert data.mean(0).abs().max() < 0.1                # 均值、尺度与标准正态相当
assert (data.std(0) - 1).abs().max() < 0.25


def scatter(ax, points, label, title):
    """画一张点图：按弧的编号上色，只画前 1000 个点，存成位图嵌进 SVG。"""
    color = [f"C{k}" for k in label[:1000].tolist()]
    ax.scatter(*points[:1000].T, s=2, c=color, linewidths=0, rasterized=True)
    ax.set(title=title, xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal")
    ax.axis("off")


# %% [markdown]
# ## 前向：把数据变成噪声
#
# 闭式 $x_t=\sqrt{\bar\alpha_t}\,x_0+\sqrt{1-\bar\alpha_t}\,\varepsilon$ 可以一步跳到任意 $t$。先核对它与逐步走一致：从同一个 $x_0$ 放 4000 个粒子走 1000 步，途中与闭式的均值、方差对照（两边都是高斯，比均值方差就够）。

# %%
g = torch.Generator().manual_seed(2)
x0 = torch.tensor([1.5, -0.8])                                     # (2,) 一个固定的起点
walk = x0.expand(4000, 2)                                          # (4000, 2)
gap_mean, gap_var = [], []
for t in range(T):
    walk = schedule.q_step(s, walk, t, torch.randn(walk.shape, generator=g))
    if t in (99, 299, 599, 999):
        mean = schedule.q_sample(s, x0, t, torch.zeros(2))                   # 闭式的均值
        std = schedule.q_sample(s, torch.zeros(2), t, torch.ones(2))         # 闭式的标准差
        gap_mean.append((walk.mean(0) - mean).abs().max().item())
        gap_var.append((walk.var(0) / std**2 - 1).abs().max().item())

# 标准误：均值 1/√4000 ≈ 0.016，方差的相对误差 √(2/4000) ≈ 0.022。上限取它们的 5 倍
assert max(gap_mean) < 0.08, gap_mean
assert max(gap_var) < 0.11, gap_var
zhixing.metric("walk_mean_gap", max(gap_mean))
zhixing.metric("walk_var_gap", max(gap_var))

# %%
fig, axes = plt.subplots(1, 6, figsize=(9, 1.8), dpi=150)
g = torch.Generator().manual_seed(3)
for ax, t in zip(axes, (-1, 49, 149, 299, 499, 999)):
    x_t = data if t < 0 else schedule.q_sample(s, data, t, torch.randn(N, 2, generator=g))
    scatter(ax, x_t, arc, "数据" if t < 0 else f"t = {t}")
zhixing.figure("forward", fig)


# %% [markdown]
# ## 网络：一个认识步号的小 MLP
#
# 输入是 $x_t$ 和步号 $t$，输出与 $x_t$ 同形状的噪声估计 $\varepsilon_\theta(x_t,t)$。坐标与步号都先展开成正弦特征：坐标要高频才画得出鱼眼，步号要让每一层都知道“现在有多吵”。网络在 `minisd/denoiser2d.py`，DDIM 的示例也用它：

# %%
print(inspect.getsource(Denoiser.forward))


# %% [markdown]
# ## 训练
#
# 与扩散模型有关的只有四行：抽数据、步号、噪声，一步加噪后让网络猜噪声。

# %%
def train(net, steps=8000, batch=256, lr=6e-3, seed=0):
    """最小化 L_simple = E‖ε - ε_θ(x_t, t)‖²（按维取平均），返回逐步损失 (steps,)。"""
    g = torch.Generator().manual_seed(seed)
    opt = torch.optim.Adam(net.parameters(), lr, fused=True)
    decay = torch.optim.lr_scheduler.OneCycleLR(             # 升温 5%，再余弦降到 0
        opt, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    losses = []
    for _ in range(steps):
        x0 = toy2d.taiji(batch, g)                                 # (B, 2) 干净数据
        t = torch.randint(T, (batch,), generator=g)                # (B,)   均匀抽步号
        eps = torch.randn(batch, 2, generator=g)                   # (B, 2) 噪声，即答案
        loss = (net(schedule.q_sample(s, x0, t, eps), t) - eps).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        decay.step()
        losses.append(loss.item())
    return torch.tensor(losses)


net = Denoiser()
clock = time.perf_counter()
losses = train(net)
seconds = time.perf_counter() - clock

final_loss = losses[-500:].mean().item()
assert losses[:20].mean() > 0.8            # 起点：什么都不会时猜 0，损失约为 Var(ε) = 1
assert final_loss < 0.3

zhixing.metric("final_loss", final_loss)
zhixing.metric("train_steps", len(losses))
zhixing.metric("train_seconds", seconds)
zhixing.metric("params", sum(p.numel() for p in net.parameters()))
save_file(net.state_dict(), zhixing.output_path("net.safetensors"))      # DDIM 的示例接着用，不再训练

# %% [markdown]
# ## 损失为什么降不到 0
#
# 同一个 $x_t$ 可以来自许多对 $(x_0,\varepsilon)$，再好的网络也只能猜给定 $x_t$ 时噪声的平均（条件期望）。这里的数据分布已知，条件期望可以直接估：把弧上密密的点当作全部可能的 $x_0$，按高斯似然加权平均。它的期望损失是任何网络的下限；训得好不好，看离它多远，不是离 0 多远。

# %%
dense = toy2d.taiji(12000, torch.Generator().manual_seed(4))       # (M, 2) 近似整条曲线


def best_eps(x, t):
    """理论最优的噪声估计 E[ε | x_t]：x (B, 2)，t 为整数 → (B, 2)。"""
    a, b = s.alpha_bar[t].sqrt().item(), (1 - s.alpha_bar[t]).sqrt().item()
    log_q = -torch.cdist(x, a * dense) ** 2 / (2 * b * b)     # (B, M)
    weight = torch.softmax(log_q, 1)                          # (B, M) 后验 q(x_0 | x_t)
    return (x - a * weight @ dense) / b


grid = [0, 2, 5, 10, 20, 40, 70, 100, 150, 200, 300, 400, 500, 600, 700, 800, 900, 999]
g = torch.Generator().manual_seed(5)
by_net, by_best = [], []
with torch.no_grad():
    for t in grid:
        eps = torch.randn(600, 2, generator=g)
        x_t = schedule.q_sample(s, toy2d.taiji(600, g), t, eps)
        by_net.append((net(x_t, torch.full((600,), t)) - eps).square().mean().item())
        by_best.append((best_eps(x_t, t) - eps).square().mean().item())


def average(values):
    """按 grid 做梯形积分，得到对 t 均匀平均的损失。"""
    return torch.trapezoid(torch.tensor(values), torch.tensor(grid)).item() / (T - 1)


floor = average(by_best)
excess = average(by_net) - floor
assert floor > 0.15                                  # 下限本身就远离 0
assert excess > -0.02 * floor                        # 没有网络能更低（留出抽样误差）
assert excess < 0.1 * floor                          # 这个网络高不出一成
assert by_net[0] > 5 * by_net[-1]                    # 大 t 最容易：x_t 几乎就是 ε
zhixing.metric("floor_loss", floor)
zhixing.metric("excess_loss", excess)

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3))
window = 100
smooth = losses.unfold(0, window, 1).mean(1)                       # 滑动平均
left.plot(range(0, len(losses), 10), losses[::10], color="C0", alpha=0.25, lw=0.5)
every = range(window - 1, len(losses), 10)
left.plot(every, smooth[::10], color="C0", label=f"{window} 步滑动平均")
left.axhline(floor, color="C3", ls="--", label="理论下限")
left.set(xlabel="训练步", ylabel="每维均方误差", ylim=(0, 1.1), title="训练损失")
left.legend(frameon=False)
right.plot(grid, by_net, "o-", color="C0", ms=4, label="训练好的网络")
right.plot(grid, by_best, "--", color="C3", label="理论下限")
right.set(xlabel="步号 t", ylabel="每维均方误差", ylim=(0, None), title="损失在哪些 t 上")
right.legend(frameon=False)
zhixing.figure("loss", fig)


# %% [markdown]
# ## 采样：从噪声走回数据
#
# 每一步问网络“噪声是什么”，换算成后验均值，再补一点新噪声；最后一步只取均值。

# %%
@torch.no_grad()
def sample(net, n, seed, step=schedule.p_step, keep=()):
    """祖先采样 n 个点，返回 x_0 (n, 2) 与 keep 里那些 t 的快照 {t: x_t}。"""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=g)                             # x_T ~ N(0, I)
    shots = {}
    for t in reversed(range(T)):
        if t in keep:
            shots[t] = x
        x = step(s, x, t, net(x, torch.full((n,), t)), torch.randn(n, 2, generator=g))
    return x, shots


KEEP = (999, 499, 299, 199, 99, 29)
generated, shots = sample(net, N, seed=6, keep=KEEP)
near, landed = toy2d.distance(generated)                # 到弧的距离、落在哪段弧

# %% [markdown]
# 三把尺子：到最近弧的距离（准不准）、五段弧各占多少（有没有漏掉模式）、能量距离（energy distance，两个点集像不像；同分布时期望为 0，有抽样误差）。基线是未经去噪的标准正态点。

# %%
def energy_distance(a, b):
    """无偏的能量距离：2E‖a-b‖ - E‖a-a'‖ - E‖b-b'‖。"""
    within = lambda z: torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))
    return (2 * torch.cdist(a, b).mean() - within(a) - within(b)).item()


noise = torch.randn(N, 2, generator=torch.Generator().manual_seed(7))
noise_near, _ = toy2d.distance(noise)
ed_model, ed_noise = energy_distance(generated, data), energy_distance(noise, data)
share = landed.bincount(minlength=5) / N                           # (5,)
share_true = toy2d.ARCS[:, 2] * toy2d.ARCS[:, 4]                 # (5,) 弧长就是概率
share_true = share_true / share_true.sum()

assert near.median() < noise_near.median() / 5
assert near.quantile(0.95) < noise_near.quantile(0.95) / 2.5
assert ed_model < ed_noise / 4
assert (share - share_true).abs().max() < 0.09       # 每段至少占一成：漏掉哪段都会超限

zhixing.metric("median_distance", near.median().item())
zhixing.metric("p95_distance", near.quantile(0.95).item())
zhixing.metric("noise_median_distance", noise_near.median().item())
zhixing.metric("energy_distance", ed_model)
zhixing.metric("noise_energy_distance", ed_noise)
zhixing.metric("share_gap", (share - share_true).abs().max().item())

# %%
fig, axes = plt.subplots(1, 7, figsize=(9.6, 1.7), dpi=150)
for ax, t in zip(axes, KEEP):
    scatter(ax, shots[t], landed, f"t = {t}")
scatter(axes[-1], generated, landed, "生成结果")
zhixing.figure("trajectory", fig)

# %%
fig, axes = plt.subplots(1, 3, figsize=(8.4, 2.7), dpi=150)
scatter(axes[0], data, arc, "数据")
scatter(axes[1], generated, landed, "生成")
bins = torch.linspace(0, 0.6, 61)
axes[2].hist(noise_near.clamp(max=0.6), bins, color="C1", alpha=0.6, label="纯噪声")
axes[2].hist(near.clamp(max=0.6), bins, color="C0", alpha=0.6, label="生成")
axes[2].set(xlabel="到最近弧的距离", ylabel="点数", yscale="log", title="准不准")
axes[2].legend(frameon=False)
zhixing.figure("compare", fig)

# %% [markdown]
# ## 弄坏它：四种写法错误
#
# 前三种只改采样公式，网络与随机数都不变。第四种把步号从网络里抹掉重训，只训 3000 步，损失已经走平、停在下限之上。

# %%
def no_rsqrt(s, x, t, eps, z):
    """错误一：均值里漏掉 1/√α_t。"""
    sigma = s.beta_tilde[t].sqrt() if t else 0.0
    return x - s.beta[t] / (1 - s.alpha_bar[t]).sqrt() * eps + sigma * z


def variance_as_std(s, x, t, eps, z):
    """错误二：加噪声时漏掉根号，拿方差 β̃_t 当标准差。"""
    mean, var = schedule.posterior(s, schedule.split(s, x, t, eps)[0], x, t)
    return mean + var * z


def alpha_for_alpha_bar(s, x, t, eps, z):
    """错误三：均值里把 ᾱ_t 写成 α_t。"""
    sigma = s.beta_tilde[t].sqrt() if t else 0.0
    return (x - s.beta[t] / (1 - s.alpha[t]).sqrt() * eps) / s.alpha[t].sqrt() + sigma * z


timeless = Denoiser(knows_time=False)
timeless_losses = train(timeless, steps=3000)
timeless_loss = timeless_losses[-500:].mean().item()
assert timeless_losses[-1000:-500].mean() - timeless_loss < 0.02   # 已经走平
assert timeless_loss > floor + 0.04                                # 却离下限很远

outcomes = {
    "正确": generated,
    "漏掉 1/√α": sample(net, N, seed=6, step=no_rsqrt)[0],
    "方差当标准差": sample(net, N, seed=6, step=variance_as_std)[0],
    "ᾱ 写成 α": sample(net, N, seed=6, step=alpha_for_alpha_bar)[0],
    "网络不知道 t": sample(timeless, N, seed=6)[0],
}
ed = {name: energy_distance(x, data) for name, x in outcomes.items()}
for name, value in ed.items():
    print(f"{name}：能量距离 {value:.4f}")
    assert (abs(value) < 0.005) == (name == "正确"), (name, value)

# 漏掉 1/√α 最阴险：点仍落在弧上，整体却缩小了——光看“像不像”发现不了
shrunk = outcomes["漏掉 1/√α"]
assert toy2d.distance(shrunk)[0].median() < noise_near.median() / 5
assert (shrunk.std(0) / data.std(0)).max() < 0.95

zhixing.metric("ed_no_rsqrt", ed["漏掉 1/√α"])
zhixing.metric("ed_variance_as_std", ed["方差当标准差"])
zhixing.metric("ed_alpha_for_alpha_bar", ed["ᾱ 写成 α"])
zhixing.metric("ed_timeless", ed["网络不知道 t"])
zhixing.metric("timeless_loss", timeless_loss)
zhixing.metric("shrink_no_rsqrt", (shrunk.std(0) / data.std(0)).mean().item())

# %%
fig, axes = plt.subplots(1, 5, figsize=(9, 2.0), dpi=150)
for ax, (name, x) in zip(axes, outcomes.items()):
    title = name.replace("1/√α", r"$1/\sqrt{\alpha_t}$").replace("ᾱ", r"$\bar\alpha$")
    scatter(ax, x, toy2d.distance(x)[1], title)
zhixing.figure("broken", fig)
