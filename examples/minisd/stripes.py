"""横条纹：一种基座没见过的纹理，以及从像素里量它的尺子。

LoRA 示例拿它当“新风格”。条纹固定在画布上：两行亮、两行暗，暗行是亮行的 0.4 倍。
判分器按纯色图形写成，所以判颜色、形状、位置之前先用 :func:`flatten` 把条纹抹平。

约定：图像 (N, 3, S, S)，[-1, 1]。形状不合约定时抛 ValueError。
"""

# --8<-- [start:stripes]
import torch

from minisd import judge

DARK = 0.4                                                       # 暗行的亮度是亮行的几倍


def dark_rows(size):
    """哪些行是暗的：(S,) 布尔，两行一换。"""
    return torch.arange(size) // 2 % 2 == 1


def paint(fill, mask, center):
    """给 ``world.draw(paint=...)`` 用：把填充的暗行压暗。fill (N, 3, S, S)，[0, 1]。"""
    return torch.where(dark_rows(fill.shape[-1])[:, None], DARK * fill, fill)


def _split(images):
    """亮行、暗行各自读颜色与遮罩。→ 图 [0, 1]、背景 (N, 3, 1, 1)、颜色与遮罩各两份。"""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"图像的形状必须是 (N, 3, S, S)，收到 {tuple(images.shape)}")
    x = ((images.detach().float().cpu() + 1) / 2).clamp(0, 1)
    size = x.shape[-1]
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2)      # (N, 3, 4S)
    background = border.median(2).values[:, :, None, None]
    far = (x - background).norm(dim=1)                                                   # (N, S, S)
    colors, masks = [], []
    for rows in (~dark_rows(size), dark_rows(size)):
        near = far[:, rows].flatten(1)                                                   # (N, S²/2)
        core = near > 0.7 * near.topk(max(3, size * size // 120)).values[:, -1:]
        pixels = torch.where(core[:, None], x[:, :, rows].flatten(2), torch.nan)
        color = pixels.nanmedian(2).values[:, :, None, None]                             # (N, 3, 1, 1)
        v = color - background
        m = ((x - background) * v).sum(1) / (v * v).sum(1).clamp(min=1e-6)               # (N, S, S)
        colors.append(color)
        masks.append(m.clamp(0, 1) * rows[:, None])                                      # 只留自己那些行
    return x, background, colors, masks


def contrast(images):
    """条纹的对比度 1 - 暗行平均亮度 / 亮行平均亮度，只数图形里的像素。(N,)，纯色图约为 0。"""
    x, _, _, masks = _split(images)
    light = x.mean(1)                                                                    # (N, S, S)
    inside = [(m > 0.5).float() for m in masks]
    bright, dark = [(light * m).sum((1, 2)) / m.sum((1, 2)).clamp(min=1) for m in inside]
    return 1 - dark / bright.clamp(min=1e-6)


def flatten(images):
    """把条纹抹平：暗行的图形像素改画成亮行的颜色，其余不动。→ 同形，[-1, 1]"""
    x, background, (bright, _), masks = _split(images)
    m = sum(masks)[:, None]                                                              # (N, 1, S, S)
    return (background * (1 - m) + bright * m) * 2 - 1


def score(images, attrs):
    """抹平条纹之后的 ``judge.score``。"""
    return judge.score(flatten(images), attrs)
# --8<-- [end:stripes]
