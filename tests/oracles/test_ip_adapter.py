"""IP-Adapter 与 diffusers 对照（解耦交叉注意力、图像投影、整个 SD1.5 的参数量），再加步 0 与坏输入。"""

import pytest
import torch
from torch import nn

from minisd import ip_adapter, lora, unet
from minisd.ip_adapter import DecoupledCrossAttention, ImageProjection


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ── 与 diffusers 对照 ─────────────────────────────────────────────

SIZES = [(32, 16, 4, 4), (48, 64, 4, 1), (64, 24, 8, 16)]          # （通道, 文本宽, 头数, 图像 token 数）


def pair(channels, width, heads, tokens, processor="IPAdapterAttnProcessor2_0"):
    """同一份权重：我们的一层与 diffusers 的 Attention + 处理器。"""
    models = pytest.importorskip("diffusers.models.attention_processor")
    ours = DecoupledCrossAttention(unet.CrossAttention(channels, width, heads).double())
    for p in ours.parameters():                                    # K'、V' 起点等于 K、V，先打散才看得出谁是谁
        nn.init.normal_(p, std=0.3)
    theirs = models.Attention(
        channels, width, heads=heads, dim_head=channels // heads, bias=False, out_bias=True
    ).double()
    extra = getattr(models, processor)(channels, width, num_tokens=(tokens,)).double()
    state = {k: v for k, v in ours.state_dict().items() if "_image" not in k and not k.startswith("to_out")}
    state |= {"to_out.0.weight": ours.to_out.weight, "to_out.0.bias": ours.to_out.bias}
    theirs.load_state_dict(state)
    extra.to_k_ip[0].weight, extra.to_v_ip[0].weight = ours.to_k_image.weight, ours.to_v_image.weight
    theirs.set_processor(extra)
    return ours, theirs, extra


def inputs(channels, width, tokens, batch=3, pixels=9, length=7):
    x = torch.randn(batch, pixels, channels, dtype=torch.double, requires_grad=True)
    text = torch.randn(batch, length, width, dtype=torch.double)
    image = torch.randn(batch, tokens, width, dtype=torch.double)
    return x, text, image, torch.ones(batch, length, dtype=torch.bool)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("processor", ["IPAdapterAttnProcessor2_0", "IPAdapterAttnProcessor"])
@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0, 1.5, -1.0])
def test_与参考的处理器逐元素相同(size, processor, scale):
    channels, width, heads, tokens = size
    ours, theirs, extra = pair(*size, processor)
    x, text, image, valid = inputs(channels, width, tokens)
    ours.scale, extra.scale = scale, [scale]
    a = ours(x, unet.Condition(None, text, valid, image))
    b = theirs(x, encoder_hidden_states=(text, [image]))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    (ga,), (gb,) = (torch.autograd.grad(out.square().sum(), x) for out in (a, b))
    torch.testing.assert_close(ga, gb, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_文本有空位时也相同(scale):
    channels, width, heads, tokens = SIZES[0]
    ours, theirs, extra = pair(*SIZES[0])
    x, text, image, valid = inputs(channels, width, tokens)
    valid[:, 4:] = False                                           # <空> 只在文本一路遮掉，图像 token 全部可见
    ours.scale, extra.scale = scale, [scale]
    mask = torch.where(valid, 0.0, -torch.inf).double()[:, None, None].expand(-1, heads, 9, -1)
    b = theirs(x, encoder_hidden_states=(text, [image]), attention_mask=mask.flatten(0, 1))
    torch.testing.assert_close(ours(x, unet.Condition(None, text, valid, image)), b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("image_dim, width, tokens", [(64, 64, 4), (1024, 768, 4), (10, 6, 1)])
def test_图像投影与参考相同(image_dim, width, tokens):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    ours, theirs = ImageProjection(image_dim, width, tokens), embeddings.ImageProjection(image_dim, width, tokens)
    nn.init.normal_(ours.norm.weight)
    names = {"image_embeds": ours.linear, "norm": ours.norm}
    theirs.load_state_dict({f"{n}.{k}": v for n, m in names.items() for k, v in m.state_dict().items()})
    x = torch.randn(5, image_dim)
    assert ours(x).shape == (5, tokens, width)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_SD15的参数量是22M():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):                                     # 缺省配置就是 SD1.5 的尺寸；不分配内存
        net = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    cross = [m for n, m in net.named_modules() if n.endswith("attn2")]
    widths = [m.to_q.in_features for m in cross]
    assert len(cross) == 16 and sorted(set(widths)) == [320, 640, 1280]
    assert [widths.count(w) for w in (320, 640, 1280)] == [5, 5, 6]
    assert all(m.to_k.in_features == m.to_v.in_features == 768 and m.to_k.bias is None for m in cross)
    with torch.device("meta"):
        projection = ImageProjection(1024, 768, 4)                 # ViT-H/14 的全局向量是 1024 维
    added = sum(2 * m.to_k.weight.numel() for m in cross) + sum(p.numel() for p in projection.parameters())
    assert added == 22_319_616


# ── 步 0 与接法 ─────────────────────────────────────────────


def base(**options):
    net = unet.UNet(widths=(16, 24), text_dim=8, **options)
    for p in net.parameters():                                     # 末层从零开始，不打散什么都看不出
        nn.init.normal_(p, std=0.2)
    return net.eval()


def batch(net, n=4):
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(n, 4, 6, 6, generator=g), torch.randn(n, 5, 8, generator=g)
    return x, torch.arange(n) * 200, text, torch.rand(n, 5, generator=g) > 0.2, torch.randn(n, 12, generator=g)


@torch.no_grad()
def test_强度为零时逐位等于基座_随机初始化且强度不为零就不同():
    net = base()
    adapted = ip_adapter.add_ip_adapter(net, image_dim=12)
    x, t, text, valid, image = batch(net)
    plain = net(x, t, text, valid)
    ip_adapter.set_scale(adapted, 0)
    assert torch.equal(adapted(x, t, text, valid, image=image), plain)
    for layer in ip_adapter.layers(adapted):
        nn.init.normal_(layer.to_k_image.weight)
        nn.init.normal_(layer.to_v_image.weight)
    assert torch.equal(adapted(x, t, text, valid, image=image), plain)         # 权重随便，λ = 0 都一样
    for scale in (-0.5, 1e-3, 1, 1.5):
        ip_adapter.set_scale(adapted, scale)
        assert not torch.equal(adapted(x, t, text, valid, image=image), plain)
        assert torch.equal(adapted(x, t, text, valid), plain)                  # 不给图像：K'、V' 不参与
        zero = adapted(x, t, text, valid, image=torch.zeros_like(image))
        assert not torch.equal(zero, plain)                                    # 零向量不是“不给”


def test_只有新增的参数可训练_原来的网络不动():
    net = base()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    adapted = ip_adapter.add_ip_adapter(net, image_dim=12, tokens=3)
    own = ip_adapter.adapter_parameters(adapted)
    assert len(ip_adapter.layers(adapted)) == 7 and len(own) == 2 * 7 + 4
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == own.keys()
    assert adapted.state_dict().keys() - own.keys() == before.keys()           # 基座的参数名一个没变
    for layer in ip_adapter.layers(adapted):
        assert torch.equal(layer.to_k_image.weight, layer.to_k.weight)
        assert torch.equal(layer.to_v_image.weight, layer.to_v.weight)
    x, t, text, valid, image = batch(net)
    optimizer = torch.optim.SGD(own.values(), lr=0.1)
    adapted(x, t, text, valid, image=image).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in own.values())
    optimizer.step()
    for net_ in (net, adapted):
        state = net_.state_dict()
        assert all(torch.equal(state[k], v) for k, v in before.items())
    assert all(p.requires_grad for p in net.parameters())                      # 原来的网络仍可训练


def test_存取_换到另一个基座上():
    adapted = ip_adapter.add_ip_adapter(base(), image_dim=12)
    for p in ip_adapter.adapter_parameters(adapted).values():
        nn.init.normal_(p, std=0.3)
    state = ip_adapter.adapter_state(adapted)
    other = ip_adapter.add_ip_adapter(base(), image_dim=12)
    x, t, text, valid, image = batch(other)
    plain = other(x, t, text, valid, image=image)
    ip_adapter.load_adapter(other, state)
    assert not torch.equal(other(x, t, text, valid, image=image), plain)
    assert all(torch.equal(p, state[n]) for n, p in ip_adapter.adapter_parameters(other).items())
    assert not any(v.requires_grad for v in state.values())
    smaller = {n: v[:1] for n, v in state.items()}
    with pytest.raises(ValueError, match="形状必须是"):
        ip_adapter.load_adapter(other, smaller)
    with pytest.raises(ValueError, match="embed.projection.linear.bias"):
        ip_adapter.load_adapter(other, {n: v for n, v in state.items() if n != "embed.projection.linear.bias"})
    assert all(torch.equal(p, state[n]) for n, p in ip_adapter.adapter_parameters(other).items())


def test_与LoRA叠加():
    adapted = ip_adapter.add_ip_adapter(base(), image_dim=12)
    x, t, text, valid, image = batch(adapted)
    before = adapted(x, t, text, valid, image=image)
    layers = lora.add_lora(adapted, ["to_q", "to_k", "to_v", "to_out"], r=2)
    assert torch.equal(adapted(x, t, text, valid, image=image), before)
    assert sum(n.endswith("cross.to_k") for n in layers) == 7 and not any("_image" in n for n in layers)
    nn.init.normal_(next(m for n, m in layers.items() if n.endswith("cross.to_q")).B)
    assert not torch.equal(adapted(x, t, text, valid, image=image), before)


def test_丢弃的三种情况互斥且比例对():
    n = 20_000
    image, row = torch.ones(n, 3), torch.ones(n, dtype=torch.long)
    out, kept = ip_adapter.drop(image, row, torch.Generator().manual_seed(0), 0.1, 0.2, 0.3)
    no_image, no_text = (out == 0).all(1), kept == 0
    assert torch.equal(no_image, (out == 0).any(1))                            # 要丢整个丢
    share = [(no_image & ~no_text), (~no_image & no_text), (no_image & no_text)]
    for got, want in zip(share, (0.1, 0.2, 0.3)):
        assert abs(got.float().mean() - want) < 0.01
    again, kept = ip_adapter.drop(image, row, torch.Generator().manual_seed(0), 0, 0, 0)
    assert torch.equal(again, image) and torch.equal(kept, row)


# ── 坏输入 ─────────────────────────────────────────────


def test_坏输入():
    net = base()
    adapted = ip_adapter.add_ip_adapter(net, image_dim=12)
    x, t, text, valid, image = batch(net)
    for bad in (image[:2], image[:, :11], image[None]):
        with pytest.raises(ValueError, match="图像向量的形状必须是"):
            adapted(x, t, text, valid, image=bad)
    with pytest.raises(ValueError, match="已经接过"):
        ip_adapter.add_ip_adapter(adapted)
    taken = unet.UNet()
    lora.add_lora(taken, ["to_k"])
    with pytest.raises(ValueError, match="先接 IP-Adapter，再接 LoRA"):
        ip_adapter.add_ip_adapter(taken)
    with pytest.raises(ValueError, match="找不到交叉注意力层"):
        ip_adapter.add_ip_adapter(nn.Linear(2, 2))
    for bad in (0, -1, 2.0, True, "4"):
        with pytest.raises(ValueError, match="tokens 必须"):
            ip_adapter.add_ip_adapter(net, tokens=bad)
    for bad in (float("nan"), float("inf"), True, "1", None):
        with pytest.raises(ValueError, match="λ 必须是有限的数"):
            ip_adapter.set_scale(adapted, bad)
    with pytest.raises(ValueError, match="还没有接"):
        ip_adapter.set_scale(net, 1)
    for bad in ((0.5, 0.5, 0.5), (-0.1, 0, 0), (float("nan"), 0, 0)):
        with pytest.raises(ValueError, match="丢弃的概率"):
            ip_adapter.drop(image, torch.ones(4), torch.Generator(), *bad)
