"""迷你 CLIP：把图与中文描述映到同一个单位球面上（arXiv:2103.00020）。

训练完后冻结：文本编码器的逐字输出给 U-Net 的交叉注意力用，图像向量给 unCLIP、IP-Adapter 一类用。

约定：B 批大小，L = 12 描述的最大长度（含首尾标记），D 特征维度。
"""

# --8<-- [start:tokenize]
import math

import torch
from torch import nn
from torch.nn import functional as F

from minisd import world

LENGTH = 12
PAD, BEGIN, END = 0, 1, 2
# 描述里会出现的字；最后几个在基座的训练里从不出现，留给微调：新的风格词与稀有标识符
CHARACTERS = dict.fromkeys("".join([*world.COLORS, *world.SHAPES, *world.PLACES]) + "色的在有一个" + "条纹双风格犇燚垚")
INDEX = {c: i for i, c in enumerate(CHARACTERS, start=3)}
VOCABULARY = 3 + len(INDEX)


def tokenize(texts):
    """描述列表 → (B, L) 的字编号：<始> 逐字 <终> <空>…。空串得到 <始><终>，即“无条件”。

    词表外的字、超长的描述抛 ValueError，不悄悄截断。
    """
    ids = torch.full((len(texts), LENGTH), PAD)
    for row, text in zip(ids, texts):
        if unknown := [c for c in text if c not in INDEX]:
            raise ValueError(f"描述 {text!r} 里有词表外的字：{'、'.join(dict.fromkeys(unknown))}")
        if len(text) > LENGTH - 2:
            raise ValueError(f"描述 {text!r} 有 {len(text)} 个字，最多 {LENGTH - 2} 个")
        row[: len(text) + 2] = torch.tensor([BEGIN, *(INDEX[c] for c in text), END])
    return ids
# --8<-- [end:tokenize]


# --8<-- [start:encoders]
class TextEncoder(nn.Module):
    """字编号 (B, L) → 逐字特征 (B, L, D) 与有效位 (B, L)。两层双向 Transformer。"""

    def __init__(self, dim=64, depth=2, heads=4):
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, dim)
        self.position = nn.Parameter(torch.randn(LENGTH, dim) * 0.02)
        nn.init.normal_(self.token.weight, std=0.5)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, ids):
        valid = ids != PAD                                             # (B, L)
        h = self.token(ids) + self.position                            # (B, L, D)
        for block in self.blocks:
            h = block(h, src_key_padding_mask=~valid)
        return self.norm(h), valid


class ImageEncoder(nn.Module):
    """图 (B, 3, 24, 24) → (B, D)。三层步长 2 的卷积，展平后线性投影，所以记得住位置。"""

    def __init__(self, dim=64, width=32):
        super().__init__()
        widths = [3, width, 2 * width, 3 * width]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 4, 2, 1) for i, o in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(nn.GroupNorm(8, o) for o in widths[1:])
        self.project = nn.Linear(3 * width * 3 * 3, dim)

    def forward(self, images):
        if images.shape[1:] != (3, 24, 24):
            raise ValueError(f"图像的形状必须是 (B, 3, 24, 24)，收到 {tuple(images.shape)}")
        h = images
        for conv, norm in zip(self.convs, self.norms):
            h = F.gelu(norm(conv(h)))
        return self.project(h.flatten(1))                              # (B, 3w, 3, 3) → (B, D)
# --8<-- [end:encoders]


# --8<-- [start:clip]
class CLIP(nn.Module):
    """双塔。``logit_scale`` 是温度的倒数取对数，可学习，exp 之后不超过 100（论文 2.5 节）。"""

    def __init__(self, dim=64):
        super().__init__()
        self.text_encoder = TextEncoder(dim)
        self.text_project = nn.Linear(dim, dim, bias=False)
        self.image_encoder = ImageEncoder(dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_text(self, ids):
        """(B, L) → (B, D) 的单位向量：取 <终> 那一位的特征，投影，归一化。"""
        h, _ = self.text_encoder(ids)
        end = (ids == END).int().argmax(1)                             # (B,)
        return F.normalize(self.text_project(h[torch.arange(len(h)), end]), dim=-1)

    def embed_image(self, images):
        """(B, 3, 24, 24) → (B, D) 的单位向量。"""
        return F.normalize(self.image_encoder(images), dim=-1)

    def scale(self):
        return self.logit_scale.exp().clamp(max=100)


def contrastive_loss(image, text, scale, same=None):
    """对称 InfoNCE：每张图在一批描述里认出自己的那句，反之亦然（论文图 3 的伪代码）。

    image、text (B, D) 单位向量；``same`` (B, B) 布尔，标出内容相同的描述：同一批里有重复描述时
    它们都算正确答案（目标均分），缺省是单位阵，即原论文的写法。
    """
    logits = scale * image @ text.T                                    # (B, B)
    target = torch.eye(len(logits)).to(logits) if same is None else same.to(logits)
    per_image = target / target.sum(1, keepdim=True)
    per_text = target.T / target.T.sum(1, keepdim=True)
    return (F.cross_entropy(logits, per_image) + F.cross_entropy(logits.T, per_text)) / 2
# --8<-- [end:clip]
