# ---
# zhixing:
#   id: sd_conditioning
#   title: 图生图：扫一遍 strength
#   needs: [clip, vae, base]
#   timeout: 600
# ---

# %% [markdown]
# 图生图不加任何条件通道，只换采样的起点：原图编码、加噪到半路、按新描述去噪。这里从 0 到 1 扫一遍强度，再用一张“像素是 B、CLIP 向量是 A”的图，看图生图到底听谁的。
#
# **预计耗时与内存**：单线程、机器空闲时十秒左右，峰值内存约 0.5 GB。

# %%
import matplotlib.pyplot as plt
import torch

import zhixing
from minisd import clip, img2img, judge, pipeline, world
from minisd.gallery import show

device = "cuda" if torch.cuda.is_available() else "cpu"
paths = [zhixing.input_path(p) for p in ("clip/clip.safetensors", "vae/vae.safetensors", "base/unet.safetensors")]
sd = pipeline.StableDiffusion.load(*paths).to(device)


def gen(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## 图生图：扫一遍 strength
#
# 36 张原图，各配一句颜色、形状、位置全不相同的新描述。判分器分别问：原图的属性还在吗，新描述的属性画出来了吗。

# %%
N, STEPS = 36, 20
source = world.sample(N, gen(1), world.ALL)
old = source.attrs
step = torch.stack([torch.randint(1, k, (N,), generator=gen(2)) for k in (6, 5, 5)], 1)
new = (old + step) % torch.tensor([6, 5, 5])                            # 三项都与原来不同
assert (new != old).all()



def redraw(attrs, strength):
    """把原图按 attrs 的描述改画。"""
    return img2img.img2img(sd, source.image.to(device), world.captions(attrs), strength, gen(3), steps=STEPS).cpu()


strengths = [k / 10 for k in range(11)]
swept = [redraw(new, p) for p in strengths]
keep = torch.stack([judge.correct(x, old).float().mean(0) for x in swept])        # (11, 3) 颜色、形状、位置
obey = torch.stack([judge.correct(x, new).float().mean(0) for x in swept])
psnr = [judge.psnr(x, source.image) for x in swept]
assert torch.equal(swept[0], sd.vae.to_image(sd.vae.to_latent(source.image.to(device))).cpu())     # 0：只过一遍 VAE
assert (keep[0] == 1).all() and keep[-1].max() < 0.1 and obey[-1].min() > 0.9
assert all(a > b for a, b in zip(psnr, psnr[1:]))                       # 越强越不像原图

flip = [strengths[int((obey[:, k] > 0.5).float().argmax())] for k in range(3)]    # 第一次有一半听新描述
for name, value in zip(("color", "shape", "place"), flip):
    zhixing.metric(f"flip_{name}", value)
assert flip[2] > max(flip[:2]), flip                                    # 位置最后才肯搬

MID = 5
again = redraw(old, strengths[MID])
for name, value in {
    "sweep_images": N, "mid": strengths[MID], "obey_color_mid": obey[MID, 0], "keep_place_mid": keep[MID, 2],
    "obey_all_full": judge.score(swept[-1], new)["all"], "same_all": judge.score(again, old)["all"], "vae_psnr": psnr[0],
}.items():
    zhixing.metric(name, value)
assert judge.score(again, old)["all"] > 0.9

# %%
columns = [0, 2, 3, 4, 5, 6, 7, 8, 10]
fig, axes = plt.subplots(4, len(columns) + 1, figsize=(8.2, 3.8))
for r, line in enumerate(axes):
    show(line, torch.stack([source.image[r], *(swept[c][r] for c in columns)]))
    line[-1].text(25, 12, world.caption(new[r]), va="center", fontsize=7)
axes[0, 0].set_title("原图", fontsize=8)
for ax, c in zip(axes[0, 1:], columns):
    ax.set_title(f"{strengths[c]:g}", fontsize=8)
zhixing.figure("sweep", fig)

fig, (ax, bx) = plt.subplots(1, 2, figsize=(8, 2.9), width_ratios=[3, 2])
for k, name in enumerate(("颜色", "形状", "位置")):
    ax.plot(strengths, obey[:, k], "o-", ms=3, color=f"C{k}", label=name)
    ax.plot(strengths, keep[:, k], "--", color=f"C{k}")
ax.set(xlabel="strength", ylabel="比例")
ax.legend()
bx.plot(strengths, psnr, "o-", ms=3, color="C3")
bx.set(xlabel="strength", ylabel="与原图的 PSNR（分贝）")
zhixing.figure("curves", fig)

# %% [markdown]
# 为什么是位置？只改一个属性、其余（半径、转角、圆心抖动、背景）都不变，量潜变量挪了多远。

# %%
def same_jitter(attrs):
    return sd.vae.to_latent(world.draw(attrs, gen(4)).image.to(device)).flatten(1)


gaps = []
for k in range(3):
    changed = old.clone()
    changed[:, k] = new[:, k]
    gaps.append((same_jitter(changed) - same_jitter(old)).norm(dim=1).mean().item())
for name, value in zip(("color", "shape", "place"), gaps):
    zhixing.metric(f"gap_{name}", value)
assert gaps[2] > max(gaps[:2]), gaps

# %% [markdown]
# ## 像素是 B，CLIP 向量是 A
#
# 给图 B 加一层幅度有限的扰动，用梯度下降让它的 CLIP 图像向量靠近图 A 的。像素还是 B，CLIP 却以为是 A：谁把 CLIP 图像向量当条件，谁就该画出 A。

# %%
tower = pipeline.load_weights(clip.CLIP(), paths[0])                              # 24 张图，留在 CPU 上
sentences = tower.embed_text(clip.tokenize(world.captions(world.ALL)))            # (150, D)
K, LIMIT, STRENGTH = 24, 0.25, 0.3
pick = torch.randperm(150, generator=gen(14))[:K]
a_attrs = world.ALL[pick]
b_attrs = (a_attrs + torch.tensor([3, 2, 2])) % torch.tensor([6, 5, 5])           # 三项都不同
a, b = world.draw(a_attrs, gen(15)).image, world.draw(b_attrs, gen(16)).image
goal = tower.embed_image(a)
delta = torch.zeros_like(b, requires_grad=True)
optimizer = torch.optim.Adam([delta], lr=0.02)
for _ in range(150):
    loss = -(tower.embed_image((b + delta).clamp(-1, 1)) * goal).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        delta.clamp_(-LIMIT, LIMIT)
fooled = (b + delta).clamp(-1, 1).detach()
vector = tower.embed_image(fooled)
guess = world.ALL[(vector @ sentences.T).argmax(1)]                               # CLIP 从 150 句里挑的那句

z = img2img.from_latent(sd.schedule, sd.unconditional(K), sd.vae.to_latent(fooled.to(device)), STRENGTH, gen(17), steps=STEPS)
redrawn = sd.vae.to_image(z).cpu()                                                # 图生图，不给文字
for name, value in {
    "adv_cosine": (vector * goal).sum(1).mean(), "adv_cosine_before": (tower.embed_image(b) * goal).sum(1).mean(),
    "adv_clip_a": (guess == a_attrs).all(1).double().mean(), "adv_clip_b": (guess == b_attrs).all(1).double().mean(),
    "img2img_a": judge.score(redrawn, a_attrs)["all"], "img2img_b": judge.score(redrawn, b_attrs)["all"],
    "adv_strength": STRENGTH, "adv_limit": LIMIT / 2, "adv_images": K,
}.items():
    zhixing.metric(name, float(value))
    print(name, round(float(value), 3))
assert (guess == a_attrs).all(1).double().mean() > 0.8                            # CLIP 上当了
assert judge.score(redrawn, b_attrs)["all"] > 0.8 and judge.score(redrawn, a_attrs)["all"] == 0       # 图生图没有

fig, axes = plt.subplots(4, 9, figsize=(8.2, 3.7))
rows = {"图 A": a, "图 B": b, "B + 扰动": fooled, "图生图": redrawn}
for line, (title, images) in zip(axes, rows.items()):
    show(line, images, title)
zhixing.figure("clip", fig)
