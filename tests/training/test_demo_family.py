"""The models that ship: they load, draw what they are asked for, and the reward model and judge know it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from training.data.decoders import autoencoder_from_taesd
from training.demo import text
from training.demo.data import STYLES, read_concepts
from training.demo.drawings import MIXED, MIXED_UP_TO, augmented, draw_mixed, draw_way, mixtures
from training.demo.export import SAMPLE_WORDS, load_family, taesd_layout
from training.demo.generator import draw
from training.demo.judge import Judge, judge_pictures

MODELS = Path(__file__).resolve().parents[2] / "models"
LIMIT = 48 * 2**20


@pytest.fixture(scope="module")
def family():
    return load_family(MODELS)


@pytest.fixture(scope="module")
def drawn(family):
    captions = [f"{word}, {STYLES[i % 4]} style" for i, word in enumerate(SAMPLE_WORDS)]
    latents = draw(family.generator, family.tokenizer, captions, list(range(len(captions))))
    return captions, latents


def concept_of(family, word):
    return next(family.concepts.index(name) for name, words in read_concepts() if word in words)


def test_all_models_together_stay_under_48_mib():
    files = list(MODELS.rglob("*.safetensors"))
    assert len(files) == 4
    assert sum(path.stat().st_size for path in files) <= LIMIT


def test_everyday_prompts_are_drawn_recognisably(family, drawn):
    asked = torch.tensor([concept_of(family, word) for word in SAMPLE_WORDS])
    probability, rank = judge_pictures(family.judge, family.decode(drawn[1]), asked)
    missed = [word for word, r in zip(SAMPLE_WORDS, rank.tolist(), strict=True) if r > 1]
    assert len(missed) <= len(SAMPLE_WORDS) // 5, f"the judge sees something else in: {missed}"
    assert probability.mean() > 0.5


def test_reward_model_prefers_the_right_caption(family, drawn):
    captions, latents = drawn
    shifted = captions[5:] + captions[:5]
    with torch.no_grad():
        right, wrong = (
            family.drm.score(
                latents, 0.0, *text.embed(family.generator.text_encoder, text.encode_ids(family.tokenizer, c))
            )
            for c in (captions, shifted)
        )
    assert (right > wrong).float().mean() >= 0.9


def test_taesd_layout_and_back(family):
    layout = taesd_layout(family.autoencoder, family.statistics)
    autoencoder, statistics = autoencoder_from_taesd(layout)
    assert statistics == pytest.approx(family.statistics, rel=1e-5)
    for key, value in family.autoencoder.state_dict().items():
        torch.testing.assert_close(autoencoder.state_dict()[key], value, rtol=0, atol=0)


def test_judge_reports_probability_and_rank():
    class Fixed(Judge):
        def forward(self, pictures):
            return torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]).log_softmax(1)

    import numpy as np

    probability, rank = judge_pictures(Fixed(3), np.zeros((2, 64, 64, 3), np.uint8), torch.tensor([1, 0]))
    e = torch.tensor(1.0).exp()
    expected = torch.stack([e / (1 + e + e**2), e**3 / (e**3 + 2)])
    torch.testing.assert_close(probability, expected)
    assert rank.tolist() == [2, 1]


def test_a_mixed_caption_lies_between_two(family):
    captions, others, seeds = ["pumpkin, fluent style", "cat, noto style"], ["star, flat style"] * 2, [1, 2]
    way = ("final", 3, 1.5, 0.7, 0.5)

    def mixed(share):
        shares = torch.full((2,), share)
        return draw_mixed(family.generator, family.tokenizer, captions, others, shares, seeds, way)

    def plain(texts):
        return draw_way(family.generator, family.tokenizer, texts, seeds, way)

    torch.testing.assert_close(mixed(0.0), plain(captions), atol=0.05, rtol=0)
    torch.testing.assert_close(mixed(1.0), plain(others), atol=0.05, rtol=0)
    between = mixed(0.5)
    assert (between - plain(captions)).abs().mean() > 0.05
    assert (between - plain(others)).abs().mean() > 0.05


def test_what_is_mixed_repeats_with_its_seed_and_stays_with_the_icons_given():
    icons = torch.tensor([3, 5, 8])
    mine, theirs, share = mixtures(icons, 7)
    assert len(mine) == len(theirs) == len(share) == MIXED
    assert set(mine) == set(theirs) == {3, 5, 8}
    assert share.min() >= 0
    assert share.max() <= MIXED_UP_TO
    assert mixtures(icons, 7)[0] == mine
    assert mixtures(icons, 8)[0] != mine


def test_augmented_icons_are_encoded_as_the_generator_s_are(family):
    class Demo:
        images = np.full((2, 128, 128, 3), 255, dtype=np.uint8)

    Demo.images[1, 32:96, 32:96] = (200, 30, 30)
    latents = augmented(Demo, [1] * 12 + [0] * 12, family.autoencoder, family.statistics, 5)
    assert latents.shape == (24, 16, 16, 16)
    assert torch.equal(
        latents, augmented(Demo, [1] * 12 + [0] * 12, family.autoencoder, family.statistics, 5)
    )
    mean, std = family.statistics["mean"], family.statistics["std"]
    other = augmented(Demo, [1] * 12 + [0] * 12, family.autoencoder, {"mean": mean + 1, "std": 2 * std}, 5)
    torch.testing.assert_close(other, (latents * std - 1) / (2 * std))
    drawn = family.decode(latents).astype(float)
    red = drawn[..., 0] - drawn[..., 1]
    assert red[:12].mean() > red[12:].mean() + 10
    assert drawn[:12].std(axis=0).mean() > 10
