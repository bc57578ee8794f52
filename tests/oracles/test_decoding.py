"""解码与 transformers 逐元素对照（五种处理器、束搜索），再加性质测试、穷举对照与坏输入。"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import decoding
from minillm.decoding import Sampler, beam_search, diverse_beam_search, generate, greedy, sample

V = 40
EMPTY = torch.zeros(1, 0, dtype=torch.long)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batches():
    """几种尺度的随机 logits (6, V)：从近乎均匀到极尖。"""
    g = torch.Generator().manual_seed(0)
    return [scale * torch.randn(6, V, dtype=torch.float64, generator=g) for scale in (0.01, 1.0, 5.0, 40.0)]


def processors():
    return pytest.importorskip("transformers.generation.logits_process")


# ── 与 transformers 的处理器逐元素对照 ───────────────────────


@pytest.mark.parametrize("z", batches())
@pytest.mark.parametrize("T", [0.1, 0.7, 1.0, 3.0])
def test_温度(z, T):
    assert torch.equal(decoding.temperature(z, T), processors().TemperatureLogitsWarper(T)(EMPTY, z))


@pytest.mark.parametrize("z", batches())
@pytest.mark.parametrize("k", [1, 2, 7, V - 1, V, V + 5])
def test_top_k(z, k):
    assert torch.equal(decoding.top_k(z, k), processors().TopKLogitsWarper(k)(EMPTY, z))
    tied = z.round()                                                        # 有并列：两边都全留
    assert torch.equal(decoding.top_k(tied, k), processors().TopKLogitsWarper(k)(EMPTY, tied))


@pytest.mark.parametrize("z", batches())
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_top_p(z, p):
    assert torch.equal(decoding.top_p(z, p), processors().TopPLogitsWarper(p)(EMPTY, z))


@pytest.mark.parametrize("z", batches())
@pytest.mark.parametrize("p", [1e-6, 0.05, 0.3, 0.9, 1.0])
def test_min_p(z, p):
    assert torch.equal(decoding.min_p(z, p), processors().MinPLogitsWarper(p)(EMPTY, z))


@pytest.mark.parametrize("z", batches())
@pytest.mark.parametrize("theta", [0.5, 1.0, 1.2, 5.0])
@pytest.mark.parametrize("length", [1, 10, 200])
def test_重复惩罚(z, theta, length):
    ids = torch.randint(V, (len(z), length))
    reference = processors().RepetitionPenaltyLogitsProcessor(theta)(ids, z.clone())
    assert torch.equal(decoding.repetition_penalty(z, ids, theta), reference)


@pytest.mark.parametrize("z", batches())
def test_流水线的次序与_generate_相同(z):
    """用 transformers 自己排好的处理器列表，而不是我们以为的次序。"""
    transformers = pytest.importorskip("transformers")
    values = dict(repetition_penalty=1.3, temperature=1.7, top_k=12, top_p=0.8, min_p=0.05)
    config = transformers.GenerationConfig(do_sample=True, num_beams=1, **values)
    chain = tiny_gpt2(0)._get_logits_processor(config, input_ids_seq_length=4, device="cpu")
    assert len(chain) == 5
    ids = torch.randint(V, (len(z), 4))
    assert torch.equal(Sampler(**values).warp(z, ids), chain(ids, z.clone()))


# ── 整个生成循环与 generate 对照 ─────────────────────────────


def tiny_gpt2(seed):
    """随机权重的两层 GPT-2；权重放大一些，分布才有高有低。"""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=12, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.6)
    return model


PROMPT, STEPS, EOS = [2, 5, 3], 8, 1


def theirs(model, **options):
    prompt = torch.tensor([PROMPT])
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=STEPS,
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip


def cut(row):
    """去掉提示与 eos 之后的补齐。"""
    row = row[len(PROMPT) :]
    return tuple(row[: row.index(EOS) + 1] if EOS in row else row)


def next_logits(model):
    return lambda ids: model(ids).logits[:, -1]


@pytest.mark.parametrize("seed", range(6))
def test_贪心循环(seed):
    model = tiny_gpt2(seed)
    ours = generate(next_logits(model), torch.tensor([PROMPT]), STEPS, greedy, eos=EOS)
    assert cut(ours[0].tolist()) == cut(theirs(model).sequences[0].tolist())


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("beams", [2, 3, 5])
def test_束搜索(beams, alpha):
    for seed in range(6):
        model = tiny_gpt2(seed)
        out = theirs(model, num_beams=beams, num_return_sequences=beams, length_penalty=alpha, early_stopping="never")
        ours = beam_search(next_logits(model), PROMPT, beams, STEPS, eos=EOS, alpha=alpha)
        assert [h.tokens for h in ours] == [cut(row) for row in out.sequences.tolist()]
        torch.testing.assert_close(torch.tensor([h.score for h in ours]), out.sequences_scores, rtol=1e-4, atol=1e-4)


def test_束搜索对照里确有与贪心不同的例子():
    """上面的对照若全是束等于贪心、全都写满或全都提前结束，就什么也没测到。"""
    differ = early = 0
    for seed in range(6):
        f = next_logits(tiny_gpt2(seed))
        walk = cut(generate(f, torch.tensor([PROMPT]), STEPS, greedy, eos=EOS)[0].tolist())
        beam = beam_search(f, PROMPT, 5, STEPS, eos=EOS)[0]
        differ += beam.tokens != walk
        early += beam.tokens[-1] == EOS and len(beam.tokens) < STEPS
        width1 = beam_search(f, PROMPT, 1, STEPS, eos=EOS)[0]
        assert beam.logprob >= width1.logprob - 1e-5                            # float32 的累加次序不同
    assert differ >= 2 and 1 <= early


# ── 性质 ─────────────────────────────────────────────────────

rows = st.lists(st.floats(-30, 30, allow_nan=False, width=32), min_size=1, max_size=12)
share = st.floats(0.001, 1.0)


def vector(row):
    return torch.tensor(row, dtype=torch.float64)


@settings(deadline=None, max_examples=200)
@given(rows, share)
def test_top_p_是达到_p_的最小集合(row, p):
    z = vector(row)
    probs, keep = z.softmax(-1), decoding.top_p(z, p).isfinite()
    assert keep.any()
    assert probs[keep].sum() >= p - 1e-9                                    # 达到
    assert probs[keep].sum() - probs[keep].min() < p + 1e-9                        # 去掉最小的就不够
    if not keep.all():
        assert probs[keep].min() >= probs[~keep].max()                      # 留下的是名次靠前的


@settings(deadline=None, max_examples=200)
@given(rows, share, share, st.integers(1, 12), st.floats(-5, 5))
def test_截断的共同性质(row, p, q, k, shift):
    z = vector(row)
    for f in (lambda z: decoding.top_p(z, p), lambda z: decoding.min_p(z, p), lambda z: decoding.top_k(z, k)):
        out = f(z)
        keep = out.isfinite()
        assert torch.equal(out[keep], z[keep])                              # 留下的原样不动
        assert keep[greedy(z)]                                              # 第一名永远在
        if not keep.all():
            assert z[keep].min() >= z[~keep].max()
    small, large = sorted((p, q))
    assert (decoding.top_p(z, small).isfinite() <= decoding.top_p(z, large).isfinite()).all()      # 单调
    assert (decoding.min_p(z, large).isfinite() <= decoding.min_p(z, small).isfinite()).all()
    again = decoding.min_p(decoding.min_p(z, p), p)
    assert torch.equal(again, decoding.min_p(z, p))                         # min-p 做两遍等于一遍
    both = decoding.min_p(decoding.top_k(z, k), p)
    assert torch.equal(both, decoding.top_k(decoding.min_p(z, p), k))       # 与 top-k 可交换


@settings(deadline=None, max_examples=200)
@given(rows, st.floats(0.05, 20))
def test_温度不改名次且越高熵越大(row, T):
    z = vector(row)
    assert greedy(decoding.temperature(z, T)) == greedy(z)
    entropy = [torch.special.entr(decoding.temperature(z, t).softmax(-1)).sum() for t in (T, 1.5 * T)]
    assert entropy[1] >= entropy[0] - 1e-9


@settings(deadline=None, max_examples=200)
@given(rows, st.floats(1.0, 10), st.data())
def test_重复惩罚只会压低出现过的(row, theta, data):
    z = vector(row)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, len(row) - 1), max_size=8)), dtype=torch.long)
    out = decoding.repetition_penalty(z, ids, theta)
    seen = torch.zeros(len(row), dtype=torch.bool)
    seen[ids] = True
    assert torch.equal(out[~seen], z[~seen]) and (out[seen] <= z[seen]).all()
    assert torch.equal(out, decoding.repetition_penalty(z, ids.repeat(3), theta))                  # 次数不重要


def test_不改动传入的张量():
    z, ids = torch.randn(3, V), torch.randint(V, (3, 5))
    copy = z.clone()
    Sampler(1.5, 0.7, 9, 0.8, 0.1)(z, ids)
    decoding.top_p(z, 1.0)
    assert torch.equal(z, copy)


def test_并列时核取编号最小的且个数最少():
    assert decoding.top_p(torch.zeros(4, dtype=torch.float64), 0.5).isfinite().tolist() == [True, True, False, False]


def test_半精度下核的大小不受累加误差影响():
    z = torch.zeros(50_000, dtype=torch.bfloat16)
    assert decoding.top_p(z, 0.5).isfinite().sum() == 25_000


def test_抽样频率():
    z = torch.tensor([0.5, 0.3, 0.2]).log().expand(2, 15_000, 3)
    draws = sample(z, torch.Generator().manual_seed(0))
    assert draws.shape == (2, 15_000)
    frequency = draws.flatten().bincount(minlength=3) / draws.numel()
    assert (frequency - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 0.015   # 标准误 0.003
    assert sample(z[0, 0]).shape == ()


def test_同一个种子同一句话():
    f = lambda ids: torch.randn(V, V, generator=torch.Generator().manual_seed(3))[ids[:, -1]]
    prompt = torch.tensor([[1], [2]])
    a, b = (generate(f, prompt, 6, Sampler(generator=torch.Generator().manual_seed(7))) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (2, 7) and torch.equal(a[:, :1], prompt)
    assert not torch.equal(a, generate(f, prompt, 6, Sampler(generator=torch.Generator().manual_seed(8))))


def test_写完的行用_eos_补齐_全写完就停():
    P = torch.full((4, 4), -math.inf)
    P[0, 1] = P[1, 3] = P[2, 0] = P[3, 2] = 0.0                              # 2 → 0 → 1 → 3；eos = 3 之后本会走到 2
    ids = generate(lambda ids: P[ids[:, -1]], torch.tensor([[2], [1]]), 10, eos=3)
    assert ids.tolist() == [[2, 0, 1, 3], [1, 3, 3, 3]]
    assert generate(lambda ids: P[ids[:, -1]], torch.tensor([[2]]), 5)[0].tolist() == [2, 0, 1, 3, 2, 0]


# ── 束搜索与穷举 ─────────────────────────────────────────────

EOS_ID = 3


def random_model(seed, size=4):
    """看最后两个词的随机模型；词 3 是结尾。"""
    table = 2 * torch.randn(size, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return lambda ids: table[ids[:, -2], ids[:, -1]]


def exhaustive(model, prompt, steps, alpha, size=4):
    """所有写完的句子（遇 eos 或写满），按得分从高到低。"""
    found = []
    for n in range(1, steps + 1):
        for body in itertools.product([w for w in range(size) if w != EOS_ID], repeat=n - 1):
            for last in range(size) if n == steps else (EOS_ID,):
                tokens = (*body, last)
                ids = list(prompt)
                logprob = 0.0
                for token in tokens:
                    logprob += model(torch.tensor([ids])).log_softmax(-1)[0, token].item()
                    ids.append(token)
                found.append((logprob / len(tokens) ** alpha, tokens))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1.0])
def test_束够宽就是穷举(seed, alpha):
    """束宽不小于前缀总数时没有剪枝，前十名必须与穷举一致；这同时证明提前收工不丢解。"""
    model = random_model(seed)
    ours = beam_search(model, [0, 1], 200, 4, eos=EOS_ID, alpha=alpha)
    truth = exhaustive(model, [0, 1], 4, alpha)
    assert len(ours) == len(truth) == 27 * 4 + 9 + 3 + 1
    for h, (score, tokens) in zip(ours[:10], truth):
        assert h.tokens == tokens and h.score == pytest.approx(score, abs=1e-9)


def reference_beams(model, prompt, groups, width, steps, strength, alpha):
    """照定义写的多样束搜索：纯 Python、不批量、不提前收工。"""
    live = [[((), 0.0)] for _ in range(groups)]
    done = [[] for _ in range(groups)]
    for step in range(1, steps + 1):
        used = []
        for g in range(groups):
            options = []
            for order, (tokens, logprob) in enumerate(live[g]):
                scores = model(torch.tensor([[*prompt, *tokens]])).log_softmax(-1)[0].tolist()
                options += [(logprob + s - strength * used.count(v), -order, -v, tokens + (v,), logprob + s) for v, s in enumerate(scores)]
            options.sort(reverse=True)
            kept, chosen = [], []
            for place, (_, _, _, tokens, logprob) in enumerate(options):
                ends = tokens[-1] == EOS_ID or step == steps
                if ends and place < width:
                    done[g].append((logprob / step**alpha, tokens))
                elif ends or len(kept) == width:
                    continue
                else:
                    kept.append((tokens, logprob))
                chosen.append(tokens[-1])
            live[g] = kept
            used += chosen
    return [sorted(d, reverse=True)[:width] for d in done]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000), groups=st.integers(1, 3), width=st.integers(1, 3), steps=st.integers(1, 5),
    strength=st.sampled_from([0.0, 0.3, 1.0, 5.0]), alpha=st.sampled_from([-0.7, 0.0, 0.5, 1.0]),
)  # fmt: skip
def test_多样束搜索与照定义写的一致(seed, groups, width, steps, strength, alpha):
    model = random_model(seed)
    ours = diverse_beam_search(model, [2, 0], groups, width, steps, strength, eos=EOS_ID, alpha=alpha)
    reference = reference_beams(model, [2, 0], groups, width, steps, strength, alpha)
    assert [[h.tokens for h in group] for group in ours] == [[tokens for _, tokens in group] for group in reference]
    for group, expected in zip(ours, reference):
        for h, (score, _) in zip(group, expected):
            assert h.score == pytest.approx(score, abs=1e-9)
            assert h.score == pytest.approx(h.logprob / len(h.tokens) ** alpha)


def test_第一组与单组就是普通束搜索():
    model = random_model(5)
    plain = beam_search(model, [0, 1], 2, 5, eos=EOS_ID, alpha=0.5)
    assert diverse_beam_search(model, [0, 1], 1, 2, 5, 9.0, eos=EOS_ID, alpha=0.5) == [plain]
    assert diverse_beam_search(model, [0, 1], 3, 2, 5, 9.0, eos=EOS_ID, alpha=0.5)[0] == plain
    assert diverse_beam_search(model, [0, 1], 3, 2, 5, 0.0, eos=EOS_ID, alpha=0.5) == [plain] * 3


def test_提前收工省下前向():
    calls = 0
    P = torch.tensor([[0.05, 0.95], [0.5, 0.5]], dtype=torch.float64).log()

    def model(ids):
        nonlocal calls
        calls += 1
        return P[ids[:, -1]]

    assert beam_search(model, [0], 1, 50, eos=1)[0].tokens == (1,)
    assert calls == 1


def test_长度指数为负时也不能提前放弃更好的():
    P = torch.zeros(5, 5, dtype=torch.float64)
    P[0, 1], P[0, 3], P[0, 4] = 0.65, 0.30, 0.05
    P[1, 2], P[1, 3], P[1, 4] = 0.90, 0.06, 0.04
    P[2, 3] = P[3, 3] = P[4, 3] = 1.0                                       # 3 是 eos
    ours = beam_search(lambda ids: P.log()[ids[:, -1]], [0], 2, 50, eos=3, alpha=-1.0)
    assert [h.tokens for h in ours] == [(3,), (1, 2, 3)]                    # 第二条在榜单满了之后才写完


def test_束里不会出现被禁止的词():
    P = torch.tensor([[-math.inf, 0.0, -math.inf], [0.0, -math.inf, 0.0], [0.0, 0.0, 0.0]])
    for h in beam_search(lambda ids: P[ids[:, -1]], [0], 4, 4):
        path = (0, *h.tokens)
        assert math.isfinite(h.logprob) and all(P[a, b] == 0 for a, b in zip(path, path[1:]))


# ── 坏输入 ───────────────────────────────────────────────────

BAD_POSITIVE = [0, -1, 0.0, -0.5, math.nan, math.inf, "1", None, True]
BAD_SHARE = [0, -0.1, 1.0001, 90, math.nan, math.inf, "0.9", True]
BAD_COUNT = [0, -1, 1.5, 2.0, "3", None, True]


@pytest.mark.parametrize("T", BAD_POSITIVE)
def test_坏温度(T):
    with pytest.raises(ValueError, match="温度 T 必须是正的有限数"):
        decoding.temperature(torch.zeros(3), T)
    with pytest.raises(ValueError, match="温度 T"):
        Sampler(temperature=T)


@pytest.mark.parametrize("p", [*BAD_SHARE, None])
def test_坏_p(p):
    with pytest.raises(ValueError, match=r"top-p 的 p 必须在 \(0, 1\] 里"):
        decoding.top_p(torch.zeros(3), p)
    with pytest.raises(ValueError, match=r"min-p 的 p 必须在 \(0, 1\] 里"):
        decoding.min_p(torch.zeros(3), p)
    with pytest.raises(ValueError, match="top-p"):
        Sampler(top_p=p)


@pytest.mark.parametrize("p", BAD_SHARE)
def test_坏_min_p(p):
    with pytest.raises(ValueError, match="min-p"):
        Sampler(min_p=p)


@pytest.mark.parametrize("k", BAD_COUNT)
def test_坏_k(k):
    with pytest.raises(ValueError, match="top-k 的 k 必须是不小于 1 的整数"):
        decoding.top_k(torch.zeros(3), k)
    if k is not None:                                                       # 流水线里 None 表示不用
        with pytest.raises(ValueError, match="top-k"):
            Sampler(top_k=k)


@pytest.mark.parametrize("theta", BAD_POSITIVE)
def test_坏_theta(theta):
    with pytest.raises(ValueError, match="重复惩罚 θ 必须是正的有限数"):
        Sampler(repetition_penalty=theta)


@pytest.mark.parametrize("value", BAD_COUNT)
@pytest.mark.parametrize("name", ["组数 groups", "束宽 beams", "步数 steps"])
def test_坏束宽(name, value):
    sizes = {"组数 groups": 2, "束宽 beams": 2, "步数 steps": 2} | {name: value}
    with pytest.raises(ValueError, match=f"{name} 必须是不小于 1 的整数"):
        diverse_beam_search(random_model(0), [0, 1], *sizes.values(), strength=0.5)
    if name != "组数 groups":
        with pytest.raises(ValueError, match=name):
            beam_search(random_model(0), [0, 1], sizes["束宽 beams"], sizes["步数 steps"])
    if name == "步数 steps":
        with pytest.raises(ValueError, match=name):
            generate(random_model(0), torch.tensor([[0, 1]]), value)


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None])
def test_坏强度与长度指数(value):
    with pytest.raises(ValueError, match="多样性强度 strength 必须是不小于 0 的有限数"):
        diverse_beam_search(random_model(0), [0, 1], 2, 1, 2, value)
    with pytest.raises(ValueError, match="多样性强度"):
        diverse_beam_search(random_model(0), [0, 1], 2, 1, 2, -0.1)
    with pytest.raises(ValueError, match="长度指数 alpha 必须是有限数"):
        beam_search(random_model(0), [0, 1], 2, 2, alpha=value)


@pytest.mark.parametrize("pick", [greedy, sample])
def test_坏_logits(pick):
    with pytest.raises(ValueError, match="NaN"):
        pick(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match=r"\+inf"):
        pick(torch.tensor([0.0, math.inf]))
    with pytest.raises(ValueError, match="全是 -inf"):
        pick(torch.tensor([[0.0, 1.0], [-math.inf, -math.inf]]))
    for bad in (torch.zeros(3, dtype=torch.long), torch.zeros(2, 0), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="最后一维为词表的浮点张量"):
            pick(bad)


def test_束搜索遇到死路与坏模型():
    with pytest.raises(ValueError, match="全是 -inf"):
        beam_search(lambda ids: torch.full((len(ids), 3), -math.inf), [0], 2, 3)
    with pytest.raises(ValueError, match="NaN"):
        beam_search(lambda ids: torch.full((len(ids), 3), math.nan), [0], 2, 3)


def test_重复惩罚的形状与越界():
    with pytest.raises(ValueError, match="批维度对不上"):
        decoding.repetition_penalty(torch.zeros(2, 5), torch.zeros(3, 4, dtype=torch.long), 1.2)
    for bad in (5, -1):
        with pytest.raises(ValueError, match="ids 越界：词表只有 5 个 token"):
            decoding.repetition_penalty(torch.zeros(1, 5), torch.tensor([[0, bad]]), 1.2)
