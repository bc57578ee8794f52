"""在没有 GPU 的机器上假装有一块：``python tests/pretend_gpu.py examples/x.py``。

“cuda” 张量是 CPU 张量外面套一层壳（:class:`Pretend`）：设备报告为 cuda:0，每个算子都剥开壳在 CPU 上真的算，
再把结果套回去。所以示例能从头跑到尾、断言也真的算；而同一个算子混用两种设备时照真的一样报错：

* CPU 张量与 cuda 张量一起算，抛 RuntimeError；0 维的 CPU 张量例外，取 cuda 张量的下标也可以在 CPU 上；
* CPU 的生成器在 cuda 上抽随机数，抛 RuntimeError；
* ``.numpy()`` 与 matplotlib 直接吃 cuda 张量，抛 TypeError。

只证明“设备对得上”：真 GPU 的舍入、显存与速度它一概不知道。
"""

import runpy
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
MOVES = (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu)
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Pretend(torch.Tensor):
    """壳：``inner`` 是真的拿来算的 CPU 张量。"""

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )
        self.inner = inner
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda = property(lambda self: CUDA), property(lambda self: True)

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        """剥壳、在 CPU 上算、套壳；就地的算子返回原来的壳。"""
        kwargs = kwargs or {}
        check(op, args, kwargs)
        out = op(*tree_map_only(cls, lambda x: x.inner, args), **tree_map_only(cls, lambda x: x.inner, kwargs))
        if op._schema.is_mutable and isinstance(out, torch.Tensor):
            return kwargs.get("out", args[0] if args else None)
        return tree_map_only(torch.Tensor, cls, out)

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    __array__ = numpy

    def tolist(self):
        return self.detach().inner.tolist()

    def untyped_storage(self):
        return self.detach().inner.untyped_storage()

    def __repr__(self):
        return f"cuda:{self.detach().inner!r}"

    def __format__(self, spec):
        return format(self.detach().inner, spec)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            memo[id(self)] = new = self.detach().clone().requires_grad_(self.requires_grad)
            new._is_param = getattr(self, "_is_param", False)
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return Pretend, (self.detach().inner,)


def check(op, args, kwargs):
    """照真的规矩查一个有 cuda 参数的算子：混用设备就抛 RuntimeError。"""
    if any(isinstance(x, torch.Generator) for x in tree_leaves((args, kwargs))):
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu'：{op}")
    if op is aten.copy_.default:                                       # 本来就是跨设备用的
        return
    if op in INDEXING:                                                 # cuda 张量可以用 CPU 上的下标取，反过来不行
        args = [args[0], *args[2:]] if isinstance(args[0], Pretend) else args
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    outside = [x for x in tensors if not isinstance(x, Pretend) and x.ndim]
    if outside or op._schema.is_mutable and not isinstance(tensors[0], Pretend):
        shapes = [(str(x.device), tuple(x.shape)) for x in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device：{op} 收到 {shapes}")


class Move(torch.autograd.Function):
    """换设备：一份新的拷贝，梯度搬回来。"""

    @staticmethod
    def forward(ctx, x, to_cuda):
        ctx.back = isinstance(x, Pretend)
        copy = (x.inner if ctx.back else x.detach()).clone()
        return Pretend(copy) if to_cuda else copy

    @staticmethod
    def backward(ctx, grad):
        return move(grad, CUDA if ctx.back else CPU), None


def move(x, device):
    there = torch.device(device).type == "cuda"
    return x if isinstance(x, Pretend) == there else Move.apply(x, there)


def parse_to(device, args, kwargs):
    """``x.to(...)`` 的各种写法 → 目标设备、(x,)、只剩关键字的其余参数。"""
    (x, *rest), kept = args, {k: v for k, v in kwargs.items() if k != "non_blocking" and v is not None}
    for item in [*rest, *([kept.pop("other")] if "other" in kept else [])]:
        if isinstance(item, torch.Tensor):
            device, kept["dtype"] = item.device, item.dtype
        elif isinstance(item, str | torch.device):
            device = item
        elif isinstance(item, torch.dtype):
            kept["dtype"] = item
    return device, (x,), kept


class Devices(TorchFunctionMode):
    """接管写明了设备的调用：``x.to("cuda")``、``torch.zeros(2, device="cuda")``……"""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None)
        if func is torch.Tensor.to:
            device, args, kwargs = parse_to(device, args, kwargs)
        elif func in MOVES:
            device, args, kwargs = "cuda" if func is torch.Tensor.cuda else "cpu", args[:1], {}
        if device is None:
            return func(*args, **kwargs)
        if torch.device(device).type == "meta":
            return func(*args, **kwargs, device=device)
        generator = kwargs.get("generator")
        if torch.device(device).type == "cuda" and generator is not None and generator.device.type == "cpu":
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if func in MOVES:
            moved = move(args[0], device)
            return moved.to(**kwargs) if kwargs else moved
        needs_grad = kwargs.pop("requires_grad", False)
        out = move(func(*args, **kwargs), device)
        return out.requires_grad_() if needs_grad else out


def module_to(*args, parse=torch._C._nn._parse_to, **kwargs):
    """``module.to(某个张量)``：C++ 那边不认识壳，设备由这里补上。"""
    device, *rest = parse(*args, **kwargs)
    return CUDA if any(isinstance(x, Pretend) for x in (*args, *kwargs.values())) else device, *rest


@contextmanager
def gpu():
    """此间 ``torch.cuda.is_available()`` 为真，``"cuda"`` 能用。"""
    torch.serialization.add_safe_globals([Pretend])
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)   # 壳不能就地换芯，Module.to 换成新的参数
    try:
        with (
            mock.patch("torch.cuda.is_available", lambda: True), mock.patch("torch.cuda.manual_seed_all", lambda seed: None),
            mock.patch("torch._C._nn._parse_to", module_to), Devices(),
        ):
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


if __name__ == "__main__":
    with gpu():
        sys.path.insert(0, str(Path(sys.argv[1]).resolve().parent))    # 与 python examples/x.py 一样
        runpy.run_path(sys.argv[1], run_name="__main__")
