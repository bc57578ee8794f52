# ---
# zhixing:
#   id: choose_control
#   title: 五种控制并排，三种叠加
#   needs: [clip, vae, base, lora, controlnet, ip_adapter]
#   timeout: 1800
# ---

# %% [markdown]
# 同一个基座、同一批目标图，五种做法各自给它能收的条件：文本、LoRA、DreamBooth、ControlNet、IP-Adapter。先看各自控制得住什么，再把 LoRA、ControlNet、IP-Adapter 三个叠在一个 U-Net 上，并逐个拆掉，看少了谁就少了什么。权重都来自前面的示例，只有 DreamBooth 在这里现训（它的产物是一整个 U-Net）。
#
# **预计耗时与内存**：单线程、机器空闲时约半分钟，峰值内存约 0.8 GB。

# %%
import copy
import time

import matplotlib.pyplot as plt
import torch

import zhixing
from minisd import adapters, clip, dreambooth, guidance, ip_adapter, judge, latents, lora, pipeline, samplers, stripes, train, world
from minisd.controlnet import Controlled, edges

device = "cuda" if torch.cuda.is_available() else "cpu"
paths = [zhixing.input_path(p) for p in ("clip/clip.safetensors", "vae/vae.safetensors", "base/unet.safetensors")]
sd = adapters.load_base(*paths).to(device)
base = sd.unet
encoder = pipeline.load_weights(clip.CLIP(), paths[0]).image_encoder


def gen(seed):
    return torch.Generator().manual_seed(seed)


def with_lora(net):
    """给一个 U-Net 接上条纹 LoRA（就地）。"""
    return adapters.attach_lora(net, zhixing.input_path("lora/stripes.safetensors"))


def with_ip():
    """基座的拷贝，接上 IP-Adapter。"""
    return adapters.attach_ip_adapter(base, zhixing.input_path("ip_adapter/adapter.safetensors")).to(device)


control = adapters.load_control(base, zhixing.input_path("controlnet/edges.safetensors")).to(device)

# %% [markdown]
# ## 同一批目标
#
# 32 个目标：颜色、形状、位置随机，**画着横条纹**，位置、大小与转角由边缘图定，描述一律不说。参考图与目标同色，但形状、位置都不同。六把尺子：颜色、形状、位置、轮廓（掩码 IoU）、条纹（对比度与目标之比）。条纹图先抹平再读。

# %%
N = 32
g = gen(21)
goal = world.draw(world.ALL[torch.randint(150, (N,), generator=g)], g, paint=stripes.paint)
shift = torch.stack([torch.zeros(N, dtype=torch.long), torch.randint(1, 5, (N,), generator=g), torch.randint(1, 5, (N,), generator=g)], 1)
reference = world.draw((goal.attrs + shift) % torch.tensor([6, 5, 5]), g)
hint = edges(goal.mask).to(device)
with torch.no_grad():
    image = encoder(reference.image).to(device)                # (N, 64)
goal_contrast = stripes.contrast(goal.image).mean().item()


def say(template):
    return [world.caption(a, template) for a in goal.attrs]


@torch.no_grad()
def draw(net, prompts, *, hint=None, image=None, seed=4, steps=10):
    """文生图，w = 2；hint、image 是可选的条件，空条件一支的图像向量取零。"""
    cond, empty = sd.encode(prompts), sd.encode([""] * len(prompts))
    extra = {} if hint is None else {"hints": [hint]}

    def ask(x, t, text, vector):
        return net(x, t, *text, *([] if vector is None else [vector]), **extra)

    def denoise(x, t):
        nothing = None if image is None else torch.zeros_like(image)
        return guidance.combine(ask(x, t, cond, image), ask(x, t, empty, nothing), 2.0)

    return sd.vae.to_image(samplers.sample(sd.schedule, denoise, sd.noise(len(prompts), gen(seed)), steps)).cpu()


def marks(images):
    flat = stripes.flatten(images)
    score = judge.score(flat, goal.attrs)
    return {
        "color": score["color"], "shape": score["shape"], "place": score["place"],
        "outline": judge.soft_iou(judge.read(flat).mask, goal.mask)[:, 0].mean().item(),
        "stripes": stripes.contrast(images).mean().item() / goal_contrast,
    }  # fmt: skip


# %% [markdown]
# ## 五种做法，各给各的条件
#
# DreamBooth 训的是一个**特定的主体**（左半品红、右半嫩绿的圆，五张图），不是一种颜色或纹理，所以另画它自己的目标：“一个犇圆在〈位置〉”。

# %%
V, DB_STEPS = "犇", 150
subject = dreambooth.subject(torch.arange(5), gen(5))
words = dreambooth.add_identifier(sd.text_encoder, V).requires_grad_(False)
personal = pipeline.StableDiffusion(words, sd.vae, copy.deepcopy(base).train().requires_grad_(True))
row = words.token.row.requires_grad_(True)
with torch.no_grad():
    instances = sd.vae.to_latent(subject.image.to(device)), [f"一个{V}圆"] * 5
prior = dreambooth.class_latents(sd, ["一个圆"] * 64, gen(50)), ["一个圆"] * 64
optimizers = [*train.adamw(personal.unet, 1e-3), torch.optim.AdamW([row], 0.06, weight_decay=0.0)]
trained = torch.nn.ModuleList([personal.unet, words.token])      # 清零梯度时别漏了 U-Net 之外的那一行
train.fit(trained, dreambooth.objective(personal, instances, prior), DB_STEPS, optimizers, generator=gen(0))
personal.unet.eval().requires_grad_(False)
mine = personal([f"一个{V}圆在{[*world.PLACES][i % 5]}" for i in range(N)], gen(10), steps=10).cpu()
seen = dreambooth.read(mine)
with torch.no_grad():
    fresh = dreambooth.subject(torch.arange(50) % 5, gen(6)).image
    best = dreambooth.read(sd.vae.to_image(sd.vae.to_latent(fresh.to(device)))).score.mean()
zhixing.metric("dreambooth_fidelity", seen.score.mean() / best)
zhixing.metric("dreambooth_place", (seen.place == torch.arange(N) % 5).float().mean())
zhixing.metric("dreambooth_steps", DB_STEPS)
zhixing.metric("text_fidelity", dreambooth.read(draw(base, say("{c}色的圆"))).score.mean() / best)

pictures = {
    "text": draw(base, say("{c}色的{s}")),
    "lora": draw(with_lora(copy.deepcopy(base)), say("{c}色的{s}")),
    "controlnet": draw(Controlled(base, control), say("{c}色的{s}"), hint=hint),
    "ip": draw(with_ip(), say("一个{s}"), image=image),
}
table = {name: marks(x) for name, x in pictures.items()}
for name, row_ in table.items():
    for key, value in row_.items():
        zhixing.metric(f"{name}_{key}", value)
    print(name, {key: round(value, 3) for key, value in row_.items()})
for name, who in {"outline": "controlnet", "stripes": "lora"}.items():           # 各自的长项，别人都做不到
    others = max(m[name] for k, m in table.items() if k != who)
    assert table[who][name] > others + 0.25, (name, table)
assert all(table[k]["color"] > 0.8 for k in table), table

# %%
NAMES = {"text": "只有文本", "lora": "LoRA", "controlnet": "ControlNet", "ip": "IP-Adapter"}


def sheet(rows, columns=8):
    fig, axes = plt.subplots(len(rows), columns, figsize=(8.2, 0.98 * len(rows)))
    for line, (name, images) in zip(axes, rows.items()):
        for ax, x in zip(line, images):
            ax.imshow(((x + 1) / 2).clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
            ax.axis("off")
        line[0].text(-3, 12, name, ha="right", va="center")
    return fig


edge_images = 1 - 2 * hint.cpu().expand(-1, 3, -1, -1)
rows = {"目标": goal.image, "边缘图": edge_images, "参考图": reference.image}
rows |= {NAMES[k]: x for k, x in pictures.items()}
zhixing.figure("five", sheet(rows | {"DreamBooth": mine}))

# %% [markdown]
# ## 三个叠在一起
#
# 描述只剩“一个星星”：**颜色**来自参考图（IP-Adapter），**轮廓与位置**来自边缘图（ControlNet），**条纹**来自 LoRA。三者改的是不同的地方：LoRA 改权重，IP-Adapter 在交叉注意力旁边加一路，ControlNet 在跳连上加残差。逐个拆掉再画。

# %%
both = with_lora(with_ip())
prompts = say("一个{s}")
stacked = {
    "all": draw(Controlled(both, control), prompts, hint=hint, image=image),
    "no_lora": draw(Controlled(with_ip(), control), prompts, hint=hint, image=image),
    "no_controlnet": draw(both, prompts, image=image),
    "no_ip": draw(Controlled(with_lora(copy.deepcopy(base)), control), prompts, hint=hint),
}
combo = {name: marks(x) for name, x in stacked.items()}
for name, row_ in combo.items():
    for key, value in row_.items():
        zhixing.metric(f"{name}_{key}", value)
    print(name, {key: round(value, 3) for key, value in row_.items()})
everything = combo["all"]
for key, gone in {"stripes": "no_lora", "outline": "no_controlnet", "color": "no_ip"}.items():
    assert everything[key] > combo[gone][key] + 0.25, (key, combo)               # 拆掉谁，就少了谁管的那一样

labels = {"all": "三个叠加", "no_lora": "去掉 LoRA", "no_controlnet": "去掉 ControlNet", "no_ip": "去掉 IP-Adapter"}
rows = {"边缘图": edge_images, "参考图": reference.image} | {labels[k]: x for k, x in stacked.items()}
zhixing.figure("stack", sheet(rows))

# %% [markdown]
# ## 成本
#
# 同一台机器、同样的批大小 32，各量几步训练与一次 16 张、10 步的采样，取最快的一次，再除以全量微调（采样除以基座），免得受机器快慢与忙闲影响。

# %%
data = latents.LatentData(sd, world.sample(200, gen(1)))
step_hint, step_image = torch.zeros(32, 1, 24, 24, device=device), torch.zeros(32, 64, device=device)


def step_time(net, *extra, **options):
    """一步训练的 CPU 秒数，四步里最快的。"""
    optimizer, g, best = train.adamw(net, 1e-5)[0], gen(2), float("inf")
    for _ in range(4):
        begin = time.process_time()
        x0, text, valid = data.batch(32, g)
        latents.diffusion_loss(lambda x, t: net(x, t, text, valid, *extra, **options), sd.schedule, x0, g).backward()
        optimizer.step()
        net.zero_grad()
        best = min(best, time.process_time() - begin)
    return best


def draw_time(net, **options):
    begin = time.process_time()
    draw(net, prompts[:16], **options)
    return time.process_time() - begin


fresh_lora = copy.deepcopy(base)
lora.add_lora(fresh_lora, adapters.LORA_TARGETS, 4, 4)
trainable = Controlled(copy.deepcopy(base), copy.deepcopy(control).requires_grad_(True))
adapter = ip_adapter.add_ip_adapter(base)
whole = copy.deepcopy(base).requires_grad_(True)
steps = {
    "full": step_time(whole), "lora": step_time(fresh_lora),
    "controlnet": step_time(trainable, hints=[step_hint]), "ip": step_time(adapter, step_image),
}  # fmt: skip
merged = lora.merge_and_unload(with_lora(copy.deepcopy(base)))
draws = {"base": [], "lora": [], "merged": [], "controlnet": [], "ip": []}
for _ in range(2):
    draws["base"].append(draw_time(base))
    draws["lora"].append(draw_time(with_lora(copy.deepcopy(base))))
    draws["merged"].append(draw_time(merged))
    draws["controlnet"].append(draw_time(Controlled(base, control), hint=hint[:16]))
    draws["ip"].append(draw_time(with_ip(), image=image[:16]))
for name, value in steps.items():
    zhixing.metric(f"step_{name}", value / steps["full"])
for name, values in draws.items():
    zhixing.metric(f"draw_{name}", min(values) / min(draws["base"]))
zhixing.metric("full_step_ms", 1000 * steps["full"])
zhixing.metric("unet_parameters", sum(p.numel() for p in base.parameters()))
