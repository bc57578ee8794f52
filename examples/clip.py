# ---
# zhixing:
#   id: clip
#   title: 从零训练一个听得懂中文的 CLIP
#   needs: []
#   timeout: 900
# ---

# %% [markdown]
# 在图形世界（颜色 × 形状 × 位置，共 150 种组合）上训练一个迷你 CLIP：两座小塔，把图与中文描述映到同一个单位球面上。训练完后它有三个用处：零样本分类、图文检索，以及给扩散模型当文本编码器。
#
# **预计耗时与内存**：单线程、机器空闲时约二十秒，峰值内存约 0.5 GB。

# %%
import matplotlib.pyplot as plt
import torch

import zhixing
from minisd import clip, pipeline, train, world

SEED, STEPS, BATCH = 0, 350, 128
torch.manual_seed(SEED)
device = "cuda" if torch.cuda.is_available() else "cpu"
data = world.sample(12_000, torch.Generator().manual_seed(1))      # 只含 135 种见过的组合
images = data.image.to(device)
model = clip.CLIP().to(device)
zhixing.metric("parameters", sum(p.numel() for p in model.parameters()))

# %% [markdown]
# ## 训练
#
# 每步抽 128 张图，各配一句随机说法。损失是对称的 InfoNCE：图认字、字认图各一个交叉熵。一批里常有完全相同的描述（“一个圆”），它们都算正确答案。

# %%
def loss_fn(generator):
    i = torch.randint(len(images), (BATCH,), generator=generator)
    ids = clip.tokenize(world.captions(data.attrs[i], generator)).to(device)      # (B, L)
    same = (ids[:, None] == ids).all(-1)                                          # (B, B)
    return clip.contrastive_loss(model.embed_image(images[i]), model.embed_text(ids), model.scale(), same)


losses = train.fit(model, loss_fn, STEPS, train.adamw(model, 2e-3, weight_decay=0.05), generator=torch.Generator().manual_seed(SEED))
model.cpu().eval().requires_grad_(False)
zhixing.metric("steps", STEPS)
zhixing.metric("temperature", 1 / model.scale())

# %%
fig, ax = plt.subplots(figsize=(6, 2.8))
ax.plot(losses, lw=0.8)
ax.set(xlabel="步数", ylabel="InfoNCE", ylim=0)
zhixing.figure("loss", fig)

# %% [markdown]
# ## 零样本分类
#
# 把 150 种组合各写成一句话，编码成 150 个向量；一张图与哪句话的余弦最大，就判成哪一种。没有任何分类头，换一批描述就换一个分类器。

# %%
sentences = model.embed_text(clip.tokenize(world.captions(world.ALL)))            # (150, D)


def zero_shot(combos, n=1000):
    """150 选 1 的正确率；图是新画的。"""
    s = world.sample(n, torch.Generator().manual_seed(55), combos)
    guess = world.ALL[(model.embed_image(s.image) @ sentences.T).argmax(1)]
    return (guess == s.attrs).all(1).float().mean().item()


accuracy = {"seen": zero_shot(world.SEEN), "held_out": zero_shot(world.HELD_OUT)}
for name, value in accuracy.items():
    zhixing.metric(f"zero_shot_{name}", value)
assert accuracy["seen"] > 0.98 and accuracy["held_out"] > 0.95, accuracy          # 瞎猜是 1/150

# %% [markdown]
# ## 图文检索
#
# 八张图与八句话两两的余弦相似度。对角线应当最亮；同色、同形、同位置的格子也会略亮，因为它们确实有一部分相同。

# %%
show = world.draw(world.ALL[[3, 29, 52, 60, 86, 99, 118, 147]], torch.Generator().manual_seed(8))
texts = world.captions(show.attrs)
cosine = model.embed_image(show.image) @ model.embed_text(clip.tokenize(texts)).T   # (8 图, 8 句)
assert (cosine.argmax(0) == torch.arange(8)).all() and (cosine.argmax(1) == torch.arange(8)).all()

fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 4.4), width_ratios=[1, 11])
left.imshow(((show.image + 1) / 2).permute(0, 2, 3, 1).flatten(0, 1).numpy(), interpolation="nearest", aspect="auto")
left.axis("off")
right.imshow(cosine, cmap="viridis", aspect="auto")   # 与左边逐行对齐
right.set_xticks(range(8), texts, rotation=35, ha="right")
right.set_yticks([])
for r, row in enumerate(cosine.tolist()):
    for c, value in enumerate(row):
        right.text(c, r, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.6 else "k", fontsize=7)
zhixing.figure("retrieval", fig)

# %%
pipeline.save_weights(model, zhixing.output_path("clip.safetensors"))
