"""LoRA：冻结线性层，只学一个低秩增量（low-rank adaptation，arXiv:2106.09685）。

公式
----
第 4.1 节式 (3)，加上同节正文里的缩放 α/r：

    h = W_0 x + scale · (α/r) · B A x

* W_0 (d, k)：``nn.Linear`` 的权重，冻结；偏置 (d,) 也冻结，代码里把两者合称基座。
* A (r, k)：Kaiming 均匀初始化（与 ``nn.Linear`` 的默认初始化、peft 的默认值相同；论文用高斯）。
* B (d, r)：初始化为零，所以起点 BA = 0，输出与基座逐位相同。
* x (..., k) → h (..., d)。``nn.Linear`` 按行存样本，所以代码里是 x Aᵀ Bᵀ。
* scale：使用时的旋钮，默认 1；0 就是基座。它不属于论文，训练时不要动。

合并（第 4.1 节 “No Additional Inference Latency”）：W = W_0 + scale·(α/r)·BA；减去同一项就还原。

错误
----
坏参数（秩、α、目标层、重复包装、权重共享）抛 ValueError；在错误的时机调用
（合并两次、没合并就还原、合并时改 scale 或载入参数、没有 LoRA 层）抛 RuntimeError。
"""

# --8<-- [start:layer]
import math

import torch
import torch.nn.functional as F
from torch import nn


class LoRALinear(nn.Module):
    """包住一个 ``nn.Linear``：基座冻结，旁边接一条 k → r → d 的窄路。"""

    def __init__(self, base, r=4, alpha=None):
        super().__init__()
        alpha = r if alpha is None else alpha                    # 缺省 α = r，即 α/r = 1
        _check(base, r, alpha)
        self.base = base.requires_grad_(False)                   # W_0 (d, k) 与偏置 (d,)，冻结
        self.A = nn.Parameter(base.weight.new_empty(r, base.in_features))    # (r, k)
        self.B = nn.Parameter(base.weight.new_zeros(base.out_features, r))   # (d, r)，零：起点就是基座
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))         # 每个元素 ~ U(-1/√k, 1/√k)
        self.r, self.alpha, self.merged, self._scale = r, alpha, False, 1.0

    @property
    def scale(self):
        """使用时的旋钮：0 是基座，1 是训练时的强度。"""
        return self._scale

    @scale.setter
    def scale(self, value):
        if self.merged:
            raise RuntimeError("已经合并：先 unmerge() 再改 scale，否则还原时减去的不是当初加上的")
        self._scale = float(value)

    @property
    def scaling(self):
        """窄路前面的总系数 scale · α/r。"""
        return self._scale * self.alpha / self.r

    def delta(self):
        """增量 ΔW = scale · (α/r) · BA，(d, k)。只在合并时才拼出来。"""
        return self.scaling * (self.B @ self.A)

    def forward(self, x):                                        # x (..., k)
        h = self.base(x)                                         # (..., d)  W_0 x + 偏置
        if self.merged:
            return h                                             # 增量已在权重里，没有第二条路
        return h + self.scaling * F.linear(F.linear(x, self.A), self.B)   # k → r → d，不拼 (d, k) 的 BA

    @torch.no_grad()
    def merge(self):
        """把增量加进权重。合并后不要再改 A、B。"""
        if self.merged:
            raise RuntimeError("已经合并过：再合并一次会把增量加两遍")
        self.base.weight += self.delta()
        self.merged = True

    @torch.no_grad()
    def unmerge(self):
        """减去增量，回到 W_0（差一次浮点舍入，不保证逐位）。"""
        if not self.merged:
            raise RuntimeError("还没有合并，不能还原")
        self.base.weight -= self.delta()
        self.merged = False

    def extra_repr(self):
        return f"r={self.r}, alpha={self.alpha}, scale={self._scale:g}, merged={self.merged}"
# --8<-- [end:layer]


# --8<-- [start:check]
def _check(base, r, alpha):
    """核对一层能不能包、参数合不合理；不改动任何东西。"""
    if isinstance(base, LoRALinear):
        raise ValueError("这一层已经包过 LoRA，不能重复包装")
    if type(base) is not nn.Linear:                              # 子类可能绕过 forward 直接读 weight
        raise ValueError(f"只能包住 nn.Linear，收到 {type(base).__name__}")
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"秩 r 必须是不小于 1 的整数，收到 {r!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha 必须是正的有限数，收到 {alpha!r}")
# --8<-- [end:check]


# --8<-- [start:inject]
def add_lora(model, targets, r=4, alpha=None):
    """冻结整个模型，再把目标线性层就地换成 LoRALinear，返回 {层名: LoRALinear}。

    ``targets``：层名或层名列表；``"q"`` 同时选中 ``"blocks.0.q"``、``"blocks.1.q"``（按点分的后缀匹配）。
    先全部核对、再动手：抛 ValueError 时模型原封不动。模型里已有的 LoRA 层保持可训练。
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    if not targets:
        raise ValueError("targets 是空的：至少给一个目标层")
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = {}                                                  # id(参数) → 几个模块持有它
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1

    chosen = {}                                                  # 层名 → nn.Linear
    for target in targets:
        found = [n for n in modules if n and (n == target or n.endswith("." + target))]
        if not found:
            linears = [n for n, m in modules.items() if n and type(m) is nn.Linear]
            raise ValueError(f"找不到目标层 {target!r}；可选的线性层：{'、'.join(linears) or '无'}")
        for name in found:
            base, parent = modules[name], modules[name.rpartition(".")[0]]
            try:
                _check(parent if isinstance(parent, LoRALinear) else base, r, r if alpha is None else alpha)
            except ValueError as error:
                raise ValueError(f"{name}：{error}") from None
            if owners[id(base.weight)] > 1:
                raise ValueError(f"{name}：权重与别的模块共享，合并会连别的模块一起改掉")
            chosen[name] = base

    model.requires_grad_(False)
    made = {}                                                    # 同一个 nn.Linear 出现两次，就共用一个包装
    for name, base in chosen.items():
        if id(base) not in made:
            made[id(base)] = LoRALinear(base, r, alpha)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(base)])
    for p in lora_parameters(model):
        p.requires_grad_(True)
    return {name: made[id(base)] for name, base in chosen.items()}


def lora_layers(model):
    """模型里的 LoRA 层，{层名: LoRALinear}；一个都没有时抛 RuntimeError。"""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise RuntimeError("模型里没有 LoRA 层，先调用 add_lora")
    return layers


def lora_parameters(model):
    """只取 A 与 B，交给优化器：[A, B, A, B, …]。"""
    return [p for layer in lora_layers(model).values() for p in (layer.A, layer.B)]


def count_parameters(model):
    """参数量：{"total": 全部, "trainable": 可训练, "fraction": 占比}；共享的参数只数一次。"""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"total": total, "trainable": trainable, "fraction": trainable / total if total else 0.0}
# --8<-- [end:inject]


# --8<-- [start:deploy]
def set_scale(model, scale):
    """把所有 LoRA 层的旋钮转到同一个值。"""
    for layer in lora_layers(model).values():
        layer.scale = scale


def merge_lora(model):
    """合并所有 LoRA 层；只要有一层已经合并就抛 RuntimeError，且不动任何一层。"""
    layers = lora_layers(model)
    if done := [n for n, m in layers.items() if m.merged]:
        raise RuntimeError(f"已经合并过：{'、'.join(done)}")
    for layer in layers.values():
        layer.merge()


def unmerge_lora(model):
    """还原所有 LoRA 层；只要有一层没合并就抛 RuntimeError，且不动任何一层。"""
    layers = lora_layers(model)
    if todo := [n for n, m in layers.items() if not m.merged]:
        raise RuntimeError(f"还没有合并，不能还原：{'、'.join(todo)}")
    for layer in layers.values():
        layer.unmerge()


def merge_and_unload(model):
    """合并后把 LoRALinear 换回里面的 nn.Linear：部署用的普通模型，参数名与原模型一样。"""
    for layer in lora_layers(model).values():
        if not layer.merged:
            layer.merge()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, LoRALinear):
            if not name:                                         # 模型本身就是一层 LoRALinear
                return module.base
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base)
    return model


def lora_state(model):
    """只含 A、B 的检查点，{"层名.A": (r, k), "层名.B": (d, r)}。"""
    return {f"{n}.{key}": getattr(m, key).detach().clone() for n, m in lora_layers(model).items() for key in "AB"}


@torch.no_grad()
def load_lora(model, state):
    """载入 :func:`lora_state` 存下的 A、B；键或形状对不上抛 ValueError，合并状态下抛 RuntimeError。"""
    layers = lora_layers(model)
    if any(m.merged for m in layers.values()):
        raise RuntimeError("已经合并：先 unmerge_lora 再载入，否则权重里留着旧的增量")
    own = {f"{n}.{key}": getattr(m, key) for n, m in layers.items() for key in "AB"}
    if own.keys() != state.keys():
        raise ValueError(f"检查点与模型的 LoRA 层对不上：{'、'.join(sorted(own.keys() ^ state.keys()))}")
    for key, p in own.items():
        if p.shape != state[key].shape:
            raise ValueError(f"{key} 的形状必须是 {tuple(p.shape)}，收到 {tuple(state[key].shape)}")
    for key, p in own.items():
        p.copy_(state[key])
# --8<-- [end:deploy]
