# ---
# zhixing:
#   id: ip_adapter
#   title: IP-Adapter：图像提示词
#   needs: [clip, vae, base]
#   timeout: 1800
# ---

# %% [markdown]
# 同一个迷你 Stable Diffusion 基座，冻结；只训练图像投影与每个交叉注意力层的 K'、V'。然后扫 $\lambda$：颜色听图的有多少，形状、位置还听不听文字，图文冲突时谁赢，只给图像又怎样。
#
# **预计耗时与内存**：单线程、机器空闲时一分多钟，峰值内存约 0.6 GB。大头是三次训练（解耦的两次、不解耦的一次）。

# %%
import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import zhixing
from minisd import clip, ip_adapter, judge, latents, pipeline, samplers, train, world
from minisd.gallery import show

STEPS, BATCH, GUIDANCE, M = 200, 32, 2.0, 48
device = "cuda" if torch.cuda.is_available() else "cpu"
paths = [zhixing.input_path(p) for p in ("clip/clip.safetensors", "vae/vae.safetensors", "base/unet.safetensors")]
sd = pipeline.StableDiffusion.load(*paths).to(device)
encoder = pipeline.load_weights(clip.CLIP(), paths[0]).image_encoder             # 冻结的 CLIP 图像编码器


def gen(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def vectors(images):
    """图 (N, 3, 24, 24) → CLIP 的全局图像向量 (N, 64)。"""
    return torch.cat([encoder(x) for x in images.split(500)])


# %% [markdown]
# ## 训练
#
# 图像条件与目标是**同一张图**（与论文相同）；损失就是基座的噪声预测损失，一个阶段训完。描述的七成是“形状在位置”，不提颜色：文字没说的那一项，图像 token 才有得可学。丢弃的概率照论文：只丢图、只丢文、都丢，各 0.05。
#
# 另训两个作对照：一个照搬基座的描述比例（四分之三的描述连颜色都说全了）；一个不解耦，把图像 token 直接接在文本后面，走基座冻结的 K、V。

# %%
SHARE = torch.tensor([0.2, 0.1, 0.0, 0.0, 0.7])          # 五种说法的比例，次序同 world.TEMPLATES
assert list(world.TEMPLATES)[-1] == "{s}在{p}"
scenes = world.sample(6000, gen(31))
data = latents.LatentData(sd, scenes, drop=0.0)
image = vectors(scenes.image)                            # (6000, 64)


class ConcatEmbed(ip_adapter.ImageEmbed):
    """不解耦的对照：图像 token 接在文本后面，一起走基座的交叉注意力。"""

    def forward(self, t, text, valid, image=None):
        cond = super().forward(t, text, valid, image)
        if image is None:
            return cond
        there = valid.new_ones(cond.image.shape[:2])
        return cond._replace(text=torch.cat([text, cond.image], 1), valid=torch.cat([valid, there], 1), image=None)


def fit(share, concat=False, seed=0):
    """训练一个适配器。→ (EMA 权重的网络, 损失)"""
    torch.manual_seed(seed)
    net = ip_adapter.add_ip_adapter(sd.unet)
    if concat:
        net.embed = ConcatEmbed(net.embed, net.embed.projection)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    average = train.EMA(net, 0.98)

    def loss(g):
        i = torch.randint(len(image), (BATCH,), generator=g)
        row = data.rows[i, torch.multinomial(share, BATCH, replacement=True, generator=g)]
        told, row = ip_adapter.drop(image[i], row, g)
        denoise = lambda x, t: net(x, t, data.text[row], data.valid[row], image=told.to(device))
        return latents.diffusion_loss(denoise, sd.schedule, data.latent[i], g)

    losses = train.fit(net, loss, STEPS, train.muon(net, 0.02, 2e-3), generator=gen(seed), ema=average)
    own = ip_adapter.adapter_parameters(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items() if k not in own)     # 基座一位没动
    return average.model, losses


net, losses = fit(SHARE)
usual, _ = fit(data.share)
simple, _ = fit(SHARE, concat=True)

# %% [markdown]
# 存成半精度的权重，只有新增的参数。后面全部用存下的那一份来算，因为别的示例读的就是它。

# %%
path = zhixing.output_path("adapter.safetensors")
save_file({k: v.half().cpu().contiguous() for k, v in ip_adapter.adapter_state(net).items()}, path)
ip_adapter.load_adapter(net, load_file(path))
own, base_size = ip_adapter.adapter_parameters(net), sum(p.numel() for p in sd.unet.parameters())
zhixing.metric("steps", STEPS)
zhixing.metric("parameters", sum(p.numel() for p in own.values()))
zhixing.metric("projection", sum(p.numel() for n, p in own.items() if "projection" in n))
zhixing.metric("layers", len(ip_adapter.layers(net)))
zhixing.metric("fraction", sum(p.numel() for p in own.values()) / base_size)
zhixing.metric("kilobytes", path.stat().st_size / 1000)

fig, ax = plt.subplots(figsize=(6, 2.4))
ax.plot(losses, lw=0.5, alpha=0.5)
ax.plot(range(19, STEPS), losses.unfold(0, 20, 1).mean(1), color="C0")
ax.set(xlabel="步数", ylabel="v 的均方误差", ylim=(0, None))
zhixing.figure("loss", fig)

# %% [markdown]
# ## λ 从 0 到 1.5
#
# 每张参考图配一句颜色、形状、位置**全不相同**的描述。两种问法：只说形状与位置（颜色该听图），三项都说（颜色冲突）。

# %%
def pairs(seed):
    """M 张参考图，和 M 组与它全不相同的属性。"""
    g = gen(seed)
    reference = world.sample(M, g, world.ALL)
    shift = torch.stack([torch.randint(1, k, (M,), generator=g) for k in (6, 5, 5)], 1)
    return reference, (reference.attrs + shift) % torch.tensor([6, 5, 5])


def ask(unet_, prompts, vector, scale, seed=5):
    """按文字与图像向量各画一张；空描述也行。两种条件一起引导：无条件的一支没有文字，图像向量是零。"""
    if scale is not None:
        ip_adapter.set_scale(unet_, scale)
    parts = [sd.encode(texts) for texts in (prompts, [""] * len(prompts))]
    text, valid = (torch.cat(column) for column in zip(*parts))
    both = ip_adapter.with_null(vector.to(device))

    @torch.no_grad()
    def denoise(x, t):
        v, v0 = unet_(torch.cat([x, x]), torch.cat([t, t]), text, valid, image=both).chunk(2)
        return v0 + GUIDANCE * (v - v0)

    return sd.vae.to_image(samplers.sample(sd.schedule, denoise, sd.noise(len(prompts), gen(seed)), 12)).cpu()


reference, wanted = pairs(77)
vector = vectors(reference.image)
without_color = [world.caption(a, "{s}在{p}") for a in wanted]
everything = world.captions(wanted)
names = ("color", "shape", "place")

plain = pipeline.StableDiffusion(sd.text_encoder, sd.vae, sd.unet)(without_color, gen(5), guidance=GUIDANCE).cpu()
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
curves = {key: {n: [] for n in names} for key in ("quiet_text", "quiet_image", "clash_text", "clash_image")}
rows = {}
for scale in SCALES:
    for kind, prompts in {"quiet": without_color, "clash": everything}.items():
        drawn = ask(net, prompts, vector, scale)
        rows[kind, scale] = drawn
        for side, attrs in {"text": wanted, "image": reference.attrs}.items():
            score = judge.score(drawn, attrs)
            for n in names:
                curves[f"{kind}_{side}"][n].append(score[n])
assert torch.equal(rows["quiet", 0.0], plain)                                    # 训过之后，λ = 0 仍逐位等于基座

# %%
at = {scale: k for k, scale in enumerate(SCALES)}
for scale, name in {0.0: "0", 0.5: "half", 1.0: "1", 1.5: "max"}.items():
    zhixing.metric(f"quiet_color_{name}", curves["quiet_image"]["color"][at[scale]])
    zhixing.metric(f"quiet_shape_{name}", curves["quiet_text"]["shape"][at[scale]])
    zhixing.metric(f"quiet_place_{name}", curves["quiet_text"]["place"][at[scale]])
    for n in names:
        zhixing.metric(f"clash_text_{n}_{name}", curves["clash_text"][n][at[scale]])
        zhixing.metric(f"clash_image_{n}_{name}", curves["clash_image"][n][at[scale]])
zhixing.metric("images", M)
for key, lines in curves.items():
    print(key, {n: [round(v, 3) for v in values] for n, values in lines.items()})
color, shape, place = curves["quiet_image"]["color"], curves["quiet_text"]["shape"], curves["quiet_text"]["place"]
assert color[at[0.0]] <= 0.25 and color[at[1.0]] >= 0.85                           # 文字没说颜色：λ = 1 时听图
assert shape[at[1.0]] >= 0.95 and place[at[1.0]] >= 0.95                          # 形状、位置仍听文字
assert curves["clash_text"]["color"][at[0.0]] >= 0.95                             # 冲突：λ = 0 时文字赢
assert curves["clash_text"]["color"][at[1.5]] <= curves["clash_text"]["color"][at[0.0]] - 0.3

fig, axes = plt.subplots(1, 2, figsize=(8, 2.9), sharey=True)
for ax, kind, title in zip(axes, ("quiet", "clash"), ("文字只说形状与位置", "三项都说，处处与图冲突")):
    for k, (n, label) in enumerate(zip(names, ("颜色", "形状", "位置"))):
        ax.plot(SCALES, curves[f"{kind}_text"][n], "o-", ms=3, color=f"C{k}", label=f"{label}：听文字")
        ax.plot(SCALES, curves[f"{kind}_image"][n], "s--", ms=3, color=f"C{k}", label=f"{label}：听图")
    ax.set(xlabel="λ", title=title, ylim=(-0.03, 1.03))
axes[0].set_ylabel("比例")
axes[1].legend(fontsize=7)
zhixing.figure("curves", fig)

fig, axes = plt.subplots(8, 8, figsize=(8.2, 8.6))
show(axes[0], reference.image, "参考图")
for ax, text in zip(axes[0], without_color):
    ax.set_title(text, fontsize=7)
for line, scale in zip(axes[1:], SCALES):
    show(line, rows["quiet", scale], f"λ = {scale:g}")
zhixing.figure("grid", fig)

fig, axes = plt.subplots(5, 8, figsize=(8.2, 5.6))
show(axes[0], reference.image, "参考图")
for ax, text in zip(axes[0], everything):
    ax.set_title(text, fontsize=6)
for line, scale in zip(axes[1:], (0.0, 0.5, 1.0, 1.5)):
    show(line, rows["clash", scale], f"λ = {scale:g}")
zhixing.figure("clash", fig)

for scale in SCALES:                                                             # 每个 λ 一张，正文里拖滑条看
    fig, axes = plt.subplots(3, 8, figsize=(7.2, 3.1))
    show(axes[0], reference.image, "参考图")
    show(axes[1], rows["quiet", scale], "没说颜色")
    show(axes[2], rows["clash", scale], "处处冲突")
    zhixing.figure(f"scale_{100 * scale:.0f}", fig)

# %% [markdown]
# 换一批参考图、描述与噪声，λ = 1 再量一次；三个适配器并排。

# %%
again, wanted_again = pairs(78)
settings = {"": (reference, wanted, vector, 5), "_again": (again, wanted_again, vectors(again.image), 6)}
drawn = {}
for tag, (source, target, v, seed) in settings.items():
    prompts = [world.caption(a, "{s}在{p}") for a in target]
    for name, model, scale in (("own", net, 1.0), ("usual", usual, 1.0), ("simple", simple, None)):
        if tag and name == "simple":
            continue
        drawn[name + tag] = pictures = ask(model, prompts, v, scale, seed)
        heard, followed = judge.score(pictures, source.attrs), judge.score(pictures, target)
        print(name + tag, *(round(v, 3) for v in (heard["color"], followed["shape"], followed["place"])))
        zhixing.metric(f"{name}{tag}_color", heard["color"])
        zhixing.metric(f"{name}{tag}_shape", followed["shape"])
        zhixing.metric(f"{name}{tag}_place", followed["place"])
        if name == "own":
            assert heard["color"] >= 0.8 and min(followed["shape"], followed["place"]) >= 0.9, (heard, followed)

fig, axes = plt.subplots(4, 8, figsize=(8.2, 4.6))
show(axes[0], reference.image, "参考图")
for ax, text in zip(axes[0], without_color):
    ax.set_title(text, fontsize=7)
for line, (name, title) in zip(axes[1:], {"own": "解耦", "usual": "解耦，描述多含颜色", "simple": "拼进文本"}.items()):
    show(line, drawn[name], title)
zhixing.figure("recipes", fig)

# %% [markdown]
# ## 只给图像；无条件的一支
#
# 文字置空、λ = 1。再看引导的无条件一支：图像向量置零（训练时丢弃的就是它），与两支都给同一个图像向量（等于没有对图像做引导）各画一遍。

# %%
only = ask(net, [""] * M, vector, 1.0)
score = judge.score(only, reference.attrs)
score_simple = judge.score(ask(simple, [""] * M, vector, None), reference.attrs)
for n in (*names, "all"):
    zhixing.metric(f"only_{n}", score[n])
    zhixing.metric(f"only_simple_{n}", score_simple[n])
print("只给图像", {n: round(v, 3) for n, v in score.items()})
assert score["color"] >= 0.8 > score["all"]

ip_adapter.set_scale(net, 1.0)
sided = pipeline.StableDiffusion(sd.text_encoder, sd.vae, net)
same = sided(without_color, gen(5), guidance=GUIDANCE, image=torch.cat([vector, vector]).to(device)).cpu()
heard = judge.score(same, reference.attrs)["color"]
zhixing.metric("null_same_color", heard)
zhixing.metric("null_same_gap", (judge.read(same).color - world.PALETTE[reference.attrs[:, 0]]).norm(dim=1).mean())
zhixing.metric("null_zero_gap", (judge.read(drawn["own"]).color - world.PALETTE[reference.attrs[:, 0]]).norm(dim=1).mean())

# 没有图像时：向量取零与 λ = 0 不是一回事
silent = sided(everything, gen(5), guidance=GUIDANCE, image=torch.zeros(2 * M, vector.shape[1], device=device)).cpu()
zhixing.metric("silent_all", judge.score(silent, wanted)["all"])
assert not torch.equal(silent, rows["clash", 0.0])
assert judge.score(silent, wanted)["all"] >= 0.9

fig, axes = plt.subplots(2, 8, figsize=(8.2, 2.5))
show(axes[0], reference.image, "参考图")
show(axes[1], only, "只给图像")
zhixing.figure("only", fig)

# %% [markdown]
# ## 它不是结构控制
#
# 把参考图的轮廓线当图像提示，文字只说颜色：轮廓里的形状、位置、大小传得过去吗？与参考图本身、与不接适配器比。

# %%
def outline(m):
    """遮罩 (N, 1, S, S) → 白底黑线的轮廓图 (N, 3, S, S)，[-1, 1]。"""
    edge = (F.max_pool2d(m, 3, 1, 1) + F.max_pool2d(-m, 3, 1, 1)).clamp(0, 1)
    return (1 - 2 * edge).expand(-1, 3, -1, -1)


sketch = outline(reference.mask)
colored = [f"{[*world.COLORS][a[0]]}色的{world.SHAPES[a[1]]}" for a in reference.attrs]
trials = {"none": (vector, 0.0), "sketch": (vectors(sketch), 1.0), "photo": (vector, 1.0)}
controlled = {name: ask(net, colored, v, scale) for name, (v, scale) in trials.items()}
iou = {name: judge.soft_iou(judge.read(pictures).mask, reference.mask).mean().item() for name, pictures in controlled.items()}
for name, value in iou.items():
    zhixing.metric(f"iou_{name}", value)
print({name: round(value, 3) for name, value in iou.items()})
assert max(iou.values()) < 0.7                                                    # 远不到 ControlNet 的水平

fig, axes = plt.subplots(4, 8, figsize=(8.2, 4.6))
show(axes[0], reference.image, "参考图")
show(axes[1], sketch, "轮廓线")
show(axes[2], controlled["sketch"], "轮廓线当提示")
show(axes[3], controlled["photo"], "参考图当提示")
zhixing.figure("sketch", fig)
