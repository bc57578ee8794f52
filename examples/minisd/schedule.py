"""噪声日程：DDPM 里所有不需要网络的数学。

约定
----
* 步号 ``t`` 从 0 数到 T-1，对应论文（arXiv:2006.11239）的 1 到 T；ᾱ₋₁ 规定为 1，即干净数据。
* ``t`` 可以是一个整数（全批共用），也可以是形状 () 或 (B,) 的整型张量（每个样本一个步号）。
* ``x0``、``x_t``、``eps`` 形状相同，第一维是批：(B, ...)；返回值与输入同精度、同设备。
* 系数一律以 float64 算好并保存，用到时才转成数据的精度，所以误差只来自数据本身。

形状、步号或取值不合约定时抛 ValueError。
"""

# --8<-- [start:schedule]
import math
import operator

import torch


class Schedule:
    """一条噪声日程：给定 β，其余系数全部由它推出。

    参数 ``beta``：(T,) 的序列，每个值都在开区间 (0, 1) 内。
    属性都是 (T,) 的 float64 张量，名字就是公式里的符号。
    """

    def __init__(self, beta):
        beta = torch.as_tensor(beta, dtype=torch.float64)
        if beta.ndim != 1 or len(beta) < 1:
            raise ValueError(f"beta 的形状必须是 (T,) 且 T ≥ 1，收到 {tuple(beta.shape)}")
        if not ((beta > 0) & (beta < 1)).all():
            raise ValueError("beta 的每个值都必须在 (0, 1) 内")
        one = torch.ones(1, dtype=torch.float64)
        self.beta = beta                                               # β_t  注入的方差
        self.alpha = 1 - beta                                          # α_t  保留的方差比例
        self.alpha_bar = torch.cumprod(self.alpha, 0)                  # ᾱ_t = α_0 α_1 … α_t
        self.alpha_bar_prev = torch.cat([one, self.alpha_bar[:-1]])    # ᾱ_{t-1}，首项是 1
        noise_prev, noise = 1 - self.alpha_bar_prev, 1 - self.alpha_bar
        self.snr = self.alpha_bar / noise                              # 信噪比
        self.beta_tilde = noise_prev / noise * beta                    # β̃_t  后验方差

    def __len__(self):
        return len(self.beta)


def linear(T=1000, beta_start=1e-4, beta_end=0.02):
    """线性日程：β 从 ``beta_start`` 等距增大到 ``beta_end``（arXiv:2006.11239 第 4 节）。"""
    return Schedule(torch.linspace(beta_start, beta_end, _count(T), dtype=torch.float64))


def cosine(T=1000, s=0.008, beta_max=0.999):
    """余弦日程：先定 ᾱ 的形状，再反推 β，并截到 ``beta_max``（arXiv:2102.09672 式 17）。"""
    u = torch.arange(_count(T) + 1, dtype=torch.float64) / T           # (T+1,) 时间 0 … 1
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2                # (T+1,) ᾱ 的常数倍
    return Schedule((1 - f[1:] / f[:-1]).clamp(max=beta_max))
# --8<-- [end:schedule]


# --8<-- [start:check]
def _count(T):
    """步数必须是不小于 1 的整数。"""
    if isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise ValueError(f"步数 T 必须是不小于 1 的整数，收到 {T!r}")
    return T


def _steps(s, t, x):
    """核对步号 t 与数据 x (B, ...)，返回整型张量 () 或 (B,)。"""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise ValueError("数据必须是浮点张量")
    if not isinstance(t, torch.Tensor):
        if isinstance(t, bool) or not hasattr(t, "__index__"):
            raise ValueError(f"步号 t 必须是整数或整型张量，收到 {t!r}")
        t = torch.tensor(operator.index(t))
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise ValueError(f"步号 t 必须是整型，收到 {t.dtype}")
    if t.ndim > 0 and t.shape != x.shape[:1]:
        want, got = tuple(x.shape[:1]), tuple(t.shape)
        raise ValueError(f"步号 t 的形状必须是 () 或 {want}，收到 {got}")
    low, high = (int(t.min()), int(t.max())) if t.numel() else (0, 0)
    if low < 0 or high >= len(s):
        raise ValueError(f"步号 t 必须在 0 到 {len(s) - 1} 之间，收到 {low} 到 {high}")
    return t.to(x.device, torch.long)


def _same(x, **others):
    """核对其余张量与 x 形状一致（不靠广播蒙混过关）。"""
    for name, y in others.items():
        if not isinstance(y, torch.Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
            raise ValueError(f"{name} 的形状必须是 {tuple(x.shape)}，收到 {got}")


def take(s, coef, t, x):
    """取每个样本的系数 coef[t]，排成能与 x 逐样本相乘的形状。

    coef (T,)，t () 或 (B,)，x (B, ...) → () 或 (B, 1, …, 1)
    """
    t = _steps(s, t, x)
    c = coef.to(x.device, x.dtype)[t]
    return c.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else c
# --8<-- [end:check]


# --8<-- [start:forward]
def q_step(s, x_prev, t, eps):
    """前向一步 q(x_t | x_{t-1})：x_t = √(1-β_t) x_{t-1} + √β_t ε。全部张量 (B, ...)。"""
    _same(x_prev, eps=eps)
    a, b = take(s, s.alpha.sqrt(), t, x_prev), take(s, s.beta.sqrt(), t, x_prev)
    return a * x_prev + b * eps


def q_sample(s, x0, t, eps):
    """一步加噪 q(x_t | x_0)：x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε。全部张量 (B, ...)。"""
    _same(x0, eps=eps)
    a, b = take(s, s.alpha_bar.sqrt(), t, x0), take(s, (1 - s.alpha_bar).sqrt(), t, x0)
    return a * x0 + b * eps
# --8<-- [end:forward]


# --8<-- [start:predictions]
def velocity(s, x0, t, eps):
    """v-预测的目标：v = √ᾱ_t ε - √(1-ᾱ_t) x_0（arXiv:2202.00512）。全部张量 (B, ...)。"""
    _same(x0, eps=eps)
    a, b = take(s, s.alpha_bar.sqrt(), t, x0), take(s, (1 - s.alpha_bar).sqrt(), t, x0)
    return a * eps - b * x0


def split(s, x_t, t, pred, kind="eps"):
    """把 x_t 拆成 (x_0, ε)：kind 说明 pred 是 "eps"、"x0" 还是 "v"。全部张量 (B, ...)。"""
    _same(x_t, pred=pred)
    a = take(s, s.alpha_bar.sqrt(), t, x_t)            # √ᾱ_t      信号系数
    b = take(s, (1 - s.alpha_bar).sqrt(), t, x_t)      # √(1-ᾱ_t)  噪声系数，a² + b² = 1
    if kind == "eps":
        return (x_t - b * pred) / a, pred
    if kind == "x0":
        return pred, (x_t - a * pred) / b
    if kind == "v":
        return a * x_t - b * pred, b * x_t + a * pred  # (x_0, ε) 是 (x_t, v) 转过同一个角度
    raise ValueError(f'预测类型必须是 "eps"、"x0" 或 "v"，收到 {kind!r}')


def convert(s, x_t, t, pred, source, target):
    """把一种预测换成另一种，例如 source="eps"、target="v"。"""
    x0, eps = split(s, x_t, t, pred, source)
    if target == "v":
        return velocity(s, x0, t, eps)
    if target in ("eps", "x0"):
        return eps if target == "eps" else x0
    raise ValueError(f'预测类型必须是 "eps"、"x0" 或 "v"，收到 {target!r}')
# --8<-- [end:predictions]


# --8<-- [start:reverse]
def posterior(s, x0, x_t, t):
    """后验 q(x_{t-1} | x_t, x_0) 的均值 (B, ...) 与方差 β̃_t，后者是 () 或 (B, 1, …, 1)。"""
    _same(x_t, x0=x0)
    c0 = s.alpha_bar_prev.sqrt() * s.beta / (1 - s.alpha_bar)              # (T,) x_0 的系数
    ct = s.alpha.sqrt() * (1 - s.alpha_bar_prev) / (1 - s.alpha_bar)       # (T,) x_t 的系数
    mean = take(s, c0, t, x_t) * x0 + take(s, ct, t, x_t) * x_t
    return mean, take(s, s.beta_tilde, t, x_t)


def reverse_variance(s, variance="beta_tilde"):
    """反向过程固定方差的两种取法，(T,)："beta"（偏大）与 "beta_tilde"（偏小）。"""
    if variance == "beta":
        return s.beta
    if variance == "beta_tilde":
        return s.beta_tilde
    raise ValueError(f'方差取法必须是 "beta" 或 "beta_tilde"，收到 {variance!r}')


def p_step(s, x_t, t, pred, noise, kind="eps", variance="beta_tilde"):
    """反向一步 p(x_{t-1} | x_t)：后验均值里的 x_0 换成预测值，再加 σ_t z；t = 0 时不加噪。

    论文的算法 2。x_t、pred、noise 都是 (B, ...)；返回 x_{t-1}，(B, ...)。
    """
    _same(x_t, noise=noise)
    x0, _ = split(s, x_t, t, pred, kind)
    mean, _ = posterior(s, x0, x_t, t)
    sigma = reverse_variance(s, variance).sqrt()                           # (T,) σ_t
    sigma[0] = 0                                                           # 末步只取均值
    return mean + take(s, sigma, t, x_t) * noise
# --8<-- [end:reverse]
