"""DreamBooth：先验保持损失与手算、与 diffusers 训练脚本的算法逐元素一致；λ = 0 与没有类别图等价；
只有标识符那一行词向量有梯度；主体得分的性质；坏输入。"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from minisd import clip, dreambooth, pipeline, schedule, train, unet, vae, world


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def sd():
    """没训练过的三件套；U-Net 的末层不再是零，输出才有内容。"""
    torch.manual_seed(0)
    net = unet.UNet()
    for p in net.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return pipeline.StableDiffusion(clip.TextEncoder().eval(), vae.VAE().eval(), net.eval())


# ── 损失 ────────────────────────────────────────────────────────────

@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(0, 6), st.floats(-2, 3))
def test_loss_by_hand(instances, classes, lam):
    pred, target = torch.randn(2, instances + classes, 2, 3, generator=gen(instances * 7 + classes), dtype=torch.float64)
    square = (pred - target) ** 2
    want = square[:instances].mean() + (lam * square[instances:].mean() if classes else 0)
    torch.testing.assert_close(dreambooth.prior_preservation_loss(pred, target, instances, lam), want)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_loss_is_the_diffusers_rule(weight):
    """diffusers 的 train_dreambooth.py：批对半切开，instance + prior_loss_weight · prior，都是 F.mse_loss 的平均。"""
    pred, target = torch.randn(2, 8, 4, 6, 6, generator=gen())
    mine, theirs = pred.clone().requires_grad_(), pred.clone().requires_grad_()
    (p, p_prior), (t, t_prior) = theirs.chunk(2), target.chunk(2)
    reference = F.mse_loss(p, t, reduction="mean") + weight * F.mse_loss(p_prior, t_prior, reduction="mean")
    loss = dreambooth.prior_preservation_loss(mine, target, 4, weight)
    assert torch.equal(loss, reference)
    loss.backward()
    reference.backward()
    assert torch.equal(mine.grad, theirs.grad)


def test_lambda_zero_ignores_the_class_images():
    pred = torch.randn(6, 3, generator=gen()).requires_grad_()
    target = torch.randn(6, 3, generator=gen(1))
    dreambooth.prior_preservation_loss(pred, target, 2, 0).backward()
    assert pred.grad[:2].abs().min() > 0 and not pred.grad[2:].any()


@pytest.mark.parametrize(("change", "message"), [
    ({"target": torch.zeros(4, 2)}, "形状必须相同"),
    ({"instances": 0}, "instances 必须是 1 到 4"),
    ({"instances": 5}, "instances 必须是 1 到 4"),
    ({"instances": True}, "instances 必须是 1 到 4"),
    ({"instances": 2.0}, "instances 必须是 1 到 4"),
    ({"lam": float("nan")}, "lam 必须是有限的数"),
    ({"lam": "1"}, "lam 必须是有限的数"),
    ({"lam": True}, "lam 必须是有限的数"),
])  # fmt: skip
def test_bad_loss_arguments(change, message):
    arguments = {"pred": torch.zeros(4, 3), "target": torch.zeros(4, 3), "instances": 2, "lam": 1.0}
    with pytest.raises(ValueError, match=message):
        dreambooth.prior_preservation_loss(**{**arguments, **change})


# ── 标识符 ──────────────────────────────────────────────────────────

PROMPTS = ["一个犇圆", "一个圆", "红色的圆在左上", ""]


def test_identifier_starts_as_the_same_encoder(sd):
    ids = clip.tokenize(PROMPTS)
    encoder = dreambooth.add_identifier(sd.text_encoder, "犇")
    assert encoder is not sd.text_encoder and not isinstance(sd.text_encoder.token, dreambooth.Identifier)
    for mine, theirs in zip(encoder(ids), sd.text_encoder(ids)):
        assert torch.equal(mine, theirs)


def test_only_the_row_learns_and_only_its_prompts_change(sd):
    encoder = dreambooth.add_identifier(sd.text_encoder, "犇")
    ids = clip.tokenize(PROMPTS)
    before = encoder(ids)[0].detach()
    encoder(ids)[0].square().sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is not None] == ["token.row"]
    with torch.no_grad():
        encoder.token.row += 1
    changed = (encoder(ids)[0] != before).flatten(1).any(1)
    assert changed.tolist() == [True, False, False, False]


@pytest.mark.parametrize("character", ["猫", "犇犇", ""])
def test_unknown_identifier(sd, character):
    with pytest.raises(ValueError, match="不在词表里"):
        dreambooth.add_identifier(sd.text_encoder, character)


def test_identifier_cannot_be_added_twice(sd):
    with pytest.raises(ValueError, match="已经有一个"):
        dreambooth.add_identifier(dreambooth.add_identifier(sd.text_encoder, "犇"), "燚")


# ── 主体与得分 ──────────────────────────────────────────────────────

def test_subject_scores_one_and_is_placed():
    places = torch.arange(40) % 5
    scene = dreambooth.subject(places, gen())
    reading = dreambooth.read(scene.image)
    assert reading.score.min() > 0.95 and torch.equal(reading.place, places)
    assert scene.attrs[:, 1].tolist() == [world.SHAPES.index("圆")] * 40


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 4), st.integers(0, 10_000))
def test_any_single_colour_scores_exactly_zero(shape, seed):
    attrs = torch.tensor([[0, shape, p] for p in range(5)])
    color = torch.rand(5, 3, 1, 1, generator=gen(seed))
    image = world.draw(attrs, gen(seed), paint=lambda fill, m, c: color.expand_as(fill)).image
    assert not dreambooth.read(image).score.any()


def test_score_is_graded():
    """从单色一点点变成双色，得分单调上升；左右颠倒、背景一样都是 0。"""
    places = torch.arange(5)
    image = dreambooth.subject(places, gen()).image
    flat = world.draw(torch.tensor([[4, 0, p] for p in range(5)]), gen()).image
    scores = [dreambooth.read(flat + (image - flat) * k / 8).score.mean().item() for k in range(9)]
    assert scores[0] == 0 and scores[-1] > 0.95
    assert all(a <= b for a, b in zip(scores, scores[1:])) and 0.2 < scores[6] < 0.8
    assert not dreambooth.read(image.flip(3)).score.any()
    blank = dreambooth.read(torch.full((2, 3, 24, 24), 0.8))
    assert blank.score.tolist() == [0, 0] and blank.place.tolist() == [-1, -1]


def test_half_a_subject_is_not_enough():
    image = dreambooth.subject(torch.tensor([4]), gen()).image
    left = image.clone()
    left[..., 12:] = image[:, :, :1, :1]                                   # 右半擦成背景
    assert dreambooth.read(left).score < 0.4
    square = image.clone()
    square[:, :, 6:18, 6:18] = dreambooth.SUBJECT[0][:, None, None] * 2 - 1     # 盖成单色
    assert dreambooth.read(square).score == 0


@pytest.mark.parametrize(("images", "message"), [
    (torch.zeros(2, 1, 24, 24), "图像的形状"),
    (torch.zeros(3, 24, 24), "图像的形状"),
    (torch.zeros(1, 3, 24, 20), "图像的形状"),
    (torch.full((1, 3, 24, 24), torch.nan), "NaN"),
])  # fmt: skip
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        dreambooth.read(images)


# ── 类别图与训练目标 ────────────────────────────────────────────────

def test_class_images_are_what_the_pipeline_draws(sd):
    prompts = ["一个圆"] * 3
    latent = dreambooth.class_latents(sd, prompts, gen(4))
    assert torch.equal(sd.vae.to_image(latent), sd(prompts, gen(4)))
    assert dreambooth.class_latents(sd, ["一个圆"] * 5, gen(4), steps=2, batch=2).shape == (5, 4, 6, 6)
    with pytest.raises(ValueError, match="至少要一句"):
        dreambooth.class_latents(sd, [], gen())


def test_objective_by_hand(sd):
    sd.text_encoder = dreambooth.add_identifier(sd.text_encoder, "犇")
    mine = torch.randn(3, 4, 6, 6, generator=gen(1)), ["一个犇圆"] * 3
    prior = torch.randn(7, 4, 6, 6, generator=gen(2)), ["一个圆"] * 7
    loss = dreambooth.objective(sd, mine, prior, 0.7, batch=4)(gen(5))
    g = gen(5)
    i, j = torch.randint(3, (4,), generator=g), torch.randint(7, (4,), generator=g)
    t, eps = torch.randint(1000, (8,), generator=g), torch.randn(8, 4, 6, 6, generator=g)
    x0 = torch.cat([mine[0][i], prior[0][j]])
    text, valid = sd.encode(["一个犇圆"] * 4 + ["一个圆"] * 4)
    v = sd.unet(schedule.q_sample(sd.schedule, x0, t, eps), t, text, valid)
    error = (v - schedule.velocity(sd.schedule, x0, t, eps)).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, error[:4].mean() + 0.7 * error[4:].mean())
    loss.backward()
    assert sd.text_encoder.token.row.grad.any()


def test_without_prior_the_batch_holds_only_instances(sd):
    """没有类别图时，批里只有实例图。"""
    mine = torch.randn(3, 4, 6, 6, generator=gen(1)), ["一个犇圆"] * 3
    seen = []
    sd.unet = lambda x, t, text, valid: seen.append(len(x)) or x
    dreambooth.objective(sd, mine, None, batch=4)(gen())
    dreambooth.objective(sd, mine, (mine[0], ["一个圆"] * 3), batch=4)(gen())
    assert seen == [4, 8]


def test_training_is_reproducible(sd):
    mine = torch.randn(2, 4, 6, 6, generator=gen(1)), ["一个犇圆"] * 2
    prior = torch.randn(4, 4, 6, 6, generator=gen(2)), ["一个圆"] * 4

    def run():
        torch.manual_seed(0)
        model = pipeline.StableDiffusion(dreambooth.add_identifier(sd.text_encoder, "犇"), sd.vae, unet.UNet())
        return train.fit(model.unet, dreambooth.objective(model, mine, prior, batch=4), 4, train.adamw(model.unet, 3e-3),
                         generator=gen())  # fmt: skip

    first = run()
    assert torch.equal(first, run()) and first.isfinite().all()


@pytest.mark.parametrize("pair", [(torch.zeros(2, 4, 6, 6), ["一个圆"]), (torch.zeros(0, 4, 6, 6), [])])
def test_bad_pairs(sd, pair):
    good = torch.zeros(1, 4, 6, 6), ["一个圆"]
    with pytest.raises(ValueError, match="图与描述要一样多"):
        dreambooth.objective(sd, pair, None)
    with pytest.raises(ValueError, match="图与描述要一样多"):
        dreambooth.objective(sd, good, pair)
