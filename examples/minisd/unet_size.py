"""Stable Diffusion 一类 U-Net 的参数量：不建网络，按配置逐块数。单位是个。

配置：各级通道 channels、各级每处 Transformer 的层数 depths（0 表示这一级没有注意力）、
中间块的层数 middle、交叉注意力的上下文维度 context、池化文本与微条件合起来的向量维度 extra（没有就是 0）。
约定同 SD1.x 与 SDXL：每级下行两个残差块、上行三个；注意力的 Q、K、V 没有偏置，前馈是 GEGLU。
"""

# --8<-- [start:size]
def conv(c_in, c_out, k=3):
    return k * k * c_in * c_out + c_out


def linear(d_in, d_out, bias=True):
    return d_in * d_out + bias * d_out


def resblock(c_in, c_out, time):
    """两个卷积、两个组归一化、时间嵌入的线性层；通道变了再加一个 1×1 卷积。"""
    skip = conv(c_in, c_out, 1) if c_in != c_out else 0
    return 2 * c_in + conv(c_in, c_out) + linear(time, c_out) + 2 * c_out + conv(c_out, c_out) + skip


def transformer(c, depth, context):
    """一处 Transformer：组归一化、进出投影，中间 depth 层（自注意力、交叉注意力、GEGLU 前馈）。"""
    attention = lambda d: linear(c, c, False) + 2 * linear(d, c, False) + linear(c, c)         # Q；K、V；输出
    layer = 3 * 2 * c + attention(c) + attention(context) + linear(c, 8 * c) + linear(4 * c, c)
    return 2 * c + 2 * linear(c, c) + depth * layer if depth else 0


def unet_parameters(channels, depths, middle, context, extra=0):
    """{"transformer": …, "resblock": …, "其余": …}；三项之和就是 U-Net 的参数量。"""
    if len(channels) != len(depths) or not channels:
        raise ValueError(f"channels 与 depths 要一样长且非空，收到 {len(channels)} 与 {len(depths)}")
    first, last, time = channels[0], channels[-1], 4 * channels[0]
    text = transformer(last, middle, context)
    res = 2 * resblock(last, last, time)
    rest = conv(4, first) + 2 * first + conv(first, 4)                                         # 首尾
    rest += linear(first, time) + linear(time, time)                                           # 步号
    rest += linear(extra, time) + linear(time, time) if extra else 0                           # 微条件与池化文本
    skips, c = [first], first
    for i, (out, depth) in enumerate(zip(channels, depths)):                                   # 下行
        for _ in range(2):
            res += resblock(c, out, time)
            text += transformer(out, depth, context)
            skips.append(c := out)
        if i < len(channels) - 1:
            rest += conv(c, c)
            skips.append(c)
    for i, (out, depth) in enumerate(zip(channels[::-1], depths[::-1])):                       # 上行：吃掉全部跳连
        for _ in range(3):
            res += resblock(c + skips.pop(), out, time)
            text += transformer(out, depth, context)
            c = out
        if i < len(channels) - 1:
            rest += conv(c, c)
    return {"transformer": text, "resblock": res, "其余": rest}
# --8<-- [end:size]


SD15 = {"channels": (320, 640, 1280, 1280), "depths": (1, 1, 1, 0), "middle": 1, "context": 768}
SDXL = {"channels": (320, 640, 1280), "depths": (0, 2, 10), "middle": 10, "context": 2048, "extra": 2816}
