"""条纹的尺子与一步训练的内存统计：LoRA 示例与页面靠它们说话，所以先证明它们自己是准的。"""

import pytest
import torch
from torch import nn

from minisd import judge, memory, stripes, world


def scenes(n, paint=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    return world.draw(world.ALL[torch.randint(150, (n,), generator=g)], g, paint=paint)


def test_条纹两行一换且暗行是四成():
    fill = torch.full((1, 3, 8, 8), 0.5)
    striped = stripes.paint(fill, None, None)
    assert striped[0, 0, :, 0].tolist() == pytest.approx([0.5, 0.5, 0.2, 0.2, 0.5, 0.5, 0.2, 0.2])


def test_对比度分得开条纹与纯色():
    assert stripes.contrast(scenes(60, stripes.paint).image).min() > 0.25
    assert stripes.contrast(scenes(60).image).abs().max() < 0.15


def test_只有一半是条纹_对比度也只有一半左右():
    def half(fill, mask, center):
        x = (torch.arange(24) + 0.5) / 24
        return torch.where(x < center[:, 0, None, None, None], stripes.paint(fill, mask, center), fill)

    whole = stripes.contrast(scenes(60, stripes.paint).image).mean()
    assert 0.3 * whole < stripes.contrast(scenes(60, half).image).mean() < 0.7 * whole


def test_抹平之后判分器读得对_不抹平读不对():
    s = scenes(80, stripes.paint)
    assert stripes.score(s.image, s.attrs)["all"] >= 0.97
    assert judge.score(s.image, s.attrs)["all"] < 0.5


def test_抹平不会把错的说成对的():
    s = scenes(80, stripes.paint)
    for column, key in enumerate(("color", "shape", "place")):
        wrong = s.attrs.clone()
        wrong[:, column] = (wrong[:, column] + 1) % 5
        assert stripes.score(s.image, wrong)[key] <= 0.03
    assert stripes.score(torch.rand(40, 3, 24, 24) * 2 - 1, s.attrs[:40])["all"] <= 0.03


def test_纯色图抹平几乎不变():
    s = scenes(40)
    assert (stripes.flatten(s.image) - s.image).abs().mean() < 0.01
    assert stripes.score(s.image, s.attrs)["all"] == 1


@pytest.mark.parametrize("shape", [(3, 24, 24), (1, 1, 24, 24), (1, 3, 24, 20)])
def test_条纹的坏输入(shape):
    for call in (stripes.contrast, stripes.flatten):
        with pytest.raises(ValueError, match=r"\(N, 3, S, S\)"):
            call(torch.zeros(shape))


def test_内存的四份都数得出来():
    net, x = nn.Linear(10, 20), torch.randn(7, 10)
    usage = memory.step_memory(net, lambda: net(x).square().mean(), torch.optim.SGD(net.parameters(), 0.1))
    assert usage["参数"] == usage["梯度"] == 4 * (10 * 20 + 20) and usage["优化器状态"] == 0
    assert usage["激活"] == 4 * (7 * 10 + 7 * 20)                    # 线性层存输入，平方存自己的输入
    net.weight.requires_grad_(False)
    net.zero_grad()
    frozen = memory.step_memory(net, lambda: net(x).square().mean(), torch.optim.AdamW([net.bias], 0.1))
    assert frozen["参数"] == usage["参数"] and frozen["梯度"] == 4 * 20
    assert frozen["优化器状态"] == 2 * 4 * 20 + 4                    # 两个矩与一个步数
    assert frozen["激活"] == 4 * 7 * 20                             # 权重冻结，就不必存线性层的输入
