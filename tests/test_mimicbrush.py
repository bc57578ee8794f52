"""MimicBrush 的迷你版：K、V 拼接的公式，步 0 与没有参考时的恒等，参考的影响与坏输入。"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minisd import concat, unet
from minisd.mimicbrush import Mimic, SharedAttention, attentions, share


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def base(**options):
    net = unet.UNet(widths=(16, 24), text_dim=8, **options)
    for p in net.parameters():                                     # 末层从零开始，不打散什么都看不出
        nn.init.normal_(p, std=0.2)
    return net.requires_grad_(False).eval()


def batch(n=4, channels=4):
    g = torch.Generator().manual_seed(1)
    text = torch.randn(1, 5, 8, generator=g).expand(n, -1, -1)
    valid = torch.ones(n, 5, dtype=torch.bool)
    return torch.randn(n, channels, 6, 6, generator=g), torch.arange(n) * 200, text, valid


@pytest.mark.parametrize("channels, heads", [(16, 4), (24, 2), (48, 4)])
def test_拼接就是论文的式1(channels, heads):
    layer = SharedAttention(unet.Attention(channels, channels, heads).double())
    x = torch.randn(3, 9, channels, dtype=torch.double)
    k_r, v_r = torch.randn(2, 3, heads, 7, channels // heads, dtype=torch.double)
    layer.reference = k_r, v_r, torch.tensor([True, True, False])
    out = layer(x, x)
    q, k, v = (layer.split(f(x)) for f in (layer.to_q, layer.to_k, layer.to_v))
    assert torch.equal(layer.kept[0], k) and torch.equal(layer.kept[1], v)
    logits = q @ torch.cat([k, k_r], 2).mT / (channels // heads) ** 0.5
    want = layer.to_out((logits.softmax(-1) @ torch.cat([v, v_r], 2)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out[:2], want[:2], rtol=1e-12, atol=1e-12)
    layer.reference = None
    torch.testing.assert_close(out[2:], layer(x, x)[2:], rtol=1e-12, atol=1e-12)      # 看不见参考的只看自己
    assert not torch.allclose(out[:2], layer(x, x)[:2], atol=1e-3)


def test_没有参考时与原来的层逐位相同():
    old = unet.Attention(16, 16)
    x = torch.randn(2, 9, 16)
    assert torch.equal(SharedAttention(old)(x, x), old(x, x))


def test_share是拷贝_原来的网络不动():
    net = base()
    x, t, text, valid = batch()
    shared = share(net)
    assert len(attentions(shared)) == 7 and not attentions(net)
    assert torch.equal(shared(x, t, text, valid), net(x, t, text, valid))
    assert shared.state_dict().keys() == net.state_dict().keys()               # 参数名一个没变
    assert not {p.data_ptr() for p in shared.parameters()} & {p.data_ptr() for p in net.parameters()}


def test_没有参考的步0等于9通道的基座():
    net = base()
    wide = concat.widen(net, 5)
    model = Mimic(wide, net)
    assert model.in_channels == 9
    x, t, text, valid = batch(channels=9)
    assert torch.equal(model(x, t, text, valid), wide(x, t, text, valid))
    z = torch.randn(4, 4, 6, 6)
    model.read(z, text, valid)
    with_reference = model(x, t, text, valid)
    assert not torch.allclose(with_reference, wide(x, t, text, valid), atol=1e-3)
    model.read(z, text, valid, seen=torch.zeros(4, dtype=torch.bool))
    torch.testing.assert_close(model(x, t, text, valid), wide(x, t, text, valid), rtol=1e-4, atol=1e-4)
    model.read(z, text, valid, seen=torch.tensor([True, False, True, False]))
    mixed = model(x, t, text, valid)
    torch.testing.assert_close(mixed[::2], with_reference[::2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1::2], wide(x, t, text, valid)[1::2], rtol=1e-4, atol=1e-4)
    model.read(None)
    assert torch.equal(model(x, t, text, valid), wide(x, t, text, valid))      # 忘得干净


def test_参考逐样本对应_步号取0():
    model = Mimic(base(), base())
    x, t, text, valid = batch()
    z = torch.randn(4, 4, 6, 6)
    model.read(z, text, valid)
    assert torch.equal(model.bank[0][0], copy.deepcopy(attentions(model.reference)[0].kept[0]))
    out = model(x, t, text, valid)
    changed = z.clone()
    changed[2] += 1
    model.read(changed, text, valid)
    moved = (model(x, t, text, valid) - out).abs().amax((1, 2, 3)) > 1e-3
    assert moved.tolist() == [False, False, True, False]                       # 只动第 2 张
    with torch.no_grad():
        model.reference(z, torch.zeros(4, dtype=torch.long), text, valid)
        kept = [m.kept for m in attentions(model.reference)]
        model.read(z, text, valid)
    assert all(torch.equal(a, b) for pair, got in zip(kept, model.bank) for a, b in zip(pair, got))


def test_梯度经过K和V到达参考U_Net():
    net = base()
    model = Mimic(net, net).requires_grad_(True)
    x, t, text, valid = batch()
    model.read(torch.randn(4, 4, 6, 6), text, valid)
    F.mse_loss(model(x, t, text, valid), torch.randn(4, 4, 6, 6)).backward()
    assert all(m.to_k.weight.grad.abs().max() > 0 and m.to_v.weight.grad.abs().max() > 0 for m in attentions(model.reference))
    assert model.reference.out.weight.grad is None                             # 它的输出没人用，用的只是 K、V


def test_坏输入():
    with pytest.raises(ValueError, match="对不上"):
        Mimic(base(), unet.UNet(widths=(16, 32), text_dim=8))
    with pytest.raises(ValueError, match="对不上"):
        Mimic(nn.Linear(2, 2), nn.Linear(2, 2))
    model = Mimic(base(), base())
    x, t, text, valid = batch()
    model.read(torch.randn(2, 4, 6, 6), text[:2], valid[:2])
    with pytest.raises(ValueError, match="必须一样多"):
        model(x, t, text, valid)
