# ---
# zhixing:
#   id: controlnet
#   title: 像素小世界里的 ControlNet
#   needs: []
#   timeout: 900
# ---

# %% [markdown]
# 先训一个只认“文本”的小扩散模型当基座，锁住；再给它接一个 ControlNet，让它照着轮廓线画。
# 世界小到可以读图判分：16×16 的灰度图，一个实心图形，三种形状、两种明暗。
#
# **预计耗时与内存**：单线程约 50 秒，峰值内存约 0.5 GB。基座约 15 秒，三次 ControlNet 训练约 25 秒，其余是采样与画图。

# %%
import copy
import math

import matplotlib.pyplot as plt
import torch
from torch import nn

import zhixing
from minisd import schedule
from minisd.controlnet import Block, Controlled, ControlNet, HintEncoder, TinyUNet, ZeroConv

torch.set_num_threads(1)
torch.manual_seed(0)

SIZE, T, BATCH = 16, 1000, 32
s = schedule.cosine(T)

# %% [markdown]
# ## 小世界
#
# 图形由有符号距离场（signed distance field）画出：距离小于 0 是内部，绝对值小于 0.7 像素的一圈就是轮廓线，也就是条件图。
# “文本”是一个编号：0 是空提示，1 到 6 是“形状 × 明暗”。轮廓线说得清形状和位置，说不清里面是亮是暗：这件事由文本说，没有文本就由初始噪声定。


# %%
def world(n, seed):
    """n 个样本：图 (n,1,16,16)，轮廓 (n,1,16,16)，真值掩码 (n,16,16)，文本编号 (n,)。"""
    g = torch.Generator().manual_seed(seed)
    kind, bright = torch.randint(0, 3, (n,), generator=g), torch.randint(0, 2, (n,), generator=g)
    between = lambda a, b: (a + (b - a) * torch.rand(n, generator=g))[:, None, None]
    cx, cy, r = between(4.5, 11.5), between(4.5, 11.5), between(3, 4.4)
    axis = torch.arange(SIZE) + 0.5
    dx, dy = axis[None, None, :] - cx, axis[None, :, None] - cy                        # (n, 1|16, 16|1)
    circle = torch.hypot(dx, dy) - r
    square = torch.maximum(dx.abs(), dy.abs()) - 0.88 * r
    triangle = torch.maximum(0.866 * dx.abs() - 0.5 * dy, dy) - 0.6 * r
    d = torch.stack([circle, square, triangle])[kind, torch.arange(n)]                # (n, 16, 16)
    inside = (0.5 - d).clamp(0, 1)
    image = 0.85 * (2 * bright - 1)[:, None, None] * (2 * inside - 1)
    return image[:, None], (d.abs() < 0.7).float()[:, None], inside > 0.5, 1 + kind + 3 * bright


def read_mask(images):
    """读图：边框像素的中位数当背景，与它相差超过 0.8 的算前景。(n,1,16,16) → (n,16,16)"""
    x = images[:, 0]
    background = torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1).median(1).values
    return (x - background[:, None, None]).abs() > 0.8


def each_iou(images, mask):
    """每张图读出的掩码与真值的交并比（intersection over union，IoU），(n,)。"""
    p = read_mask(images)
    return (p & mask).sum((1, 2)) / (p | mask).sum((1, 2)).clamp(min=1)


def iou(images, mask):
    return each_iou(images, mask).mean().item()


images, edges, masks, texts = world(4096, 1)                    # 训练
images_v, edges_v, masks_v, texts_v = world(64, 2)              # 评测：没见过的位置与大小
empty_v = torch.zeros_like(texts_v)

assert iou(images_v, masks_v) > 0.98                            # 读图的尺子本身是准的
shifted = iou(torch.roll(images_v, 1, -1), masks_v)             # 整张图平移一个像素，IoU 就只剩这么多
zhixing.metric("iou_shift1", shifted)

# %% [markdown]
# ## 目标与采样
#
# 网络的输出按 $v$ 参数化，再换算成噪声（`schedule.split`）；**损失是噪声的均方误差**，基座与 ControlNet 用的是同一个函数。
# 步号按 $\sqrt u$ 抽（$u$ 均匀），偏向大噪声：图这么小，布局在大噪声处就定了。


# %%
def noise_loss(model, x0, t, eps, text, **kwargs):
    """‖ε − ε̂‖²，对一切取平均。损失里没有“生成的图”。"""
    x_t = schedule.q_sample(s, x0, t, eps)
    _, eps_hat = schedule.split(s, x_t, t, model(x_t, t, text, **kwargs), "v")
    return (eps_hat - eps).pow(2).mean()


def train(model, parameters, steps, lr, drop, seed, watch=None, hinted=True):
    """训练 steps 步；``drop`` 是把文本换成空提示的概率；每步之前调用 ``watch(k)``。"""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.0)
    for k in range(steps):
        if watch:
            watch(k)
        for group in optimizer.param_groups:                    # 20 步预热，随后余弦退火
            group["lr"] = lr * min(1, (k + 1) / 20) * (0.1 + 0.45 * (1 + math.cos(math.pi * k / steps)))
        i = torch.randint(0, len(images), (BATCH,), generator=g)
        t = (T * torch.rand(BATCH, generator=g).sqrt()).long().clamp(max=T - 1)
        eps = torch.randn(BATCH, 1, SIZE, SIZE, generator=g)
        text = torch.where(torch.rand(BATCH, generator=g) < drop, 0, texts[i])
        loss = noise_loss(model, images[i], t, eps, text, **({"hints": [edges[i]]} if hinted else {}))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if watch:
        watch(steps)


@torch.no_grad()
def sample(model, text, steps=10, seed=0, **kwargs):
    """DDIM（确定性）采样，初始噪声由 seed 固定，所以不同设置之间可以逐张比较。"""
    x = torch.randn(len(text), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(980, 0, steps).round().long().tolist()
    for t, t_next in zip(times, [*times[1:], None]):
        x0, _ = schedule.split(s, x, t, model(x, torch.full((len(x),), t), text, **kwargs), "v")
        x0 = x0.clamp(-1, 1)
        if t_next is None:
            return x0
        eps = (x - s.alpha_bar[t].sqrt() * x0) / (1 - s.alpha_bar[t]).sqrt()
        x = schedule.q_sample(s, x0, t_next, eps.float())


# %% [markdown]
# ## 基座：只认文本
#
# 训完锁住（残差块的第二个卷积从零开始，这是扩散 U-Net 的常见做法，与 ControlNet 的零卷积无关）。它大多画得出对的明暗，但看不到轮廓，图形落在哪里由初始噪声决定，与给定的轮廓对上只是碰巧。

# %%
base = TinyUNet(classes=7)
for block in base.modules():
    if isinstance(block, Block):
        nn.init.zeros_(block.conv2.weight)
train(base, base.parameters(), 700, 4e-3, drop=0.15, seed=3, hinted=False)
before = copy.deepcopy(base.state_dict())

base_images = sample(base, texts_v)
iou_base = iou(base_images, masks_v)
is_bright = lambda x: x[:, 0, 0, 0] < 0                         # 背景暗就是亮图形
follows_text = (is_bright(base_images) == (texts_v > 3)).float().mean().item()
assert follows_text > 0.9 and iou_base < 0.4                    # 听文本，不知道轮廓
zhixing.metric("iou_base", iou_base)
zhixing.metric("base_parameters", sum(p.numel() for p in base.parameters()))

# %% [markdown]
# ## ControlNet：锁定基座，训练副本
#
# 400 步，一半的文本换成空提示。每 20 步测一次：同一批没见过的轮廓、同样的初始噪声，读图算 IoU。


# %%
def attach(seed):
    torch.manual_seed(seed)
    control = ControlNet(base, HintEncoder(1, base.encoder[0].out_channels, down=1))
    return control, Controlled(base, control)


g = torch.Generator().manual_seed(4)
fixed = {                                                       # 评损失用的固定步号与噪声
    "x0": images_v.repeat(4, 1, 1, 1),
    "t": (T * torch.rand(256, generator=g).sqrt()).long().clamp(max=T - 1),
    "eps": torch.randn(256, 1, SIZE, SIZE, generator=g),
}


@torch.no_grad()
def validate(model, text):
    return noise_loss(model, text=text.repeat(4), hints=[edges_v.repeat(4, 1, 1, 1)], **fixed).item()


def norms(control):
    """每个零卷积权重的 Frobenius 范数。"""
    zeros = {f"跳连 {i}": z for i, z in enumerate(control.zero_skips)}
    zeros |= {"中间块": control.zero_middle, "条件入口": control.hint_encoder[-1]}
    return {name: z.weight.norm().item() for name, z in zeros.items()}


def run(steps=400, every=20, drop=0.5, seed=5, prepare=lambda control: None):
    """训一个 ControlNet，返回（控制模型，记录）。"""
    control, model = attach(seed)
    prepare(control)
    log = {"step": [], "iou": [], "iou_empty": [], "loss": [], "loss_empty": [], "norm": []}

    def watch(k):
        log["norm"].append(norms(control))
        if k % every == 0:
            log["step"].append(k)
            log["iou"].append(iou(sample(model, texts_v, hints=[edges_v]), masks_v))
            log["iou_empty"].append(iou(sample(model, empty_v, hints=[edges_v]), masks_v))
            log["loss"].append(validate(model, texts_v))
            log["loss_empty"].append(validate(model, empty_v))

    train(model, control.parameters(), steps, 4e-3, drop, seed=6, watch=watch)
    return model, log


control, model = attach(5)
with torch.no_grad():                                           # 步 0：与基座逐位相同
    t = torch.full((64,), 500)
    assert torch.equal(model(images_v, t, texts_v, hints=[edges_v]), base(images_v, t, texts_v))
assert torch.equal(sample(model, texts_v, hints=[edges_v]), base_images)      # 采样整条轨迹也逐位相同

model, log = run()
assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())   # 基座一个数也没变
assert log["iou"][0] == iou_base and log["iou"][-1] > iou_base + 0.3


def score(model, text):
    """换四组初始噪声，共 256 张的 IoU，(256,)。"""
    return torch.cat([each_iou(sample(model, text, seed=k, hints=[edges_v]), masks_v) for k in range(4)])


final = score(model, texts_v)
zhixing.metric("iou_final", final.mean())
zhixing.metric("share_failed", (final < 0.4).float().mean())
zhixing.metric("iou_empty_final", score(model, empty_v).mean())
zhixing.metric("control_parameters", sum(p.numel() for p in model.controls.parameters()))

# %% [markdown]
# ## 收敛得突然吗
#
# 找出 IoU 涨得最快的 100 步（训练的四分之一），看它占全程涨幅的多少；再看固定噪声上的损失在同一段里降了多少。

# %%
window = 5                                                      # 5 次评测 = 100 步
gain = [b - a for a, b in zip(log["iou"], log["iou"][window:])]
start = max(range(len(gain)), key=gain.__getitem__)
share = gain[start] / (log["iou"][-1] - log["iou"][0])
loss_share = (log["loss"][start] - log["loss"][start + window]) / (log["loss"][0] - log["loss"][-1])
quiet = next(k for k, v in zip(log["step"], log["iou"]) if v > log["iou"][0] + 0.05)   # 第一次看得出变化
zhixing.metric("window_start", log["step"][start])
zhixing.metric("window_end", log["step"][start + window])
zhixing.metric("window_share", share)
zhixing.metric("window_loss_share", loss_share)
zhixing.metric("quiet_until", quiet)
assert share > 0.4                                              # 匀速增长时是 0.25

fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.2))
left.plot(log["step"], log["iou"], label="给文本")
left.plot(log["step"], log["iou_empty"], label="空提示")
left.axhline(iou_base, color="k", lw=0.8, ls=":")
left.axhline(shifted, color="k", lw=0.8, ls="--")
left.text(400, iou_base, "基座", ha="right", va="top")
left.text(0, shifted, "真图平移一个像素", va="bottom")
left.axvspan(log["step"][start], log["step"][start + window], color="C0", alpha=0.12, lw=0)
left.set(xlabel="训练步数", ylabel="掩码 IoU", ylim=(0, 1))
left.legend(loc="lower right", bbox_to_anchor=(1, 0.3))
for name in log["norm"][0]:
    right.plot([n[name] for n in log["norm"]], label=name)
right.set(xlabel="训练步数", ylabel="零卷积权重的范数")
right.legend(ncol=2)
zhixing.figure("curves", fig)

assert all(v == 0 for v in log["norm"][0].values())             # 起点都是零
assert log["norm"][1]["条件入口"] == 0 and log["norm"][1]["跳连 0"] > 0     # 第一步只有输出端的动
assert all(v > 0 for v in log["norm"][2].values())              # 第二步起全部动了

# %% [markdown]
# ## 条件强度
#
# 把全部残差乘以 `scale`。0 就是基座；训练时是 1。

# %%
scales = [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3]
swept = [sample(model, texts_v, hints=[edges_v], scales=[v]) for v in scales]
by_scale = [iou(x, masks_v) for x in swept]
assert torch.equal(swept[0], base_images)                       # 强度 0 逐位等于基座
assert by_scale[:5] == sorted(by_scale[:5])                     # 0 到 1 单调变强
assert max(by_scale) - by_scale[4] < 0.3 * (by_scale[4] - by_scale[0])        # 1 以后只剩零头
zhixing.metric("iou_scale_half", by_scale[2])
zhixing.metric("iou_scale_3", by_scale[-1])

shown = [0, 2, 4, 5, 8]                                         # 展示哪几个强度
columns = [int((texts_v == k).nonzero()[0]) for k in range(1, 7)]             # 每种文本一张
rows = [("轮廓", 2 * edges_v - 1)] + [(f"强度 {scales[i]:g}", swept[i]) for i in shown] + [("原图", images_v)]
fig = plt.figure(figsize=(8.2, 3.6))
grid = fig.add_gridspec(len(rows), len(columns) + 1, width_ratios=[1] * len(columns) + [7], wspace=0.05, hspace=0.05)
for r, (name, x) in enumerate(rows):
    for c, j in enumerate(columns):
        ax = fig.add_subplot(grid[r, c])
        ax.imshow(x[j, 0], vmin=-1, vmax=1, cmap="gray")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        if c == 0:
            ax.set_ylabel(name, rotation=0, ha="right", va="center")
ax = fig.add_subplot(grid[:, -1])
ax.plot(scales, by_scale, "o-")
ax.axhline(shifted, color="k", lw=0.8, ls="--")
ax.text(3, shifted, "真图平移一个像素", ha="right", va="bottom")
ax.set(xlabel="条件强度", ylabel="掩码 IoU", ylim=(0, 1))
zhixing.figure("scale", fig)

# %% [markdown]
# ## 同一条轮廓，两种画法
#
# 空提示、同一张轮廓、64 个不同的初始噪声：明暗没有人指定，由噪声决定，两种都会出现。

# %%
one = edges_v[:1].expand(64, -1, -1, -1)
many = sample(model, empty_v, hints=[one], steps=20, seed=7)
share_bright = is_bright(many).float().mean().item()
assert 0.1 < share_bright < 0.9
zhixing.metric("share_bright", share_bright)

# %% [markdown]
# ## 对照一：零卷积改成普通初始化
#
# 用 PyTorch 卷积的缺省初始化，其余一切不变，训 200 步。

# %%
def ordinary(control):
    """把每个零卷积换成卷积的默认初始化。"""
    for z in control.modules():
        if isinstance(z, ZeroConv):
            nn.Conv2d.reset_parameters(z)


_, log_random = run(steps=200, every=40, prepare=ordinary)
assert log_random["loss"][0] > 1.3 * log["loss"][0]             # 步 0 就把基座弄坏了
repaired = next(k for k, v in zip(log_random["step"], log_random["loss"]) if v < log["loss"][0])
zhixing.metric("repaired", repaired)
zhixing.metric("loss_zero_0", log["loss"][0])
zhixing.metric("loss_random_0", log_random["loss"][0])
zhixing.metric("iou_zero_200", log["iou"][10])
zhixing.metric("iou_random_200", log_random["iou"][-1])

# %% [markdown]
# ## 对照二：不丢文本
#
# 训练 ControlNet 时文本从不为空（基座仍是原来那个），评测时给空提示。

# %%
model_keep, log_keep = run(drop=0.0, every=200)
zhixing.metric("keep_iou", score(model_keep, texts_v).mean())
zhixing.metric("keep_iou_empty", score(model_keep, empty_v).mean())
zhixing.metric("keep_loss_empty", log_keep["loss_empty"][-1])
zhixing.metric("drop_loss_empty", log["loss_empty"][-1])
zhixing.metric("keep_loss", log_keep["loss"][-1])
zhixing.metric("drop_loss", log["loss"][-1])
assert log["loss_empty"][-1] < log_keep["loss_empty"][-1]       # 空提示下，丢过文本的损失更低

fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3))
for name, x in (("零初始化", log), ("普通初始化", log_random)):
    n = sum(k <= 200 for k in x["step"])
    left.plot(x["step"][:n], x["loss"][:n], "o-", ms=3, label=name)
    right.plot(x["step"][:n], x["iou"][:n], "o-", ms=3, label=name)
left.axhline(log["loss"][0], color="k", lw=0.8, ls=":")
left.text(200, log["loss"][0], "基座", ha="right", va="bottom")
left.set(xlabel="训练步数", ylabel="固定噪声上的损失", ylim=(0, None))
right.set(xlabel="训练步数", ylabel="掩码 IoU", ylim=(0, 1))
right.legend()
zhixing.figure("ablation", fig)
