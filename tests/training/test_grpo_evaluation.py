"""Held-out scores: the drawing, the diversity, and what decodes and judges the pictures."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from drm import flow
from tests.tiny import build_demo_family
from tests.training.fine_tuning import make_config
from tests.training.sd3_folder import _vae
from training.data.decoders import DecoderError, load_decoder
from training.demo import rival
from training.grpo.cost import forecast, kept, meta_policy
from training.grpo.held_out_prompts import diversity, draw, grid

MODELS = Path(__file__).parents[2] / "models"


def test_drawing_follows_a_straight_path_to_its_end():
    x0, noise = torch.full((2, 1, 2, 2), 3.0), torch.randn(2, 1, 2, 2)
    found = draw(lambda x, sigma: (x - x0) / sigma, noise, flow.schedule(7, 3.0))
    assert torch.allclose(found, x0, atol=1e-5)


def test_diversity_by_hand():
    one = torch.tensor([1.0, 1.0, 1.0, 3.0]).reshape(1, 4, 1, 1, 1).expand(1, 4, 2, 3, 3)
    # six pairs of seeds, three of them two apart
    assert diversity(one).tolist() == pytest.approx([3 * 2 / 6 / 2**0.5])
    assert diversity(one[:, :3]).tolist() == [0]
    assert diversity(one[:, :1]).tolist() == [0]
    unrelated = torch.randn(2, 3, 16, 20, 20, generator=torch.Generator().manual_seed(0))
    assert diversity(unrelated).tolist() == pytest.approx([1, 1], abs=0.02)


def test_a_grid_has_a_row_a_prompt_and_a_column_a_seed():
    red, blue = (Image.new("RGB", (4, 6), colour) for colour in ("red", "blue"))
    sheet = grid([[red, red, blue], [blue, red, red]])
    assert sheet.size == (12, 12)
    assert sheet.getpixel((9, 0)) == sheet.getpixel((0, 7)) == (0, 0, 255)


def test_pictures_of_sd3_s_vae_are_the_pipeline_s(tmp_path: Path):
    vae = _vae()
    vae.save_pretrained(tmp_path / "sd3" / "vae")
    latents = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    for folder in (tmp_path / "sd3", tmp_path / "sd3" / "vae"):
        pictures = load_decoder(folder)(latents)
        assert [picture.size for picture in pictures] == [(6 * 8, 4 * 8)] * 2
        pixel = torch.tensor(pictures[1].getpixel((5, 9)))
        assert torch.allclose(pixel.float(), (wanted[1, :, 9, 5].clamp(-1, 1) + 1) * 127.5, atol=0.51)


def test_what_is_no_vae(tmp_path: Path):
    text_encoder = build_demo_family(tmp_path, hidden=64, depth=1, text=64).text_encoder
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for path, words in ((text_encoder, "no VAE folder"), (tmp_path, "UNet2DModel"), (tmp_path / "x", "x is")):
        with pytest.raises(DecoderError, match=words):
            load_decoder(path)


def test_the_demo_s_judge_reads_prompts():
    words = {"cat": 3, "cat face": 5, "dog": 7}
    assert rival.asked("Cat face, noto style", words) == 5
    assert rival.asked("a cat in noto style", words) == 3
    with pytest.raises(ValueError, match="names none"):
        rival.asked("category", words)


@pytest.mark.skipif(not (MODELS / rival.JUDGE).is_file(), reason="the demo family is not there")
def test_the_demo_s_judge_knows_one_of_its_pictures_from_another(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rival, "MODELS", MODELS)
    samples = Image.open(MODELS / "samples.jpg")
    heart, sun = (samples.crop((128 * i, 0, 128 * (i + 1), 128)) for i in range(2))
    assert rival.score("heart, fluent style", [heart])[0] > 0.5 > rival.score("heart, fluent style", [sun])[0]


SHAPE = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 40,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}


def test_the_memory_forecast_counts_what_is_there(tmp_path: Path):
    found = forecast(make_config(tmp_path, out="none", rollout={"micro_prompts": 5}), SHAPE)
    policy = meta_policy(SHAPE, 4, half=False, checkpointing=False)
    numbers = [p.numel() for p in policy.learned.values()]
    assert found["learned parameters"] == sum(numbers) == 4 * 2 * 64 * (3 * 7 + 2 + 4)
    assert found["LoRA, gradients, Adam, averages"] * 2**30 == pytest.approx(5 * 4 * sum(numbers))
    assert (found["passes with gradients"], found["passes without"]) == (5 * 3, 5 * 3 * 3)
    assert found["scored"] == 5 * 3 * 3
    alone = meta_policy(SHAPE, 4, half=False, checkpointing=False)
    one, two = (kept(alone, n, 4, 77 + 256) for n in (1, 2))
    expected = max(0, 2 * one - two) + 5 * (two - one)
    assert found["kept for the backward pass"] * 2**30 == pytest.approx(expected)
    light = meta_policy(SHAPE, 4, half=False, checkpointing=True)
    assert kept(light, 1, 4, 77 + 256) < one / 3
