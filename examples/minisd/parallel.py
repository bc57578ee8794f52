"""并排训练 R 个小网络：权重多一个前导维 R，一次矩阵乘法算完全部。

小网络的一步几乎都花在调度上，R 个并排训练只比一个慢几倍；每个各有自己的初始化、学习率与 β₁，
所以一次就能跑完整张消融表。形状不符时抛 ValueError。
"""

# --8<-- [start:parallel]
import torch


def init(R, widths, generator=None):
    """R 个多层感知机的参数 [W₁ (R, in, out), b₁ (R, 1, out), W₂, …]，各元素均匀分布在 ±1/√in。"""
    if R < 1 or len(widths) < 2:
        raise ValueError(f"至少一个网络、两个宽度，收到 R={R}、widths={widths}")
    params = []
    for n, m in zip(widths, widths[1:]):
        for rows in (n, 1):
            params.append((2 * torch.rand(R, rows, m, generator=generator) - 1) / n**0.5)
    return [p.requires_grad_() for p in params]


def forward(params, x):
    """x (R, B, in) → (R, B, out)，层间是 ReLU。"""
    for i in range(0, len(params), 2):
        x = torch.baddbmm(params[i + 1], x if i == 0 else x.relu(), params[i])
    return x


class Adam:
    """与 torch.optim.Adam 同一套公式，但学习率与 β₁ 每个网络各一个：lr、beta1 都是 (R,)。"""

    def __init__(self, params, lr, beta1, beta2=0.9, eps=1e-8):
        if any(p.shape[0] != len(lr) or p.shape[0] != len(beta1) for p in params):
            raise ValueError("lr 与 beta1 的长度必须等于网络个数 R")
        self.params, self.beta2, self.eps, self.t = params, beta2, eps, 0
        self.lr, self.beta1 = lr.view(-1, 1, 1), beta1.view(-1, 1, 1)
        self.m, self.v = ([torch.zeros_like(p) for p in params] for _ in "mv")

    @torch.no_grad()
    def step(self, loss):
        """loss (R,)：各网络互不相干，求和再反传就是各自的梯度。"""
        self.t += 1
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss.sum(), self.params)
        for p, g, m, v in zip(self.params, gradients, self.m, self.v):
            m.mul_(self.beta1).add_((1 - self.beta1) * g)
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            denominator = (v / (1 - self.beta2**self.t)).sqrt_().add_(self.eps)
            p.sub_(self.lr * (m / (1 - self.beta1**self.t)) / denominator)
# --8<-- [end:parallel]
