# ---
# zhixing:
#   id: text_encoder
#   title: 扩散模型的文本编码器：CLIP 给了什么
#   needs: [vae]
#   timeout: 600
# ---

# %% [markdown]
# 同一个小 U-Net、同样的数据与步数，只换文本编码器：冻结的 CLIP、冻结的随机网络、从随机开始与 U-Net 一起训练。
#
# 图只有“中间的圆”，颜色由描述决定；U-Net 的训练描述只有一种说法。CLIP 的训练描述更杂，还见过颜色的别名。真实的 CLIP 见过几亿句话，这里照样缩小。
#
# **预计耗时与内存**：单线程、机器空闲时约一分钟，峰值内存约 0.5 GB。

# %%
import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

import zhixing
from minisd import clip, judge, latents, pipeline, train, unet, vae, world

CLIP_STEPS, STEPS, BATCH, WIDTHS = 200, 150, 32, (32, 48)
device = "cuda" if torch.cuda.is_available() else "cpu"
codec = pipeline.load_weights(vae.VAE(), zhixing.input_path("vae/vae.safetensors")).to(device)
ALIAS = str.maketrans("红绿蓝", "犇燚垚")                                # 三个在别处没有含义的字，当别名


# %% [markdown]
# ## 一个见过别名的 CLIP
#
# 与 clip 示例相同的训练，只是每句描述有一半的机会把颜色写成别名。别名的两句内容相同，都算正确答案。

# %%
torch.manual_seed(0)
model = clip.CLIP().to(device)
scenes = world.sample(6000, torch.Generator().manual_seed(1))
pictures = scenes.image.to(device)


def contrast(generator):
    i = torch.randint(len(pictures), (128,), generator=generator)
    plain = world.captions(scenes.attrs[i], generator)
    renamed = torch.rand(len(plain), generator=generator) < 0.5
    ids = clip.tokenize([text.translate(ALIAS) if r else text for text, r in zip(plain, renamed)]).to(device)
    meaning = clip.tokenize(plain)
    return clip.contrastive_loss(
        model.embed_image(pictures[i]), model.embed_text(ids), model.scale(), (meaning[:, None] == meaning).all(-1)
    )


train.fit(model, contrast, CLIP_STEPS, train.adamw(model, 2e-3, 0.05), generator=torch.Generator().manual_seed(0))
model.eval().requires_grad_(False)

COPIES = 16
three = torch.tensor([[c, 0, 4] for c in range(3)]).repeat(COPIES, 1)   # 红、绿、蓝的圆在中间
EXAMS = {
    "trained": world.captions(three),
    "paraphrase": [world.caption(a, "{p}有一个{c}色的{s}") for a in three],
    "alias": [text.translate(ALIAS) for text in world.captions(three)],
}


def color_word(texts):
    """颜色字那一位的特征 (N, D)。"""
    return model.text_encoder(clip.tokenize(texts).to(device))[0][:, 1].cpu()


plain, renamed = color_word(EXAMS["trained"][:3]), color_word(EXAMS["alias"][:3])
cosine = F.cosine_similarity(plain[:, None], renamed, dim=-1)          # (3, 3) 本名 × 别名
near, far = cosine.diagonal().mean().item(), cosine[~torch.eye(3, dtype=torch.bool)].mean().item()
print(f"本名与自己的别名 {near:.2f}，与别人的别名 {far:.2f}")
zhixing.metric("alias_cosine", near)
zhixing.metric("other_cosine", far)
assert near > far + 0.1                                                # 两个名字从不同句出现，只共用同样的图


# %% [markdown]
# ## 三种文本编码器，三次训练

# %%
colors = torch.randint(6, (3000,), generator=torch.Generator().manual_seed(2))
attrs = torch.stack([colors, torch.zeros_like(colors), torch.full_like(colors, 4)], 1)
with torch.no_grad():
    latent = codec.to_latent(world.draw(attrs, torch.Generator().manual_seed(3)).image.to(device))
ids = clip.tokenize(world.captions(attrs)).to(device)                  # 只有“红色的圆在中间”这一种说法
empty = clip.tokenize([""])[0].to(device)
zhixing.metric("steps", STEPS)


def fit(kind):
    """训练一次，返回半途与训完时颜色画对的比例、末段损失。"""
    torch.manual_seed(0)
    net = unet.UNet(widths=WIDTHS).to(device, memory_format=torch.channels_last)
    encoder = model.text_encoder if kind == "clip" else clip.TextEncoder().to(device)
    if kind == "random":
        encoder.eval().requires_grad_(False)
    ema, optimizers = train.EMA(net, 0.98), train.muon(net, 0.02, 2e-3)
    if kind == "joint":
        optimizers += train.adamw(encoder, 1e-3)
    sd = pipeline.StableDiffusion(encoder, codec, ema.model)

    def loss_fn(generator):
        i = torch.randint(len(latent), (BATCH,), generator=generator)
        drop = torch.rand(BATCH, 1, generator=generator).to(device) < 0.1
        text, valid = encoder(torch.where(drop, empty, ids[i]))
        return latents.diffusion_loss(lambda x, t: net(x, t, text, valid), sd.schedule, latent[i], generator)

    def exam(name):
        return judge.score(sd(EXAMS[name], torch.Generator().manual_seed(7), steps=8), three)["color"]

    early = []

    def watch(step, _):
        if step + 1 == STEPS * 2 // 3:                                 # 半途先考一次
            early.append(exam("trained"))

    losses = train.fit(net, loss_fn, STEPS, optimizers, generator=torch.Generator().manual_seed(0), ema=ema, watch=watch)
    encoder.eval()
    return {"early": early[0]} | {name: exam(name) for name in EXAMS}, losses[-50:].mean().item()


KINDS = {"clip": "冻结的 CLIP", "random": "冻结的随机网络", "joint": "一起训练"}
results = {kind: fit(kind) for kind in KINDS}
color = {kind: right for kind, (right, _) in results.items()}
loss = {kind: value for kind, (_, value) in results.items()}
for kind, name in KINDS.items():
    print(f"{name}：损失 {loss[kind]:.3f}，", {k: round(v, 2) for k, v in color[kind].items()})
    zhixing.metric(f"{kind}_loss", loss[kind])
    for exam, value in color[kind].items():
        zhixing.metric(f"{kind}_{exam}", value)

assert color["clip"]["alias"] > max(color["random"]["alias"], color["joint"]["alias"]) + 0.4   # U-Net 没见过的别名，只有 CLIP 认得
assert min(color["clip"]["trained"], color["random"]["trained"]) > 0.7                         # 训练过的说法上，随机的冻结编码器也画得对
assert abs(loss["clip"] - loss["random"]) < 0.01 < loss["joint"] - max(loss["clip"], loss["random"])      # 同样步数，一起训练的损失更高

fig, ax = plt.subplots(figsize=(6.6, 2.9), layout="constrained")
for k, (kind, name) in enumerate(KINDS.items()):
    ax.bar([i + (k - 1) * 0.27 for i in range(3)], [color[kind][exam] for exam in EXAMS], 0.27, color=f"C{k}", label=name)
ax.axhline(1 / 6, color="k", ls=":", lw=1)
ax.set(xticks=range(3), xticklabels=["训练过的说法", "换一种说法", "颜色换成别名"], ylabel="颜色画对的比例", ylim=(0, 1.3), yticks=[0, 0.5, 1])
ax.legend(ncols=3, loc="upper center")
zhixing.figure("encoders", fig)
