"""训练循环：AdamW、升温 + 余弦、梯度裁剪、EMA、断点续训。不认识任何模型与数据。"""

# --8<-- [start:ema]
import copy
import math
import os

import torch
from tqdm import tqdm

from minisd.muon import Muon


class EMA:
    """权重的指数滑动平均：θ̄ ← d·θ̄ + (1-d)·θ；开头 d 从 0.1 逐渐升到 ``decay``，免得被初值拖住。"""

    def __init__(self, model, decay=0.998):
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_([*self.model.parameters()], [p.detach() for p in model.parameters()], 1 - d)
# --8<-- [end:ema]


# --8<-- [start:fit]
def warmup_cosine(step, steps, warmup=50, floor=0.02):
    """学习率的倍数：前 warmup 步线性升到 1，再按余弦降到 floor。"""
    rise = min(1.0, (step + 1) / warmup)
    return rise * (floor + (1 - floor) * (1 + math.cos(math.pi * step / steps)) / 2)


def adamw(model, lr, weight_decay=0.01):
    """全部参数用 AdamW。"""
    params = [p for p in model.parameters() if p.requires_grad]
    return [torch.optim.AdamW(params, lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)]


def muon(model, lr, adam_lr):
    """矩阵与卷积核用 Muon，其余（偏置、归一化、嵌入、细长的首末层）用 AdamW。"""
    params = [p for p in model.parameters() if p.requires_grad]
    big = [p for p in params if p.ndim >= 2 and min(len(p), p[0].numel()) >= 16]
    rest = [p for p in params if all(p is not q for q in big)]
    return [Muon(big, lr), torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]


def fit(model, loss_fn, steps, optimizers, *, generator=None, ema=None, resume=None, save_every=200, watch=None):
    """训练 ``steps`` 步，返回逐步损失 (steps,)。

    loss_fn(generator) -> 标量损失；全部随机数都从 generator 来，所以续训与一口气训完逐位相同。
    ``optimizers``：:func:`adamw` 或 :func:`muon` 的返回值；学习率由这里升温、余弦降。
    ``ema``：:class:`EMA`，每步更新。``watch(step, model)``：每步之后调用，画学习曲线用。
    ``resume``：检查点路径。存在就接着训；每 save_every 步原子地改写一次，训完由调用者决定去留。

    损失不是有限数时抛 FloatingPointError；检查点读不出或与模型对不上时抛 ValueError。
    """
    generator = generator or torch.Generator().manual_seed(0)
    params = [p for opt in optimizers for group in opt.param_groups for p in group["params"]]
    schedules = [torch.optim.lr_scheduler.LambdaLR(opt, lambda k: warmup_cosine(k, steps)) for opt in optimizers]
    parts = [model, *optimizers, *schedules]
    losses = []
    if resume is not None and os.path.exists(resume):
        losses = _load(resume, parts, ema, generator, steps)
    for step in tqdm(range(len(losses), steps), initial=len(losses), total=steps, disable=None):
        loss = loss_fn(generator)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"第 {step} 步的损失是 {loss.item()}：学习率太大，或数据里有 NaN")
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for part in [*optimizers, *schedules]:
            part.step()
        if ema is not None:
            ema.update(model)
        losses.append(loss.item())
        if watch is not None:
            watch(step, model)
        if resume is not None and (step + 1) % save_every == 0:
            _save(resume, parts, ema, generator, losses)
    return torch.tensor(losses)
# --8<-- [end:fit]


# --8<-- [start:resume]
def _save(path, parts, ema, generator, losses):
    """先写到旁边再改名：任何时刻被杀，检查点要么是旧的，要么是新的。"""
    state = {
        "parts": [part.state_dict() for part in parts],
        "ema": ema and (ema.updates, ema.model.state_dict()),
        "generator": generator.get_state(),
        "losses": losses,
    }
    torch.save(state, f"{path}.new")
    os.replace(f"{path}.new", path)


def _load(path, parts, ema, generator, steps):
    try:
        state = torch.load(path, weights_only=True)
        if len(state["losses"]) > steps:
            raise ValueError(f"已经训了 {len(state['losses'])} 步，多于要求的 {steps} 步")
        for part, saved in zip(parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        if ema is not None:
            ema.updates, weights = state["ema"]
            ema.model.load_state_dict(weights)
        generator.set_state(state["generator"])
    except Exception as error:
        raise ValueError(f"检查点 {path} 不能用（删掉它就从头训）：{error}") from error
    return state["losses"]
# --8<-- [end:resume]
