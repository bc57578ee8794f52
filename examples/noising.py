# ---
# zhixing:
#   id: noising
#   title: 两种日程下加噪的图
# ---

# %% [markdown]
# 同几张图、同一份噪声，按线性日程与余弦日程加到同一步，看各剩下多少。每一步一张，正文里拖滑条看。
#
# **预计耗时与内存**：几秒，峰值内存约 0.4 GB；没有网络，只用 CPU。

# %%
import matplotlib.pyplot as plt
import torch

import zhixing
from minisd import schedule, world

T = 1000
pictures = world.sample(6, torch.Generator().manual_seed(0), world.ALL).image               # (6, 3, 24, 24)
noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
schedules = {"线性": schedule.linear(T), "余弦": schedule.cosine(T)}

for t in (0, 100, 200, 300, 400, 600, 800, 999):
    fig, axes = plt.subplots(2, 6, figsize=(6.4, 2.4))
    for row, (name, each) in zip(axes, schedules.items()):
        for ax, x in zip(row, schedule.q_sample(each, pictures, t, noise)):
            ax.imshow(((x + 1) / 2).clamp(0, 1).permute(1, 2, 0))
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        row[0].set_ylabel(f"{name}\n$\\bar\\alpha_t={each.alpha_bar[t]:.3f}$", fontsize=8, rotation=0, ha="right", va="center")
    zhixing.figure(f"noised_{t}", fig)

# %% [markdown]
# 信号占一成以上的步数：

# %%
kept = {name: (each.alpha_bar > 0.1).sum().item() for name, each in schedules.items()}
assert kept["余弦"] > 1.5 * kept["线性"], kept
zhixing.metric("kept_linear", kept["线性"])
zhixing.metric("kept_cosine", kept["余弦"])
