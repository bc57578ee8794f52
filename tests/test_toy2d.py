"""二维玩具数据：与“把弧切成密密的折线再找最近点”的笨办法对照。"""

import math

import torch

from minisd import toy2d


def test_distance_matches_brute_force():
    points = 4 * torch.rand(400, 2, generator=torch.Generator().manual_seed(0)) - 2
    u = torch.linspace(0, 1, 4001)
    per_arc = []
    for cx, cy, r, start, sweep in toy2d.ARCS.tolist():
        a = start + sweep * u
        curve = toy2d.SCALE * torch.stack([cx + r * torch.cos(a), cy + r * torch.sin(a)], 1)
        per_arc.append(torch.cdist(points, curve).min(1).values)
    want, label = torch.stack(per_arc).min(0)
    got, arc = toy2d.distance(points)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-3)  # 折线的步长
    assert (arc == label).float().mean() > 0.99  # 到两段弧几乎等距的点可能归到另一段


def test_samples_lie_on_the_curve_with_density_by_length():
    n = 20000
    points = toy2d.taiji(n, torch.Generator().manual_seed(1))
    far, arc = toy2d.distance(points)
    assert points.shape == (n, 2) and far.max() < 1e-5
    length = toy2d.ARCS[:, 2] * toy2d.ARCS[:, 4]
    share = length / length.sum()
    error = (arc.bincount(minlength=5) / n - share).abs()
    assert (error < 5 * (share * (1 - share) / n).sqrt() + 1e-3).all()
    ring = points[arc == 0]  # 外圆上角度均匀
    angle = torch.atan2(ring[:, 1], ring[:, 0])
    assert torch.hypot(angle.cos().mean(), angle.sin().mean()) < 5 / math.sqrt(len(ring))


def test_pattern_is_a_taiji():
    points = toy2d.taiji(2000, torch.Generator().manual_seed(2))
    assert toy2d.distance(-points)[0].max() < 1e-5  # 绕中心转半圈不变
    assert toy2d.distance(points * torch.tensor([-1.0, 1.0]))[0].max() > 0.3  # 左右翻转会变
    assert abs(points.norm(dim=1).max() - toy2d.SCALE) < 1e-5


def test_same_seed_same_points():
    a, b, c = (toy2d.taiji(50, torch.Generator().manual_seed(k)) for k in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)
