# ---
# zhixing:
#   id: vae
#   title: 迷你 Stable Diffusion 的 VAE
#   needs: []
#   timeout: 900
# ---

# %% [markdown]
# 把 24×24×3 的图压成 6×6×4 的潜变量，再解码回来：扩散模型以后只在这个小 12 倍的空间里工作。
#
# 训练图比扩散模型要画的**更宽**：除了世界里的六种颜色，还有任意颜色、左右双色、横条纹。解码器见过它们，以后微调出来的新纹理才画得出来——真实的 Stable Diffusion 也是用通用图片训练 VAE 的。
#
# **预计耗时与内存**：单线程、机器空闲时约一分钟，峰值内存约 0.6 GB。

# %%
import matplotlib.pyplot as plt
import torch

import zhixing
from minisd import judge, pipeline, train, vae, world

SEED, STEPS, BATCH = 0, 500, 64
torch.manual_seed(SEED)
device = "cuda" if torch.cuda.is_available() else "cpu"
data = world.broad(12_000, torch.Generator().manual_seed(1)).to(device, memory_format=torch.channels_last)
model = vae.VAE().to(device, memory_format=torch.channels_last)        # 通道在后：CPU 上卷积更快
zhixing.metric("parameters", sum(p.numel() for p in model.parameters()))


# %%
def loss_fn(generator):
    i = torch.randint(len(data), (BATCH,), generator=generator)
    return vae.vae_loss(model, data[i], torch.randn(BATCH, 4, 6, 6, generator=generator).to(device))


losses = train.fit(
    model, loss_fn, STEPS, train.muon(model, 0.01, 3e-3), generator=torch.Generator().manual_seed(SEED),
    resume=zhixing.scratch_path() / "state.pt",
)
model.measure(data[:4000])
model.cpu().eval().requires_grad_(False)
zhixing.metric("steps", STEPS)

# %% [markdown]
# ## 重建得怎样
#
# 峰值信噪比之外，更要紧的是判分器读重建图能不能读对：读错一张，扩散模型再好也画不对。

# %%
scenes = world.sample(500, torch.Generator().manual_seed(9), world.ALL)
wide = world.broad(500, torch.Generator().manual_seed(10))
rebuilt, rebuilt_wide = (model.to_image(model.to_latent(x)) for x in (scenes.image, wide))
zhixing.metric("psnr", judge.psnr(rebuilt, scenes.image))
zhixing.metric("psnr_wide", judge.psnr(rebuilt_wide, wide))
readable = judge.score(rebuilt, scenes.attrs)["all"]
zhixing.metric("readable", readable)
assert readable >= 0.995, readable
assert judge.psnr(rebuilt, scenes.image) > 30 and judge.psnr(rebuilt_wide, wide) > 29

# %%
rows = torch.cat([scenes.image[:10], rebuilt[:10], wide[:10], rebuilt_wide[:10]])
fig, axes = plt.subplots(4, 10, figsize=(8, 3.4))
for ax, picture in zip(axes.flat, rows):
    ax.imshow(((picture + 1) / 2).clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
    ax.axis("off")
for ax, name in zip(axes[:, 0], ("原图", "重建", "原图（更宽）", "重建（更宽）")):
    ax.set_title(name, loc="left")
zhixing.figure("reconstruction", fig)

# %% [markdown]
# ## 潜变量的尺度
#
# 扩散的噪声日程假定数据的方差约为 1。量出各通道的均值与标准差，存进权重，编码时标准化——Stable Diffusion 的缩放系数 0.18215 做的是同一件事。

# %%
z = model.to_latent(scenes.image)
assert z.mean((0, 2, 3)).abs().max() < 0.35 and (z.std((0, 2, 3)) - 1).abs().max() < 0.35      # 量时用的是更宽的分布

fig, (ax, bx) = plt.subplots(1, 2, figsize=(8, 2.8))
ax.plot(losses, lw=0.8)
ax.set(xlabel="步数", ylabel="重建 + β·KL", yscale="log")
bx.hist(z.permute(1, 0, 2, 3).flatten(1).T.numpy(), bins=60, histtype="step", density=True, label=[f"通道 {k}" for k in range(4)])
bx.set(xlabel="标准化之后的潜变量", ylabel="密度")
bx.legend()
zhixing.figure("loss_and_latent", fig)

# %%
pipeline.save_weights(model, zhixing.output_path("vae.safetensors"))
