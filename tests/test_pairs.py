"""两个物体的世界与判分器：真图全对，任何一种弄坏都判错，而且只扣该扣的那一项。"""

import pytest
import torch

from minisd import clip, pairs, world


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def attrs():
    every = torch.cat([pairs.scenes(g) for g in pairs.groups().values()])
    return every[torch.randperm(len(every), generator=gen(1))[:200]]


@pytest.fixture(scope="module")
def images(attrs):
    return pairs.draw(attrs, gen(2))


def test_三组互不相交_合起来是全部():
    groups = {k: {tuple(p) for p in v.tolist()} for k, v in pairs.groups().items()}
    assert [len(groups[k]) for k in ("seen", "swapped", "new")] == [130, 30, 20]
    assert len(set.union(*groups.values())) == 180
    trained = groups["seen"]
    for a, s, b, t in groups["swapped"]:
        assert (a, t, b, s) in trained                                   # 对调之前的搭配训练过
    for a, s, b, t in groups["new"]:
        assert (a, t, b, s) not in trained
    assert len({p[:2] for p in trained} | {p[2:] for p in trained}) == 24   # 每个物体单独都见过


def test_每对物体八种说法_两两同义():
    every = pairs.scenes(torch.tensor([[0, 0, 2, 1]]))
    texts = [pairs.caption(a) for a in every]
    assert len(set(texts)) == 8 and "红色的圆在蓝色的方块左边" in texts and "蓝色的方块在红色的圆右边" in texts
    objects, vertical = pairs.layout(every)
    looks = {(tuple(o.flatten().tolist()), bool(v)) for o, v in zip(objects, vertical)}
    assert len(looks) == 4                                               # 八种说法，四种画面
    left, right = texts.index("红色的圆在蓝色的方块左边"), texts.index("蓝色的方块在红色的圆右边")
    assert torch.equal(pairs.draw(every[[left]], gen()), pairs.draw(every[[right]], gen()))


def test_真图全对_轻微噪声也对(images, attrs):
    assert pairs.score(images, attrs) == dict.fromkeys(("color", "shape", "binding", "relation", "all", "bound"), 1.0)
    assert pairs.score(images + 0.05 * torch.randn(images.shape, generator=gen()), attrs)["all"] > 0.97


def change(attrs, **columns):
    new = attrs.clone()
    for name, value in columns.items():
        new[:, "c1 s1 c2 s2 r".split().index(name)] = value
    return new


def test_颜色对调_只扣绑定(images, attrs):
    c1, s1, c2, s2, r = attrs.T
    score = pairs.score(pairs.draw(change(attrs, c1=c2, c2=c1), gen(3)), attrs)
    assert score["color"] == score["shape"] == 1 and score["binding"] == score["all"] == score["bound"] == 0
    score = pairs.score(pairs.draw(change(attrs, s1=s2, s2=s1), gen(3)), attrs)
    assert score["color"] == score["shape"] == 1 and score["binding"] == score["all"] == 0


def test_换一种颜色_换一种形状(attrs):
    c1, s1, c2, s2, r = attrs.T
    third = torch.tensor([next(c for c in range(6) if c not in (a, b)) for a, b in zip(c1, c2)])
    score = pairs.score(pairs.draw(change(attrs, c1=third), gen(3)), attrs)
    assert score["color"] == score["binding"] == score["all"] == 0 and score["shape"] == score["relation"] == 1
    third = torch.tensor([next(s for s in range(4) if s not in (a, b)) for a, b in zip(s1, s2)])
    score = pairs.score(pairs.draw(change(attrs, s2=third), gen(3)), attrs)
    assert score["shape"] == score["binding"] == score["all"] == 0 and score["color"] == score["relation"] == 1


@pytest.mark.parametrize("move", [
    lambda r: r ^ 1,                                                     # 左右、上下对调
    lambda r: (r + 2) % 4,                                               # 横竖对调
    lambda r: 3 - r,
])
def test_位置错了_只扣关系(attrs, move):
    score = pairs.score(pairs.draw(change(attrs, r=move(attrs[:, 4])), gen(3)), attrs)
    assert score["color"] == score["shape"] == score["binding"] == 1 and score["relation"] == score["all"] == 0


@pytest.mark.parametrize("which", [0, 1])
def test_少一个物体_全部判错(images, attrs, which):
    score = pairs.score(pairs.split(images)[which], attrs)
    assert score["all"] == score["binding"] == score["relation"] == 0 and score["color"] < 0.02 and score["shape"] < 0.02


SPOILERS = {
    "打乱像素": lambda x: x.flatten(2)[:, :, torch.randperm(32 * 32, generator=gen())].view_as(x),
    "纯噪声": lambda x: torch.randn(x.shape, generator=gen()),
    "全白": torch.ones_like,
    "全黑": lambda x: -torch.ones_like(x),
    "反色": lambda x: -x,
    "换通道": lambda x: x[:, [1, 2, 0]],
    "糊掉": lambda x: torch.nn.functional.avg_pool2d(x, 11, 1, 5, count_include_pad=False),
    "与下一张对换": lambda x: x.roll(1, 0),
    "与下一张叠起来": lambda x: torch.minimum(x, x.roll(1, 0)),
    "转四分之一圈": lambda x: x.rot90(1, (2, 3)),
    "左右、上下都翻": lambda x: x.flip(2, 3),
    "挪半幅": lambda x: x.roll((16, 16), (2, 3)),
    "多一个物体": lambda x: torch.minimum(x, world.sample(len(x), gen(4), world.ALL, size=32).image),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_弄坏的图判错(images, attrs, name):
    score = pairs.score(SPOILERS[name](images), attrs)
    assert score["all"] < 0.05, score


def test_一个物体的图不能冒充两个(attrs):
    one = world.sample(200, gen(), world.ALL, size=32).image
    assert pairs.score(one, attrs)["all"] == 0
    assert (pairs.read(one).vertical >= 0).float().mean() < 0.05


def test_描述与词():
    text = "紫色的三角在青色的十字下面"
    ids = pairs.tokenize([text, ""])
    names = [*pairs.WORDS]
    assert "".join(names[i] for i in ids[0, 1:]) == text and ids[1].tolist() == [1] + [0] * 8
    hidden, valid = pairs.TextEncoder()(ids)
    assert hidden.shape == (2, 9, 64) and valid.sum(1).tolist() == [9, 1] and names[clip.PAD] == ""
    order = [f"{a}在{b}左边" for a, b in (("红色的圆", "蓝色的方块"), ("蓝色的方块", "红色的圆"))]
    a, b = pairs.TextEncoder()(pairs.tokenize(order))[0]
    assert not torch.allclose(a.mean(0), b.mean(0), atol=1e-3)            # 词相同、词序不同，特征不同
    for bad in ("红色的猫在蓝色的方块左边", "红色的圆在蓝色的方块左边左边"):
        with pytest.raises(ValueError, match="不是这个世界的说法"):
            pairs.tokenize([bad])


@pytest.mark.parametrize("bad, message", [
    ([[0, 0, 2, 1]], r"\(N, 5\)"), ([[0.0, 0, 2, 1, 0]], "整型"), ([[6, 0, 2, 1, 0]], "编号"), ([[0, 0, 2, 1, -1]], "编号"),
    ([[0, 0, 0, 1, 0]], "都必须不同"), ([[0, 1, 2, 1, 0]], "都必须不同"), ([[0, 4, 2, 1, 0]], "编号"),
])
def test_坏的属性(bad, message):
    with pytest.raises(ValueError, match=message):
        pairs.draw(torch.tensor(bad), gen())


@pytest.mark.parametrize("bad", [torch.zeros(2, 1, 32, 32), torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 24), torch.zeros(1, 3, 8, 8)])
def test_坏的图像(bad):
    with pytest.raises(ValueError, match=r"\(N, 3, S, S\)"):
        pairs.read(bad)


def test_图与描述要一样多_NaN_报错(images, attrs):
    with pytest.raises(ValueError, match="每张图要有一行"):
        pairs.score(images[:3], attrs[:2])
    with pytest.raises(ValueError, match="NaN"):
        pairs.read(torch.full((1, 3, 32, 32), torch.nan))
