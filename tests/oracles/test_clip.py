"""CLIP 一页的事实与公式对照 transformers 的 CLIPModel：整机损失、因果掩码、取哪一层。"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from minisd import clip

transformers = pytest.importorskip("transformers")


def tiny(layers=3):
    """一个随机权重的小 CLIP；文本塔宽 16，3 层，77 位。"""
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2, "vocab_size": 50, "eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 49}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).double().eval()


def sentences(n, generator):
    ids = torch.randint(1, 48, (n, 9), generator=generator)
    ids[:, 0], ids[:, -1] = 48, 49
    return ids


@given(st.integers(1, 6), st.integers(0, 99))
def test_whole_model_loss_is_our_loss_on_its_embeddings(batch, seed):
    g = torch.Generator().manual_seed(seed)
    model = tiny()
    images = torch.randn(batch, 3, 8, 8, generator=g, dtype=torch.float64)
    with torch.no_grad():
        out = model(input_ids=sentences(batch, g), pixel_values=images, return_loss=True)
        image, text = F.normalize(out.image_embeds, dim=-1), F.normalize(out.text_embeds, dim=-1)
        scale = model.logit_scale.exp()
        torch.testing.assert_close(scale * image @ text.T, out.logits_per_image, rtol=0, atol=1e-10)
        torch.testing.assert_close(clip.contrastive_loss(image, text, scale), out.loss, rtol=0, atol=1e-10)


def test_initial_temperature_and_context_length():
    config = transformers.CLIPConfig()
    assert config.text_config.max_position_embeddings == 77
    assert torch.tensor(config.logit_scale_init_value).exp().item() == pytest.approx(1 / 0.07, rel=1e-3)
    assert clip.CLIP().scale().item() == pytest.approx(1 / 0.07, rel=1e-4)


def test_real_text_tower_is_causal_and_ours_is_not():
    model, g = tiny(), torch.Generator().manual_seed(0)
    one = sentences(1, g)
    two = one.clone()
    two[0, 5] = one[0, 5] % 47 + 1
    with torch.no_grad():
        a, b = (model.text_model(input_ids=ids).last_hidden_state[0] for ids in (one, two))
        assert torch.equal(a[:5], b[:5]) and not torch.allclose(a[5:], b[5:], atol=1e-3)
        c, d = clip.TextEncoder().eval()(clip.tokenize(["红色的圆在左上", "红色的圆在左下"]))[0]
    assert not torch.allclose(c[0], d[0], atol=1e-3)                   # 连 <始> 都受后面影响


def test_last_layer_has_the_final_norm_and_the_penultimate_does_not():
    """SD 1.x 用 last_hidden_state（已过 LayerNorm）；SDXL 用 hidden_states[-2]（没过）；SD 2.x 给后者补一次 LayerNorm。"""
    model, g = tiny(), torch.Generator().manual_seed(1)
    ids = sentences(2, g)
    with torch.no_grad():
        out = model.text_model(input_ids=ids, output_hidden_states=True)
        assert len(out.hidden_states) == 3 + 1                         # 词嵌入 + 每层一个
        norm = model.text_model.final_layer_norm
        torch.testing.assert_close(norm(out.hidden_states[-1]), out.last_hidden_state, rtol=0, atol=1e-12)
        shorter = tiny()
        del shorter.text_model.encoder.layers[-1]
        penultimate = shorter.text_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(norm(out.hidden_states[-2]), penultimate, rtol=0, atol=1e-12)


def test_our_penultimate_layer_is_one_block_less():
    encoder, ids = clip.TextEncoder().eval(), clip.tokenize(["红色的圆在左上"])
    with torch.no_grad():
        valid = ids != clip.PAD
        h = encoder.token(ids) + encoder.position
        h = encoder.blocks[0](h, src_key_padding_mask=~valid)
        full, _ = encoder(ids)
        last = encoder.norm(encoder.blocks[1](h, src_key_padding_mask=~valid))
    torch.testing.assert_close(full[valid], last[valid], rtol=0, atol=1e-5)
