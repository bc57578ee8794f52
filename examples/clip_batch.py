# ---
# zhixing:
#   id: clip_batch
#   title: 对比学习里批大小管什么
#   needs: []
#   timeout: 900
# ---

# %% [markdown]
# “对比学习要大批量”里混着两件事：一批越大，每个样本的**负样本**越多；同样多的图文对，一批越大，**更新次数**越少。这里把两件事分开量。
#
# **预计耗时与内存**：单线程、机器空闲时半分多钟，峰值内存约 0.5 GB；网络太小，有 GPU 也用 CPU。

# %%
import math

import matplotlib.pyplot as plt
import torch

import zhixing
from minisd import clip, train, world

PAIRS, BATCH, SEEDS = 6400, 128, (0, 1)
data = world.sample(6000, torch.Generator().manual_seed(1))
test = world.sample(1500, torch.Generator().manual_seed(55), world.ALL)
zhixing.metric("pairs", PAIRS)


def fit(batch, negatives_from, seed, lr):
    """一共见 PAIRS 对；每步 batch 对，只与同组的 negatives_from 对比较。→ (150 选 1 的正确率, 末段损失)"""
    torch.manual_seed(seed)
    model = clip.CLIP()

    def loss_fn(generator):
        i = torch.randint(len(data.image), (batch,), generator=generator)
        ids = clip.tokenize(world.captions(data.attrs[i], generator))
        parts = (t.split(negatives_from) for t in (model.embed_image(data.image[i]), model.embed_text(ids), ids))
        losses = [clip.contrastive_loss(a, b, model.scale(), (c[:, None] == c).all(-1)) for a, b, c in zip(*parts)]
        return torch.stack(losses).mean()

    losses = train.fit(model, loss_fn, PAIRS // batch, train.adamw(model, lr, 0.05), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        sentences = model.embed_text(clip.tokenize(world.captions(world.ALL)))
        guess = world.ALL[(model.embed_image(test.image) @ sentences.T).argmax(1)]
    return (guess == test.attrs).all(1).float().mean().item(), losses[-5:].mean().item()


# %% [markdown]
# ## 只改负样本数
#
# 每步都是 128 对，更新次数、学习率、见过的图文对全都一样；唯一的差别是损失在 8、32 还是 128 对之内比较。

# %%
by_negatives = {n: [fit(BATCH, n, seed, 1e-3) for seed in SEEDS] for n in (8, 32, 128)}
accuracy = {n: sum(a for a, _ in runs) / len(runs) for n, runs in by_negatives.items()}
loss = {n: sum(b for _, b in runs) / len(runs) for n, runs in by_negatives.items()}
for n in accuracy:
    print(f"每组 {n}：正确率 {accuracy[n]:.3f}（{[round(a, 3) for a, _ in by_negatives[n]]}），损失 {loss[n]:.2f}，瞎猜 {math.log(n):.2f}")
    zhixing.metric(f"accuracy_{n}", accuracy[n])
    zhixing.metric(f"loss_{n}", loss[n])
assert accuracy[128] > accuracy[8] + 0.03                              # 负样本多，同样的更新学得更多
assert loss[8] < loss[32] < loss[128]                                  # 损失却更高：题目更难，不能跨批大小比损失

# %% [markdown]
# ## 真的把批改小
#
# 见过的图文对不变，批从 128 改成 32 或 8：负样本少了，更新次数却多了 4 倍、16 倍。每种批大小各试两个学习率，取好的。

# %%
naive = {128: accuracy[128]}
for batch, rates in {32: (5e-4, 1e-3), 8: (2.5e-4, 5e-4)}.items():
    naive[batch] = max(fit(batch, batch, 0, lr)[0] for lr in rates)
for batch, value in naive.items():
    print(f"批 {batch}，更新 {PAIRS // batch} 次：{value:.3f}")
    zhixing.metric(f"naive_{batch}", value)
    zhixing.metric(f"updates_{batch}", PAIRS // batch)
assert naive[32] > accuracy[32] and naive[8] > accuracy[8]             # 更新次数的好处盖过了负样本的坏处

# %%
fig, ax = plt.subplots(figsize=(5.4, 2.9), layout="constrained")
ax.plot([*accuracy], [*accuracy.values()], "o-", label=f"只改负样本数（都更新 {PAIRS // BATCH} 次）")
ax.plot([*naive], [*naive.values()], "s--", label="改批大小（小批更新得多）")
ax.set(xscale="log", xticks=[8, 32, 128], xticklabels=[8, 32, 128], xlabel="互相比较的图文对数", ylabel="150 选 1 的正确率", ylim=(0, 1.03))
ax.minorticks_off()
ax.legend()
zhixing.figure("negatives", fig)
