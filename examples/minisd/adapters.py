"""把训好的适配器装回基座：LoRA、ControlNet、IP-Adapter 各一个函数，示例与页面共用。

权重都来自各自的示例，存成半精度，读回来转成单精度；对不上号时由各自的载入函数抛 ValueError。
"""

from minisd import ip_adapter, lora, pipeline, unet, world
from minisd.controlnet import Controlled, ControlNet, HintEncoder, edges

__all__ = ["Controlled", "ControlNet", "HintEncoder", "edges", "ip_adapter", "lora", "pipeline", "unet", "world"]

# --8<-- [start:attach]
from safetensors.torch import load_file

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out", "ff.0", "ff.2", "text.out"]    # 注意力、前馈、文本块的输出


def read(path):
    """半精度的权重文件 → {名字: 单精度张量}。"""
    return {name: tensor.float() for name, tensor in load_file(str(path)).items()}


def load_base(clip_path, vae_path, unet_path):
    """冻结的迷你 Stable Diffusion。"""
    return pipeline.StableDiffusion.load(clip_path, vae_path, unet_path)


def attach_lora(net, path, rank=4, alpha=4):
    """就地加上 LoRA：线性层换成 W_0 + (α/r)BA。返回 net。"""
    lora.add_lora(net, LORA_TARGETS, rank, alpha)
    lora.load_lora(net, read(path))
    return net


def attach_ip_adapter(net, path):
    """复制一份 U-Net，给每个交叉注意力层配上 K'、V'。"""
    net = ip_adapter.add_ip_adapter(net)
    ip_adapter.load_adapter(net, read(path))
    return net


def load_control(base, path, down=2):
    """副本从**没改过的**基座复制结构，再载入训好的权重；用 ``Controlled(任何同结构的 U-Net, control)`` 接上。"""
    first, *_ = base.encoder                                       # 条件加在第 0 块的输出上
    control = ControlNet(base, HintEncoder(1, first.out_channels, down=down))
    return pipeline.load_weights(control, path)
# --8<-- [end:attach]
