"""ControlNet 与 diffusers 对照（零卷积的数目与位置、步 0、第一步的梯度、强度），再加本库的性质与坏输入。"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minisd import unet as mini
from minisd.controlnet import Controlled, ControlNet, HintEncoder, ZeroConv, edges


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def skips(widths, per_level):
    """U-Net 编码器每条跳连的通道数：输入卷积、每级的残差块、级间的降采样。"""
    result = [widths[0]]
    for level, width in enumerate(widths):
        result += [width] * per_level + [width] * (level < len(widths) - 1)
    return result


# ── 与 diffusers 对照 ─────────────────────────────────────────────

SIZES = [((16, 32), 1), ((16, 32), 2), ((16, 16, 32), 1), ((16, 32, 32, 48), 2)]     # （各级通道，每级块数）


def reference(widths, per_level):
    """随机权重的小 SD 结构与它的 ControlNet。"""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=widths,
        layers_per_block=per_level,
        down_block_types=("CrossAttnDownBlock2D",) * (len(widths) - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(widths) - 1),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    control = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 8))
    return unet.requires_grad_(False).eval(), control.eval()


def inputs():
    return {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }, torch.rand(2, 3, 128, 128)                                  # 条件图是潜空间边长的 8 倍


def zeros_in(module):
    """权重与偏置全为零的卷积的名字。"""
    return {
        name
        for name, m in module.named_modules()
        if isinstance(m, nn.Conv2d) and not m.weight.any() and not m.bias.any()
    }


@pytest.mark.parametrize("widths, per_level", SIZES)
def test_零卷积的数目与位置(widths, per_level):
    unet, control = reference(widths, per_level)
    expected = skips(widths, per_level)
    assert len(expected) == 1 + len(widths) * per_level + len(widths) - 1
    assert [(z.in_channels, z.out_channels, z.kernel_size) for z in control.controlnet_down_blocks] == [
        (c, c, (1, 1)) for c in expected
    ]
    assert zeros_in(control) == (
        {f"controlnet_down_blocks.{i}" for i in range(len(expected))}
        | {"controlnet_mid_block", "controlnet_cond_embedding.conv_out"}
    )
    assert not zeros_in(unet)                                      # 基座里没有零卷积，副本的卷积也都不是零


def test_SD15的12加1加1():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):                                     # 缺省配置就是 SD1.5 的尺寸；不分配内存
        control = diffusers.ControlNetModel(cross_attention_dim=768)
    assert list(control.config.block_out_channels) == [320, 640, 1280, 1280]
    assert [z.in_channels for z in control.controlnet_down_blocks] == skips([320, 640, 1280, 1280], 2)
    assert len(control.controlnet_down_blocks) == 12
    assert control.controlnet_mid_block.kernel_size == (1, 1)
    hint = control.controlnet_cond_embedding
    assert hint.conv_out.kernel_size == (3, 3)                     # 条件入口是 3×3，不是 1×1
    convs = [m for m in hint.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 8 and sorted(c.stride[0] for c in convs) == [1] * 5 + [2] * 3
    blocks = [m for b in control.down_blocks for m in [*b.resnets, *(b.downsamplers or [])]]
    assert len(control.down_blocks) == 4 and 1 + len(blocks) == 12           # conv_in + 8 个残差块 + 3 个降采样


@pytest.mark.parametrize("widths, per_level", SIZES[:3])
def test_步0残差为零且输出逐位相同(widths, per_level):
    unet, control = reference(widths, per_level)
    arguments, hint = inputs()
    with torch.no_grad():
        down, mid = control(**arguments, controlnet_cond=hint, return_dict=False)
        assert len(down) == len(skips(widths, per_level))
        assert all((r == 0).all() for r in [*down, mid])
        plain = unet(**arguments).sample
        steered = unet(**arguments, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
        assert torch.equal(plain, steered) and plain.abs().max() > 0.1
        nn.init.normal_(control.controlnet_mid_block.weight, std=0.1)        # 弄坏一个零卷积就不再相同
        down, mid = control(**arguments, controlnet_cond=hint, return_dict=False)
        steered = unet(**arguments, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
        assert not torch.equal(plain, steered)


def test_参考实现的醒来次序与本库相同():
    unet, control = reference((16, 32), 1)
    arguments, hint = inputs()
    noise = torch.randn(2, 4, 16, 16)
    optimizer = torch.optim.SGD(control.parameters(), lr=0.1)

    def awake():
        optimizer.zero_grad()
        down, mid = control(**arguments, controlnet_cond=hint, return_dict=False)
        predicted = unet(**arguments, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
        F.mse_loss(predicted, noise).backward()
        names = {name for name, p in control.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        return {
            "出口": any(n.startswith(("controlnet_down_blocks", "controlnet_mid_block")) for n in names),
            "副本": any(n.startswith(("down_blocks", "mid_block", "conv_in", "time_embedding")) for n in names),
            "入口": "controlnet_cond_embedding.conv_out.weight" in names,
            "小网络": "controlnet_cond_embedding.conv_in.weight" in names,
        }

    assert awake() == {"出口": True, "副本": False, "入口": False, "小网络": False}
    assert awake() == {"出口": True, "副本": True, "入口": True, "小网络": False}
    assert all(awake().values())
    assert all(p.grad is None for p in unet.parameters())


def test_强度是简单的乘法():
    _, control = reference((16, 32), 1)
    arguments, hint = inputs()
    for z in [*control.controlnet_down_blocks, control.controlnet_mid_block]:
        nn.init.normal_(z.weight)
    with torch.no_grad():
        one = control(**arguments, controlnet_cond=hint, return_dict=False)
        half = control(**arguments, controlnet_cond=hint, conditioning_scale=0.5, return_dict=False)
        guess = control(**arguments, controlnet_cond=hint, guess_mode=True, return_dict=False)
    for i, factor in enumerate(torch.logspace(-1, 0, len(one[0]) + 1)):      # guess_mode：浅层弱、深层强
        full = [*one[0], one[1]][i]
        torch.testing.assert_close([*half[0], half[1]][i], 0.5 * full)
        torch.testing.assert_close([*guess[0], guess[1]][i], factor * full)


# ── 本库的性质 ─────────────────────────────────────────────


def tiny(widths=(8, 16)):
    """窄的迷你 U-Net；末层不从零开始，输出才不是零。"""
    base = mini.UNet(widths=widths, text_dim=8)
    for p in base.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
    return base, hinted(base)


def hinted(base):
    return ControlNet(base, HintEncoder(1, base.encoder[0].out_channels, down=2))


def batch(n=3, height=6, width=6):
    """x、t、文本特征、有效位，与边长 4 倍的条件图。"""
    valid = torch.arange(5) < torch.randint(1, 6, (n, 1))
    inputs = torch.randn(n, 4, height, width), torch.randint(0, 1000, (n,)), torch.randn(n, 5, 8), valid
    return inputs, torch.rand(n, 1, 4 * height, 4 * width)


def randomize(control):
    for z in control.modules():
        if isinstance(z, ZeroConv):
            nn.Conv2d.reset_parameters(z)
    return control


@pytest.mark.parametrize("size", [(2, 2), (6, 6), (4, 10)])
def test_步0逐位相同_零卷积改随机就不同(size):
    base, control = tiny()
    model = Controlled(base, control)
    inputs, hint = batch(3, *size)
    assert torch.equal(model(*inputs, hints=[hint]), base(*inputs)) and base(*inputs).abs().max() > 0.1
    randomize(control)
    assert not torch.allclose(model(*inputs, hints=[hint]), base(*inputs), atol=1e-2)
    assert torch.equal(model(*inputs, hints=[hint], scales=[0.0]), base(*inputs))


def test_边缘图():
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, 2:6, 2:6] = 1
    mask[1, :, 2:6, 2:6] = 0.4                                     # 不过半：没有边缘
    found = edges(mask)
    assert found[0].sum() == 36 - 4 and not found[0, :, 3:5, 3:5].any() and not found[1].any()


def test_零卷积经得起重新初始化():
    z = ZeroConv(3, 5)
    z.reset_parameters()
    assert z.weight.shape == (5, 3, 1, 1) and not z.weight.any() and not z.bias.any()
    assert ZeroConv(4).out_channels == 4


def test_副本与基座互不影响():
    base, control = tiny()
    assert all(torch.equal(a, b) for a, b in zip(base.encoder.parameters(), control.encoder.parameters(), strict=True))
    ours = {p.data_ptr() for p in control.parameters()}
    assert not ours & {p.data_ptr() for p in base.parameters()}
    base.requires_grad_(False)
    again = hinted(base)                                           # 从已锁定的基座复制，副本仍要可训练
    assert all(p.requires_grad for p in again.parameters())


def test_训练几步只动副本():
    base, control = tiny()
    model, before = Controlled(base, control), copy.deepcopy(base.state_dict())
    inputs, hint = batch()
    noise = torch.randn_like(inputs[0])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(*inputs, hints=[hint]), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in base.parameters())
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
    assert all((p.grad is not None) and p.grad.isfinite().all() for p in control.parameters())


def test_锁定包括批归一化():
    base, _ = tiny()
    base.encoder[1].res.norm1 = nn.BatchNorm2d(8)
    model = Controlled(base, hinted(base)).train()
    inputs, hint = batch()
    model(*inputs, hints=[hint])
    assert base.encoder[1].res.norm1.num_batches_tracked == 0
    assert model.controls[0].encoder[1].res.norm1.num_batches_tracked == 1       # 副本照常更新


class OtherBlock(nn.Module):
    out_channels = 6

    def __init__(self, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 6, 3, padding=1)

    def forward(self, h, emb):
        temb, text = emb                                           # emb 是元组：时间与文本
        return torch.tanh(self.conv(h) + temb[:, :, None, None] + text.mean(1)[:, :, None, None])


class OtherEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.text = nn.Linear(1, 6), nn.Linear(7, 6)

    def forward(self, t, context):
        return self.time(t[:, None] / 1000), self.text(context)


class OtherUNet(nn.Module):
    """与迷你 U-Net 毫无关系的基座：没有降采样，emb 是元组，解码器只有一个卷积。"""

    def __init__(self):
        super().__init__()
        self.embed = OtherEmbed()
        self.encoder = nn.ModuleList([OtherBlock(4), OtherBlock(6), OtherBlock(6)])
        self.middle = OtherBlock(6)
        self.decoder = nn.Conv2d(24, 4, 1)

    def forward(self, x, t, context, residuals=None):
        emb = self.embed(t, context)
        features = []
        for block in [*self.encoder, self.middle]:
            x = block(x, emb)
            features.append(x)
        if residuals is not None:
            features = [f + r for f, r in zip(features, residuals, strict=True)]
        return self.decoder(torch.cat(features, 1))


def test_接在别的基座上():
    base = OtherUNet()
    control = ControlNet(base, HintEncoder(3, 6, down=3))          # 条件图是特征边长的 8 倍
    model = Controlled(base, control)
    x, t, context, hint = torch.randn(2, 4, 6, 6), torch.tensor([1, 9]), torch.randn(2, 5, 7), torch.rand(2, 3, 48, 48)
    assert len(control.zero_skips) == 3
    assert torch.equal(model(x, t, context, hints=[hint]), base(x, t, context))
    randomize(control)
    with torch.no_grad():
        assert not torch.equal(model(x, t, context, hints=[hint]), base(x, t, context))


def test_多个残差相加():
    base, a = tiny()
    b = randomize(copy.deepcopy(a))
    a = randomize(a)
    inputs, hint = batch()
    both = Controlled(base, a, b)(*inputs, hints=[hint, 1 - hint], scales=[0.3, [1, 0, 0, 0, 2]])
    ra, rb = a(*inputs, hint=hint, scale=0.3), b(*inputs, hint=1 - hint)
    expected = [p + s * q for p, q, s in zip(ra, rb, [1, 0, 0, 0, 2], strict=True)]
    torch.testing.assert_close(both, base(*inputs, residuals=expected))


# ── 坏输入 ─────────────────────────────────────────────


def bad(message):
    return pytest.raises(ValueError, match=message)


def test_重复接入():
    base, control = tiny()
    model = Controlled(base, control)
    with bad("接了两次"):
        Controlled(base, control, control)
    with bad("已经接过"):
        Controlled(model, copy.deepcopy(control))
    with bad("已经接过"):
        ControlNet(model, HintEncoder(1, 8, down=2))
    with bad("至少"):
        Controlled(base)


def test_基座不合约定():
    hint = HintEncoder(1, 8)
    with bad("缺少模块 'embed'"):
        ControlNet(nn.Linear(2, 2), hint)
    base, _ = tiny()
    base.encoder = nn.ModuleList()
    with bad("非空"):
        ControlNet(base, hint)
    base, _ = tiny()
    del base.middle.out_channels
    with bad("middle 缺少整数属性 out_channels"):
        ControlNet(base, hint)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda h: h[:1], "不符"),                                  # 批大小 1 不许广播
        (lambda h: h[..., :8, :8], "不符"),                         # 边长不符
        (lambda h: h[..., :1, :1], "不符"),                         # 编码成 1×1 也不许广播
        (lambda h: h.expand(-1, 3, -1, -1), "形状必须是"),           # 通道不符
        (lambda h: h[0], "形状必须是"),
    ],
)
def test_条件图形状(make, message):
    _, control = tiny()
    inputs, hint = batch()
    with bad(message):
        control(*inputs, hint=make(hint))


def test_强度与个数():
    base, control = tiny()
    model = Controlled(base, control)
    inputs, hint = batch()
    for scale in ([], [1] * 4, [1] * 6):
        with bad("长 5 的序列"):
            control(*inputs, hint=hint, scale=scale)
    with bad("收到 2 张、1 个"):
        model(*inputs, hints=[hint, hint])
    with bad("收到 1 张、2 个"):
        model(*inputs, hints=[hint], scales=[1, 1])


@pytest.mark.parametrize("widths", [(16, 16), (8, 24)])
def test_给别的基座训的(widths):
    base, control = tiny()
    _, other = tiny(widths)
    with bad("第 1 个 ControlNet .*它是给别的基座训的"):
        Controlled(base, control, other)
