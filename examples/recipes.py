# ---
# zhixing:
#   id: recipes
#   title: 怎样把它训快：同预算的对照
#   needs: [clip, vae]
#   timeout: 3600
# ---

# %% [markdown]
# 基座的配方有四处选择：在潜空间里扩散、预测 $v$、文本编码器先用 CLIP 训好再冻结、矩阵用 Muon 优化。每次只换掉一处，数据相同、批大小相同、**算力预算相同**，各训两个种子，看判分器的正确率。
#
# 预算只有基座的几分之一，所以绝对分数都不高；要看的是差距。
#
# **预计耗时与内存**：单线程、机器空闲时约七分钟，峰值内存约 0.8 GB。

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zhixing
from minisd import clip, judge, latents, pipeline, samplers, train, unet, world

STEPS, BATCH, SEEDS = 150, 64, (0, 1)
sd = pipeline.StableDiffusion.load(zhixing.input_path("clip/clip.safetensors"), zhixing.input_path("vae/vae.safetensors"))
scenes = world.sample(12_000, torch.Generator().manual_seed(1))
data = latents.LatentData(sd, scenes)
ids = clip.tokenize(data.captions)                                    # (M, L) 全部说法，联合训练时现编码

# %% [markdown]
# ## 像素空间的对手
#
# 同一个 U-Net，输入从 6×6×4 的潜变量换成 12×12×12 的像素（每 2×2 个像素叠成一个位置，不然还要再贵四倍）。位置多了四倍，一步的算力也差不多是四倍，所以步数按算力折算。

# %%
class Pixels(nn.Module):
    """与 VAE 同接口的“什么都不压缩”：只把 2×2 个像素叠到通道上。"""

    FACTOR = 2

    def to_latent(self, images):
        return nn.functional.pixel_unshuffle(images, 2)

    def to_image(self, z):
        return nn.functional.pixel_shuffle(z, 2)


def flops(channels, side):
    """U-Net 在一张图上前向一次的浮点运算数。"""
    with FlopCounterMode(display=False) as counter:
        unet.UNet(channels, channels)(torch.zeros(1, channels, side, side), torch.zeros(1), data.text[:1], data.valid[:1])
    return counter.get_total_flops()


ratio = flops(12, 12) / flops(4, 6)
zhixing.metric("pixel_flops_ratio", ratio)
assert 3.5 < ratio < 4.5, ratio

# %% [markdown]
# ## 一次训练


# %%
class Joint(nn.Module):
    """U-Net 与随机初始化的文本编码器一起训练；条件是字编号。"""

    def __init__(self):
        super().__init__()
        self.unet, self.text_encoder = unet.UNet(), clip.TextEncoder()

    def forward(self, x, t, row):
        return self.unet(x, t, *self.text_encoder(ids[row]))


def run(seed, *, space="潜空间", kind="v", text="冻结的 CLIP", optimizer="Muon"):
    """按给定的选择训练一次，返回按 150 句完整描述画出来的图的四个正确率。"""
    torch.manual_seed(seed)
    steps, codec, source = STEPS, sd.vae, data.latent
    net = Joint() if text == "联合训练" else unet.UNet()
    if space == "像素":
        steps, codec, source = round(STEPS / ratio), Pixels(), pixel_latents
        net = unet.UNet(12, 12)
    net = net.to(memory_format=torch.channels_last)
    ema = train.EMA(net)

    def loss_fn(generator):
        i, row = data.draw(BATCH, generator)
        cond = (row,) if text == "联合训练" else (data.text[row], data.valid[row])
        return latents.diffusion_loss(lambda x, t: net(x, t, *cond), sd.schedule, source[i], generator, kind)

    optimizers = train.muon(net, 0.02, 2e-3) if optimizer == "Muon" else train.adamw(net, 2e-3)
    train.fit(net, loss_fn, steps, optimizers, generator=torch.Generator().manual_seed(seed), ema=ema)

    model = pipeline.StableDiffusion(ema.model.text_encoder if text == "联合训练" else sd.text_encoder, codec, getattr(ema.model, "unet", ema.model))
    z = torch.randn(150, *source.shape[1:], generator=torch.Generator().manual_seed(5))
    z = samplers.sample(sd.schedule, model.denoiser(world.captions(world.ALL), 2.0), z, 12, "dpm++", kind)
    return judge.score(codec.to_image(z), world.ALL)


# %%
pixel_latents = Pixels().to_latent(scenes.image)
RECIPES = {
    "基座的配方": {},
    "预测 ε": {"kind": "eps"},
    "AdamW": {"optimizer": "AdamW"},
    "文本编码器联合训练": {"text": "联合训练"},
    "像素空间": {"space": "像素"},
}
results = {name: [run(seed, **choice) for seed in SEEDS] for name, choice in RECIPES.items()}
for name, runs in results.items():
    print(name, *({k: round(v, 3) for k, v in r.items()} for r in runs))
