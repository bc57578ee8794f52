"""采样器：DDIM、PNDM、DPM-Solver++(2M) 与 DDIM 反演。

采样器只认识日程 ``s``（schedule.Schedule）与一个函数 ``denoise(x, t) -> pred``，不认识网络：
x (B, ...)，t (B,) 的 long，pred 与 x 同形；``kind`` 说明 pred 是 "eps"、"x0" 还是 "v"。

约定
----
* 步号 t 从 0 数到 T-1；**-1 表示干净数据**，那里 ᾱ = 1。走完一条轨迹总是停在 -1。
* 一条轨迹是一串严格递减的步号 t_0 > t_1 > … > t_{n-1}，每一步从一个步号走到下一个，最后走到 -1。
* 记 a = √ᾱ（信号）、b = √(1-ᾱ)（噪声）、λ = log(a/b)。a² + b² = 1。

四种方法共用一个动作 ``move``：拿一对 (x̂_0, ε̂) 按下一个步号的系数重新混合。区别只在这一对从哪里来。

形状、步数、方法名或取值不合约定，预测出现 NaN 或无穷时抛 ValueError。
"""

# --8<-- [start:timesteps]
import math
import operator

import torch

from minisd.schedule import _same, convert, split


def timesteps(T, steps, spacing="trailing"):
    """从 T 个步号里取 ``steps`` 个，从大到小，长 ``steps`` 的列表（arXiv:2305.08891 表 2）。

    "trailing"：从 T-1 起等距往下。起点与训练时的纯噪声一致，是缺省。
    "leading" ：从 0 起每隔 ⌊T/steps⌋ 取一个，到不了 T-1。
    "linspace"：0 与 T-1 都取，中间等距。
    """
    steps = whole(steps, "采样步数")
    if not 1 <= steps <= T:
        raise ValueError(f"采样步数必须在 1 到训练步数 T = {T} 之间，收到 {steps}")
    if spacing == "trailing":
        return [round(T - i * T / steps) - 1 for i in range(steps)]
    if spacing == "leading":
        return [i * (T // steps) for i in reversed(range(steps))]
    if spacing == "linspace":
        return [round(i * (T - 1) / max(steps - 1, 1)) for i in reversed(range(steps))]
    raise ValueError(f'步号取法必须是 "trailing"、"leading" 或 "linspace"，收到 {spacing!r}')
# --8<-- [end:timesteps]


# --8<-- [start:ddim]
def level(s, t):
    """步号 t 处的 (a, b) = (√ᾱ, √(1-ᾱ))，两个 float；t = -1 是干净数据 (1, 0)。"""
    alpha_bar = s.alpha_bar[t].item() if t >= 0 else 1.0
    return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)


def ddim_sigma(s, t, t_next, eta=1.0):
    """σ(η) = η √((1-ᾱ')/(1-ᾱ)) √(1 - ᾱ/ᾱ')（arXiv:2010.02502 式 16），带撇的是 t_next。"""
    (a, b), (a_next, b_next) = level(s, t), level(s, t_next)
    return eta * b_next / b * math.sqrt(1 - (a / a_next) ** 2)


def ddim_step(s, x, t, t_next, pred, kind="eps", eta=0.0, noise=None):
    """DDIM 的一步（式 12）：x' = a' x̂_0 + √(b'² - σ²) ε̂ + σ z。t_next 可以小于或大于 t。

    x、pred、noise 都是 (B, ...)；η = 0 时不用 noise。走到 t_next = -1 时 b' = σ = 0，结果就是 x̂_0。
    """
    x0, eps = split(s, x, t, pred, kind)
    a_next, b_next = level(s, t_next)
    if not eta:
        return a_next * x0 + b_next * eps
    _same(x, noise=noise)
    sigma = ddim_sigma(s, t, t_next, eta)
    along = math.sqrt(max(b_next**2 - sigma**2, 0.0))                      # 舍入可能让差略小于 0
    return a_next * x0 + along * eps + sigma * noise


def move(s, x, t, t_next, pred, kind):
    """确定性地从 t 走到 t_next：η = 0 的 DDIM 一步。"""
    return ddim_step(s, x, t, t_next, pred, kind)


def ddim(s, ask, x, ts, kind, eta, generator):
    """DDIM。每步问一次网络。"""
    where = x.device if generator is None else generator.device            # 生成器在哪里就在哪里抽，再搬过去
    for t, t_next in zip(ts, [*ts[1:], -1]):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=where).to(x.device) if eta else None
        x = ddim_step(s, x, t, t_next, ask(x, t), kind, eta, noise)
        yield x
# --8<-- [end:ddim]


# --8<-- [start:pndm]
ADAMS = {                                            # Adams–Bashforth 系数，最新的预测在前
    1: (1,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def pndm(s, ask, x, ts, kind):
    """PNDM 的线性多步形式（PLMS，arXiv:2202.09778 式 9、12）：用最近四个 ε̂ 的组合代替这一个。

    头一步没有历史：先试走一步，在终点再问一次网络，取两个 ε̂ 的平均重走，所以 n 步共问 n+1 次。
    这与 diffusers 的 PNDMScheduler(skip_prk_steps=True) 相同；原论文的头三步用四阶龙格–库塔，要多问九次。
    ε̂ 的一点变化会被放大 a'/a 倍，所以不要从 ᾱ ≈ 0 处起步：缺省的步号取法是 "leading"。
    """
    past = []
    for t, t_next in zip(ts, [*ts[1:], -1]):
        _, eps = split(s, x, t, ask(x, t), kind)
        past = [eps, *past[:3]]                                            # 最新的在前，至多四个
        if len(past) == 1 and t_next >= 0:
            trial = move(s, x, t, t_next, eps, "eps")
            eps = (eps + split(s, trial, t_next, ask(trial, t_next), kind)[1]) / 2
        else:
            eps = sum(c * e for c, e in zip(ADAMS[len(past)], past, strict=True))
        x = move(s, x, t, t_next, eps, "eps")
        yield x
# --8<-- [end:pndm]


# --8<-- [start:dpm]
def dpm_solver_pp(s, ask, x, ts, kind):
    """DPM-Solver++(2M)（arXiv:2211.01095 算法 2）：在 λ 上把 x̂_0 线性外推半步。

    每步 x' = (b'/b) x - a' (e^{-h} - 1) D，h = λ' - λ，D = x̂_0 + h/(2 h_prev) · (x̂_0 - 上一步的 x̂_0)。
    因为 a' e^{-h} = a b'/b，这恰好是把 D 当作 x̂_0 的 ``move``，不用算指数，也就没有无穷：
    末步走到 ᾱ = 1，λ' = ∞，退回一阶（D = x̂_0），结果就是 x̂_0。首步没有历史，也是一阶。
    """
    lam = s.snr.log() / 2                                                  # (T,) λ，处处有限
    last = None
    for i, (t, t_next) in enumerate(zip(ts, [*ts[1:], -1])):
        x0, _ = split(s, x, t, ask(x, t), kind)
        D = x0
        if last is not None and t_next >= 0:
            h, h_prev = lam[t_next] - lam[t], lam[t] - lam[ts[i - 1]]
            D = x0 + (h / (2 * h_prev)).item() * (x0 - last)
        last = x0
        x = move(s, x, t, t_next, D, "x0")
        yield x
# --8<-- [end:dpm]


# --8<-- [start:sample]
@torch.no_grad()
def sample(s, denoise, x_T, steps, method="dpm++", kind="v", eta=0.0, spacing=None,
           generator=None, callback=None):
    """从 x_T (B, ...) 出发走完一条轨迹，返回 x_0 (B, ...)。不改动 x_T，不记梯度。

    ``steps``     步数；也可以是一串严格递减的步号，例如图生图用 ``timesteps(T, 20)[8:]`` 从半路开始。
    ``method``    "ddim"、"pndm" 或 "dpm++"。DDPM（σ² = β̃）就是 method="ddim"、eta=1。
    ``kind``      预测类型："eps"、"x0" 或 "v"。
    ``eta``       0 到 1，只有 "ddim" 可以不为 0；噪声取自 ``generator``。
    ``spacing``   步号取法，见 ``timesteps``；缺省时 "pndm" 用 "leading"，另两种用 "trailing"。
    ``callback``  每步之后以 callback(i, t, x) 调用：第 i 步（从 0 数）从步号 t 走到了 x。
    """
    if method not in ("ddim", "pndm", "dpm++"):
        raise ValueError(f'采样方法必须是 "ddim"、"pndm" 或 "dpm++"，收到 {method!r}')
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta <= 1:
        raise ValueError(f"eta 必须在 0 到 1 之间，收到 {eta!r}")
    if eta and method != "ddim":
        raise ValueError(f'{method} 是确定性的，eta 必须为 0，收到 {eta}；要随机采样请用 method="ddim"')
    ts = check_path(s, steps, spacing or ("leading" if method == "pndm" else "trailing"))
    ask = checked(denoise, x_T)
    walk = {
        "ddim": lambda: ddim(s, ask, x_T, ts, kind, eta, generator),
        "pndm": lambda: pndm(s, ask, x_T, ts, kind),
        "dpm++": lambda: dpm_solver_pp(s, ask, x_T, ts, kind),
    }[method]()
    for i, x in enumerate(walk):
        if not x.isfinite().all():
            raise ValueError(f"第 {i} 步（t = {ts[i]}）之后样本出现 NaN 或无穷：步子太大，请增加步数或换一种方法")
        if callback is not None:
            callback(i, ts[i], x)
    return x
# --8<-- [end:sample]


# --8<-- [start:invert]
@torch.no_grad()
def invert(s, denoise, x0, steps, kind="v", spacing="trailing", refine=0, callback=None):
    """DDIM 反演：把干净数据 x0 (B, ...) 送回它的“初始噪声”，返回 (B, ...)。

    采样从 t 走到更小的 t' 用的是 ε̂(x_t, t)；倒过来走时 x_t 还不知道，先拿手里的 x_{t'} 去问网络，
    这就是误差的来源。``refine`` 大于 0 时再用刚得到的 x_t 去问，重走 ``refine`` 次（不动点迭代），
    收敛时与采样严格互逆。每步问 1 + refine 次网络。

    重走用 v 的形式：采样的一步是旋转 x_{t'} = cosΔ x_t - sinΔ v̂(x_t, t)，Δ 是两个步号的夹角，
    反解 x_t。这样迭代的缩小率约为 tanΔ，在 ᾱ ≈ 0 那一头也小于 1；用 ε 的形式在那里接近 1，不收敛。
    """
    if whole(refine, "refine") < 0:
        raise ValueError(f"refine 不能为负，收到 {refine}")
    ts = check_path(s, steps, spacing)[::-1]                               # 从小到大
    ask = checked(denoise, x0)
    x = x0
    for i, (t_now, t) in enumerate(zip([-1, *ts[:-1]], ts)):               # 从 t_now 走上 t
        (a_now, b_now), (a, b) = level(s, t_now), level(s, t)
        _, eps = split(s, x, t, ask(x, t), kind)
        x_t = a * (x - b_now * eps) / a_now + b * eps
        for _ in range(refine):
            v = convert(s, x_t, t, ask(x_t, t), kind, "v")
            x_t = (x + (a_now * b - b_now * a) * v) / (a_now * a + b_now * b)
        x = x_t
        if callback is not None:
            callback(i, t, x)
    return x
# --8<-- [end:invert]


# --8<-- [start:check]
def whole(value, name):
    """整数（含 0 维整型张量）→ int。"""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}必须是整数，收到 {value!r}") from None


def check_path(s, steps, spacing):
    """步数或步号序列 → 严格递减的步号列表。"""
    if not isinstance(steps, list | tuple | range):
        return timesteps(len(s), steps, spacing)
    ts = [whole(t, "步号") for t in steps]
    if not ts or ts[0] >= len(s) or ts[-1] < 0 or any(t <= u for t, u in zip(ts, ts[1:])):
        raise ValueError(f"步号序列必须非空、严格递减、在 0 到 {len(s) - 1} 之间，收到 {ts}")
    return ts


def checked(denoise, x):
    """把 denoise 包成 ask(x, t)：t 是整数，预测的形状与取值当场核对。"""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim < 1:
        raise ValueError("起点必须是形状 (B, ...) 的浮点张量")
    if not x.isfinite().all():
        raise ValueError("起点含有 NaN 或无穷")

    def ask(x, t):
        pred = denoise(x, torch.full((len(x),), t, dtype=torch.long, device=x.device))
        if not isinstance(pred, torch.Tensor) or pred.shape != x.shape:
            got = tuple(pred.shape) if isinstance(pred, torch.Tensor) else type(pred).__name__
            raise ValueError(f"denoise 的返回值形状必须是 {tuple(x.shape)}，收到 {got}")
        if not pred.isfinite().all():
            raise ValueError(f"t = {t} 处的预测含有 NaN 或无穷：检查模型权重，或是否把 kind 写错导致样本发散")
        return pred.to(x.dtype)

    return ask
# --8<-- [end:check]
