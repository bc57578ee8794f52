# ---
# zhixing:
#   id: vae_vqvae
#   title: 自编码器、VAE 与 VQ-VAE
#   needs: []
#   timeout: 900
# ---

# %% [markdown]
# 三件事：用两维潜变量看清自编码器（AE）与变分自编码器（VAE）差在哪里；在彩色图形上训练 VQ-VAE，比较四种学码本的办法，再把损失逐项拆掉看它怎样坏；最后给码的下标训一个先验，从零生成图。
#
# **预计耗时与内存**：单线程、机器空闲时不到一分钟，峰值内存约 0.5 GB；网络太小，有 GPU 也用 CPU。大头是 21 次 VQ-VAE 训练，每次 400 步（最后一次 1200 步）。

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import zhixing
from minisd import elbo, vq, world

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## AE 与 VAE：差在潜空间能不能抽样
#
# 数据只有两个自由度：一个半径固定的圆，圆心在画布上均匀分布。潜变量也取两维，所以整个潜空间能画在纸上。两个模型结构相同；AE 只管重建，VAE 多了采样与 KL，优化的是完整的变分下界（像素按伯努利分布算似然）。

# %%
def circles(center):
    """圆心 (N, 2) → 灰度图 (N, 576)，取值 [0, 1]。"""
    n = len(center)
    shape, radius = torch.zeros(n, dtype=torch.long), torch.full((n,), 0.16)
    return world.mask(shape, center, radius, torch.zeros(n)).flatten(1)


def random_circles(n, g):
    return circles(0.2 + 0.6 * torch.rand(n, 2, generator=g))


def train_2d(variational, steps=500, batch=64):
    """训练两维潜变量的 AE 或 VAE，返回 (编码器, 解码器)。"""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    encoder = nn.Sequential(nn.Linear(576, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU(), nn.Linear(64, 4))
    decoder = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 576))
    opt = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 2e-3, fused=True)
    for _ in range(steps):
        x = random_circles(batch, g)                               # (B, 576)
        mu, logvar = encoder(x).chunk(2, 1)                        # 各 (B, 2)
        z = elbo.reparameterize(mu, logvar, torch.randn(mu.shape, generator=g)) if variational else mu
        reconstruction = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="none").sum(1)    # (B,)
        kl = elbo.kl_standard_normal(mu, logvar).sum(1) if variational else 0.0                        # (B,)
        loss = (reconstruction + kl).mean()                        # VAE：负的变分下界
        opt.zero_grad()
        loss.backward()
        opt.step()
    return encoder, decoder


POSITIONS = torch.cartesian_prod(*2 * [torch.linspace(0.2, 0.8, 31)])      # (961, 2)
DENSE = circles(POSITIONS)                                                 # (961, 576) 几乎铺满数据流形
g = torch.Generator().manual_seed(1)
held_out = random_circles(800, g)
latent, mse = {}, {}
for name, variational in {"AE": False, "VAE": True}.items():
    encoder, decoder = train_2d(variational)
    with torch.no_grad():
        mu, logvar = encoder(held_out).chunk(2, 1)
        mse[name] = (decoder(mu).sigmoid() - held_out).square().mean().item()
        drawn = decoder(torch.randn(800, 2, generator=g)).sigmoid()        # 从 N(0, I) 抽样再解码
    where = POSITIONS[torch.cdist(drawn, DENSE).argmin(1)]                 # (800, 2) 画出来的圆在哪里
    cells = ((where - 0.2) / 0.6 * 6).long().clamp(max=5)                  # 把画布分成 6×6 格
    covered = len(set(map(tuple, cells.tolist()))) / 36
    latent[name] = mu, logvar, drawn, covered
    zhixing.metric(f"{name.lower()}_mse", mse[name])
    zhixing.metric(f"{name.lower()}_covered", covered)
    zhixing.metric(f"{name.lower()}_code_std", mu.std(0).mean().item())

mu, logvar, _, _ = latent["VAE"]
rate = elbo.kl_standard_normal(mu, logvar).sum(1).mean().item()
zhixing.metric("vae_rate", rate)
assert latent["AE"][3] < 0.5 < 0.9 < latent["VAE"][3]                      # N(0, I) 只碰到 AE 编码区的一角
assert latent["AE"][0].std(0).mean() > 3 * mu.std(0).mean()                # AE 的码想多大就多大
assert mse["AE"] < mse["VAE"]                                               # 能重建不等于能生成
assert 3 < rate < 12                                                       # 没有后验坍塌：潜变量带着信息

# %%
fig, axes = plt.subplots(1, 4, figsize=(9.6, 2.7), dpi=130, width_ratios=[1, 1, 1, 1])
for ax, image_ax, (name, (mu, _, drawn, covered)) in zip(axes[::2], axes[1::2], latent.items()):
    ax.scatter(*mu.T, s=3, color="C0", linewidths=0, rasterized=True, label="数据的编码")
    for r in (1, 2):
        angle = torch.linspace(0, 2 * math.pi, 100)
        ax.plot(r * angle.cos(), r * angle.sin(), color="C3", lw=1.2, label="N(0, I)：1σ、2σ" if r == 1 else None)
    ax.set(title=f"{name} 的潜空间", aspect="equal", adjustable="datalim")
    tile = drawn[:25].view(5, 5, 24, 24).transpose(1, 2).reshape(120, 120)
    image_ax.imshow(1 - tile, cmap="gray", vmin=0, vmax=1)
    image_ax.set(title=f"{name}：从 N(0, I) 抽样")
    image_ax.axis("off")
axes[0].legend(fontsize=6, loc="upper right")
zhixing.figure("latent", fig)

# %% [markdown]
# ## VQ-VAE：怎样学码本
#
# 24×24 的彩色图切成 6×6 个小块，每块编码成 8 维，再换成 128 个码之一：一张图变成 36 个下标。编码器只看一个小块，解码器用一层 3×3 卷积看邻居。码本有两种学法（码本项的梯度、滑动平均），各配有无死码重启，每种三个种子；最后一种是核对用的对照，理由见下。

# %%
K, D, BETA = 128, 8, 0.25
STEPS, BATCH, PATIENCE = 400, 32, 30

g = torch.Generator().manual_seed(2)
train_x = F.pixel_unshuffle(world.sample(2000, g).image, 4)        # (2000, 48, 6, 6) 每个位置是一个 4×4 的小块
test_x = F.pixel_unshuffle(world.sample(300, g).image, 4)


def codec():
    """编码器 (B, 48, 6, 6) → (B, D, 6, 6) 与解码器。"""
    encoder = nn.Sequential(nn.Conv2d(48, 64, 1), nn.SiLU(), nn.Conv2d(64, D, 1))
    decoder = nn.Sequential(nn.Conv2d(D, 48, 3, padding=1), nn.SiLU(), nn.Conv2d(48, 48, 1))
    return encoder, decoder


def whole(q, z_e, decoder, x):
    """完整的三项：重建 + 码本项 + β · 承诺项。"""
    z_q, loss, k = q(z_e)
    return F.mse_loss(decoder(z_q), x) + loss, k


def train_vq(seed=0, objective=whole, beta=BETA, gamma=None, restart=False, frozen=False, speed=1.0, steps=STEPS):
    """训练一个 VQ-VAE，返回 (测试集重建误差, 测试集困惑度, 逐步困惑度 (steps,), 三个模块, 潜变量的均方根)。"""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    encoder, decoder = codec()
    q = vq.VectorQuantizer(K, D, beta, gamma, PATIENCE if restart else None)
    q.e.requires_grad_(gamma is None and not frozen)
    groups = [{"params": [*encoder.parameters(), *decoder.parameters()]}]
    if q.e.requires_grad:
        groups.append({"params": [q.e], "lr": 3e-3 * speed})
    opt = torch.optim.Adam(groups, 3e-3, fused=True)
    curve = []
    for step in range(steps):
        x = train_x[torch.randint(len(train_x), (BATCH,), generator=g)]
        z_e = encoder(x)                                           # (B, D, 6, 6)
        loss, k = objective(q, z_e, decoder, x)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if gamma is not None or (restart and step < 0.8 * steps):  # 最后一段不再重启，让码本安定下来
            q.update(z_e.detach(), k, g)
        curve.append(vq.perplexity(k, K))
    with torch.no_grad():
        z_e = encoder(test_x)
        k = q(z_e).k
        error = F.mse_loss(decoder(q.lookup(k)), test_x).item()
    rms = z_e.square().mean().sqrt().item()
    return error, vq.perplexity(k, K), torch.tensor(curve), (encoder, q, decoder), rms


RECIPES = {
    "梯度": ("grad", {}),
    "梯度 + 重启": ("grad_restart", {"restart": True}),
    "EMA": ("ema", {"gamma": 0.99}),
    "EMA + 重启": ("ema_restart", {"gamma": 0.99, "restart": True}),
    "梯度 ×10 + 重启": ("fast_restart", {"restart": True, "speed": 10.0}),     # 码本的学习率放大十倍
}
runs = {name: [train_vq(seed, **config) for seed in range(3)] for name, (_, config) in RECIPES.items()}
for name, (key, _) in RECIPES.items():
    for metric, column in (("mse", 0), ("perplexity", 1)):
        values = [run[column] for run in runs[name]]
        zhixing.metric(f"{key}_{metric}_min", min(values))
        zhixing.metric(f"{key}_{metric}_max", max(values))
    print(name, [f"{error:.4f} / {used:.1f}" for error, used, *_ in runs[name]])

# %% [markdown]
# 没有重启，两种学法都只用上少数几个码：EMA 本身治不了坍塌。加上重启，困惑度都上去了，可只有 EMA 的重建变好：用梯度学的码，每步最多走一个学习率那么远，被重启到哪里就只能在附近慢慢挪，追不上还在移动的编码器。**困惑度高不等于重建好。** 这个解释可以核对：单独把码本的学习率放大十倍，重建应当好起来，事实也是如此。

# %%
low = {name: min(run[1] for run in group) for name, group in runs.items()}
high = {name: max(run[1] for run in group) for name, group in runs.items()}
assert max(high["梯度"], high["EMA"]) < 0.15 * K                   # 没有重启：大半个码本没用上
assert min(low["梯度 + 重启"], low["EMA + 重启"]) > 2 * max(high["梯度"], high["EMA"])
for plain, stuck, fast, ours in zip(runs["梯度"], runs["梯度 + 重启"], runs["梯度 ×10 + 重启"], runs["EMA + 重启"]):
    assert stuck[0] > 1.3 * plain[0]                               # 困惑度更高，重建反而更差
    assert max(fast[0], ours[0]) < plain[0]                        # 码跟得上编码器，重建才变好

best = train_vq(0, **RECIPES["EMA + 重启"][1], steps=1200)          # 画图与第二阶段用的：多训两倍步数
assert best[0] < runs["EMA + 重启"][0][0]
zhixing.metric("best_mse", best[0])
zhixing.metric("bits", 36 * math.log2(K))

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.1))
for i, (name, group) in enumerate(runs.items()):
    smooth = torch.stack([run[2] for run in group]).unfold(1, 25, 1).mean(2)       # (3, STEPS - 24)
    steps = range(24, STEPS)
    left.plot(steps, smooth.mean(0), color=f"C{i}", label=name)
    left.fill_between(steps, smooth.amin(0), smooth.amax(0), color=f"C{i}", alpha=0.2, lw=0)
    right.plot([run[1] for run in group], [run[0] for run in group], "o", color=f"C{i}", label=name)
left.set(xlabel="训练步", ylabel=f"批内困惑度（上限 {K}）", title="用上了几个码")
left.legend(frameon=False, fontsize=8)
right.set(xlabel="测试集困惑度", ylabel="测试集重建误差", title="困惑度高，重建未必好")
zhixing.figure("perplexity", fig)


# %% [markdown]
# ## 逐项拆掉
#
# 每次只改损失的一处，其余与“梯度”那一行相同（种子 0）。

# %%
def no_copy(q, z_e, decoder, x):
    """直通估计里不写 sg：前向的值不变，z_e 却再也收不到重建的梯度。"""
    _, loss, k = q(z_e)
    z_q = z_e + (q.lookup(k) - z_e)
    return F.mse_loss(decoder(z_q), x) + loss, k


def no_sg(q, z_e, decoder, x):
    """后两项都不写 sg：合成 (1 + β)‖z_e - e‖²，两边都被拉。"""
    z_q, _, k = q(z_e)
    return F.mse_loss(decoder(z_q), x) + (1 + q.beta) * F.mse_loss(z_e, q.lookup(k)), k


BROKEN = {
    "完整": ("whole", {}),
    "后两项不写 sg": ("no_sg", {"objective": no_sg}),
    "β = 1.25": ("beta125", {"beta": 1.25}),
    "直通不写 sg": ("no_copy", {"objective": no_copy}),
    "没有承诺项": ("no_commit", {"beta": 0.0}),
    "没有码本项": ("no_codebook", {"frozen": True}),
}
broken = {name: runs["梯度"][0] if name == "完整" else train_vq(0, **config) for name, (_, config) in BROKEN.items()}
for name, (key, _) in BROKEN.items():
    error, used, _, _, rms = broken[name]
    zhixing.metric(f"{key}_mse", error)
    zhixing.metric(f"{key}_perplexity", used)
    zhixing.metric(f"{key}_rms", rms)
    print(f"{name}：重建误差 {error:.4f}，困惑度 {used:.1f}，z_e 的均方根 {rms:.3g}")

mean_image = (train_x.mean(0, keepdim=True) - test_x).square().mean().item()       # 只会画平均图的误差
zhixing.metric("mean_image_mse", mean_image)
for name in ("直通不写 sg", "没有承诺项", "没有码本项"):
    assert broken[name][0] > 2 * broken["完整"][0], name
assert max(broken["直通不写 sg"][1], broken["没有承诺项"][1]) < 2.5                # 几乎只剩一个码
assert broken["没有承诺项"][4] > 30 * broken["完整"][4]                            # 潜变量越跑越远
# 去掉后两项的 sg 不会坍塌：它只是把两个权重都变成 1 + β，与写着 sg 的 β = 1.25 一样
assert broken["后两项不写 sg"][0] < 1.2 * broken["完整"][0]
assert abs(broken["后两项不写 sg"][0] / broken["β = 1.25"][0] - 1) < 0.25

# %%
def picture(run, x):
    """重建 x (N, 48, 6, 6) → (N, 24, 24, 3)，取值 [0, 1]。"""
    encoder, q, decoder = run[3]
    with torch.no_grad():
        out = decoder(q.lookup(q(encoder(x)).k))
    return rgb(out)


def rgb(x):
    return (F.pixel_shuffle(x, 4).movedim(1, -1) / 2 + 0.5).clamp(0, 1)


def strip(ax, pictures, title):
    """(N, 24, 24, 3) 横着排成一行。"""
    ax.imshow(pictures.movedim(0, 1).flatten(1, 2), interpolation="nearest")
    ax.set_title(title, fontsize=8, loc="left", pad=2)
    ax.axis("off")


show = test_x[:16]
rows = {"原图": rgb(show), "EMA + 重启，1200 步": picture(best, show)}
rows |= {f"梯度，{name}" if name == "完整" else name: picture(run, show) for name, run in broken.items() if name != "β = 1.25"}
fig, axes = plt.subplots(len(rows), 1, figsize=(7.6, 0.66 * len(rows)), dpi=130)
for ax, (title, pictures) in zip(axes, rows.items()):
    strip(ax, pictures, title)
zhixing.figure("broken", fig)

# %% [markdown]
# ## 第二阶段：给下标训一个先验
#
# 训练 VQ-VAE 时先验取均匀分布，KL 恒等于 36·log K，没有梯度。生成时却不能真的从均匀分布抽下标：那是 36 个互不相干的小块。冻结 VQ-VAE，把每张图的下标当作长 36 的序列，用一个循环网络（GRU）自回归地学它的分布。

# %%
with torch.no_grad():
    encoder, q, decoder = best[3]
    codes, test_codes = (q(encoder(x)).k.flatten(1) for x in (train_x, test_x))     # (N, 36)


class Prior(nn.Module):
    """p(k_i | k_<i)：下标 (B, 36) → 对数概率 (B, 36, K)。K 号是起始符。"""

    def __init__(self, width=96):
        super().__init__()
        self.embed, self.place = nn.Embedding(K + 1, width), nn.Parameter(torch.zeros(36, width))
        self.gru, self.head = nn.GRU(width, width, batch_first=True), nn.Linear(width, K)

    def forward(self, k):
        start = torch.full((len(k), 1), K)
        h = self.embed(torch.cat([start, k[:, :-1]], 1)) + self.place              # (B, 36, width)
        return self.head(self.gru(h)[0]).log_softmax(-1)

    @torch.no_grad()
    def sample(self, n, g):
        k, state = torch.full((n, 1), K), None
        out = []
        for i in range(36):
            h, state = self.gru(self.embed(k) + self.place[i], state)              # (n, 1, width)
            k = torch.multinomial(self.head(h[:, 0]).softmax(-1), 1, generator=g)
            out.append(k)
        return torch.cat(out, 1)


def nll(log_p, k):
    """每个下标的负对数似然，单位奈特。"""
    return -log_p.gather(-1, k.unsqueeze(-1)).mean()


torch.manual_seed(0)
g = torch.Generator().manual_seed(3)
prior = Prior()
opt = torch.optim.Adam(prior.parameters(), 4e-3, fused=True)
for _ in range(250):
    k = codes[torch.randint(len(codes), (64,), generator=g)]
    loss = nll(prior(k), k)
    opt.zero_grad()
    loss.backward()
    opt.step()

frequency = (codes.flatten().bincount(minlength=K) + 1) / (codes.numel() + K)       # (K,) 加一平滑
with torch.no_grad():
    rates = {
        "uniform": math.log(K),
        "unigram": nll(frequency.log().expand(*test_codes.shape, K), test_codes).item(),
        "gru": nll(prior(test_codes), test_codes).item(),
    }
for name, value in rates.items():
    zhixing.metric(f"rate_{name}", value)
    print(f"{name}：每个下标 {value:.3f} 奈特，一张图 {36 * value / math.log(2):.0f} 比特")
assert rates["gru"] < 0.8 * rates["unigram"] < 0.8 * rates["uniform"]

# %%
drawn = {
    "均匀先验": torch.randint(K, (16, 36), generator=g),
    "按频率独立抽": torch.multinomial(frequency.expand(16, K), 36, replacement=True, generator=g),
    "自回归先验": prior.sample(16, g),
}
fig, axes = plt.subplots(4, 1, figsize=(7.6, 2.7), dpi=130)
strip(axes[0], rgb(show), "真实的图")
with torch.no_grad():
    for ax, (name, k) in zip(axes[1:], drawn.items()):
        strip(ax, rgb(decoder(q.lookup(k.view(16, 6, 6)))), name)
zhixing.figure("prior", fig)
