"""生成对抗网络的损失与正则：与网络结构无关，只认判别器输出的 logit。

约定：``real``、``fake`` 是判别器对真、假样本的 logit，形状 (..., B)，最后一维是批；返回 (...)，
前面的维留给“并排训练的许多个 GAN”。D(x) = sigmoid(logit)。

出处：GAN（arXiv:1406.2661）、R1（arXiv:1801.04406）、WGAN-GP（arXiv:1704.00028）、
谱归一化（arXiv:1802.05957）。批为空或形状不符时抛 ValueError。
"""

# --8<-- [start:losses]
import torch
import torch.nn.functional as F


def discriminator_loss(real, fake):
    """-E[log D(x)] - E[log(1 - D(G(z)))]。softplus(-a) = -log sigmoid(a)，logit 再大也不溢出。"""
    _check(real=real, fake=fake)
    return F.softplus(-real).mean(-1) + F.softplus(fake).mean(-1)


def generator_loss(fake, saturating=False):
    """非饱和：-E[log D(G(z))]；饱和（原始的极小极大）：E[log(1 - D(G(z)))]。"""
    _check(fake=fake)
    return -F.softplus(fake).mean(-1) if saturating else F.softplus(-fake).mean(-1)
# --8<-- [end:losses]


# --8<-- [start:regularizers]
def r1(real, x):
    """R1：½ E‖∇ₓ logit(x)‖²，只在真样本上；乘上 γ 加进判别器损失。x (..., B, d) 须 requires_grad。"""
    _check(real=real)
    if not isinstance(x, torch.Tensor) or x.shape[:-1] != real.shape or not x.requires_grad:
        raise ValueError("x 的形状必须是 logit 的形状再加一维，并且 requires_grad=True（在过判别器之前设）")
    gradient, = torch.autograd.grad(real.sum(), x, create_graph=True)      # (..., B, d)
    return gradient.square().sum(-1).mean(-1) / 2


def critic_estimate(real, fake):
    """WGAN 评论家的估计 E[f(x)] - E[f(G(z))]：f 是 1-Lipschitz 时不超过 W₁ 距离。"""
    _check(real=real, fake=fake)
    return real.mean(-1) - fake.mean(-1)


def gradient_penalty(critic, x, y, u):
    """WGAN-GP：E(‖∇f‖ - 1)²，在真假样本的连线上取。x、y (..., B, d)，u (..., B, 1) 取自 [0, 1]。"""
    if x.shape != y.shape or u.shape != (*x.shape[:-1], 1):
        raise ValueError(f"x、y 须同形状，u 须是 {(*x.shape[:-1], 1)}，收到 {tuple(x.shape)}、{tuple(y.shape)}、{tuple(u.shape)}")
    between = (u * x + (1 - u) * y).detach().requires_grad_()
    gradient, = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (gradient.norm(dim=-1) - 1).square().mean(-1)


def spectral_normalize(W, u):
    """谱归一化：W / σ(W)，σ 由一步幂迭代估计。W (..., m, n)，u (..., m) → 归一化的 W 与新的 u。"""
    with torch.no_grad():                                                  # 奇异向量当常数
        v = F.normalize(u.unsqueeze(-2) @ W, dim=-1)                       # (..., 1, n)
        u = F.normalize((W @ v.mT).squeeze(-1), dim=-1)                    # (..., m)
    sigma = u.unsqueeze(-2) @ W @ v.mT                                     # (..., 1, 1) uᵀ W v
    return W / sigma, u
# --8<-- [end:regularizers]


# --8<-- [start:check]
def _check(**logits):
    shapes = set()
    for name, a in logits.items():
        if not isinstance(a, torch.Tensor) or a.ndim < 1 or not a.numel():
            raise ValueError(f"{name} 必须是形状 (..., B) 的非空张量；判别器输出 (..., B, 1) 时先 squeeze(-1)")
        shapes.add(a.shape[:-1])
    if len(shapes) > 1:
        raise ValueError(f"真假两批 logit 的前几维必须一致，收到 {' 与 '.join(str(tuple(s)) for s in shapes)}")
# --8<-- [end:check]
