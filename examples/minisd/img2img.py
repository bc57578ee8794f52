"""图生图：编码 → 加噪到半路 → 从半路采样（SDEdit，arXiv:2108.01073；Stable Diffusion 的 img2img）。

没有新的网络，也没有新的条件通道：原图只出现一次，就是采样的起点；提示词照旧走交叉注意力。
``strength`` 决定从哪里起步：0 原样解码，1 从最吵的一步起，几乎等于文生图。
"""

from minisd import samplers, schedule

# --8<-- [start:img2img]
import torch


def remaining(ts, strength):
    """完整轨迹 ts（从大到小的步号）里还要走的后一段：最后 int(n·strength) 步。

    与 diffusers 的 StableDiffusionImg2ImgPipeline.get_timesteps 相同，所以 n 小的时候是一级一级跳的。
    strength 不在 [0, 1] 内时抛 ValueError。
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise ValueError(f"strength 必须是 0 到 1 之间的数（0 保持原图，1 几乎等于文生图），收到 {strength!r}")
    return ts[len(ts) - int(len(ts) * strength):]


@torch.no_grad()
def from_latent(s, denoise, z, strength, generator, steps=12, method="dpm++", kind="v", spacing="trailing"):
    """潜变量 z (B, ...) → 加噪到半路 → 采样回来，(B, ...)。denoise 同 ``samplers.sample``。

    噪声总在 CPU 上抽，换设备不换噪声。一步都不用走（int(steps·strength) = 0）时原样返回 z。
    """
    ts = remaining(samplers.timesteps(len(s), steps, spacing), strength)
    if not ts:
        return z
    eps = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
    z_t = schedule.q_sample(s, z, ts[0], eps)                          # √ᾱ z + √(1-ᾱ) ε，一步到位
    return samplers.sample(s, denoise, z_t, ts, method, kind)


@torch.no_grad()
def img2img(sd, images, prompts, strength, generator, guidance=2.0, negative=None, **options):
    """图 (N, 3, S, S) 与 N 句描述 → 改好的图。sd 是 ``pipeline.StableDiffusion``；options 交给 from_latent。"""
    if len(images) != len(prompts):
        raise ValueError(f"图与描述要一样多：{len(images)} 张图，{len(prompts)} 句描述")
    z = sd.vae.to_latent(images)                                       # (N, 4, S/4, S/4)
    return sd.vae.to_image(from_latent(sd.schedule, sd.denoiser(prompts, guidance, negative), z, strength, generator, **options))
# --8<-- [end:img2img]
