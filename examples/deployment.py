# ---
# zhixing:
#   id: deployment
#   title: 同一个小模型的六种部署
#   needs: []
#   timeout: 600
# ---

# %% [markdown]
# 训练一个小卷积网络，再把**同一份权重**变成六种可以上线的样子：PyTorch 即时执行、`torch.export`、ONNX Runtime 的 FP32、动态 int8、两种静态 int8；在同一台机器上量体积、精度、延迟。
#
# **预计耗时与内存**：单线程、机器空闲时约十秒，大头是训练与导出。延迟只在本机有意义：CPU 型号、指令集、线程数一变，名次就可能变。量的就是 CPU，有 GPU 也不用。

# %%
import logging
import math
import tempfile
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

import zhixing

torch.set_num_threads(1)
torch.manual_seed(0)
logging.disable(logging.WARNING)                     # 导出器与量化器的提示
warnings.simplefilter("ignore", FutureWarning)

# %% [markdown]
# ## 任务与模型
#
# 认条纹的方向：8 个方向，相位随机，加很强的噪声。卷积两层、全连接两层，参数大部分在第一个全连接里。

# %%
SIZE, CLASSES = 16, 8


def stripes(n, seed):
    """n 张带噪声的条纹 (n, 1, 16, 16) 与方向编号 (n,)。"""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, CLASSES, (n,), generator=g)
    angle, phase = label * math.pi / CLASSES, 2 * math.pi * torch.rand(n, generator=g)
    r = torch.arange(SIZE) - SIZE / 2
    along = torch.cos(angle)[:, None, None] * r[:, None] + torch.sin(angle)[:, None, None] * r     # (n, 16, 16)
    image = torch.sin(0.9 * along + phase[:, None, None]) + 2 * torch.randn(n, SIZE, SIZE, generator=g)
    return image[:, None], label


train_x, train_y = stripes(4096, 1)
test_x, test_y = stripes(4000, 2)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),      # (n, 16, 8, 8)
    nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),     # (n, 32, 4, 4)
    nn.Flatten(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, CLASSES),
)
optimizer = torch.optim.Adam(model.parameters(), 2e-3)
for step in range(300):
    batch = torch.randint(0, len(train_x), (64,))
    loss = F.cross_entropy(model(train_x[batch]), train_y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()
for parameter in model.parameters():
    parameter.requires_grad_(False)
parameters = sum(p.numel() for p in model.parameters())
zhixing.metric("parameters", parameters)

# %% [markdown]
# ## 导出
#
# `torch.export` 追踪出一张不含 Python 的计算图；批大小声明成可变，其余维度固定。ONNX 从这张图转换而来。

# %%
paths = {name: zhixing.output_path(f"{name}.onnx") for name in ("fp32", "dynamic", "static", "static7")}
sample = test_x[:4].clone()                          # 不复制的话，存盘会连整个 test_x 一起带上
exported = torch.export.export(model, (sample,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},))
torch.onnx.export(exported, (sample,), paths["fp32"], input_names=["x"], output_names=["y"],
                  dynamo=True, external_data=False, verbose=False)
onnx.checker.check_model(str(paths["fp32"]), full_check=True)
program = zhixing.output_path("exported.pt2")
torch.export.save(exported, program)
weights = zhixing.output_path("weights.pt")
torch.save(model.state_dict(), weights)

# %% [markdown]
# ## int8 量化
#
# **动态**：权重离线变成 int8，激活的量程每次推理现算，不要数据。**静态**：激活的量程用 256 张训练图校准，推理时不再算。没有 VNNI 的 x86 上，`uint8 × int8` 的指令两两相加时会在 int16 处饱和；`reduce_range` 把权重压到 7 位来避开，两种都做。

# %%
class Calibration(CalibrationDataReader):
    """按批给出校准图。"""

    def __init__(self):
        self.batches = iter(train_x[:256].split(64))

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {"x": batch.numpy()}


prepared = str(Path(tempfile.mkdtemp()) / "prepared.onnx")
quant_pre_process(str(paths["fp32"]), prepared)
quantize_dynamic(prepared, paths["dynamic"], weight_type=QuantType.QUInt8)
for name, seven in (("static", False), ("static7", True)):
    quantize_static(prepared, paths[name], Calibration(), per_channel=True, reduce_range=seven,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)


def session(path):
    """单线程的 ONNX Runtime 会话。"""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


module = exported.module()
runners = {
    "eager": lambda x: model(torch.from_numpy(x)).numpy(),
    "export": lambda x: module(torch.from_numpy(x)).numpy(),
}
for name, path in paths.items():
    runners[name] = lambda x, s=session(path): s.run(None, {"x": x})[0]

# %% [markdown]
# ## 体积与精度

# %%
x, y = test_x.numpy(), test_y.numpy()
logits = {name: run(x) for name, run in runners.items()}
accuracy = {name: float((value.argmax(1) == y).mean()) for name, value in logits.items()}
disk = {"eager": weights, "export": program, **paths}
size = {name: path.stat().st_size for name, path in disk.items()}

assert np.abs(logits["export"] - logits["eager"]).max() < 1e-4
assert np.abs(logits["fp32"] - logits["eager"]).max() < 1e-3         # 逐元素接近，不只是类别相同
assert 1 < size["export"] / size["eager"] < 1.3 and 1 < size["fp32"] / size["eager"] < 1.1         # 都是权重加一张图
assert accuracy["eager"] > 0.9 and accuracy["fp32"] == accuracy["export"] == accuracy["eager"]
for name in ("dynamic", "static", "static7"):
    assert 0.25 < size[name] / size["fp32"] < 0.32                   # 四分之一，多出来的是图结构与量程
    assert accuracy[name] > accuracy["eager"] - 0.03
    assert np.abs(logits[name] - logits["eager"]).max() > 0.01       # int8 确实在用：输出变了
for name in runners:
    zhixing.metric(f"accuracy_{name}", 100 * accuracy[name])
    zhixing.metric(f"kib_{name}", size[name] / 1024)
    zhixing.metric(f"agree_{name}", 100 * float((logits[name].argmax(1) == logits["eager"].argmax(1)).mean()))
zhixing.metric("onnx_gap", float(np.abs(logits["fp32"] - logits["eager"]).max()))
np.savez(zhixing.output_path("test.npz"), x=x[:1000], y=y[:1000], logits=logits["eager"][:1000])

# %% [markdown]
# ## 延迟与批大小
#
# 六种形式轮流跑，各取最快的一次：机器上别的进程只会让时间变长，最小值最接近“没人打扰”。

# %%
batches = [1, 2, 4, 8, 16, 32, 64, 128]
fastest = {name: np.full(len(batches), np.inf) for name in runners}
for k, n in enumerate(batches):
    for repeat in range(max(40, 640 // n)):
        for name, run in runners.items():
            start = time.perf_counter()
            run(x[:n])
            fastest[name][k] = min(fastest[name][k], time.perf_counter() - start)

rate = {name: batches / seconds for name, seconds in fastest.items()}        # 每秒多少张
assert rate["eager"][5] > 1.5 * rate["eager"][0]                     # 攒批提高吞吐……
assert all(seconds[-1] > 2 * seconds[0] for seconds in fastest.values())     # ……代价是每一批更慢
assert all(fastest[name][6] > 0.25 * fastest["fp32"][6] for name in ("dynamic", "static", "static7"))     # 体积四分之一，延迟不是
for name, seconds in fastest.items():
    zhixing.metric(f"us_{name}", 1e6 * float(seconds[0]))
    zhixing.metric(f"ms64_{name}", 1e3 * float(seconds[6]))
zhixing.metric("batch_gain", float(rate["eager"][5] / rate["eager"][0]))

# %%
names = {"eager": "PyTorch", "export": "torch.export", "fp32": "ONNX Runtime FP32", "dynamic": "动态 int8", "static": "静态 int8"}
fig, ax = plt.subplots(figsize=(6.4, 3.4))
for name, label in names.items():
    ax.plot(1e3 * fastest[name], rate[name], marker="o", ms=3, label=label)
ax.set(xscale="log", yscale="log", xlabel="一批的延迟（毫秒，对数轴）", ylabel="吞吐（张／秒，对数轴）")
ax.legend(frameon=False, fontsize=8)
zhixing.figure("throughput", fig)
