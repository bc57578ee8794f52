# ---
# zhixing:
#   id: regularization
#   title: 正则化（一）：同一任务上加与不加
#   needs: []
#   timeout: 900
# ---

# %% [markdown]
# 权重衰减、Dropout、梯度裁剪、EMA 放到**同一个**二维扩散任务上，加与不加各训一遍，每个设置五个种子，画出区间。另外四种手段（梯度惩罚、谱归一化、先验保持、KL 项）管的不是这件事，在示例 `regularization_other` 里。
#
# **预计耗时与内存**：单线程、机器空闲时约二十秒，峰值内存约 0.5 GB；网络太小，有 GPU 也用 CPU。
#
# 网络、训练循环与采样在 `examples/minisd/stacked2d.py`：几十个小网络叠成一个大张量一起训。同一个种子下，不同设置的初始权重、数据、步号、噪声逐位相同，所以可以成对比较。

# %%
import matplotlib.pyplot as plt
import torch
from safetensors.torch import save_file
from torch import nn

import zhixing
from minisd import toy2d
from minisd.stacked2d import SEEDS, adam_state, adam_step, band, forward, mlp, sample, train

torch.set_num_threads(1)
torch.manual_seed(0)


def spread(values):
    """(SEEDS,) → 平均值、最小值、最大值。"""
    return values.mean().item(), values.min().item(), values.max().item()


# %% [markdown]
# ## 优化器的三个开关
#
# `decay` 是解耦的权重衰减（AdamW），`l2` 是把 $\lambda\theta$ 加进梯度，`clip` 是裁剪阈值。先与 PyTorch 自带的实现核对。

# %%
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
# ## 过拟合：16 个训练点
#
# 数据是太极图线稿上的点，每个种子只给 16 个训练点，“更多数据”给 512 个；验证集是同一条曲线上的 2048 个新点。报告的都是**高出理论下限多少**：训练误差为负，就说明网络在背训练点。
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
assert gain["早停"].mean() > max(gain[n].mean() for n in ("权重衰减", "强权重衰减", "L2 进梯度", "Dropout"))
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
base = {str(i): p.detach()[SEEDS:].clone() for i, p in enumerate(weights)}        # 余弦退火的那组
save_file(base, zhixing.output_path("base.safetensors"))                          # regularization_other 拿它微调
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
