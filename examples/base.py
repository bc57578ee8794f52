# ---
# zhixing:
#   id: base
#   title: 从零训练迷你 Stable Diffusion
#   needs: [clip, vae]
#   timeout: 1800
# ---

# %% [markdown]
# CLIP 的文本编码器与 VAE 已经训好并冻结，这里训练最后一件：在 6×6×4 的潜空间里、听文本指挥的 U-Net。训完存下的权重就是**基座**，采样、引导、图生图、微调与可控生成的全部示例都接在它上面。
#
# **预计耗时与内存**：单线程、机器空闲时训练约三分钟，判分与画图另半分多钟；峰值内存约 0.8 GB。

# %%
import time

import matplotlib.pyplot as plt
import torch

import zhixing
from minisd import judge, latents, pipeline, train, unet, world

SEED, STEPS, BATCH, DATA, GUIDANCE = 0, 1000, 64, 12_000, 1.5
EARLY = 300                                                    # 顺手留一个欠训练的检查点
torch.manual_seed(SEED)
device = "cuda" if torch.cuda.is_available() else "cpu"

sd = pipeline.StableDiffusion.load(zhixing.input_path("clip/clip.safetensors"), zhixing.input_path("vae/vae.safetensors"))
sd.to(device)                                                  # 先搬，数据才编码在同一个设备上
data = latents.LatentData(sd, world.sample(DATA, torch.Generator().manual_seed(1)))
net = sd.unet.to(memory_format=torch.channels_last)
ema = train.EMA(net)
zhixing.metric("unet_parameters", sum(p.numel() for p in net.parameters()))

# %% [markdown]
# ## 判分
#
# 学习曲线上的每一点：用当前的 EMA 权重按 96 句完整描述各画一张（DPM-Solver++ 12 步，引导强度 $w=1.5$），由判分器读出颜色、形状、位置。判分器不含任何学出来的东西。再强，颜色就会过饱和（见 CFG 的示例）。

# %%
def draw(unet, attrs, seed):
    """按描述画图，128 张一批。→ (N, 3, 24, 24)"""
    model = pipeline.StableDiffusion(sd.text_encoder, sd.vae, unet)
    g = torch.Generator().manual_seed(seed)
    return torch.cat([model(world.captions(a), g, guidance=GUIDANCE).cpu() for a in attrs.split(128)])


probe = world.ALL[torch.randint(150, (96,), generator=torch.Generator().manual_seed(99))]
scratch = zhixing.scratch_path()                               # 构建被打断，下次从这里接着训
notes = scratch / "notes.pt"
seen_so_far = torch.load(notes) if notes.exists() else {"curve": {}, "early": None}


def watch(step, _):
    if step + 1 == EARLY:
        seen_so_far["early"] = {k: v.clone() for k, v in ema.model.state_dict().items()}
    if (step + 1) % 200 == 0 or step + 1 == EARLY:
        begin = time.perf_counter()
        seen_so_far["curve"][step + 1] = judge.score(draw(ema.model, probe, 5), probe)
        torch.save(seen_so_far, notes)
        judging.append(time.perf_counter() - begin)


# %% [markdown]
# ## 训练
#
# 目标与 DDPM 相同，只换三处：数据是潜变量；预测的是 $v=\sqrt{\bar\alpha_t}\,\varepsilon-\sqrt{1-\bar\alpha_t}\,x_0$；每步有一成描述换成空串，让同一个网络也学会无条件的预测。

# %%
def loss_fn(generator):
    x0, text, valid = data.batch(BATCH, generator)
    return latents.diffusion_loss(lambda x, t: net(x, t, text, valid), sd.schedule, x0, generator)


judging, begin = [], time.perf_counter()
losses = train.fit(
    net, loss_fn, STEPS, train.muon(net, 0.02, 2e-3), generator=torch.Generator().manual_seed(SEED), ema=ema,
    watch=watch, resume=scratch / "state.pt", save_every=100,
)
zhixing.metric("train_seconds", time.perf_counter() - begin - sum(judging))
zhixing.metric("steps", STEPS)
zhixing.metric("early_steps", EARLY)

# %%
curve = seen_so_far["curve"]
fig, (ax, bx) = plt.subplots(1, 2, figsize=(8, 2.9))
ax.plot(losses, lw=0.4, alpha=0.5)
ax.plot(range(49, STEPS), losses.unfold(0, 50, 1).mean(1), color="C0")
ax.set(xlabel="步数", ylabel="v 的均方误差", ylim=(0, 1.1))
for key, name in {"place": "位置", "shape": "形状", "color": "颜色", "all": "全对"}.items():
    bx.plot([0, *curve], [0, *(point[key] for point in curve.values())], marker=".", label=name, ls="--" if key == "all" else "-")
bx.set(xlabel="步数", ylabel="正确率", ylim=(0, 1.03))
bx.legend()
zhixing.figure("learning", fig)

# %% [markdown]
# ## 成绩
#
# 见过的组合与训练时从未见过的 15 种组合分开算。两个数都用存下的半精度权重重新算，因为别的示例用的就是那一份。

# %%
final, undertrained = zhixing.output_path("unet.safetensors"), zhixing.output_path("early.safetensors")
pipeline.save_weights(ema.model, final)
ema.model.load_state_dict(seen_so_far["early"])
pipeline.save_weights(ema.model, undertrained)

best = pipeline.load_weights(unet.UNet(), final).to(device)
seen, held = world.SEEN.repeat(4, 1), world.HELD_OUT.repeat(14, 1)                # 540 张、210 张
scores = {"seen": judge.score(draw(best, seen, 7), seen), "held_out": judge.score(draw(best, held, 8), held)}
for group, score in scores.items():
    for key, value in score.items():
        zhixing.metric(f"{group}_{key}", value)
assert scores["seen"]["all"] >= 0.99, scores
assert scores["held_out"]["all"] >= 0.97, scores

few = world.SEEN.repeat(2, 1)
rough = judge.score(draw(pipeline.load_weights(unet.UNet(), undertrained).to(device), few, 7), few)
zhixing.metric("early_all", rough["all"])
assert rough["all"] < scores["seen"]["all"] - 0.1, rough                           # 检查点确实欠训练

# %%
show = world.ALL[torch.randint(150, (16,), generator=torch.Generator().manual_seed(4))]
begin = time.perf_counter()
pictures = draw(best, show, 11)
zhixing.metric("sample_16_seconds", time.perf_counter() - begin)
assert judge.score(pictures, show)["all"] >= 15 / 16

fig, axes = plt.subplots(2, 8, figsize=(8, 2.6))
for ax, picture, text in zip(axes.flat, pictures, world.captions(show)):
    ax.imshow(((picture + 1) / 2).clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
    ax.set_title(text, fontsize=7)
    ax.axis("off")
zhixing.figure("grid", fig)

# %% [markdown]
# ## 体积
#
# 三个网络合起来的半精度权重。

# %%
files = [zhixing.input_path("clip/clip.safetensors"), zhixing.input_path("vae/vae.safetensors"), final]
megabytes = sum(f.stat().st_size for f in files) / 1e6
zhixing.metric("weights_megabytes", megabytes)
assert megabytes <= 4, megabytes
