"""Reward models trained with heads after earlier blocks: learned together, logged, resumed, exported."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from drm import load_drm, preference
from drm.checkpoint import read_header
from tests.training.encoded import make_config, write_base, write_encoded
from tests.training.processes import numbers, train, train_and_kill
from training import network
from training.batches import Batch
from training.config import ConfigError, ModelConfig
from training.reward_loss import Tally, pair_losses
from training.reward_report import as_rows, calibrated, held_out_table, in_order

EARLY = {"early_heads": (1,)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("depths")
    write_encoded(folder / "encoded")
    write_base(folder / "base.safetensors")
    return folder


@pytest.fixture(scope="module")
def reference(files: Path) -> Path:
    """6 steps with a head after the first of two blocks, never stopped."""
    config = make_config(
        files, model=EARLY, out=str(files / "reference"), steps=6, save_every=2, evaluate_every=3
    )
    train(config)
    return Path(config.train.out)


def batch(count: int) -> Batch:
    """Only what the loss reads: labels, weights (the last pair is padding) and sigmas."""
    weight = torch.ones(count).index_fill(0, torch.tensor([count - 1]), 0.0)
    weight[0] = 2.0
    parts = {"label": torch.full((count,), 0.9), "weight": weight, "sigma": torch.rand(count)}
    nothing = {name: torch.empty(0) for name in ("noisy", "prompt_embeds", "pooled")}
    return Batch(**parts, **nothing)


def test_the_file_keeps_every_head_and_what_decides(reference: Path):
    header = read_header(reference / "reward.safetensors")
    facts = header["metadata"]
    drm = load_drm(reference / "reward.safetensors")
    assert drm.depths == (1, 2)
    assert set(facts["decisive"]) == {"1"}
    table = facts["decisive"]["1"]
    assert table["sigma"] == header["calibration"]["sigma"]
    assert all(lead >= 0 for lead in table["lead"])
    by_depth = facts["held_out"]["by_depth"]
    assert set(by_depth) == {"1", "2"}
    assert by_depth["2"]["accuracy"] == facts["held_out"]["accuracy"]
    assert len(by_depth["1"]["by_sigma"]) == 4
    assert "decisive" not in facts["held_out"]


def test_accuracy_of_each_depth_in_the_logs(reference: Path):
    rows = numbers(reference / "log.jsonl")
    assert len(rows) == 6
    assert all(0 <= row["accuracy/1"] <= 1 for row in rows)
    assert any(row["accuracy/1"] != row["accuracy"] for row in rows)
    evaluated = numbers(reference / "evaluation.jsonl")
    assert [row["step"] for row in evaluated] == [3, 6]
    assert all(set(row["by_depth"]) == {"1", "2"} for row in evaluated)
    assert "decisive" in evaluated[-1]


def test_every_head_and_the_backbone_learn_from_the_early_loss(files: Path, reference: Path):
    start = network.build(make_config(files, model=EARLY, out="").model, seed=0).state_dict()
    made = load_file(reference / "reward.safetensors")
    assert made.keys() == start.keys()
    for part in ("early_heads.1.mlp.0.weight", "head.mlp.0.weight", "backbone.transformer_blocks.0.ff"):
        name = next(key for key in made if key.startswith(part))
        assert (made[name].float() - start[name]).abs().max() > 1e-4, part
    plain = make_config(files, out=str(files / "plain"), steps=2)
    train(plain)
    losses = [numbers(folder / "log.jsonl")[0]["loss"] for folder in (files / "plain", reference)]
    assert losses[1] > 1.5 * losses[0]


def test_killed_and_resumed_it_is_the_run_never_stopped(files: Path, reference: Path):
    config = make_config(
        files, model=EARLY, out=str(files / "killed"), steps=6, save_every=2, evaluate_every=3
    )
    train_and_kill(config, 3, delay=0.03)
    train(config)
    assert numbers(files / "killed" / "log.jsonl") == numbers(reference / "log.jsonl")
    one, two = (load_file(folder / "reward.safetensors") for folder in (reference, files / "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (
        read_header(files / "killed" / "reward.safetensors")["metadata"]["decisive"]
        == (read_header(reference / "reward.safetensors")["metadata"]["decisive"])
    )


def test_two_processes_equal_one(files: Path, reference: Path):
    config = make_config(files, model=EARLY, out=str(files / "two"), steps=6, save_every=6, micro_batch=3)
    train(config, world=2)
    rows = [numbers(folder / "log.jsonl") for folder in (reference, files / "two")]
    for name in ("loss", "accuracy", "accuracy/1"):
        assert [row[name] for row in rows[1]] == pytest.approx([row[name] for row in rows[0]], abs=1e-5)


@pytest.mark.parametrize("part", ["lora", "head"])
def test_heads_are_added_to_a_reward_model_that_has_fewer(files: Path, reference: Path, part: str):
    plain = make_config(files, out=str(files / "base_of_more"), steps=1)
    if not (files / "base_of_more" / "reward.safetensors").exists():
        train(plain)
    base = str(files / "base_of_more" / "reward.safetensors")
    model = {"base": base, "train": part, "lora_rank": 4, **EARLY}
    train(make_config(files, model=model, out=str(files / f"more_{part}"), steps=2))
    before, after = load_drm(base), load_drm(files / f"more_{part}" / "reward.safetensors")
    assert (before.depths, after.depths) == ((2,), (1, 2))
    again = network.build(
        ModelConfig(base=str(files / f"more_{part}" / "reward.safetensors"), train="head"), seed=5
    )
    assert again.depths == (1, 2)
    assert all(p.requires_grad for p in again.early_heads.parameters())


@pytest.mark.parametrize(("early", "words"), [((2,), "below 2"), ((0, 1), "growing"), ((1, 1), "growing")])
def test_impossible_depths_are_refused(files: Path, early: tuple[int, ...], words: str):
    with pytest.raises(ConfigError, match=words):
        network.build(make_config(files, model={"early_heads": early}, out="").model, seed=0)


def test_the_loss_is_the_sum_over_depths():
    win, lose, pairs = torch.randn(5, 3), torch.randn(5, 3), batch(5)
    for kind, loss in (("bradley-terry", preference.bradley_terry_loss), ("thurstone", None)):
        found = pair_losses(win, lose, pairs, kind)
        each = [pair_losses(win[:, [d]], lose[:, [d]], pairs, kind) for d in range(3)]
        torch.testing.assert_close(found, sum(each))
        if loss is not None:
            torch.testing.assert_close(each[1], loss(win[:, 1], lose[:, 1], pairs.label, pairs.weight))
    pairs.weight.zero_()
    assert pair_losses(win, lose, pairs, "bradley-terry") == 0


def test_the_tally_counts_the_last_depth_and_the_right_pairs_of_the_others():
    pairs, tally = batch(3), Tally.empty(torch.device("cpu"), (4,))
    win, lose = (
        torch.tensor([[1.0, 3.0], [0.0, 2.0], [9.0, 9.0]]),
        torch.tensor([[0.0, 5.0], [0.0, 1.0], [0, 0]]),
    )
    tally.add(torch.tensor(0.5), win, lose, pairs)
    figures = tally.figures()
    # The third pair is padding; the second is a tie early on.
    assert figures["accuracy"] == pytest.approx(0.5)
    assert figures["accuracy/4"] == pytest.approx(0.75)
    assert figures["margin"] == pytest.approx(-0.5)
    assert figures["rewards/mean"] == pytest.approx(11 / 4)


def test_gathered_rows_come_back_in_order():
    """Two processes with two batches of two; the very last place is padding."""
    win, lose = torch.arange(24.0).reshape(8, 3), -torch.arange(24.0).reshape(8, 3)
    sigma, weight = torch.linspace(0, 0.7, 8), torch.ones(8).index_fill(0, torch.tensor([7]), 0.0)
    # View i of the order is in batch i // 4, on process i // 2 % 2.
    found = [
        torch.stack(
            [
                as_rows(
                    *(part[4 * b + 2 * rank : 4 * b + 2 * rank + 2] for part in (win, lose, sigma, weight))
                )
                for b in range(2)
            ],
            dim=1,
        )
        for rank in range(2)
    ]
    again = in_order(torch.cat(found), depths=3)
    for one, other in zip(again, (win, lose, sigma), strict=True):
        assert torch.equal(one, other[:7])


def test_tables_by_depth():
    win = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    lose, sigma = 0.5 * torch.ones(4, 2), torch.tensor([0.1, 0.4, 0.6, 0.9])
    table = held_out_table(win, lose, sigma, ["a"], (1, 2))
    assert table["accuracy"] == table["by_depth"]["2"]["accuracy"] == 0.75
    assert table["by_depth"]["1"]["by_sigma"] == [1.0, 0.0, 1.0, 1.0]
    assert "by_depth" not in held_out_table(win[:, 1:], lose[:, 1:], sigma, ["a"], (2,))
    found = calibrated(win, lose, sigma, (1, 2), bins=2)
    # In pair 1 the finally better side is 0.5 behind early on, and in pair 2 too.
    assert found["decisive"] == {"1": {"sigma": [0.25, 0.75], "lead": [0.5, 0.5]}}
    assert "decisive" not in calibrated(win[:, 1:], lose[:, 1:], sigma, (2,), bins=2)


def test_coarse_tokens_are_learned_and_come_back(files: Path):
    config = make_config(files, model={"coarse": 2}, out=str(files / "coarse"), steps=2)
    start = network.build(config.model, seed=0)
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
