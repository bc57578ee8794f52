"""一步训练占的内存，拆成四份来量：参数、梯度、优化器状态、激活。不认识任何模型。"""

# --8<-- [start:memory]
import torch


def step_memory(model, loss_fn, optimizer):
    """真的训练一步，返回四份内存（字节），{"参数", "梯度", "优化器状态", "激活"}。

    ``loss_fn() -> 标量损失``。前三份是张量字节数之和；激活是自动求导为反向保存的张量
    （``saved_tensors_hooks`` 截住），按存储去重，扣掉参数本身。合计不等于峰值：反向时激活边释放，梯度边出现。
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}                                                     # 存储地址 → 字节数

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = loss_fn()
    loss.backward()
    optimizer.step()
    return {
        "参数": sum(p.nbytes for p in model.parameters()),
        "梯度": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "优化器状态": sum(t.nbytes for state in optimizer.state.values() for t in state.values()),
        "激活": sum(saved.values()),
    }
# --8<-- [end:memory]
