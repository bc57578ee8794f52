"""一叠小网络上的二维扩散：正则化那一组实验共用的网络、优化器、训练循环与采样。

几十个结构相同的多层感知机叠成一个大张量一起训，第一维 M = 设置数 × SEEDS 是“第几个网络”，它们之间没有任何联系。
同一个种子下，不同设置的初始权重、数据、步号、噪声逐位相同，所以可以成对比较。

数据是太极图线稿上的点。分布已知，最优的 E[ε | x_t] 算得出，误差一律报“高出理论下限多少”：训练误差为负，就是在背训练点。
开关的名字写错时抛 ValueError。
"""

import math

import torch
from torch import nn

from minisd import schedule, toy2d

T, SEEDS = 1000, 5
_s = schedule.cosine(T)
SIGNAL, NOISE = _s.alpha_bar.sqrt().float(), (1 - _s.alpha_bar).sqrt().float()     # (T,) √ᾱ_t、√(1-ᾱ_t)
FREQ_X, FREQ_T = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([1.0, 2.0, 4.0, 8.0])
WIDTHS = [2 + 1 + 4 * len(FREQ_X) + 2 * len(FREQ_T), 64, 64, 64, 2]


# --8<-- [start:nets]
def mlp(dims, seed, copies=1):
    """每个种子一个网络，再整体复制 copies 份：返回 [W (M, i, o), b (M, 1, o), …]，M = copies · SEEDS。"""
    g = torch.Generator().manual_seed(seed)
    params = []
    for i, o in zip(dims, dims[1:]):
        params += [(2 * torch.rand(SEEDS, i, o, generator=g) - 1) * 1.5 / i**0.5, torch.zeros(SEEDS, 1, o)]
    return [p.repeat(copies, 1, 1).requires_grad_() for p in params]


def forward(params, h, mask=lambda h: h):
    """h (M, B, i) → (M, B, o)；mask 作用在每个隐藏层之后。"""
    for k in range(0, len(params), 2):
        h = torch.baddbmm(params[k + 1], h, params[k])
        if k < len(params) - 2:
            h = mask(nn.functional.silu(h))
    return h


def features(x, t, c=None):
    """x (M, B, 2)、t (M, B)、条件 c (M, B) → 网络输入 (M, B, 27)：坐标、条件与正弦特征。"""
    u = (x[..., None] * FREQ_X).flatten(-2)
    v = t[..., None] * (math.pi / T) * FREQ_T
    c = torch.zeros_like(v[..., :1]) if c is None else c[..., None]
    return torch.cat([x, c, u.sin(), u.cos(), v.sin(), v.cos()], -1)


def diffuse(x0, t, eps):
    """x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε：x0、eps (M, B, 2)，t (M, B)。"""
    return SIGNAL[t][..., None] * x0 + NOISE[t][..., None] * eps


def per_member(params, x0, t, eps, mask=lambda h: h, c=None):
    """每个网络各自的 ‖ε - ε_θ‖² 平均，(M,)。"""
    return (forward(params, features(diffuse(x0, t, eps), t, c), mask) - eps).square().mean((1, 2))
# --8<-- [end:nets]


# --8<-- [start:adam]
def adam_state(params):
    """从零开始的矩：与 params 同形状。"""
    return {"step": 0, "m": [torch.zeros_like(p) for p in params], "v": [torch.zeros_like(p) for p in params]}


@torch.no_grad()
def adam_step(params, grads, state, lr, decay=0.0, l2=0.0, clip=math.inf):
    """就地更新；decay、l2、clip 可以是标量或 (M, 1, 1)。返回裁剪前每个网络的梯度范数 (M, 1, 1)。"""
    norm = sum(g.square().sum((1, 2), keepdim=True) for g in grads).sqrt()        # (M, 1, 1)
    shrink = (clip / (norm + 1e-6)).clamp(max=1)                                   # 只缩短，不拉长
    state["step"] += 1
    c1, c2 = 1 - 0.9 ** state["step"], 1 - 0.999 ** state["step"]                  # 偏差修正
    for p, g, m, v in zip(params, grads, state["m"], state["v"]):
        g = g * shrink + l2 * p                                                    # L2：先进梯度
        m.lerp_(g, 1 - 0.9)
        v.lerp_(g * g, 1 - 0.999)
        p.mul_(1 - lr * decay)                                                     # 解耦：直接缩权重
        p.sub_(lr / c1 * m / ((v / c2).sqrt() + 1e-8))
    return norm
# --8<-- [end:adam]


# --8<-- [start:train]
def lowest(x, t, eps):
    """任何网络的误差下限：用密密的点近似整条曲线，直接算 E[ε | x_t]。x、eps (n, 2)，t (n,)。"""
    dense = toy2d.taiji(4000, torch.Generator().manual_seed(8))                   # (D, 2)
    a, b = SIGNAL[t][:, None], NOISE[t][:, None]                                   # (n, 1)
    weight = torch.softmax(-((torch.cdist(x / a, dense) * a / b) ** 2) / 2, 1)    # (n, D) 后验 q(x_0 | x_t)
    return ((x - a * (weight @ dense)) / b - eps).square().mean()


def train(configs, steps, points=16, lr=5e-3, poison=(), every=50, ema=0.995, batch=64):
    """configs {名字: 开关}，每个设置 SEEDS 个网络。返回参数、EMA 参数、训练点与记录。

    configs 的开关：decay、l2、drop、clip、points（训练点数）、anneal（1 为学习率余弦退火到 0）。
    曲线 {train、val、val_ema: {名字: (记录次数, SEEDS)}}，都已减去各自的理论下限。poison 里的步号喂一批坏数据。
    """
    unknown = {key for c in configs.values() for key in c} - {"decay", "l2", "drop", "clip", "points", "anneal"}
    if unknown:
        raise ValueError(f"不认识的开关：{', '.join(sorted(unknown))}")
    K = len(configs)
    column = lambda key, default: torch.tensor(                                   # (M, 1, 1) 每个网络的开关
        [c.get(key, default) for c in configs.values()], dtype=torch.float32
    ).repeat_interleave(SEEDS).view(-1, 1, 1)
    decay, l2, clip = column("decay", 0.0), column("l2", 0.0), column("clip", math.inf)
    anneal = column("anneal", 0.0)                                                # 1 为余弦退火到 0
    keep, use = 1 - column("drop", 0.0), column("points", points)[:, :, 0]
    dropped = (keep < 1).nonzero()[:, 0].unique()                                 # 哪些网络开了 Dropout
    every_config = lambda z: z.repeat(K, *[1] * (z.ndim - 1))                     # (SEEDS, …) → (M, …)

    def mask(h):
        if not len(dropped):
            return h
        q = keep[dropped]
        h = h.clone()
        h[dropped] = h[dropped] * (torch.rand(h[dropped].shape, generator=g) < q) / q
        return h

    g = torch.Generator().manual_seed(1)
    bank = torch.stack([toy2d.taiji(max(512, points), g) for _ in range(SEEDS)])  # (SEEDS, n, 2) 训练点
    fresh = torch.stack([toy2d.taiji(2048, g) for _ in range(SEEDS)])             # (SEEDS, 2048, 2) 验证点
    t_val = torch.randint(T, (SEEDS, 2048), generator=g)
    eps_val = torch.randn(SEEDS, 2048, 2, generator=g)
    u_val = torch.rand(SEEDS, 2048, generator=g)
    bank, fresh, t_val, eps_val, u_val = map(every_config, (bank, fresh, t_val, eps_val, u_val))
    pick = lambda u: bank.gather(1, (u * use).long()[..., None].expand(-1, -1, 2))   # 均匀地抽训练点

    params = mlp(WIDTHS, seed=2, copies=K)
    average, state = [p.detach().clone() for p in params], adam_state(params)
    log = {"step": [], "train": [], "val": [], "val_ema": []}
    x_val = diffuse(fresh, t_val, eps_val)[:SEEDS]                                 # 各设置的验证集相同
    floor = torch.stack([lowest(*z) for z in zip(x_val, t_val, eps_val)]).repeat(K)   # (M,)
    for k in range(steps):
        u = every_config(torch.rand(SEEDS, batch, generator=g))
        t = every_config(torch.randint(T, (SEEDS, batch), generator=g))
        eps = every_config(torch.randn(SEEDS, batch, 2, generator=g))
        x0 = pick(u)
        if k in poison:
            x0 = 127.5 * (x0 + 1)                                                  # 忘了把 0–255 归一化到 ±1
        grads = torch.autograd.grad(per_member(params, x0, t, eps, mask).sum(), params)
        now = lr * (1 - anneal * (0.5 - 0.5 * math.cos(math.pi * k / steps)))      # (M, 1, 1)
        adam_step(params, grads, state, now, decay, l2, clip)
        for a, p in zip(average, params):
            a.lerp_(p.detach(), 1 - min(ema, (k + 1) / (k + 10)))                  # 预热：开头的衰减小一些
        if (k + 1) % every == 0:
            with torch.no_grad():
                scores = {
                    "train": per_member(params, pick(u_val), t_val, eps_val) - floor,
                    "val": per_member(params, fresh, t_val, eps_val) - floor,
                    "val_ema": per_member(average, fresh, t_val, eps_val) - floor,
                }
            log["step"].append(k + 1)
            for name, value in scores.items():
                log[name].append(value.view(K, SEEDS))
    names = list(configs)
    curves = {key: {n: torch.stack(log[key])[:, i] for i, n in enumerate(names)} for key in log if key != "step"}
    return params, average, bank, log["step"], curves                             # 曲线 (记录次数, SEEDS)
# --8<-- [end:train]


# --8<-- [start:sample]
@torch.no_grad()
def sample(params, n, seed, c=0.0, steps=25):
    """DDIM（η = 0）：每个网络 n 个样本，(M, n, 2)。初始噪声只看种子，各设置相同。"""
    M = len(params[0])
    x = torch.randn(SEEDS, n, 2, generator=torch.Generator().manual_seed(seed)).repeat(M // SEEDS, 1, 1)
    times = torch.linspace(T - 20, 0, steps).long().tolist()
    for t, after in zip(times, [*times[1:], None]):
        eps = forward(params, features(x, torch.full((M, n), t), torch.full((M, n), c)))
        x0 = ((x - NOISE[t] * eps) / SIGNAL[t]).clamp(-3, 3)
        x = x0 if after is None else SIGNAL[after] * x0 + NOISE[after] * (x - SIGNAL[t] * x0) / NOISE[t]
    return x
# --8<-- [end:sample]


# --8<-- [start:band]
def band(ax, step, curve, color, label, style="-"):
    """画平均线与最小到最大的阴影：curve (记录次数, SEEDS)。"""
    ax.plot(step, curve.mean(1), style, color=color, label=label)
    ax.fill_between(step, curve.min(1).values, curve.max(1).values, color=color, alpha=0.15, lw=0)
# --8<-- [end:band]
