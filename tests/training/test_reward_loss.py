"""The loss of a batch, what is counted of it, held-out views in order, and a network of coarse tokens."""

from pathlib import Path

import pytest
import torch

from drm import load_drm, preference
from tests.training.encoded import make_config, write_base, write_encoded
from tests.training.processes import train
from training.data.batches import Batch
from training.reward import trainable
from training.reward.held_out_pairs import as_rows, calibrated, held_out_table, in_order
from training.reward.pair_loss import Tally, pair_losses


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loss")
    write_encoded(folder / "encoded")
    write_base(folder / "base.safetensors")
    return folder


def batch(count: int) -> Batch:
    """Only what the loss reads: labels, weights (the last pair is padding) and sigmas."""
    weight = torch.ones(count).index_fill(0, torch.tensor([count - 1]), 0.0)
    weight[0] = 2.0
    parts = {"label": torch.full((count,), 0.9), "weight": weight, "sigma": torch.rand(count)}
    nothing = {name: torch.empty(0) for name in ("noisy", "prompt_embeds", "pooled", "number")}
    return Batch(**parts, **nothing)


def test_the_loss_of_each_kind_and_of_nothing():
    win, lose, pairs = torch.randn(5), torch.randn(5), batch(5)
    wanted = preference.bradley_terry_loss(win, lose, pairs.label, pairs.weight)
    assert torch.equal(pair_losses(win, lose, pairs, "bradley-terry"), wanted)
    wanted = preference.thurstone_loss(win, lose, pairs.sigma, pairs.label, pairs.weight)
    assert torch.equal(pair_losses(win, lose, pairs, "thurstone"), wanted)
    pairs.weight.zero_()
    win.requires_grad_()
    nothing = pair_losses(win, lose, pairs, "bradley-terry")
    assert nothing == 0
    assert nothing.requires_grad


def test_the_tally_by_hand():
    pairs, tally = batch(3), Tally.empty(torch.device("cpu"))
    tally.add(torch.tensor(0.5), torch.tensor([3.0, 2.0, 9.0]), torch.tensor([5.0, 2.0, 0.0]), pairs)
    figures = tally.figures()
    # The third pair is padding; the second is a tie.
    assert figures["loss"] == pytest.approx(0.5)
    assert figures["accuracy"] == pytest.approx(0.25)
    assert figures["margin"] == pytest.approx(-1.0)
    assert figures["rewards/mean"] == pytest.approx(3.0)
    assert figures["rewards/std"] == pytest.approx(1.5**0.5)


def test_gathered_rows_come_back_in_order():
    """Two processes with two batches of two; the very last place is padding."""
    win, lose = torch.arange(8.0), -torch.arange(8.0)
    sigma, weight = torch.linspace(0, 0.7, 8), torch.ones(8).index_fill(0, torch.tensor([7]), 0.0)
    views = (win, lose, sigma, weight)
    # View i of the order is in batch i // 4, on process i // 2 % 2.
    found = [
        torch.stack(
            [as_rows(*(part[4 * b + 2 * rank : 4 * b + 2 * rank + 2] for part in views)) for b in range(2)],
            dim=1,
        )
        for rank in range(2)
    ]
    for one, other in zip(in_order(torch.cat(found)), views, strict=False):
        assert torch.equal(one, other[:7])


def test_the_held_out_table_by_hand():
    win, lose = torch.tensor([1.0, 1.0, 0.0, 1.0]), 0.5 * torch.ones(4)
    sigma = torch.tensor([0.1, 0.4, 0.6, 0.9])
    table = held_out_table(win, lose, sigma, ["a"])
    assert (table["pairs"], table["accuracy"], table["by_source"]) == (1, 0.75, {"a": 0.75})
    assert table["by_sigma"] == [1.0, 1.0, 0.0, 1.0]
    found = calibrated(win, lose, sigma, bins=2)["calibration"]
    assert found["sigma"] == [0.25, 0.75]
    assert found["mean"] == [0.75, 0.5]


def test_coarse_tokens_are_learned_and_come_back(files: Path):
    config = make_config(files, model={"coarse": 2}, out=str(files / "coarse"), steps=2)
    start = trainable.build(config.model, seed=0)
    assert start.backbone.pos_embed.proj.weight.requires_grad
    train(config)
    drm = load_drm(Path(config.train.out) / "reward.safetensors")
    assert drm.backbone.config.patch_size == 4
    learned, began = (m.backbone.pos_embed.proj.weight for m in (drm, start))
    assert not torch.allclose(learned, began, atol=1e-4)
    scores = drm.score(
        torch.randn(2, 16, 8, 8), 0.5, torch.randn(2, 7, drm.prompt_dim), torch.randn(2, drm.pooled_dim)
    )
    assert torch.isfinite(scores).all()
