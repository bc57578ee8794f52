"""无分类器引导（classifier-free guidance，CFG）。

只认识一个函数 ``denoise(x, t, cond) -> pred``，不认识网络与噪声日程：
x (B, ...)，t (B,)，pred 与 x 同形；cond 是张量，或张量的元组、列表（每个张量的第一维都是 B）。
pred 是 ε、x0 还是 v 都行（页面上证明了三者等价）。

约定：``scale`` 以 1 为“不引导”，与 diffusers 的 guidance_scale 相同；论文（arXiv:2207.12598）的 w = scale - 1。

形状、引导强度或返回值不合约定时抛 ValueError。
"""

# --8<-- [start:combine]
import math

import torch


def combine(cond, uncond, scale):
    """ε̃ = ε_∅ + s (ε_c - ε_∅)。cond、uncond 同形 (B, ...)。

    s = 0 是无条件，s = 1 是有条件（差一次舍入），s > 1 是沿两者之差外推。
    """
    _same(cond, uncond)
    return uncond + _scale(scale) * (cond - uncond)


def from_paper(w):
    """论文的 w → 这里的 scale：(1+w) ε_c - w ε_∅ 就是 s = 1 + w。"""
    return 1 + _scale(w, "论文的 w ")


def to_paper(scale):
    """这里的 scale → 论文的 w。7.5 对应 6.5。"""
    return _scale(scale) - 1
# --8<-- [end:combine]


# --8<-- [start:guided]
def guided(denoise, cond, null, scale):
    """包成采样器要的 ``denoise(x, t) -> pred``：两支并成一批，只调用一次网络。

    ``null`` 是空条件；换成负提示词的条件，就是负提示词。
    scale = 1 或 0 只算需要的那一支：快一倍，而且与单独调用逐位相同。
    """
    pairs = _pairs(cond, null)
    scale = _scale(scale)
    if scale in (0, 1):
        only = cond if scale == 1 else null
        return lambda x, t: _asked(denoise, x, t, only)
    both = [torch.cat([n, c]) for c, n in pairs]                       # (2B, ...) 空条件在前
    both = both[0] if isinstance(cond, torch.Tensor) else tuple(both)

    def wrapped(x, t):
        pred = _asked(denoise, torch.cat([x, x]), torch.cat([t, t]), both)     # (2B, ...)
        uncond, with_cond = pred.chunk(2)
        return combine(with_cond, uncond, scale)

    return wrapped
# --8<-- [end:guided]


# --8<-- [start:rescale]
def rescale(pred, cond, phi):
    """按样本把 pred 的标准差往 cond 的拉：phi = 0 不动，1 完全相同（arXiv:2305.08891 第 3.4 节）。"""
    _same(pred, cond)
    if isinstance(phi, bool) or not isinstance(phi, int | float) or not 0 <= phi <= 1:
        raise ValueError(f"phi 必须在 0 到 1 之间，收到 {phi!r}")
    dims = tuple(range(1, pred.ndim))
    ratio = cond.std(dims, keepdim=True) / pred.std(dims, keepdim=True)        # (B, 1, …, 1)
    return phi * (pred * ratio) + (1 - phi) * pred
# --8<-- [end:rescale]


# --8<-- [start:check]
def _scale(value, name="引导强度 scale "):
    """有限的实数 → float。负数合法（往反方向推），但不能是 NaN、无穷、布尔或张量。"""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}必须是有限的数，收到 {value!r}")
    return float(value)


def _same(cond, uncond):
    """两个预测都是同形的浮点张量（不靠广播蒙混过关）。"""
    for name, value in (("有条件的预测", cond), ("无条件的预测", uncond)):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise ValueError(f"{name}必须是浮点张量，收到 {type(value).__name__}")
    if cond.shape != uncond.shape:
        raise ValueError(f"两个预测的形状必须相同，收到 {tuple(cond.shape)} 与 {tuple(uncond.shape)}")


def _parts(cond):
    """条件 → 张量的列表。"""
    parts = [cond] if isinstance(cond, torch.Tensor) else cond
    if not isinstance(parts, list | tuple) or not parts or not all(isinstance(p, torch.Tensor) and p.ndim for p in parts):
        raise ValueError("条件必须是第一维为批的张量，或这种张量的元组")
    return list(parts)


def _pairs(cond, null):
    """有条件与空条件逐个配对，形状必须相同。"""
    c, n = _parts(cond), _parts(null)
    shapes = [tuple(p.shape) for p in c], [tuple(p.shape) for p in n]
    if shapes[0] != shapes[1]:
        raise ValueError(f"空条件的形状必须与条件相同（批大小、长度都要补齐），收到 {shapes[1]} 与 {shapes[0]}")
    return list(zip(c, n))


def _asked(denoise, x, t, cond):
    """调用一次 denoise，核对批大小与返回的形状。"""
    if any(len(p) != len(x) for p in _parts(cond)) or t.shape != x.shape[:1]:
        got = [len(p) for p in _parts(cond)]
        raise ValueError(f"x、t、条件的批大小必须相同，收到 {len(x)}、{tuple(t.shape)}、{got}")
    pred = denoise(x, t, cond)
    if not isinstance(pred, torch.Tensor) or pred.shape != x.shape:
        got = tuple(pred.shape) if isinstance(pred, torch.Tensor) else type(pred).__name__
        raise ValueError(f"denoise 的返回值形状必须是 {tuple(x.shape)}，收到 {got}")
    return pred
# --8<-- [end:check]
