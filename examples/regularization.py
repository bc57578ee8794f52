# ---
# zhixing:
#   id: regularization
#   title: 八种正则化，同一任务上加与不加
#   needs: []
#   timeout: 900
# ---

# %% [markdown]
# 权重衰减、Dropout、梯度裁剪、EMA 放到**同一个**二维扩散任务上，加与不加各训一遍；梯度惩罚与谱归一化换到判别器，先验保持换到微调，KL 项换到自编码器。每个设置都跑多个种子，画出区间。
#
# **预计耗时与内存**：单线程、机器空闲时一分钟以内，峰值内存约 0.5 GB。
#
# 为了跑得快，几十个小网络叠成一个大张量一起训（第一维是“第几个网络”），它们之间没有任何联系。同一个种子下，不同设置的初始权重、数据、步号、噪声逐位相同，所以可以成对比较。

# %%
import math

import matplotlib.pyplot as plt
import torch
from torch import nn

import zhixing
from minisd import schedule, toy2d

torch.set_num_threads(1)
torch.manual_seed(0)

T, SEEDS = 1000, 5
s = schedule.cosine(T)
signal, noise = s.alpha_bar.sqrt().float(), (1 - s.alpha_bar).sqrt().float()      # (T,) √ᾱ_t、√(1-ᾱ_t)


def spread(values):
    """(SEEDS,) → 平均值、最小值、最大值。"""
    return values.mean().item(), values.min().item(), values.max().item()


# %% [markdown]
# ## 一叠小网络
#
# `M` 个结构相同的多层感知机，权重 `(M, 入, 出)`。Dropout 用反向缩放：保留概率 $q$，留下的除以 $q$，期望不变。

# %%
FREQ_X, FREQ_T = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([1.0, 2.0, 4.0, 8.0])


def mlp(dims, seed, copies=1):
    """每个种子一个网络，再整体复制 copies 份：返回 [W (M, i, o), b (M, 1, o), …]，M = copies · SEEDS。"""
    g = torch.Generator().manual_seed(seed)
    params = []
    for i, o in zip(dims, dims[1:]):
        params += [(2 * torch.rand(SEEDS, i, o, generator=g) - 1) * 1.5 / i**0.5, torch.zeros(SEEDS, 1, o)]
    return [p.repeat(copies, 1, 1).requires_grad_() for p in params]


def forward(params, h, mask=lambda h: h):
    """h (M, B, i) → (M, B, o)；mask 作用在每个隐藏层之后。"""
    for k in range(0, len(params), 2):
        h = torch.baddbmm(params[k + 1], h, params[k])
        if k < len(params) - 2:
            h = mask(nn.functional.silu(h))
    return h


def features(x, t, c=None):
    """x (M, B, 2)、t (M, B)、条件 c (M, B) → 网络输入 (M, B, 27)：坐标、条件与正弦特征。"""
    u = (x[..., None] * FREQ_X).flatten(-2)
    v = t[..., None] * (math.pi / T) * FREQ_T
    c = torch.zeros_like(v[..., :1]) if c is None else c[..., None]
    return torch.cat([x, c, u.sin(), u.cos(), v.sin(), v.cos()], -1)


WIDTHS = [2 + 1 + 4 * len(FREQ_X) + 2 * len(FREQ_T), 64, 64, 64, 2]


def diffuse(x0, t, eps):
    """x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε：x0、eps (M, B, 2)，t (M, B)。"""
    return signal[t][..., None] * x0 + noise[t][..., None] * eps


def per_member(params, x0, t, eps, mask=lambda h: h, c=None):
    """每个网络各自的 ‖ε - ε_θ‖² 平均，(M,)。"""
    return (forward(params, features(diffuse(x0, t, eps), t, c), mask) - eps).square().mean((1, 2))


# %% [markdown]
# ## 优化器：三个开关
#
# 手写一步 Adam，好让每个网络的系数各不相同：`decay` 是解耦的权重衰减（AdamW），`l2` 是把 $\lambda\theta$ 加进梯度，`clip` 是裁剪阈值。三个开关都与 PyTorch 自带的实现核对。

# %%
def adam_state(params):
    return {"step": 0, "m": [torch.zeros_like(p) for p in params], "v": [torch.zeros_like(p) for p in params]}


@torch.no_grad()
def adam_step(params, grads, state, lr, decay=0.0, l2=0.0, clip=math.inf):
    """就地更新；decay、l2、clip 可以是标量或 (M, 1, 1)。返回裁剪前每个网络的梯度范数 (M, 1, 1)。"""
    norm = sum(g.square().sum((1, 2), keepdim=True) for g in grads).sqrt()        # (M, 1, 1)
    shrink = (clip / (norm + 1e-6)).clamp(max=1)                                   # 只缩短，不拉长
    state["step"] += 1
    c1, c2 = 1 - 0.9 ** state["step"], 1 - 0.999 ** state["step"]                  # 偏差修正
    for p, g, m, v in zip(params, grads, state["m"], state["v"]):
        g = g * shrink + l2 * p                                                    # L2：先进梯度
        m.lerp_(g, 1 - 0.9)
        v.lerp_(g * g, 1 - 0.999)
        p.mul_(1 - lr * decay)                                                     # 解耦：直接缩权重
        p.sub_(lr / c1 * m / ((v / c2).sqrt() + 1e-8))
    return norm


for ours, theirs in (
    ({"decay": 0.3}, lambda p: torch.optim.AdamW(p, 5e-3, weight_decay=0.3)),
    ({"l2": 0.3}, lambda p: torch.optim.Adam(p, 5e-3, weight_decay=0.3)),
    ({"clip": 0.01}, lambda p: torch.optim.Adam(p, 5e-3)),
):
    a = mlp([3, 8, 2], seed=9)
    b = [p.detach()[:1].clone().requires_grad_() for p in a]                       # 只取第一个网络作参照
    state, optimizer = adam_state(a), theirs(b)
    x = torch.randn(SEEDS, 16, 3, generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        norm = adam_step(a, torch.autograd.grad(forward(a, x).square().mean((1, 2)).sum(), a), state, 5e-3, **ours)
        optimizer.zero_grad()
        forward(b, x[:1]).square().mean().backward()
        if "clip" in ours:
            want = nn.utils.clip_grad_norm_(b, 0.01)
            assert want > 0.01 and abs(norm[0].item() / want - 1) < 1e-5           # 真的裁到了
        optimizer.step()
    for p, q in zip(a, b):
        torch.testing.assert_close(p[:1], q, rtol=1e-4, atol=1e-6)


# %% [markdown]
# ## 共同的任务
#
# 数据是太极图线稿上的点。每个种子只给 16 个训练点，用来看过拟合；“更多数据”给 512 个。验证集是同一条曲线上的 2048 个新点，步号与噪声固定。
#
# 数据分布已知，最优的 $\mathbb E[\varepsilon\mid x_t]$ 可以直接算，所以报告的都是**高出理论下限多少**。训练误差也减同一个下限：它是负的，就说明网络在背训练点。

# %%
def lowest(x, t, eps):
    """任何网络的误差下限：用密密的点近似整条曲线，直接算 E[ε | x_t]。x、eps (n, 2)，t (n,)。"""
    dense = toy2d.taiji(4000, torch.Generator().manual_seed(8))                   # (D, 2)
    a, b = signal[t][:, None], noise[t][:, None]                                   # (n, 1)
    weight = torch.softmax(-((torch.cdist(x / a, dense) * a / b) ** 2) / 2, 1)    # (n, D) 后验 q(x_0 | x_t)
    return ((x - a * (weight @ dense)) / b - eps).square().mean()


def train(configs, steps, points=16, lr=5e-3, poison=(), every=50, ema=0.995, batch=64):
    """configs {名字: 开关}，每个设置 SEEDS 个网络。返回参数、EMA 参数、训练点与记录。

    configs 的开关：decay、l2、drop、clip、points（训练点数）、anneal（1 为学习率余弦退火到 0）。
    曲线 {train、val、val_ema: {名字: (记录次数, SEEDS)}}，都已减去各自的理论下限。poison 里的步号喂一批坏数据。
    """
    K = len(configs)
    column = lambda key, default: torch.tensor(                                   # (M, 1, 1) 每个网络的开关
        [c.get(key, default) for c in configs.values()], dtype=torch.float32
    ).repeat_interleave(SEEDS).view(-1, 1, 1)
    decay, l2, clip = column("decay", 0.0), column("l2", 0.0), column("clip", math.inf)
    anneal = column("anneal", 0.0)                                                # 1 为余弦退火到 0
    keep, use = 1 - column("drop", 0.0), column("points", points)[:, :, 0]
    dropped = (keep < 1).nonzero()[:, 0].unique()                                 # 哪些网络开了 Dropout
    every_config = lambda z: z.repeat(K, *[1] * (z.ndim - 1))                     # (SEEDS, …) → (M, …)

    def mask(h):
        if not len(dropped):
            return h
        q = keep[dropped]
        h = h.clone()
        h[dropped] = h[dropped] * (torch.rand(h[dropped].shape, generator=g) < q) / q
        return h

    g = torch.Generator().manual_seed(1)
    bank = torch.stack([toy2d.taiji(max(512, points), g) for _ in range(SEEDS)])  # (SEEDS, n, 2) 训练点
    fresh = torch.stack([toy2d.taiji(2048, g) for _ in range(SEEDS)])             # (SEEDS, 2048, 2) 验证点
    t_val = torch.randint(T, (SEEDS, 2048), generator=g)
    eps_val = torch.randn(SEEDS, 2048, 2, generator=g)
    u_val = torch.rand(SEEDS, 2048, generator=g)
    bank, fresh, t_val, eps_val, u_val = map(every_config, (bank, fresh, t_val, eps_val, u_val))
    pick = lambda u: bank.gather(1, (u * use).long()[..., None].expand(-1, -1, 2))   # 均匀地抽训练点

    params = mlp(WIDTHS, seed=2, copies=K)
    average, state = [p.detach().clone() for p in params], adam_state(params)
    log = {"step": [], "train": [], "val": [], "val_ema": []}
    x_val = diffuse(fresh, t_val, eps_val)[:SEEDS]                                 # 各设置的验证集相同
    floor = torch.stack([lowest(*z) for z in zip(x_val, t_val, eps_val)]).repeat(K)   # (M,)
    for k in range(steps):
        u = every_config(torch.rand(SEEDS, batch, generator=g))
        t = every_config(torch.randint(T, (SEEDS, batch), generator=g))
        eps = every_config(torch.randn(SEEDS, batch, 2, generator=g))
        x0 = pick(u)
        if k in poison:
            x0 = 127.5 * (x0 + 1)                                                  # 忘了把 0–255 归一化到 ±1
        grads = torch.autograd.grad(per_member(params, x0, t, eps, mask).sum(), params)
        now = lr * (1 - anneal * (0.5 - 0.5 * math.cos(math.pi * k / steps)))      # (M, 1, 1)
        adam_step(params, grads, state, now, decay, l2, clip)
        for a, p in zip(average, params):
            a.lerp_(p.detach(), 1 - min(ema, (k + 1) / (k + 10)))                  # 预热：开头的衰减小一些
        if (k + 1) % every == 0:
            with torch.no_grad():
                scores = {
                    "train": per_member(params, pick(u_val), t_val, eps_val) - floor,
                    "val": per_member(params, fresh, t_val, eps_val) - floor,
                    "val_ema": per_member(average, fresh, t_val, eps_val) - floor,
                }
            log["step"].append(k + 1)
            for name, value in scores.items():
                log[name].append(value.view(K, SEEDS))
    names = list(configs)
    curves = {key: {n: torch.stack(log[key])[:, i] for i, n in enumerate(names)} for key in log if key != "step"}
    return params, average, bank, log["step"], curves                             # 曲线 (记录次数, SEEDS)


def band(ax, step, curve, color, label, style="-"):
    """画平均线与最小到最大的阴影：curve (记录次数, SEEDS)。"""
    ax.plot(step, curve.mean(1), style, color=color, label=label)
    ax.fill_between(step, curve.min(1).values, curve.max(1).values, color=color, alpha=0.15, lw=0)


# %% [markdown]
# ## 过拟合：16 个训练点
#
# 七个设置各训一遍，另加两个不用重训的：EMA（无正则那次的平均权重）、早停（无正则那次事后挑验证误差最低的一步，所以占了便宜）。

# %%
configs = {
    "无正则": {},
    "权重衰减": {"decay": 0.3},
    "强权重衰减": {"decay": 3.0},
    "L2 进梯度": {"l2": 1e-3},
    "Dropout": {"drop": 0.2},
    "梯度裁剪": {"clip": 0.3},
    "更多数据": {"points": 512},
}
params, _, bank, step, curves = train(configs, steps=1000)
final = {name: curves["val"][name][-1] for name in configs}                       # 每项 (SEEDS,)
final["EMA"] = curves["val_ema"]["无正则"][-1]
final["早停"] = curves["val"]["无正则"].min(0).values
fit = {name: curves["train"][name][-1] for name in configs}
gain = {name: final["无正则"] - v for name, v in final.items()}                    # 成对的差：正数是变好

for name, key in {"无正则": "none", "权重衰减": "decay", "强权重衰减": "strong", "L2 进梯度": "l2", "Dropout": "dropout",
                  "梯度裁剪": "clip", "更多数据": "more", "EMA": "ema", "早停": "early"}.items():  # fmt: skip
    mean, low, high = spread(gain[name])
    print(f"{name}：验证 {final[name].mean():.3f}，比无正则低 {mean:.3f}（{low:.3f} 到 {high:.3f}）")
    zhixing.metric(f"val_{key}", final[name].mean().item())
    zhixing.metric(f"gain_{key}", mean)
    zhixing.metric(f"gain_{key}_low", low)
    zhixing.metric(f"gain_{key}_high", high)
    if name in fit:
        zhixing.metric(f"train_{key}", fit[name].mean().item())

assert fit["无正则"].max() < 0 < final["无正则"].min()                             # 背下训练点，新点上变差
assert curves["val"]["无正则"][-1].min() > 1.2 * final["早停"].min()               # 越训越差
for name in ("权重衰减", "强权重衰减", "L2 进梯度", "Dropout"):
    assert gain[name].min() > 0, name                                              # 每个种子都变好
assert gain["梯度裁剪"].mean() < 0.2 * gain["权重衰减"].mean()                     # 裁剪不防过拟合
assert 0 < gain["EMA"].mean() < 0.7 * gain["权重衰减"].mean()                      # EMA 有一点用，不稳
assert fit["强权重衰减"].mean() > 0.03                                             # 太强：训练点也学不好
assert final["更多数据"].mean() < 0.4 * min(v.mean() for n, v in final.items() if n != "更多数据")   # 数据最管用

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.3))
for color, name in zip(("C3", "C0", "C1", "C2"), ("无正则", "权重衰减", "Dropout", "更多数据")):
    left.plot(step, curves["val"][name].mean(1), color=color, label=name)
    left.plot(step, curves["train"][name].mean(1), ":", color=color)
left.axhline(0, color="k", lw=0.6)
left.set(xlabel="训练步数", ylabel="高出下限的误差", title="实线：验证；点线：训练")
left.legend()
order = ["更多数据", "早停", "强权重衰减", "Dropout", "权重衰减", "L2 进梯度", "EMA", "梯度裁剪"]
for y, name in enumerate(reversed(order)):
    right.plot(spread(gain[name])[1:], (y, y), color="C0", lw=1.5)
    right.plot(gain[name], [y] * SEEDS, "o", color="C0", ms=3, alpha=0.6)
    right.plot(gain[name].mean(), y, "D", color="C3", ms=5)
right.axvline(0, color="k", lw=0.6)
right.set(yticks=range(len(order)), yticklabels=reversed(order), xlabel="验证误差比无正则低多少")
zhixing.figure("overfit", fig)

# %% [markdown]
# ### 生成的样本：有没有复制训练点
#
# 复制率：离某个训练点不到 0.1 的样本占多少。真正的新点碰巧也会落在训练点附近，那个比例是基线。复制率低不等于好：糊成一团也不复制，所以同时量样本到曲线的距离。


# %%
@torch.no_grad()
def sample(params, n, seed, c=0.0, steps=25):
    """DDIM（η = 0）：每个网络 n 个样本，(M, n, 2)。初始噪声只看种子，各设置相同。"""
    M = len(params[0])
    x = torch.randn(SEEDS, n, 2, generator=torch.Generator().manual_seed(seed)).repeat(M // SEEDS, 1, 1)
    times = torch.linspace(T - 20, 0, steps).long().tolist()
    for t, after in zip(times, [*times[1:], None]):
        eps = forward(params, features(x, torch.full((M, n), t), torch.full((M, n), c)))
        x0 = ((x - noise[t] * eps) / signal[t]).clamp(-3, 3)
        x = x0 if after is None else signal[after] * x0 + noise[after] * (x - signal[t] * x0) / noise[t]
    return x


def near(points, targets, radius):
    """离 targets 不到 radius 的点占多少：points (M, n, 2)、targets (M, k, 2) → (M,)。"""
    return (torch.cdist(points, targets).min(-1).values < radius).float().mean(-1)


def off_curve(points):
    """到太极图最近弧的距离的中位数：points (M, n, 2) → (M,)。"""
    return toy2d.distance(points.flatten(0, 1))[0].view(points.shape[:2]).median(1).values


drawn, few = sample(params, 300, seed=3), bank[:, :16]
copied = dict(zip(configs, near(drawn, few, 0.1).view(-1, SEEDS)))                # {名字: (SEEDS,)}
blurred = dict(zip(configs, off_curve(drawn).view(-1, SEEDS)))
truth = toy2d.taiji(SEEDS * 2000, torch.Generator().manual_seed(4)).view(SEEDS, 2000, 2)
chance = near(truth, few[:SEEDS], 0.1)                                            # (SEEDS,) 基线
for name in configs:
    print(f"{name}：复制率 {copied[name].mean():.2f}，到曲线的距离 {blurred[name].mean():.3f}")
assert copied["无正则"].min() > 2 * chance.max()
for name in ("权重衰减", "Dropout"):
    assert (copied[name] < copied["无正则"]).all()
assert blurred["强权重衰减"].mean() > 2 * blurred["更多数据"].mean()               # 不复制，但也不像
for name, key in (("无正则", "none"), ("权重衰减", "decay"), ("Dropout", "dropout"), ("强权重衰减", "strong"), ("更多数据", "more")):
    zhixing.metric(f"copied_{key}", copied[name].mean().item())
    zhixing.metric(f"blur_{key}", blurred[name].mean().item())
zhixing.metric("copied_chance", chance.mean().item())

fig, axes = plt.subplots(1, 5, figsize=(9, 2.1), dpi=150)
for ax, name in zip(axes, ("无正则", "权重衰减", "Dropout", "强权重衰减", "更多数据")):
    i = list(configs).index(name) * SEEDS                                         # 第一个种子
    ax.scatter(*drawn[i].T, s=2, color="C0", linewidths=0, rasterized=True)
    if name != "更多数据":
        ax.scatter(*few[i].T, s=22, marker="x", color="C3", linewidths=1)
    ax.set(title=name, xlim=(-2.1, 2.1), ylim=(-2.1, 2.1), aspect="equal")
    ax.axis("off")
zhixing.figure("samples", fig)

# %% [markdown]
# ## 稳定性：一批坏数据
#
# 数据充足（2048 点），第 200 步喂一批忘了归一化的数据：$x_0$ 被放大一百多倍。其余 399 步都正常。

# %%
_, _, _, spike_step, spiked = train(
    {"无": {}, "裁剪到 1": {"clip": 1.0}, "权重衰减": {"decay": 0.3}}, steps=400, points=2048, poison={199}, every=10
)
before, hit = spike_step.index(190), spike_step.index(210)


def jump(key, name):
    """坏批次之后的最高误差比之前高多少，(SEEDS,)。"""
    curve = spiked[key][name]
    return curve[hit - 1 :].max(0).values - curve[before]


for name, tag in (("无", "none"), ("裁剪到 1", "clip"), ("权重衰减", "decay")):
    for key in ("val", "val_ema"):
        print(f"{name}，{key}：跳高 {jump(key, name).mean():.3f}")
        zhixing.metric(f"jump_{key}_{tag}", jump(key, name).mean().item())
for key in ("val", "val_ema"):
    assert jump(key, "裁剪到 1").max() < 0.4 * jump(key, "无").min()               # 裁剪：每个种子都几乎不受影响
    assert jump(key, "权重衰减").min() > 2 * jump(key, "裁剪到 1").max()           # 权重衰减防不了
recover = lambda key: next(k for k, v in zip(spike_step[hit:], spiked[key]["无"][hit:].mean(1))
                           if v < spiked[key]["无"][before].mean() + 0.01) - 200   # fmt: skip
zhixing.metric("recover", recover("val"))
zhixing.metric("recover_ema", recover("val_ema"))

fig, axes = plt.subplots(1, 2, figsize=(8.4, 3), sharey=True)
for ax, key, title in zip(axes, ("val", "val_ema"), ("原始权重", "EMA 权重（衰减 0.995）")):
    for color, name in zip(("C3", "C0", "C1"), spiked[key]):
        band(ax, spike_step, spiked[key][name], color, name)
    ax.set(xlabel="训练步数", title=title, xlim=(100, 400), ylim=(0, None))
axes[0].set_ylabel("高出下限的验证误差")
axes[1].legend()
zhixing.figure("spike", fig)

# %% [markdown]
# ## EMA：抹平最后的抖动
#
# 学习率恒定时，权重一直在最优点附近抖动；EMA 取一段时间的平均。学习率退火到 0 也能抹平抖动，两者哪个都行，叠加没有更多好处。

# %%
weights, _, _, ema_step, annealed = train({"恒定": {}, "余弦": {"anneal": 1.0}}, steps=1000, points=2048, lr=1e-2)
base = [p.detach()[SEEDS:].clone() for p in weights]                              # 余弦退火的那组，后面微调用
end = {(key, name): annealed[key][name][-1] for key in ("val", "val_ema") for name in ("恒定", "余弦")}
for (key, name), value in end.items():
    print(f"学习率{name}，{key}：{value.mean():.4f}（{value.min():.4f} 到 {value.max():.4f}）")
    zhixing.metric(f"end_{key}_{'constant' if name == '恒定' else 'cosine'}", value.mean().item())
plain, mean = end["val", "恒定"], end["val_ema", "恒定"]
assert (mean < plain).all() and mean.mean() < 0.7 * plain.mean()                  # 恒定学习率：EMA 每个种子都更好
assert (end["val_ema", "余弦"] - end["val", "余弦"]).abs().max() < 0.2 * (plain - mean).mean()   # 退火之后：没有区别

fig, ax = plt.subplots(figsize=(6.2, 3))
band(ax, ema_step, annealed["val"]["恒定"], "C3", "恒定学习率")
band(ax, ema_step, annealed["val_ema"]["恒定"], "C0", "恒定学习率 + EMA")
band(ax, ema_step, annealed["val"]["余弦"], "C1", "余弦退火", "--")
ax.set(xlabel="训练步数", ylabel="高出下限的验证误差", ylim=(0, 0.12))
ax.legend()
zhixing.figure("ema", fig)


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
# 从余弦退火的那组权重出发，用 5 个新点（右上角的一小团，条件 $c=1$）全参数微调。$c=0$ 是“类别”，它应当还画得出太极图。先验保持就是在损失里加一项：基座自己在 $c=0$ 下生成的样本。

# %%
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
leak = near(shown[0.0], centre, 0.3).view(2, SEEDS)                               # 没说“主体”，也画出主体
made = near(shown[1.0], centre, 0.3).view(2, SEEDS)                               # 说了“主体”，画对了
history = {name: torch.stack(v) for name, v in history.items()}                   # (记录次数, 2, SEEDS)
assert leak[0].min() > 0.5 and leak[1].max() < 0.1
assert made[1].mean() > 0.7 and made[0].mean() >= made[1].mean()                  # 代价：主体学得慢一点
assert history["类别"][-1, 0].min() > 1.5 * history["类别"][-1, 1].max()
for i, key in enumerate(("none", "prior")):
    zhixing.metric(f"leak_{key}", leak[i].mean().item())
    zhixing.metric(f"subject_{key}", made[i].mean().item())
print("泄漏", leak.mean(1).tolist(), "主体", made.mean(1).tolist())

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
