"""变分自编码器的两块积木：重参数化与高斯 KL 的闭式（arXiv:1312.6114 第 2.4 节、附录 B）。

``mu``、``logvar`` 是编码器给出的均值与对数方差，形状相同，任意维；网络输出 log σ² 而不是 σ，
是为了不必约束正负，小方差时也不下溢。形状不符时抛 ValueError。
"""

# --8<-- [start:elbo]
import torch


def reparameterize(mu, logvar, eps):
    """z = μ + σ ε：随机性全在 ε 里，z 对 μ、σ 可导。三者与返回值同形状。"""
    _same(mu, logvar=logvar, eps=eps)
    return mu + (logvar / 2).exp() * eps


def kl_standard_normal(mu, logvar):
    """KL( N(μ, σ²) ‖ N(0, 1) ) = ½(μ² + σ² - 1 - log σ²)，逐元素，与 mu 同形状。"""
    _same(mu, logvar=logvar)
    return (mu.square() + logvar.expm1() - logvar) / 2         # expm1：σ² - 1，接近 0 时不丢精度
# --8<-- [end:elbo]


# --8<-- [start:check]
def _same(mu, **others):
    """核对形状一致（不靠广播蒙混过关）。"""
    if not isinstance(mu, torch.Tensor) or not mu.is_floating_point():
        raise ValueError("mu 必须是浮点张量")
    for name, x in others.items():
        if not isinstance(x, torch.Tensor) or x.shape != mu.shape:
            got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"{name} 的形状必须是 {tuple(mu.shape)}，收到 {got}")
# --8<-- [end:check]
