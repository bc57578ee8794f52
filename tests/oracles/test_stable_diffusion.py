"""页面“Stable Diffusion”引用的真实模型数字：按公开配置在 meta 设备上搭空壳，数参数与运算量。

配置抄自 SD 1.x 的官方仓库（v1-inference.yaml）与 CLIP ViT-L/14；meta 设备只推形状，不占内存、不下载权重。
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


def count(net):
    return sum(p.numel() for p in net.parameters())


def flops(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def unet():
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(
            sample_size=64, in_channels=4, out_channels=4, layers_per_block=2, cross_attention_dim=768, attention_head_dim=8,
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )


@pytest.fixture(scope="module")
def vae():
    with torch.device("meta"):
        return diffusers.AutoencoderKL(
            latent_channels=4, layers_per_block=2, block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )


@pytest.fixture(scope="module")
def text_encoder():
    with torch.device("meta"):
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            vocab_size=49408, max_position_embeddings=77, projection_dim=768,
        ))


def test_parameters(unet, vae, text_encoder):
    assert count(unet) == 859_520_964
    assert (count(vae), count(vae.encoder), count(vae.decoder)) == (83_653_863, 34_163_592, 49_490_179)
    assert count(vae) - count(vae.encoder) - count(vae.decoder) == 92
    assert count(text_encoder) == 123_060_480
    assert sum(name.endswith("attn2") for name, _ in unet.named_modules()) == 16


def test_shapes_and_scale(vae):
    latent = vae.encode(torch.empty(1, 3, 512, 512, device="meta")).latent_dist.mode()
    assert latent.shape == (1, 4, 64, 64)
    assert vae.config.scaling_factor == 0.18215


def test_flops(unet, vae):
    def forward(side):
        text = torch.empty(1, 77, 768, device="meta")
        return flops(lambda: unet(torch.empty(1, 4, side, side, device="meta"), torch.zeros(1, device="meta"), text))

    latent, pixel = forward(64), forward(512)
    assert latent == pytest.approx(0.803e12, rel=0.01)
    assert pixel == pytest.approx(545e12, rel=0.01)
    assert pixel / latent == pytest.approx(679, rel=0.01)
    decode = flops(lambda: vae.decode(torch.empty(1, 4, 64, 64, device="meta")))
    assert decode == pytest.approx(2.51e12, rel=0.01)
    assert 0.02 < decode / (50 * 2 * latent) < 0.04                     # 50 步、每步两次前向：解码占百分之三


def test_schedule_ends_with_this_much_signal():
    s = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert s.alphas_cumprod[-1].item() == pytest.approx(0.00466, rel=0.01)
