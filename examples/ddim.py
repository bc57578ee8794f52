# ---
# zhixing:
#   id: ddim
#   title: 同一个网络，四种采样器
#   needs: [ddpm, clip, vae, base]
#   timeout: 900
# ---

# %% [markdown]
# 这里一步训练也没有：二维部分的网络来自 DDPM 的示例，图像部分的网络来自迷你 Stable Diffusion 的基座，权重原样读入。变的只有采样器：DDPM（DDIM 取 $\eta=1$）、DDIM、PNDM、DPM-Solver++(2M)。
#
# **预计耗时与内存**：单线程、机器空闲时约半分钟，峰值内存约 0.8 GB。二维的网络太小，有 GPU 也用 CPU。

# %%
import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file

import zhixing
from minisd import judge, pipeline, samplers, schedule, toy2d, world
from minisd.denoiser2d import Denoiser

torch.manual_seed(0)
METHODS = {                                          # 名字 → samplers.sample 的参数
    "DDPM（η = 1）": {"method": "ddim", "eta": 1.0},
    "DDIM（η = 0）": {"method": "ddim"},
    "PNDM": {"method": "pndm"},
    "DPM-Solver++": {"method": "dpm++"},
}
COLOR = dict(zip(METHODS, ("C3", "C0", "C2", "C1")))
DDPM, DDIM, PNDM, DPM = METHODS


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## 二维：DDPM 训好的网络，一个参数不动

# %%
s = schedule.linear(1000)                            # 与训练时相同的日程
net = Denoiser().eval().requires_grad_(False)
net.load_state_dict(load_file(zhixing.input_path("ddpm/net.safetensors")))

N = 1000
data = toy2d.taiji(2000, seeded(1))                  # (2000, 2)
x_T = torch.randn(N, 2, generator=seeded(0))         # 所有采样器从同一批噪声出发


def draw(steps, method, eta=0.0, seed=3):
    """从 x_T 采样 (N, 2)；步号取各方法的缺省取法。"""
    return samplers.sample(s, net, x_T, steps, method, "eps", eta, generator=seeded(seed))


def energy_distance(a, b):
    """无偏的能量距离：2E‖a-b‖ - E‖a-a'‖ - E‖b-b'‖。"""
    within = lambda z: torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))
    return (2 * torch.cdist(a, b).mean() - within(a) - within(b)).item()


def rms(a, b):
    return (a - b).square().mean().sqrt().item()


# 尺子的分辨力：两批真数据之间的能量距离也不恰好是 0，取 20 次的最大绝对值
resolution = max(abs(energy_distance(toy2d.taiji(N, seeded(100 + i)), data)) for i in range(20))
zhixing.metric("resolution", resolution)

# %% [markdown]
# ## 步数-质量曲线
#
# 两把尺子。**能量距离**问“整批样本像不像数据”，对四种方法都有意义。**到参考轨迹的距离**问“每个样本离同一噪声出发的精确轨迹有多远”，只对确定性方法有意义；参考是 DPM-Solver++ 走满 1000 步。PNDM 的步号取 leading，起点比 $T-1$ 低一截，所以与从同一起点走 250 步的轨迹比。

# %%
STEPS = (5, 10, 20, 50, 100, 200)
reference = draw(1000, "dpm++")
samples = {(name, n): draw(n, **options) for name, options in METHODS.items() for n in STEPS}
samples[DDPM, 1000], samples[DDIM, 1000] = draw(1000, **METHODS[DDPM]), draw(1000, **METHODS[DDIM])
quality = {key: energy_distance(x, data) for key, x in samples.items()}
gap = {key: rms(x, reference) for key, x in samples.items()}
for n in STEPS:
    start = samplers.timesteps(1000, n, "leading")[0]
    fine = [round(start * (1 - i / 250)) for i in range(250)]
    gap[PNDM, n] = rms(samples[PNDM, n], draw(fine, "dpm++"))
print(f"尺子的分辨力 {resolution:.4f}")

for n in STEPS:
    print(f"{n:4d} 步  " + "  ".join(f"{name} {quality[name, n]:+.4f} / {gap[name, n]:.4f}" for name in METHODS))

for n in (5, 10, 20):                                # 步数少：随机的最差
    assert quality[DDPM, n] > max(quality[m, n] for m in (DDIM, PNDM, DPM))
assert quality[DDPM, 10] > 4 * resolution
for name in METHODS:                                 # 步数够了，能量距离就分不出谁好
    assert abs(quality[name, 200]) < 2 * resolution, name
assert abs(quality[DDIM, 50] - quality[DPM, 50]) < resolution
assert gap[DDIM, 50] > 1.5 * gap[DPM, 50]            # 同样 50 步，到参考轨迹的距离分得出
assert gap[DDIM, 200] > 1.8 * gap[DPM, 200]
assert all(gap[DDPM, n] > 1 for n in STEPS)          # 随机采样与参考轨迹毫不相干

for key, name in {"ddpm": DDPM, "ddim": DDIM, "pndm": PNDM, "dpm": DPM}.items():
    for n in (10, 20, 50):
        zhixing.metric(f"ed_{key}_{n}", quality[name, n])
        zhixing.metric(f"gap_{key}_{n}", gap[name, n])

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2))
for name in METHODS:
    left.plot(STEPS, [abs(quality[name, n]) for n in STEPS], "o-", color=COLOR[name], ms=4, label=name)
    if name != DDPM:
        right.plot(STEPS, [gap[name, n] for n in STEPS], "o-", color=COLOR[name], ms=4, label=name)
left.axhspan(3e-4, resolution, color="#888888", alpha=0.25, lw=0)
left.text(5, 3.6e-4, "两批真数据也差这么多", fontsize=8)
left.set(xscale="log", yscale="log", ylim=(3e-4, 0.2), xlabel="步数", title="能量距离的绝对值：分布像不像")
right.set(xscale="log", yscale="log", xlabel="步数", title="到参考轨迹的距离：走得准不准")
left.legend(frameon=False, fontsize=8)
for ax in (left, right):
    ax.set_xticks(STEPS, [str(n) for n in STEPS])
    ax.minorticks_off()
zhixing.figure("curves", fig)

# %% [markdown]
# ## 步数够多时，随机采样反而更干净
#
# 走满 1000 步，离散化误差都很小，剩下的主要是网络误差。看离弧最远的那 5% 的点：DDPM 每步注入的噪声会把走偏的点拉回高密度处，确定性轨迹偏了就偏了。DDPM 走满 1000 步换两串噪声，结论不变。

# %%
def tail(x):
    """到最近弧的距离的 95 分位。"""
    return toy2d.distance(x)[0].quantile(0.95).item()


stray_ddim, stray_ode = tail(samples[DDIM, 1000]), tail(reference)
stray_ddpm = [tail(samples[DDPM, 1000]), tail(draw(1000, **METHODS[DDPM], seed=4))]
print(f"1000 步时到弧距离的 95 分位：DDPM {stray_ddpm[0]:.3f}、{stray_ddpm[1]:.3f}，DDIM {stray_ddim:.3f}")
assert max(stray_ddpm) < 0.85 * min(stray_ddim, stray_ode)       # 多走一千步，随机的尾巴短
assert tail(samples[DDPM, 10]) > tail(samples[DDIM, 10])         # 只走十步，正相反
zhixing.metric("tail_ddpm_1000", max(stray_ddpm))
zhixing.metric("tail_ddim_1000", stray_ddim)
zhixing.metric("tail_ddpm_10", tail(samples[DDPM, 10]))
zhixing.metric("tail_ddim_10", tail(samples[DDIM, 10]))

# %% [markdown]
# ## 确定性与隐空间
#
# $\eta=0$ 时样本是初始噪声的函数：再跑一遍逐位相同，换个步数也落在附近。于是每个噪声点有了“归宿”，噪声平面就是隐空间。按噪声的方位角上色：DDIM 的结果里颜色成片；$\eta=1$ 的颜色全混了，初始噪声几乎不决定结果。

# %%
assert torch.equal(draw(20, "ddim"), draw(20, "ddim", seed=4))                    # η = 0 与随机数种子无关
assert not torch.equal(draw(20, "ddim", 1.0), draw(20, "ddim", 1.0, seed=4))

hue = torch.atan2(x_T[:, 1], x_T[:, 0])                                           # (N,) 噪声的方位角


def neighbours_agree(x):
    """每个点与离它最近的点，初始噪声的夹角余弦的均值：1 是成片，0 是全混。"""
    near = (torch.cdist(x, x) + 1e9 * torch.eye(len(x))).argmin(1)
    return torch.cos(hue - hue[near]).mean().item()


smooth, mixed = neighbours_agree(samples[DDIM, 100]), neighbours_agree(samples[DDPM, 100])
assert smooth > 0.8 and mixed < 0.3
zhixing.metric("latent_smooth", smooth)
zhixing.metric("latent_mixed", mixed)

fig, axes = plt.subplots(1, 3, figsize=(8.4, 2.9), dpi=150)
panels = {"初始噪声": x_T, "DDIM，100 步": samples[DDIM, 100], "DDPM，100 步": samples[DDPM, 100]}
for ax, (title, x) in zip(axes, panels.items()):
    ax.scatter(*x.T, s=4, c=hue, cmap="hsv", linewidths=0, rasterized=True)
    ax.set(title=title, xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), aspect="equal")
    ax.axis("off")
zhixing.figure("latent", fig)

# %% [markdown]
# ## η 从 0 到 1

# %%
ETAS = (0.0, 0.25, 0.5, 0.75, 1.0)
by_eta = {n: [energy_distance(draw(n, "ddim", eta), data) for eta in ETAS] for n in (10, 20, 50)}
assert by_eta[10][-1] > 1.3 * by_eta[10][0] and by_eta[20][-1] > 1.3 * by_eta[20][0]   # 步数少时 η = 1 更差
assert max(map(abs, by_eta[50])) < by_eta[10][0] / 2                                   # 步数多了差别就小

fig, ax = plt.subplots(figsize=(5.2, 3))
for color, (n, values) in zip(("C0", "C1", "C2"), by_eta.items()):
    ax.plot(ETAS, values, "o-", color=color, ms=4, label=f"{n} 步")
ax.axhspan(-resolution, resolution, color="#888888", alpha=0.25, lw=0)
ax.set(xlabel="η", ylabel="能量距离", title="灰带：两批真数据之间也有的差")
ax.legend(frameon=False)
zhixing.figure("eta", fig)

# %% [markdown]
# ## 图像：迷你 Stable Diffusion 的基座
#
# 潜空间 6×6×4、余弦日程、v-预测、$w=2$ 的引导。32 句描述、同一批初始噪声，四种采样器各走 4 到 20 步。尺子同样两把：判分器的“颜色、形状、位置全对”，与潜变量到参考轨迹（DPM-Solver++ 60 步）的均方根距离。

# %%
device = "cuda" if torch.cuda.is_available() else "cpu"
paths = [zhixing.input_path(name) for name in ("clip/clip.safetensors", "vae/vae.safetensors", "base/unet.safetensors")]
sd = pipeline.StableDiffusion.load(*paths).to(device)
B = 32
attrs = world.ALL[torch.randperm(len(world.ALL), generator=seeded(0))[:B]]
denoise = sd.denoiser(world.captions(attrs), guidance=2.0)
z_T = sd.noise(B, seeded(1))                                     # (B, 4, 6, 6)


def latents(steps, denoise=denoise, z=z_T, **options):
    return samplers.sample(sd.schedule, denoise, z, steps, **options, generator=seeded(2))


def right(z):
    """判分器：三项全对的比例。"""
    return judge.score(sd.vae.to_image(z), attrs)["all"]


FEW = (4, 6, 10, 20)
z_ref = latents(60)
drawn = {(name, n): latents(n, **options) for name, options in METHODS.items() for n in FEW}
score = {key: right(z) for key, z in drawn.items()}
z_gap = {key: rms(z, z_ref) for key, z in drawn.items()}
for n in FEW:
    print(f"{n:2d} 步  " + "  ".join(f"{name} {score[name, n]:.2f} / {z_gap[name, n]:.3f}" for name in METHODS))

assert right(z_ref) > 0.95
for n in FEW:                                        # 负结果：判分器分不出 DDIM 与 DPM-Solver++
    assert abs(score[DDIM, n] - score[DPM, n]) < 0.07 and min(score[DDIM, n], score[DPM, n]) > 0.9
assert z_gap[DDIM, 10] > 1.2 * z_gap[DPM, 10]        # 到参考轨迹的距离分得出，步数越多差得越多
assert z_gap[DDIM, 20] > 1.5 * z_gap[DPM, 20]
assert score[PNDM, 4] < 0.8                          # PNDM 步数太少时外推过头
for key, name in {"ddpm": DDPM, "ddim": DDIM, "pndm": PNDM, "dpm": DPM}.items():
    for n in FEW:
        zhixing.metric(f"score_{key}_{n}", score[name, n])
        zhixing.metric(f"z_gap_{key}_{n}", z_gap[name, n])           # PNDM 的起点不同，它的 z_gap 只作参考

# 步号取法：DPM-Solver++ 用 leading，末尾要从一个大步跨到 t = 0，外推过头
leading = {m: right(latents(4, method=m, spacing="leading")) for m in ("dpm++", "ddim")}
assert leading["dpm++"] < 0.7 < leading["ddim"]
zhixing.metric("dpm_leading_4", leading["dpm++"])
zhixing.metric("ddim_leading_4", leading["ddim"])

# %%
fig, (ax, right_ax) = plt.subplots(1, 2, figsize=(8.4, 3))
for name in METHODS:
    ax.plot(FEW, [score[name, n] for n in FEW], "o-", color=COLOR[name], ms=4, label=name)
    if name in (DDIM, DPM):
        right_ax.plot(FEW, [z_gap[name, n] for n in FEW], "o-", color=COLOR[name], ms=4, label=name)
ax.set(xscale="log", xlabel="步数", ylim=(0, 1.05), title="判分：三项全对的比例")
right_ax.set(xscale="log", yscale="log", xlabel="步数", title="到参考轨迹的距离（潜变量）")
ax.legend(frameon=False, fontsize=8, loc="lower right")
for a in (ax, right_ax):
    a.set_xticks(FEW, [str(n) for n in FEW])
    a.minorticks_off()
zhixing.figure("image_curves", fig)

# %% [markdown]
# 同一个噪声、不同步数。提示词只说“一个圆”，颜色与位置由噪声决定：确定性采样器换步数画的还是同一张图，DDPM 每撒一串新噪声就是另一张。
#
# 这是多数，不是全部：32 个噪声里，有几个落在两种图的边界附近，步数少时会走到另一张去。数一数 DDIM 有多少离参考不到 0.3（两张不同的图相差 1 上下）。画出来的是离边界最远的一个。

# %%
def show(ax, z, title=None):
    ax.imshow((sd.vae.to_image(z)[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).cpu())
    ax.axis("off")
    if title:
        ax.set_title(title, fontsize=9)


z_many = torch.cat([sd.noise(1, seeded(k)) for k in range(32)])
circles = sd.denoiser(["一个圆"] * 32, guidance=2.0)
targets = latents(60, circles, z_many)
kept = {}
for n in FEW:
    off = (latents(n, circles, z_many, method="ddim") - targets).square().mean((1, 2, 3)).sqrt()     # (32,)
    kept[n] = (off < 0.3).float().mean().item()
    zhixing.metric(f"kept_{n}", kept[n])
print("离参考不到 0.3 的比例：", kept)
stray = (latents(20, circles, z_many, **METHODS[DDPM]) - targets).square().mean((1, 2, 3)).sqrt()
zhixing.metric("kept_ddpm", (stray < 0.3).float().mean())
assert kept[4] < kept[20] and kept[20] > 0.8 and (stray < 0.3).float().mean() < 0.3      # DDPM 走同样的步数，到别处去了

PICK = int((latents(min(FEW), circles, z_many, method="ddim") - targets).square().mean((1, 2, 3)).argmin())   # 离边界最远的一个
one, z_one, target = sd.denoiser(["一个圆"], guidance=2.0), z_many[PICK : PICK + 1], targets[PICK : PICK + 1]
same = {}
for name, options in METHODS.items():
    for n in FEW:                                    # 每个步数一串新噪声，只有 DDPM 用得到
        same[name, n] = samplers.sample(sd.schedule, one, z_one, n, **options, generator=seeded(n))
for n in FEW:
    assert max(rms(same[m, n], target) for m in (DDIM, DPM)) < 0.3
assert rms(same[PNDM, FEW[0]], target) > rms(same[DDIM, FEW[0]], target) and rms(same[PNDM, FEW[-1]], target) < 0.3

fig, axes = plt.subplots(4, 5, figsize=(6, 5.2), dpi=150)
for line, name in zip(axes, METHODS):
    for ax, n in zip(line, FEW):
        show(ax, same[name, n], f"{n} 步" if name == DDPM else None)
    show(line[-1], target, "参考" if name == DDPM else None)
    label = name.replace("（", "\n（")
    line[0].text(-0.15, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
zhixing.figure("same_noise", fig)

# %% [markdown]
# ## 隐空间插值
#
# 两个噪声之间按球面插值（slerp），提示词只说“一个圆”，颜色与位置由噪声决定。DDIM 的九张图是渐变的；同样九个起点交给 $\eta=1$，相邻两张就没有关系了。

# %%
def slerp(a, b, u):
    """球面插值：u = 0 给 a，u = 1 给 b，途中长度不塌缩。"""
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - u) * angle) * a + torch.sin(u * angle) * b) / torch.sin(angle)


circle = sd.denoiser(["一个圆"] * 9, guidance=2.0)
U = torch.linspace(0, 1, 9)
rows = {}
for seed in (1, 2):
    a, b = sd.noise(2, seeded(seed))
    path = torch.stack([slerp(a, b, u) for u in U])              # (9, 4, 6, 6)
    straight = torch.stack([(1 - u) * a + u * b for u in U])
    assert (path[4].norm() / a.norm() - 1).abs() < 0.1           # 球面插值的中点仍像一个噪声
    assert straight[4].norm() < 0.85 * a.norm()                  # 直线插值的中点短了近三成
    rows[f"DDIM，第 {seed} 对"] = latents(20, circle, path, method="ddim")
    if seed == 1:
        rows["DDPM，第 1 对"] = latents(20, circle, path, method="ddim", eta=1.0)


def change(z):
    """相邻两张图之差的均方根，取九张的均值。"""
    image = sd.vae.to_image(z)
    return (image[1:] - image[:-1]).square().mean((1, 2, 3)).sqrt().mean().item()


changes = {name: change(z) for name, z in rows.items()}
assert changes["DDIM，第 1 对"] < 0.5 * changes["DDPM，第 1 对"]
zhixing.metric("change_ddim", changes["DDIM，第 1 对"])
zhixing.metric("change_ddpm", changes["DDPM，第 1 对"])

fig, axes = plt.subplots(3, 9, figsize=(8.6, 3.2), dpi=150)
for row, name in zip(axes, ("DDIM，第 1 对", "DDIM，第 2 对", "DDPM，第 1 对")):
    for ax, z in zip(row, rows[name]):
        show(ax, z[None])
    row[0].text(-0.15, 0.5, name.replace("，", "\n"), transform=row[0].transAxes, ha="right", va="center", fontsize=9)
zhixing.figure("interpolation", fig)

# %% [markdown]
# ## DDIM 反演：把真图送回噪声，再采样回来
#
# 往返误差来自一处：往上走时 $x_t$ 还不知道，只能拿下一级的 $x$ 去问网络。步数多则误差小；用刚得到的 $x_t$ 再问两次（不动点迭代），误差小一个数量级。顺带量反演得到的“噪声”的标准差：它应当是 1。

# %%
pictures = world.draw(attrs[:16], seeded(5)).image.to(device)
z_0 = sd.vae.to_latent(pictures)                                  # (16, 4, 6, 6)
trip = {}
for w, steps, refine in ((1, 10, 0), (1, 20, 0), (1, 50, 0), (1, 10, 2), (1, 20, 2), (2, 20, 2)):
    d = sd.denoiser(world.captions(attrs[:16]), guidance=w)
    noise = samplers.invert(sd.schedule, d, z_0, steps, refine=refine)
    trip[w, steps, refine] = rms(latents(steps, d, noise, method="ddim"), z_0), noise.std().item()
    print(f"w = {w}，{steps} 步，迭代 {refine} 次：往返误差 {trip[w, steps, refine][0]:.4f}，噪声标准差 {noise.std():.2f}")
    zhixing.metric(f"trip_w{w}_{steps}_{refine}", trip[w, steps, refine][0])
    zhixing.metric(f"std_w{w}_{steps}_{refine}", trip[w, steps, refine][1])

assert trip[1, 10, 0][0] > 1.2 * trip[1, 20, 0][0] > 1.5 * trip[1, 50, 0][0]      # 步数多，误差小
assert trip[1, 10, 2][0] < trip[1, 50, 0][0] / 2                                  # 迭代两次胜过五倍的步数
assert trip[1, 20, 0][1] < 0.8 and abs(trip[1, 20, 2][1] - 1) < 0.1               # 不迭代时噪声偏小
assert trip[2, 20, 2][1] > 1.2                                                    # w = 2：得到的不是标准正态
