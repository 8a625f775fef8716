"""The arithmetic behind the reward model's tables, against values worked out by hand."""

import numpy as np
import pytest
import torch

from benchmarks import personal_taste, reward_studies, reward_training
from drm.backbone import sd35_medium_config
from tests.tiny import tiny_drm
from tests.training.encoded import write_encoded
from training.data.batches import HeldOutBatches
from training.data.shards import EncodedPairs


def test_an_interval_resamples_groups_and_models():
    groups = np.array([0, 0, 1, 1])
    mean, low, high = reward_studies.interval(np.array([[1.0, 1.0, 0.0, 0.0]]), groups)
    assert mean == 0.5
    assert (low, high) == (0.0, 1.0)  # both draws may be of one group
    assert reward_studies.interval(np.ones((3, 4)), groups) == (1.0, 1.0, 1.0)
    mean, low, high = reward_studies.interval(np.array([[1.0] * 4, [0.0] * 4]), groups)
    assert (mean, low, high) == (0.5, 0.0, 1.0)


def test_margins_are_the_model_s_own(tmp_path):
    pairs = EncodedPairs(write_encoded(tmp_path / "encoded", t5_lengths=()))
    drm = tiny_drm(hidden=64, depth=2)
    rows = torch.arange(22, 28)
    found = reward_studies.margins(drm, pairs, rows)
    assert found.shape == (6, 4)
    settings = {"rank": 0, "world": 1, "micro_batch": 1, "sigmas_each": 4, "t5_length": None}
    data = HeldOutBatches(pairs, rows, text_width=256, seed=7, **settings)
    batch = data[9]  # the third pair at its second sigma
    score = [
        drm.score(side, batch.sigma, batch.prompt_embeds.float(), batch.pooled.float())
        for side in batch.noisy.chunk(2)
    ]
    assert found[2, 1].item() == pytest.approx((score[0] - score[1]).item(), abs=0.02)


def test_what_fits_a_card():
    # 24 GB are 22.35 GiB, a fifth aside 18.63: 5 + 8 x 1.5 = 17 fits, 5 + 16 x 1.5 does not
    assert reward_training.largest_fit(5.0, 1.5, 24) == 8
    assert reward_training.largest_fit(18.0, 1.5, 24) is None
    assert reward_training.largest_fit(17.0, 1.5, 24) == 1


def test_full_training_keeps_five_copies_of_float32_weights():
    """Weights, gradients, two moments, averages: 20 bytes a parameter; the rest is what autograd keeps."""
    found = reward_training.computed(reward_training.TINY, "full", False, 64)
    parameters = found["learned_parameters"]
    bare = reward_training.computed(reward_training.TINY, "full", False, 64, averaged=False)
    assert (found["fixed_gib"] - bare["fixed_gib"]) * 2**30 == pytest.approx(4 * parameters)
    # and most weights cast to bfloat16 for the pass; the table of positions does not learn
    positions = 384 * 384 * reward_training.TINY.width * 4
    assert found["fixed_gib"] * 2**30 == pytest.approx(positions + 22 * parameters, rel=0.1)


def test_less_learned_or_checkpointed_is_less_memory():
    def computed(part: str, checkpointing: bool) -> dict:
        return reward_training.computed(reward_training.TINY, part, checkpointing, 64)

    full, lora, head = (computed(part, False) for part in ("full", "lora", "head"))
    assert full["fixed_gib"] > lora["fixed_gib"] > head["fixed_gib"]
    assert full["pair_gib"] > lora["pair_gib"] > head["pair_gib"]
    assert computed("full", True)["pair_gib"] < full["pair_gib"]


def test_the_full_size_is_sd35_medium():
    drm = reward_training.network(sd35_medium_config(), "lora", True, "meta")
    assert sum(p.numel() for p in drm.backbone.parameters() if not p.requires_grad) == pytest.approx(
        1.98e9, rel=0.005
    )


def test_tastes_order_pictures_as_they_say():
    pictures = np.full((3, 8, 8, 3), 255, dtype=np.uint8)
    pictures[0, :4] = (200, 40, 40)  # red
    pictures[1, :4] = (40, 40, 200)  # blue
    pictures[2, ::2] = (40, 200, 40)  # green, in stripes
    cold, busy = personal_taste.coldness(pictures), personal_taste.busyness(pictures)
    assert cold.tolist() == [-160.0, 160.0, 0.0]
    assert busy[2] > max(busy[0], busy[1])
