"""解码：把模型一步给出的 logits 变成下一个 token，再把许多步连成一句话。

“模型”在这里只是一个函数：``model(ids) -> logits``，``ids`` 是 (N, L) 的整数张量，
``logits`` 是 (N, V) 的实数张量，第 n 行是第 n 条前缀之后下一个 token 的未归一化对数概率。
被截掉的 token 记成 -inf，于是 softmax 之后概率恰为零。所有函数都不改动传入的张量。
"""

# --8<-- [start:check]
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Model = Callable[[Tensor], Tensor]


def _check_int(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} 必须是不小于 {low} 的整数，收到 {value!r}")


def _check_real(name: str, value: object, what: str, ok: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not ok(value):
        raise ValueError(f"{name} 必须{what}，收到 {value!r}")


def _check_logits(logits: Tensor) -> None:
    """形状 (..., V)，V ≥ 1；不许有 NaN 与 +inf，每一行至少一个有限值。"""
    if not logits.is_floating_point() or logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits 必须是最后一维为词表的浮点张量，收到 {logits.dtype}、形状 {tuple(logits.shape)}")
    if (logits.isnan() | (logits == math.inf)).any():
        raise ValueError("logits 里有 NaN 或 +inf（温度小到溢出也会这样）")
    if not logits.isfinite().any(-1).all():
        raise ValueError("有一行 logits 全是 -inf：没有任何 token 可选")
# --8<-- [end:check]


# --8<-- [start:temperature]
def temperature(logits: Tensor, T: float) -> Tensor:
    """z / T，形状不变 (..., V)。T < 1 变尖，T > 1 变平；T 不是正数抛 ValueError。"""
    _check_real("温度 T", T, "是正的有限数（要贪心请用 greedy）", lambda t: t > 0)
    return logits / T
# --8<-- [end:temperature]


# --8<-- [start:top_k]
def top_k(logits: Tensor, k: int) -> Tensor:
    """只留最大的 k 个，其余 -inf；与第 k 名并列的都留下。k 不是正整数抛 ValueError。"""
    _check_int("top-k 的 k", k, 1)
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]           # (..., 1)
    return logits.masked_fill(logits < kth, -math.inf)
# --8<-- [end:top_k]


# --8<-- [start:top_p]
def top_p(logits: Tensor, p: float) -> Tensor:
    """核采样：留下概率之和达到 p 的最小集合（arXiv:1904.09751 第 3.1 节）。p 不在 (0, 1] 抛 ValueError。

    从大到小排队，排在自己前面的概率之和还不到 p，就留下。第一名前面是零，所以至少留一个。
    """
    _check_real("top-p 的 p", p, "在 (0, 1] 里", lambda p: 0 < p <= 1)
    if p == 1:
        return logits                                                              # 不截断，免得被舍入误差误伤
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)              # (..., V) 名次 → 值、词号
    mass = ranked.softmax(-1, dtype=torch.float64)
    before = mass.cumsum(-1) - mass                                                # (..., V) 前面各名的概率之和
    drop = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(drop, -math.inf)
# --8<-- [end:top_p]


# --8<-- [start:min_p]
def min_p(logits: Tensor, p: float) -> Tensor:
    """留下概率不低于 p · 最大概率的（arXiv:2407.01082）。p 不在 (0, 1] 抛 ValueError。

    两边取对数，归一化常数抵消：z ≥ max z + log p。
    """
    _check_real("min-p 的 p", p, "在 (0, 1] 里", lambda p: 0 < p <= 1)
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)
# --8<-- [end:min_p]


# --8<-- [start:repetition]
def repetition_penalty(logits: Tensor, ids: Tensor, theta: float) -> Tensor:
    """压低已出现过的 token：正的 logit 除以 θ，负的乘以 θ；出现几次都只罚一次。

    logits (..., V)，ids (..., L) 是整条前缀（含提示）。θ = 1 不罚，θ < 1 变成奖励。
    θ 不是正数、ids 的形状对不上或越界抛 ValueError。
    """
    _check_real("重复惩罚 θ", theta, "是正的有限数", lambda t: t > 0)
    if ids.shape[:-1] != logits.shape[:-1]:
        raise ValueError(f"ids {tuple(ids.shape)} 与 logits {tuple(logits.shape)} 的批维度对不上")
    if ids.numel() and not 0 <= ids.min() <= ids.max() < logits.shape[-1]:
        raise ValueError(f"ids 越界：词表只有 {logits.shape[-1]} 个 token")
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, True)       # (..., V)
    return torch.where(seen, torch.where(logits > 0, logits / theta, logits * theta), logits)
# --8<-- [end:repetition]


# --8<-- [start:choose]
def greedy(logits: Tensor, ids: Tensor | None = None) -> Tensor:
    """每行取最大的一个：(..., V) -> (...)；并列取编号最小的。不看 ids，只为与 Sampler 同一种叫法。"""
    _check_logits(logits)
    return logits.argmax(-1)


def sample(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """每行按 softmax(logits) 抽一个：(..., V) -> (...)。"""
    _check_logits(logits)
    probs = logits.softmax(-1).reshape(-1, logits.shape[-1])                       # (N, V)
    return probs.multinomial(1, generator=generator).view(logits.shape[:-1])
# --8<-- [end:choose]


# --8<-- [start:sampler]
@dataclass(frozen=True)
class Sampler:
    """一步的流水线：重复惩罚 → 温度 → top-k → top-p → min-p → 抽样。

    字段名与 transformers 的生成参数相同；缺省值全是“不起作用”。坏参数在构造时就抛 ValueError。
    """

    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        self.warp(torch.zeros(1, 1), torch.zeros(1, 0, dtype=torch.long))          # 空跑一遍，借各函数的检查

    def warp(self, logits: Tensor, ids: Tensor) -> Tensor:
        """logits (N, V)、前缀 ids (N, L) -> 截断后的 logits (N, V)。"""
        logits = repetition_penalty(logits, ids, self.repetition_penalty)
        logits = temperature(logits, self.temperature)
        logits = logits if self.top_k is None else top_k(logits, self.top_k)
        logits = top_p(logits, self.top_p)
        return logits if self.min_p is None else min_p(logits, self.min_p)

    def __call__(self, logits: Tensor, ids: Tensor) -> Tensor:
        return sample(self.warp(logits, ids), self.generator)
# --8<-- [end:sampler]


# --8<-- [start:generate]
@torch.no_grad()
def generate(
    model: Model, prompt: Tensor, steps: int, choose: Callable[[Tensor, Tensor], Tensor] = greedy, eos: int | None = None
) -> Tensor:
    """逐步解码：prompt (N, L) -> (N, L + 走的步数)。写完的行用 eos 补齐，全部写完就停。"""
    _check_int("步数 steps", steps, 1)
    ids, done = prompt, torch.zeros(len(prompt), dtype=torch.bool)
    for _ in range(steps):
        token = choose(model(ids), ids)                                            # (N,)
        if eos is not None:
            token = token.masked_fill(done, eos)
            done = token == eos                                                    # 写完的行一直是 eos
        ids = torch.cat([ids, token[:, None]], dim=1)
        if done.all():
            break
    return ids
# --8<-- [end:generate]


# --8<-- [start:beam]
@dataclass(frozen=True)
class Hypothesis:
    """写完的一句：新生成的 token（不含提示，含结尾的 eos）、对数概率之和、按长度调整后的得分。"""

    tokens: tuple[int, ...]
    logprob: float
    score: float


class _Beam:
    """一束：没写完的 live 与写完的 done，各最多 width 条。"""

    def __init__(self, prompt: Sequence[int], width: int, steps: int, eos: int | None, alpha: float) -> None:
        self.prompt, self.width, self.steps, self.eos, self.alpha = tuple(int(t) for t in prompt), width, steps, eos, alpha
        self.live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]               # (token, 对数概率之和)
        self.done: list[Hypothesis] = []
        self.step = 0

    def advance(self, model: Model, used: Sequence[int] = (), strength: float = 0.0) -> list[int]:
        """所有 live 一起走一步，返回选中的 token。

        used 里的 token 每出现一次扣 strength 分（多样束才用）：只影响这一步选谁，不计入对数概率。
        """
        if not self.live:
            return []
        self.step += 1
        ids = torch.tensor([self.prompt + tokens for tokens, _ in self.live], dtype=torch.long)       # (b, L)
        logits = model(ids)                                                                           # (b, V)
        _check_logits(logits)
        so_far = torch.tensor([logprob for _, logprob in self.live], dtype=torch.float64)             # (b,)
        total = logits.double().log_softmax(-1) + so_far[:, None]                                     # (b, V)
        penalty = strength * torch.tensor(used, dtype=torch.long).bincount(minlength=total.shape[-1])  # (V,)
        ranking = (total - penalty).flatten().sort(descending=True, stable=True).indices
        live, chosen = [], []
        for place, flat in enumerate(ranking[: 2 * self.width].tolist()):          # 至多 width 个 eos，所以 2·width 个够用
            row, token = divmod(flat, total.shape[-1])
            tokens, logprob = self.live[row][0] + (token,), total[row, token].item()
            if logprob == -math.inf:
                break                                                              # 剩下的都是被禁止的 token
            if token == self.eos or self.step == self.steps:
                if place < self.width:                                             # 名次靠后的结尾不算数
                    self.done.append(Hypothesis(tokens, logprob, logprob / len(tokens) ** self.alpha))
                    chosen.append(token)
            elif len(live) < self.width:
                live.append((tokens, logprob))
                chosen.append(token)
        self.live = live
        self.done = sorted(self.done, key=lambda h: h.score, reverse=True)[: self.width]
        return chosen

    def settled(self) -> bool:
        """没写完的还能不能挤进榜。对数概率只减不增，所以得分有上界：α > 0 时拖到最长最有利。"""
        if not self.live:
            return True
        length = self.steps if self.alpha > 0 else self.step + 1
        bound = max(logprob for _, logprob in self.live) / length**self.alpha
        return len(self.done) == self.width and bound <= self.done[-1].score


@torch.no_grad()
def beam_search(
    model: Model, prompt: Sequence[int], beams: int, steps: int, eos: int | None = None, alpha: float = 0.0
) -> list[Hypothesis]:
    """束搜索：最多 beams 条写完的句子，得分从高到低。得分 = 对数概率之和 / 长度**alpha，长度含 eos。

    走满 steps 步还没有 eos 的也算写完。beams、steps 不是正整数，alpha 不是有限数，抛 ValueError。
    """
    return diverse_beam_search(model, prompt, 1, beams, steps, 0.0, eos, alpha)[0]
# --8<-- [end:beam]


# --8<-- [start:diverse]
@torch.no_grad()
def diverse_beam_search(
    model: Model, prompt: Sequence[int], groups: int, beams: int, steps: int, strength: float,
    eos: int | None = None, alpha: float = 0.0,
) -> list[list[Hypothesis]]:  # fmt: skip
    """多样束搜索（arXiv:1610.02424 第 3 节，汉明多样性）：groups 组，每组 beams 条，组间依次走。

    每一步，后面的组选 token 时，前面各组这一步选过的 token 每次扣 strength 分。返回各组的结果。
    groups、beams、steps 不是正整数，strength 是负数，alpha 不是有限数，抛 ValueError。
    """
    for name, value in (("组数 groups", groups), ("束宽 beams", beams), ("步数 steps", steps)):
        _check_int(name, value, 1)
    _check_real("多样性强度 strength", strength, "是不小于 0 的有限数", lambda s: s >= 0)
    _check_real("长度指数 alpha", alpha, "是有限数", lambda a: True)
    team = [_Beam(prompt, beams, steps, eos, alpha) for _ in range(groups)]
    for _ in range(steps):
        used: list[int] = []                                                       # 前面各组这一步选过的 token
        for beam in team:
            used += beam.advance(model, used, strength)
        if all(beam.settled() for beam in team):
            break
    return [beam.done for beam in team]
# --8<-- [end:diverse]
