"""正则化实验共用的“一叠小网络”：成员互不相干、开关真的起作用、训练点数与采样。"""

import pytest
import torch

from minisd import stacked2d as s2


def test_members_do_not_affect_each_other():
    """多放一个设置，别的设置的曲线不变：叠在一起只是为了快。"""
    alone = s2.train({"无": {}}, steps=6, every=3)
    together = s2.train({"无": {}, "衰减": {"decay": 0.3}, "裁剪": {"clip": 1e-3}}, steps=6, every=3)
    for key in alone[4]:
        torch.testing.assert_close(together[4][key]["无"], alone[4][key]["无"], rtol=1e-4, atol=1e-5)
    assert (together[4]["val"]["衰减"] != together[4]["val"]["无"]).all()


def test_unknown_switch_is_an_error():
    with pytest.raises(ValueError, match="不认识的开关：dacay"):
        s2.train({"写错": {"dacay": 0.3}}, steps=1)


def test_few_points_are_all_the_network_sees(monkeypatch):
    """points=4：喂给损失的 x_0 只能是前 4 个训练点；坏批次是它们放大之后的样子。"""
    seen, real = [], s2.per_member
    monkeypatch.setattr(s2, "per_member", lambda p, x0, *rest, **kw: seen.append(x0) or real(p, x0, *rest, **kw))
    _, _, bank, _, _ = s2.train({"少": {"points": 4}}, steps=3, every=3, poison={1})
    for step, x0 in enumerate(seen[:3]):
        x0 = x0 / 127.5 - 1 if step == 1 else x0
        assert torch.cdist(x0, bank[:, :4]).min(-1).values.max() < 1e-2


def test_annealing_reaches_zero_and_ema_lags():
    params, average, *_ = s2.train({"恒定": {}, "余弦": {"anneal": 1.0}}, steps=40, every=40)
    gap = torch.stack([(a - p).abs().mean((1, 2)) for a, p in zip(average, params)]).mean(0).view(2, s2.SEEDS)
    assert (gap > 0).all() and (gap[1] < gap[0]).all()  # 学习率退到零，平均值就追上来了


def test_floor_of_almost_clean_and_almost_pure_noise():
    """几乎没有噪声：垂直于曲线的那一维猜得出，沿着曲线的猜不出，下限约 1/2；几乎全是噪声：ε 就是 x_t，下限约 0。"""
    g = torch.Generator().manual_seed(0)
    x0, eps = s2.toy2d.taiji(2000, g), torch.randn(2000, 2, generator=g)
    for t, low, high in ((8, 0.4, 0.6), (990, 0.0, 0.01)):
        step = torch.full((2000,), t)
        x = s2.SIGNAL[t] * x0 + s2.NOISE[t] * eps
        assert low < s2.lowest(x, step, eps) < high, t


def test_sampling_with_a_perfect_denoiser(monkeypatch):
    """去噪器恰好知道 x_0 = (1, -1)：终点就是它，沿途每一步反推出的 ε 都是同一个（DDIM 不加新噪声）。"""
    target, seen = torch.tensor([1.0, -1.0]), []

    def exact(params, h):
        x, t = h
        seen.append((x - s2.SIGNAL[t][..., None] * target) / s2.NOISE[t][..., None])
        return seen[-1]

    monkeypatch.setattr(s2, "features", lambda x, t, c: (x, t))
    monkeypatch.setattr(s2, "forward", exact)
    out = s2.sample([torch.zeros(2 * s2.SEEDS, 1, 1)], n=7, seed=0, steps=25)
    assert out.shape == (2 * s2.SEEDS, 7, 2) and (out - target).abs().max() < 1e-3
    assert len(seen) == 25 and max((eps - seen[0]).abs().max() for eps in seen) < 1e-2
