"""文生图管线：文本编码器 + U-Net + 采样器 + VAE 解码，外加权重的存取。

三个网络彼此不认识，只在这里接到一起；换采样器、换引导强度、接适配器都不必改它们。
"""

# --8<-- [start:weights]
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minisd import clip, samplers, schedule, unet, vae
from minisd.guidance import combine


def save_weights(module, path):
    """以半精度存成 safetensors。整型的缓冲原样保存。"""
    state = module.state_dict()
    save_file({k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}, str(path))


def load_weights(module, path):
    """读回权重（转成 float32），冻结，切到 eval，返回 module。

    文件损坏、不是 safetensors、名字或形状与 module 对不上、含 NaN 时抛 ValueError。
    """
    try:
        state = {k: v.float() if v.is_floating_point() else v for k, v in load_file(str(path)).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"权重文件 {path} 读不出：{error}") from error
    if bad := [k for k, v in state.items() if not torch.isfinite(v).all()]:
        raise ValueError(f"权重文件 {path} 里有 NaN 或无穷大：{'、'.join(bad)}")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"权重文件 {path} 与 {type(module).__name__} 对不上：{error}") from error
    return module.eval().requires_grad_(False)
# --8<-- [end:weights]


# --8<-- [start:pipeline]
class StableDiffusion:
    """冻结的三件套加一条日程。

    Args:
        text_encoder: :class:`minisd.clip.TextEncoder`。
        vae: :class:`minisd.vae.VAE`。
        unet: :class:`minisd.unet.UNet`，或任何同样调用的东西（接了 LoRA、ControlNet 的也行）。
        schedule: 缺省是 1000 步的余弦日程；U-Net 预测 v。
    """

    def __init__(self, text_encoder, vae, unet, schedule=schedule.cosine()):
        self.text_encoder, self.vae, self.unet, self.schedule = text_encoder, vae, unet, schedule

    @property
    def device(self):
        """权重所在的设备；输入都搬到这里。"""
        return next(self.text_encoder.parameters()).device

    def to(self, device):
        """三个网络一起搬到 device，返回自己。"""
        for net in (self.text_encoder, self.vae, self.unet):
            net.to(device)
        return self

    @classmethod
    def load(cls, clip_path, vae_path, unet_path=None):
        """从权重文件组装；不给 unet_path 就是一个还没训练的 U-Net（输出恒为零）。"""
        net = unet.UNet()
        if unet_path is not None:
            load_weights(net, unet_path)
        return cls(load_weights(clip.CLIP(), clip_path).text_encoder, load_weights(vae.VAE(), vae_path), net)

    def encode(self, prompts):
        """描述列表 → 逐字特征 (B, L, D) 与有效位 (B, L)。空串表示无条件。"""
        return self.text_encoder(clip.tokenize(prompts).to(self.device))

    def denoiser(self, prompts, guidance=2.0, negative=None, **extra):
        """给采样器用的 denoise(x, t) → v，已含无分类器引导：v_∅ + w (v_c - v_∅)。

        ``negative`` 是负提示词列表，缺省为空串。guidance = 1 时只算有条件的一支，快一倍。
        """
        if empty := [i for i, p in enumerate(prompts) if not p]:
            raise ValueError(f"第 {empty} 条描述是空的；要无条件生成，用 unconditional()")
        text, valid = self.encode(prompts)
        if guidance == 1:
            return lambda x, t: self.unet(x, t, text, valid, **extra)
        text0, valid0 = self.encode(negative or [""] * len(prompts))
        both = torch.cat([text, text0]), torch.cat([valid, valid0])

        def denoise(x, t):
            v, v0 = self.unet(torch.cat([x, x]), torch.cat([t, t]), *both, **extra).chunk(2)
            return combine(v, v0, guidance)

        return denoise

    def unconditional(self, n):
        """无条件的 denoise(x, t) → v，n 是批大小。"""
        text, valid = self.encode([""] * n)
        return lambda x, t: self.unet(x, t, text, valid)

    def noise(self, n, generator, size=24):
        """初始噪声 x_T：(n, 4, size/4, size/4)。总在 CPU 上抽，换设备不换噪声。"""
        if size % (2 * self.vae.FACTOR):
            raise ValueError(f"图像边长必须是 {2 * self.vae.FACTOR} 的倍数，收到 {size}")
        side = size // self.vae.FACTOR
        return torch.randn(n, 4, side, side, generator=generator).to(self.device)

    @torch.no_grad()
    def __call__(self, prompts, generator, steps=12, guidance=2.0, negative=None, method="dpm++", **extra):
        """文生图：描述列表 → 图 (N, 3, 24, 24)，[-1, 1]。

        空描述、词表外的字、步数超过日程的 T、预测出 NaN 时抛 ValueError。
        """
        denoise = self.denoiser(prompts, guidance, negative, **extra)
        z = samplers.sample(self.schedule, denoise, self.noise(len(prompts), generator), steps, method)
        return self.vae.to_image(z)
# --8<-- [end:pipeline]
