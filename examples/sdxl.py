# ---
# zhixing:
#   id: sdxl
#   title: 裁剪坐标微条件怎样消除“切头”
#   needs: [clip, vae, base]
#   timeout: 1800
# ---

# %% [markdown]
# 训练扩散模型时图常被随机裁剪，切掉的头会被当成世界本来的样子学进去。SDXL 的办法是把裁剪坐标也告诉网络，采样时令它为 $(0,0)$。
#
# 这里把训练图随机裁剪，从迷你 SD 的基座出发各微调两个模型：一个不知道裁剪坐标，一个知道；三个种子。然后由判分器数一数，画出来的图形有多少是完整的。
#
# **预计耗时与内存**：单线程、机器空闲时一分多钟，峰值内存约 0.5 GB。大头是六次微调。

# %%
import copy

import matplotlib.pyplot as plt
import torch

import zhixing
from minisd import judge, latents, micro, pipeline, train, world
from minisd.gallery import show

SEEDS, STEPS, BATCH, FAR = (0, 1, 2), 100, 32, 8
device = "cuda" if torch.cuda.is_available() else "cpu"
paths = [zhixing.input_path(p) for p in ("clip/clip.safetensors", "vae/vae.safetensors", "base/unet.safetensors")]
sd = pipeline.StableDiffusion.load(*paths).to(device)


def gen(seed):
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## 被切过的训练图
#
# 裁剪坐标 $(top, left)$：从上边切掉 top 个像素、从左边切掉 left 个像素，右边和下边露出背景。三成的图没有切，其余的在 0 到 8 之间均匀抽。描述不变：它说的是原图。

# %%
def crop(images, corner):
    """images (N, 3, S, S)，corner (N, 2) 的整数 (top, left) → 裁剪后的图，同形。露出的部分填背景色。"""
    n, _, size, _ = images.shape
    padded = images[:, :, -1:, -1:].expand(-1, -1, size + FAR, size + FAR).clone()    # 右下角一定是背景
    padded[:, :, :size, :size] = images
    grid = torch.arange(size)
    rows, columns = corner[:, 0, None] + grid, corner[:, 1, None] + grid              # (N, S)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def corners(n, g):
    corner = torch.randint(0, FAR + 1, (n, 2), generator=g)
    corner[torch.rand(n, generator=g) < 0.3] = 0
    return corner


def whole(images, attrs):
    """完整：形状读得对，而且图形几乎不碰画布的边。(N,) 布尔"""
    read = judge.read(images)
    m = read.mask[:, 0]
    touching = m[:, 0].sum(1) + m[:, -1].sum(1) + m[:, 1:-1, 0].sum(1) + m[:, 1:-1, -1].sum(1)
    return (touching < 2) & (read.attrs[:, 1] == attrs[:, 1])


scenes = world.sample(4000, gen(1))
corner = corners(len(scenes.image), gen(2))
cropped = crop(scenes.image, corner)
share = {"original": whole(scenes.image[:1000], scenes.attrs[:1000]), "cropped": whole(cropped[:1000], scenes.attrs[:1000])}
for name, ok in share.items():
    zhixing.metric(f"whole_{name}", ok.float().mean())
assert share["original"].float().mean() > 0.99                                        # 判据不冤枉没切过的图
assert share["cropped"].float().mean() < 0.75

data = latents.LatentData(sd, scenes._replace(image=cropped))                         # 图被切过，描述照旧

fig, axes = plt.subplots(2, 8, figsize=(8, 2.4))
show(axes[0], scenes.image[:8])
show(axes[1], cropped[:8])
for ax, c in zip(axes[1], corner):
    ax.set_title(f"({c[0]}, {c[1]})", fontsize=8)
zhixing.figure("crops", fig)

# %% [markdown]
# ## 微调
#
# 两个模型的数据、批次顺序、步数、U-Net 的学习率完全相同，差别只有嵌入：一个收裁剪坐标，一个不收。收的那个末层从零开始，步 0 与基座逐位相同；它是全新的，学习率取 U-Net 的十倍。

# %%
def fit(seed, conditioned):
    torch.manual_seed(seed)
    net = micro.add_micro(sd.unet, 2) if conditioned else copy.deepcopy(sd.unet).requires_grad_(True)
    average = train.EMA(net, 0.98)

    def loss(g):
        i = torch.randint(len(corner), (BATCH,), generator=g)
        template = torch.multinomial(data.share, BATCH, replacement=True, generator=g)
        row = torch.where(torch.rand(BATCH, generator=g) < data.drop, 0, data.rows[i, template])
        told = {"image": corner[i].float().to(device)} if conditioned else {}
        return latents.diffusion_loss(lambda x, t: net(x, t, data.text[row], data.valid[row], **told), sd.schedule, data.latent[i], g)

    fresh = [*net.embed.micro.parameters()] if conditioned else []
    kept = [p for p in net.parameters() if all(p is not q for q in fresh)]
    groups = [{"params": kept, "lr": 1e-3}] + [{"params": fresh, "lr": 1e-2}] * conditioned
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    train.fit(net, loss, STEPS, [optimizer], generator=gen(seed), ema=average)
    return average.model


start = micro.add_micro(sd.unet, 2)
x, t, (text, valid) = sd.noise(4, gen(0)), torch.tensor([10, 300, 700, 990], device=device), sd.encode(world.captions(world.ALL[:4]))
assert torch.equal(start(x, t, text, valid, image=torch.full((4, 2), 5.0, device=device)), sd.unet(x, t, text, valid))     # 步 0

models = {(kind, seed): fit(seed, kind == "told") for seed in SEEDS for kind in ("blind", "told")}
zhixing.metric("steps", STEPS)
zhixing.metric("seeds", len(SEEDS))

# %% [markdown]
# ## 完整率
#
# 64 句完整描述，每个模型画一遍。知道坐标的模型分别在 $(0,0)$ 与 $(8,0)$ 下画：后者等于点名要切过的图。

# %%
asked = world.ALL[torch.randint(150, (64,), generator=gen(9))]


def draw(net, corner=None):
    model = pipeline.StableDiffusion(sd.text_encoder, sd.vae, net)
    told = {} if corner is None else {"image": torch.tensor([corner], dtype=torch.float32, device=device).expand(len(asked), -1)}
    return model(world.captions(asked), gen(5), **told).cpu()


pictures, rate = {}, {"blind": [], "told": [], "top": []}
for seed in SEEDS:
    for name, image in {
        "blind": draw(models["blind", seed]),
        "told": draw(models["told", seed], (0, 0)),
        "top": draw(models["told", seed], (FAR, 0)),
    }.items():
        rate[name].append(whole(image, asked).float().mean().item())
        pictures.setdefault(name, image)
    zhixing.metric(f"blind_{seed}", rate["blind"][-1])
    zhixing.metric(f"told_{seed}", rate["told"][-1])
for name, values in rate.items():
    zhixing.metric(name, sum(values) / len(values))
zhixing.metric("asked", len(asked))
correct = {name: judge.score(pictures[name], asked)["all"] for name in ("blind", "told")}     # 第一个种子
for name, value in correct.items():
    zhixing.metric(f"{name}_all", value)
assert correct["told"] > correct["blind"] + 0.2, correct
zhixing.metric("base", whole(draw(sd.unet), asked).float().mean())
assert all(a > b + 0.05 for a, b in zip(rate["told"], rate["blind"])), rate           # 每个种子都成立
assert min(rate["told"]) > 0.85, rate
assert sum(rate["top"]) < sum(rate["told"]) - 0.3, rate                               # 点名要切过的，就有切过的

fig, axes = plt.subplots(3, 10, figsize=(8.2, 2.8))
cut = (~whole(pictures["blind"], asked)).nonzero()[:, 0]                              # 先放几张被切的，再随便放几张
shown = torch.cat([cut[:6], whole(pictures["blind"], asked).nonzero()[:4, 0]])
for line, (name, title) in zip(axes, {"blind": "不知道坐标", "told": "坐标 (0, 0)", "top": f"坐标 ({FAR}, 0)"}.items()):
    show(line, pictures[name][shown])
    line[0].text(-2, 12, title, ha="right", va="center")
zhixing.figure("samples", fig)

# %% [markdown]
# ## 坐标是不是精确的取景框
#
# 同一句描述、同一份初始噪声，坐标从 0 走到 8。若学成了取景框，图形应当移同样多的像素。量一量图形重心的位移，与坐标画在一起。

# %%
attrs = torch.tensor([[0, 3, 4]]).repeat(16, 1)                                       # 红色的十字在中间
grid = torch.arange(24) + 0.5


def center(images):
    m = judge.read(images).mask[:, 0]
    area = m.sum((1, 2))
    return torch.stack([(m.sum(2) * grid).sum(1), (m.sum(1) * grid).sum(1)], 1) / area[:, None]      # (N, 2) 行、列


net, knob = models["told", 0], torch.tensor([0, 2, 4, 6, 8])
model = pipeline.StableDiffusion(sd.text_encoder, sd.vae, net)
moved = []
for kind in ((1, 0), (0, 1)):
    told = (knob[:, None] * torch.tensor(kind)).float().to(device)                    # (5, 2)
    for c in told:
        image = model(world.captions(attrs), gen(6), image=c.expand(len(attrs), -1))
        moved.append(center(image).mean(0))
moved = torch.stack(moved).view(2, 5, 2)
shift = moved[:, :1] - moved                                                          # (2, 5, 2) 向上、向左移了多少
own = torch.stack([shift[0, :, 0], shift[1, :, 1]])                                   # 自己那个方向
other = torch.stack([shift[0, :, 1], shift[1, :, 0]])
zhixing.metric("reach_top", own[0, -1])
zhixing.metric("reach_left", own[1, -1])
zhixing.metric("leak", other.abs().max())
assert (own[:, -1].abs() < 6).all(), own                                               # 远不到 8 个像素

fig, (ax, bx) = plt.subplots(1, 2, figsize=(8, 2.8), width_ratios=[3, 2])
ax.plot(knob, own[0], "o-", label="top → 向上")
ax.plot(knob, own[1], "s-", label="left → 向左")
ax.plot(knob, other.abs().amax(0), "^--", label="另一个方向")
ax.plot(knob, knob, ":", color="k", lw=1, label="训练数据里的位移")
ax.set(xlabel="裁剪坐标（像素）", ylabel="图形重心的位移（像素）")
ax.legend()
names = {"blind": "不知道坐标", "told": "(0, 0)", "top": f"({FAR}, 0)"}
for k, name in enumerate(names):
    bx.plot([k] * len(SEEDS), rate[name], "o", color=f"C{k}")
bx.axhline(share["cropped"].float().mean(), color="k", ls=":", lw=1)
bx.text(2.4, share["cropped"].float().mean() + 0.01, "训练图", ha="right")
bx.set_xticks(range(3), names.values())
bx.set(ylabel="完整率", ylim=(0.3, 1.02), xlim=(-0.5, 2.5))
zhixing.figure("knob", fig)
