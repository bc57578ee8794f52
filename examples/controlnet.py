# ---
# zhixing:
#   id: controlnet
#   title: 给迷你 Stable Diffusion 接上 ControlNet
#   needs: [clip, vae, base]
#   timeout: 1800
# ---

# %% [markdown]
# 锁住基座，接一个边缘图 ControlNet，训练 180 步：前后都读图量轮廓对不对得上。另有两个对照：零卷积改成普通初始化、训练时不丢文本。训好的权重存下来，供别的示例叠加使用。
#
# **预计耗时与内存**：单线程、机器空闲时约一分半，峰值内存约 0.8 GB。

# %%
import copy

import matplotlib.pyplot as plt
import torch
from torch import nn

import zhixing
from minisd import guidance, judge, latents, pipeline, samplers, schedule, train, world
from minisd.controlnet import Controlled, ControlNet, HintEncoder, ZeroConv, edges

device = "cuda" if torch.cuda.is_available() else "cpu"
paths = [zhixing.input_path(p) for p in ("clip/clip.safetensors", "vae/vae.safetensors", "base/unet.safetensors")]
sd = pipeline.StableDiffusion.load(*paths).to(device)
base = sd.unet.to(memory_format=torch.channels_last)
before = copy.deepcopy(base.state_dict())
zhixing.metric("base_parameters", sum(p.numel() for p in base.parameters()))


def gen(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## 条件与尺子
#
# 条件图是遮罩的边缘，像素级的。描述只说颜色与形状（“红色的圆”），**不说位置**：图形在哪里、多大、转了几度，只有边缘图知道；颜色只有描述知道。
#
# 尺子是掩码的软交并比（intersection over union，IoU）：判分器从图里读出的遮罩与真值比。三个参照：原图自己、VAE 重建一遍（潜空间方法的上限）、原图平移一个像素。

# %%
DATA, BATCH, STEPS = 4000, 32, 180
scenes = world.sample(DATA, gen(1))
hints = edges(scenes.mask).to(device)
held = world.sample(48, gen(8))                                # 评测用的 48 个轮廓，训练里没有
held_hint = edges(held.mask).to(device)
prompts = [world.caption(a, "{c}色的{s}") for a in held.attrs]


def iou(images, mask=held.mask):
    """读出的遮罩与真值的软 IoU，(N,)。"""
    return judge.soft_iou(judge.read(images).mask, mask)[:, 0]


ceiling = iou(sd.vae.to_image(sd.vae.to_latent(held.image.to(device)))).mean()
shifted = iou(held.image.roll(1, -1)).mean()
assert iou(held.image).mean() > 0.98                            # 尺子本身是准的
zhixing.metric("iou_vae", ceiling)
zhixing.metric("iou_shift1", shifted)


@torch.no_grad()
def draw(model, texts, hint, seed, w=2.0, steps=12, scale=1.0):
    """受控的文生图，两支都加残差；w = 1 不引导，描述可以是空串。→ (N, 3, 24, 24)"""
    cond, empty = sd.encode(texts), sd.encode([""] * len(texts))

    def denoise(x, t):
        v = model(x, t, *cond, hints=[hint], scales=[scale])
        return v if w == 1 else guidance.combine(v, model(x, t, *empty, hints=[hint], scales=[scale]), w)

    return sd.vae.to_image(samplers.sample(sd.schedule, denoise, sd.noise(len(texts), gen(seed)), steps)).cpu()


def uncontrolled(x, t, *cond, hints, scales):
    """不受控的基座，调用方式与受控的相同。"""
    return base(x, t, *cond)


base_images = draw(uncontrolled, prompts, held_hint, 4)
iou_base = iou(base_images).mean().item()
read_base = judge.score(base_images, held.attrs)
assert read_base["color"] > 0.9 and iou_base < 0.3, (read_base, iou_base)      # 听文本，不知道轮廓
zhixing.metric("iou_base", iou_base)

# %% [markdown]
# ## 训练
#
# 损失与训练基座时是同一个函数，只更新副本、零卷积与条件小网络；一半的描述换成空串。每 5 步记一次：24 个没见过的轮廓、固定的初始噪声，8 步采样（不引导），读图算 IoU；同时在固定的步号与噪声上算损失，量各个零卷积的范数。


# %%
class Enough(Exception):
    """训到要的步数就停：学习率仍按完整的日程走，才能与完整的训练逐步相比。"""


g = gen(5)
fixed_t = torch.randint(1000, (48,), generator=g)
fixed = {"x0": sd.vae.to_latent(held.image.to(device)), "t": fixed_t.to(device), "noise": torch.randn(48, 4, 6, 6, generator=g).to(device)}


@torch.no_grad()
def validate(model, texts):
    """固定的步号与噪声上 v 的均方误差。"""
    t, noise = fixed["t"], fixed["noise"]
    x_t = schedule.q_sample(sd.schedule, fixed["x0"], t, noise)
    v = model(x_t, t, *sd.encode(texts), hints=[held_hint])
    return (v - schedule.velocity(sd.schedule, fixed["x0"], t, noise)).square().mean().item()


def norms(control):
    """每个零卷积权重的 Frobenius 范数。"""
    zeros = {f"跳连 {i}": z for i, z in enumerate(control.zero_skips)}
    zeros |= {"中间块": control.zero_middle, "条件入口": control.hint_encoder[-1]}
    return {name: z.weight.norm().item() for name, z in zeros.items()}


def run(drop=0.5, stop=STEPS, every=5, prepare=lambda control: None, keep=()):
    """训一个 ControlNet，返回（受控模型，记录，{步数: 副本}）。"""
    data = latents.LatentData(sd, scenes, drop)
    torch.manual_seed(0)
    control = ControlNet(base, HintEncoder(1, base.encoder[0].out_channels, down=2)).to(device)
    prepare(control)
    model, kept = Controlled(base, control), {}
    log = {"step": [], "iou": [], "loss": [], "norm": []}

    def record(step):
        log["step"].append(step)
        log["iou"].append(iou(draw(model, prompts[:24], held_hint[:24], 4, w=1, steps=8), held.mask[:24]).mean().item())
        log["loss"].append(validate(model, prompts))

    def watch(step, _):
        log["norm"].append(norms(control))
        if (step + 1) % every == 0:
            record(step + 1)
        if step + 1 in keep:
            kept[step + 1] = copy.deepcopy(control)
        if step + 1 == stop < STEPS:
            raise Enough

    def loss_fn(generator):
        i, row = data.draw(BATCH, generator)
        text, valid, hint = data.text[row], data.valid[row], hints[i]
        return latents.diffusion_loss(lambda x, t: model(x, t, text, valid, hints=[hint]), sd.schedule, data.latent[i], generator)

    log["norm"].append(norms(control))
    record(0)
    try:
        train.fit(control, loss_fn, STEPS, train.muon(control, 0.05, 2e-3), generator=gen(6), watch=watch)
    except Enough:
        pass
    return model, log, kept


control = ControlNet(base, HintEncoder(1, base.encoder[0].out_channels, down=2)).to(device)
fresh = Controlled(base, control)
assert torch.equal(draw(fresh, prompts, held_hint, 4), base_images)           # 步 0：整条采样轨迹与基座逐位相同
nn.Conv2d.reset_parameters(control.zero_middle)                               # 弄坏一个零卷积就不再相同
assert not torch.equal(draw(fresh, prompts, held_hint, 4), base_images)

HALF = 80
model, log, kept = run(keep=(HALF,))
assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())   # 基座一个数也没变
assert all(v == 0 for v in log["norm"][0].values())                           # 起点都是零
assert log["norm"][1]["条件入口"] == 0 and log["norm"][1]["跳连 0"] > 0       # 第一步只有出口动
assert all(v > 0 for v in log["norm"][2].values())                            # 第二步起全部动了

# %% [markdown]
# ## 成绩
#
# 先把权重存成半精度再读回来评：别的示例用的就是那一份。48 个轮廓各换两组初始噪声，共 96 张；颜色、形状由判分器读，位置以轮廓的为准。

# %%
weights = zhixing.output_path("edges.safetensors")
pipeline.save_weights(model.controls[0], weights)
control = ControlNet(base, HintEncoder(1, base.encoder[0].out_channels, down=2)).to(device)
model = Controlled(base, pipeline.load_weights(control, weights))
zhixing.metric("control_parameters", sum(p.numel() for p in control.parameters()))
zhixing.metric("hint_parameters", sum(p.numel() for p in control.hint_encoder.parameters()))
zhixing.metric("steps", STEPS)
zhixing.metric("scenes", DATA)


images = torch.cat([draw(model, prompts, held_hint, seed) for seed in (4, 5)])
final = iou(images, held.mask.repeat(2, 1, 1, 1))
read = judge.score(images, held.attrs.repeat(2, 1))
zhixing.metric("iou_final", final.mean())
zhixing.metric("share_failed", (final < 0.6).float().mean())
for key in ("color", "shape", "place"):
    zhixing.metric(f"final_{key}", read[key])
assert final.mean() >= 0.78 and final.mean() > iou_base + 0.5, final.mean()
assert read["color"] >= 0.95 and read["place"] >= 0.95, read

# %% [markdown]
# ## 收敛得突然吗
#
# 找出 IoU 涨得最快的 30 步（全程的六分之一），看它占全程涨幅的多少；再看固定噪声上的损失在同一段里降了多少。

# %%
window = 6                                                      # 6 次记录 = 30 步
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
assert share > 0.5                                              # 匀速增长时约 0.17

fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.2))
left.plot(log["step"], log["iou"], label="掩码 IoU")
left.plot(log["step"], [v / log["loss"][0] for v in log["loss"]], ls="--", label="损失（步 0 为 1）")
left.axhline(ceiling, color="C2", lw=0.8, ls=":", label="VAE 重建")
left.axvspan(log["step"][start], log["step"][start + window], color="C0", alpha=0.12, lw=0)
left.set(xlabel="训练步数", ylim=(0, 1.03))
left.legend(loc="lower right")
for name in log["norm"][0]:
    right.plot([n[name] for n in log["norm"]], label=name)
right.set(xlabel="训练步数", ylabel="零卷积权重的范数")
right.legend(ncol=2)
zhixing.figure("curves", fig)

# %% [markdown]
# ## 条件强度
#
# 把全部残差乘以 `scale`。0 就是基座；训练时是 1。

# %%
scales = [0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3]
swept = [draw(model, prompts[:24], held_hint[:24], 4, scale=float(v)) for v in scales]
by_scale = [iou(x, held.mask[:24]).mean().item() for x in swept]
by_color = [judge.score(x, held.attrs[:24])["color"] for x in swept]
assert torch.equal(swept[0], draw(uncontrolled, prompts[:24], held_hint[:24], 4))                       # 强度 0 逐位等于基座
assert by_scale[:4] == sorted(by_scale[:4]) and by_scale[4] > by_scale[2]      # 往 1 走，越来越听边缘的
zhixing.metric("iou_scale_half", by_scale[2])
zhixing.metric("iou_scale_3", by_scale[-1])
zhixing.metric("color_scale_3", by_color[-1])


def picture(ax, x):
    ax.imshow(((x + 1) / 2).clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


shown = [0, 2, 4, 6, 7]                                         # 展示哪几个强度
rows = [("边缘", 1 - 2 * held_hint.cpu().expand(-1, 3, -1, -1))]
rows += [(f"强度 {scales[i]:g}", swept[i]) for i in shown] + [("原图", held.image)]
fig = plt.figure(figsize=(8.2, 4.2))
grid = fig.add_gridspec(len(rows), 7, width_ratios=[1] * 6 + [6], wspace=0.05, hspace=0.05)
for r, (name, x) in enumerate(rows):
    for c in range(6):
        ax = fig.add_subplot(grid[r, c])
        picture(ax, x[c])
        if c == 0:
            ax.set_ylabel(name, rotation=0, ha="right", va="center")
ax = fig.add_subplot(grid[:, -1])
ax.plot(scales, by_scale, "o-", label="掩码 IoU")
ax.plot(scales, by_color, "s--", label="颜色正确率")
ax.axhline(ceiling, color="C2", lw=0.8, ls=":", label="VAE 重建")
ax.set(xlabel="条件强度", ylim=(0, 1.03))
ax.legend(loc="lower right")
zhixing.figure("scale", fig)

# %% [markdown]
# ## 各管各的：边缘管轮廓，文本管颜色
#
# 上：同一张边缘图配六种颜色的描述。下：同一张边缘图、空提示、不同的初始噪声，颜色没人指定。再看两者冲突：描述说“圆”，边缘画的是别的形状，听谁的？

# %%
star = int((held.attrs[:, 1] == 4).nonzero()[0])
one = held_hint[star : star + 1]
by_text = draw(model, [f"{c}色的星星" for c in world.COLORS], one.expand(6, -1, -1, -1), 7)
wanted = torch.tensor([[c, 4, int(held.attrs[star, 2])] for c in range(6)])
right_text = judge.correct(by_text, wanted).float().mean(0)
zhixing.metric("six_colors", right_text[0])
free = draw(model, [""] * 32, one.expand(32, -1, -1, -1), 7, w=1)
free_read = judge.read(free).attrs
counts = torch.bincount(free_read[:, 0].clamp(min=0), minlength=6)
zhixing.metric("free_colors", int((counts > 0).sum()))
zhixing.metric("free_top", counts.max() / 32)
assert (counts > 0).sum() >= 3 and right_text[0] >= 5 / 6, (counts, right_text)

other = held.attrs[:, 1] != 0                                   # 边缘不是圆的那些
disagree = draw(model, [f"{[*world.COLORS][c]}色的圆" for c in held.attrs[other, 0]], held_hint[other], 4)
shape = judge.read(disagree).attrs[:, 1]
zhixing.metric("conflict_edges", (shape == held.attrs[other, 1]).float().mean())
zhixing.metric("conflict_text", (shape == 0).float().mean())

fig, axes = plt.subplots(2, 7, figsize=(8.2, 2.7))
for row, (images_, label) in zip(axes, [(by_text, "给颜色"), (free, "空提示")]):
    picture(row[0], 1 - 2 * one[0].cpu().expand(3, -1, -1))
    row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    for ax, x in zip(row[1:], images_):
        picture(ax, x)
for ax, name in zip(axes[0], ["边缘", *world.COLORS]):
    ax.set_title(name)
zhixing.figure("colors", fig)

# %% [markdown]
# ## 对照一：零卷积改成普通初始化
#
# 用 PyTorch 卷积的缺省初始化，其余一切不变，学习率日程也相同，训到第 80 步。

# %%
def ordinary(control):
    """把每个零卷积换成卷积的默认初始化。"""
    for z in control.modules():
        if isinstance(z, ZeroConv):
            nn.Conv2d.reset_parameters(z)


_, log_random, _ = run(stop=HALF, every=10, prepare=ordinary)
at = log["step"].index(HALF)
assert log_random["loss"][0] > 1.1 * log["loss"][0]             # 步 0 就把基座弄坏了
zhixing.metric("loss_zero_0", log["loss"][0])
zhixing.metric("loss_random_0", log_random["loss"][0])
zhixing.metric("loss_zero_half", log["loss"][at])
zhixing.metric("loss_random_half", log_random["loss"][-1])
zhixing.metric("iou_zero_half", log["iou"][at])
zhixing.metric("iou_random_half", log_random["iou"][-1])

fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3))
for name, x in (("零初始化", log), ("普通初始化", log_random)):
    n = sum(k <= HALF for k in x["step"])
    left.plot(x["step"][:n], x["loss"][:n], "o-", ms=3, label=name)
    right.plot(x["step"][:n], x["iou"][:n], "o-", ms=3, label=name)
left.axhline(log["loss"][0], color="C2", lw=0.8, ls=":", label="基座")
left.legend()
left.set(xlabel="训练步数", ylabel="固定噪声上的损失", ylim=(0, None))
right.set(xlabel="训练步数", ylabel="掩码 IoU", ylim=(0, 1))
zhixing.figure("ablation", fig)

# %% [markdown]
# ## 对照二：不丢文本
#
# 训练 ControlNet 时描述从不换成空串，同样训到第 80 步；评测时给空提示与给描述各测一遍。

# %%
model_keep, _, _ = run(drop=0.0, stop=HALF, every=HALF)
for name, m in (("drop", Controlled(base, kept[HALF])), ("keep", model_keep)):
    zhixing.metric(f"{name}_loss", validate(m, prompts))
    zhixing.metric(f"{name}_loss_empty", validate(m, [""] * 48))
    zhixing.metric(f"{name}_iou", iou(draw(m, prompts, held_hint, 4)).mean())
    zhixing.metric(f"{name}_iou_empty", iou(draw(m, [""] * 48, held_hint, 4, w=1)).mean())
