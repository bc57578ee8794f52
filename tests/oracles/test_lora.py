"""LoRA 与 peft 逐元素对照（前向、梯度、合并、还原、参数量），再加坏输入。"""

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minisd import lora
from minisd.lora import LoRALinear

# (d_out, d_in, r, alpha, 偏置)：先是几个边角（r=1、r 超过 min(d, k)、alpha 非整数），再是固定种子抽的 16 组
_rng = random.Random(0)
SHAPES = [(5, 7, 1, 1, True), (24, 16, 32, 3, True), (3, 40, 8, 0.5, False)] + [
    (_rng.randint(1, 96), _rng.randint(1, 96), _rng.randint(1, 24), _rng.choice([1, 2, 8, 16, 0.3]), _rng.random() < 0.5)
    for _ in range(16)
]


class Attention(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        return x + self.out(torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x))


def network():
    return nn.Sequential(Attention(), nn.GELU(), Attention(), nn.Linear(16, 4))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pair(d, k, r, alpha, bias, dtype=torch.float64):
    """同一个基座、同样的 A、B：我们的一层与 peft 的一层。"""
    peft = pytest.importorskip("peft")
    base = nn.Linear(k, d, bias=bias, dtype=dtype)
    holder = nn.Sequential(copy.deepcopy(base))
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], lora_dropout=0.0)
    theirs = peft.get_peft_model(holder, config, autocast_adapter_dtype=False).base_model.model[0]
    ours = LoRALinear(base, r, alpha)
    with torch.no_grad():
        ours.A.normal_()
        ours.B.normal_()
        theirs.lora_A["default"].weight.copy_(ours.A)
        theirs.lora_B["default"].weight.copy_(ours.B)
    return ours, theirs


# ── 与 peft 对照 ─────────────────────────────────────────────


@pytest.mark.parametrize("shape", SHAPES)
def test_前向与梯度(shape):
    ours, theirs = pair(*shape)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    a, b = ours(x), theirs(x2)
    assert a.shape == (2, 3, shape[0])
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    out_grad = torch.randn_like(a)
    a.backward(out_grad)
    b.backward(out_grad)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.A.grad, theirs.lora_A["default"].weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.B.grad, theirs.lora_B["default"].weight.grad, rtol=1e-12, atol=1e-12)
    assert ours.base.weight.grad is None and theirs.base_layer.weight.grad is None


@pytest.mark.parametrize("shape", SHAPES)
def test_增量_合并_还原(shape):
    ours, theirs = pair(*shape)
    origin = ours.base.weight.clone()
    x = torch.randn(4, shape[1], dtype=torch.float64)
    before = ours(x)
    torch.testing.assert_close(ours.delta(), theirs.get_delta_weight("default"), rtol=1e-12, atol=1e-12)
    ours.merge()
    theirs.merge()
    torch.testing.assert_close(ours.base.weight, theirs.base_layer.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours(x), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours(x), F.linear(x, ours.base.weight, ours.base.bias), rtol=0, atol=0)
    ours.unmerge()
    theirs.unmerge()
    torch.testing.assert_close(ours.base.weight, theirs.base_layer.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.base.weight, origin, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 0.25, 2.0])
def test_使用强度(scale):
    ours, theirs = pair(6, 5, 2, 4, True)
    x = torch.randn(3, 5, dtype=torch.float64)
    ours.scale = scale
    theirs.set_scale("default", scale)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.delta(), scale * (4 / 2) * ours.B @ ours.A)


def test_单精度():
    ours, theirs = pair(32, 48, 8, 16, True, dtype=torch.float32)
    x = torch.randn(10, 48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("targets", [["q", "v"], ["q", "k", "v", "out"], ["0.q"], ["3"]])
def test_整个网络(targets, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    base = network().double()
    ours = copy.deepcopy(base)
    layers = lora.add_lora(ours, targets, r=2, alpha=6)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, lora_dropout=0.0)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    assert torch.equal(ours(x), base(x)) and torch.equal(theirs(x), base(x))

    trainable, total = theirs.get_nb_trainable_parameters()
    assert (trainable, total) == tuple(lora.count_parameters(ours)[k] for k in ("trainable", "total"))
    theirs.print_trainable_parameters()
    assert f"{trainable:,}" in capsys.readouterr().out

    with torch.no_grad():
        for name, layer in layers.items():
            layer.B.normal_()
            other = theirs.base_model.model.get_submodule(name)
            other.lora_A["default"].weight.copy_(layer.A)
            other.lora_B["default"].weight.copy_(layer.B)
    expected = ours(x)
    assert not torch.allclose(expected, base(x), atol=1e-2)
    torch.testing.assert_close(expected, theirs(x), rtol=1e-9, atol=1e-9)

    theirs.save_pretrained(tmp_path)
    saved = sum(p.numel() for p in peft.utils.load_peft_weights(str(tmp_path), device="cpu").values())
    assert saved == sum(p.numel() for p in lora.lora_state(ours).values()) == trainable

    merged, reference = lora.merge_and_unload(ours), theirs.merge_and_unload()
    assert merged.state_dict().keys() == base.state_dict().keys()
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[key], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged(x), expected, rtol=1e-9, atol=1e-9)


def test_初始化与_peft_同分布():
    """两边的 A 都在 U(-1/√k, 1/√k)：界、均值、方差。"""
    peft = pytest.importorskip("peft")
    k, r = 64, 256
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(k, 8)), peft.LoraConfig(r=r, target_modules=["0"])).base_model.model[0]
    ours = LoRALinear(nn.Linear(k, 8), r)
    assert not theirs.lora_B["default"].weight.any() and not ours.B.any()
    for A in (ours.A, theirs.lora_A["default"].weight):
        assert A.shape == (r, k)
        assert 0.99 / math.sqrt(k) < A.abs().max() <= 1 / math.sqrt(k)
        assert A.mean().abs() < 5 * math.sqrt(1 / (3 * k) / A.numel())     # 五倍标准误
        assert A.var().item() == pytest.approx(1 / (3 * k), rel=0.05)


# ── 性质 ─────────────────────────────────────────────────────


def test_起点逐位相同且只有_A_B_有梯度():
    base = network()
    model = copy.deepcopy(base)
    layers = lora.add_lora(model, ["q", "3"], r=3)
    x = torch.randn(2, 5, 16)
    assert torch.equal(model(x), base(x))
    model(x).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {f"{n}.{k}" for n in layers for k in "AB"}
    for layer in layers.values():
        assert not layer.A.grad.any() and layer.B.grad.any()


def test_只取_LoRA_参数():
    model = network()
    layers = lora.add_lora(model, ["q"], r=3)
    got = lora.lora_parameters(model)
    assert [id(p) for p in got] == [id(p) for m in layers.values() for p in (m.A, m.B)]
    assert sum(p.numel() for p in got) == 2 * 3 * (16 + 16) == lora.count_parameters(model)["trainable"]
    assert lora.count_parameters(nn.ReLU()) == {"total": 0, "trainable": 0, "fraction": 0.0}


def test_目标按点分后缀匹配():
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "to_q": nn.Linear(4, 4), "block": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    assert set(lora.add_lora(model, "q")) == {"q", "block.q"}                # to_q 不算
    assert type(model["to_q"]) is nn.Linear


def test_分两次添加时前一次保持可训练():
    model = network()
    first = lora.add_lora(model, "q", r=2)
    second = lora.add_lora(model, "v", r=4)
    assert all(p.requires_grad for m in (*first.values(), *second.values()) for p in (m.A, m.B))
    assert len(lora.lora_layers(model)) == 4


def test_同一个层出现两次只包一次():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    layers = lora.add_lora(model, ["0", "2"])
    assert model[0] is model[2] is layers["0"]
    assert lora.count_parameters(model)["trainable"] == 4 * (4 + 4)
    lora.merge_and_unload(model)
    assert model[0] is model[2] is shared


def test_精度跟随基座():
    layer = LoRALinear(nn.Linear(4, 4, dtype=torch.bfloat16), 2)
    assert layer.A.dtype == layer.B.dtype == layer(torch.randn(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_检查点往返():
    base = network()
    a, b = copy.deepcopy(base), copy.deepcopy(base)
    for model in (a, b):
        lora.add_lora(model, ["q", "v"], r=2)
    for p in lora.lora_parameters(a):
        nn.init.normal_(p)
    state = lora.lora_state(a)
    assert sum(v.numel() for v in state.values()) == lora.count_parameters(a)["trainable"]
    lora.load_lora(b, state)
    x = torch.randn(2, 5, 16)
    assert torch.equal(a(x), b(x))
    nn.init.zeros_(lora.lora_parameters(a)[0])
    assert state["0.q.A"].any()                                              # 检查点是副本，不随模型变


def test_强度为零就是基座_一步到位():
    base = network()
    model = copy.deepcopy(base)
    for layer in lora.add_lora(model, ["q", "3"]).values():
        nn.init.normal_(layer.B)
    x = torch.randn(2, 5, 16)
    full = model(x)
    lora.set_scale(model, 0)
    assert torch.equal(model(x), base(x))
    lora.set_scale(model, 1)
    assert torch.equal(model(x), full)


def test_模型本身就是一层():
    layer = LoRALinear(nn.Linear(4, 3), 2)
    nn.init.normal_(layer.B)
    x = torch.randn(5, 4)
    expected = layer(x)
    plain = lora.merge_and_unload(layer)
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), expected)


def test_已合并的层也能卸下且不会加两遍():
    model = network()
    for layer in lora.add_lora(model, ["q", "v"]).values():
        nn.init.normal_(layer.B)
    x = torch.randn(2, 5, 16)
    expected = model(x)
    next(iter(lora.lora_layers(model).values())).merge()                      # 只先合并一层
    torch.testing.assert_close(lora.merge_and_unload(model)(x), expected, rtol=1e-5, atol=1e-5)


# ── 坏输入 ───────────────────────────────────────────────────


@pytest.mark.parametrize("r", [0, -1, 1.5, 4.0, True, "4", None])
def test_坏秩(r):
    with pytest.raises(ValueError, match="秩 r 必须是不小于 1 的整数"):
        LoRALinear(nn.Linear(4, 4), r=r, alpha=1)


@pytest.mark.parametrize("alpha", [0, -1, math.inf, math.nan, "8", True])
def test_坏_alpha(alpha):
    with pytest.raises(ValueError, match="alpha 必须是正的有限数"):
        LoRALinear(nn.Linear(4, 4), r=2, alpha=alpha)


def test_重复包装():
    layer = LoRALinear(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="已经包过"):
        LoRALinear(layer)
    model = network()
    lora.add_lora(model, "q")
    for again in ("q", "0.q", "base"):                                       # base 是包装里面的 nn.Linear
        with pytest.raises(ValueError, match=r"0\.q.*已经包过"):
            lora.add_lora(model, again)
    assert len(lora.lora_layers(model)) == 2


@pytest.mark.parametrize("module", [nn.Conv2d(3, 3, 1), nn.ReLU(), nn.MultiheadAttention(4, 1).out_proj])
def test_不是普通线性层(module):
    with pytest.raises(ValueError, match=f"只能包住 nn.Linear，收到 {type(module).__name__}"):
        LoRALinear(module)
    with pytest.raises(ValueError, match="x：只能包住 nn.Linear"):
        lora.add_lora(nn.ModuleDict({"x": module}), "x")


def test_找不到目标层():
    with pytest.raises(ValueError, match="找不到目标层 'to_q'；可选的线性层：0.q、0.k"):
        lora.add_lora(network(), ["q", "to_q"])
    with pytest.raises(ValueError, match="可选的线性层：无"):
        lora.add_lora(nn.Linear(4, 4), "")                                   # 模型自己不能就地换掉
    with pytest.raises(ValueError, match="targets 是空的"):
        lora.add_lora(network(), [])


@pytest.mark.parametrize("bad", [dict(targets=["q", "没有"]), dict(targets=["q", "1"]), dict(targets="q", r=0)])
def test_出错时模型原封不动(bad):
    model = network()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError):
        lora.add_lora(model, **bad)
    assert [type(m) for m in model.modules()] == kinds
    assert all(p.requires_grad for p in model.parameters())


def test_共享权重():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(ValueError, match="head：权重与别的模块共享"):
        lora.add_lora(model, "head")


def test_合并两次与未合并就还原():
    layer = LoRALinear(nn.Linear(4, 4))
    nn.init.normal_(layer.B)
    with pytest.raises(RuntimeError, match="还没有合并"):
        layer.unmerge()
    layer.merge()
    weight = layer.base.weight.clone()
    with pytest.raises(RuntimeError, match="已经合并过"):
        layer.merge()
    with pytest.raises(RuntimeError, match="先 unmerge"):
        layer.scale = 0.5
    assert torch.equal(layer.base.weight, weight) and layer.scale == 1.0


def test_整个网络的合并要么全做要么不做():
    model = network()
    layers = lora.add_lora(model, ["q", "v"])
    layers["0.v"].merge()
    with pytest.raises(RuntimeError, match="已经合并过：0.v"):
        lora.merge_lora(model)
    with pytest.raises(RuntimeError, match="还没有合并，不能还原：0.q"):
        lora.unmerge_lora(model)
    assert [n for n, m in layers.items() if m.merged] == ["0.v"]
    layers["0.v"].unmerge()
    lora.merge_lora(model)
    lora.unmerge_lora(model)
    assert not any(m.merged for m in layers.values())


@pytest.mark.parametrize("call", [lora.lora_parameters, lora.lora_state, lora.merge_lora, lora.unmerge_lora, lora.merge_and_unload])
def test_没有_LoRA_层(call):
    with pytest.raises(RuntimeError, match="模型里没有 LoRA 层"):
        call(network())


def test_坏检查点():
    model = network()
    lora.add_lora(model, "q", r=2)
    state = lora.lora_state(model)
    with pytest.raises(ValueError, match=r"对不上：0\.q\.A"):
        lora.load_lora(model, {k: v for k, v in state.items() if k != "0.q.A"})
    with pytest.raises(ValueError, match=r"0\.q\.A 的形状必须是 \(2, 16\)，收到 \(4, 16\)"):
        lora.load_lora(model, {**state, "0.q.A": torch.zeros(4, 16)})
    lora.merge_lora(model)
    with pytest.raises(RuntimeError, match="先 unmerge_lora"):
        lora.load_lora(model, state)
