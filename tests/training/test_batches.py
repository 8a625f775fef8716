"""Which pairs, which noise: the same for whoever asks."""

from collections import Counter
from functools import partial

import pytest
import torch

from tests.training.encoded import write_encoded
from training.data.batches import (
    HeldOutBatches,
    Mixture,
    Share,
    TrainingBatches,
    generator,
    logit_normal_sigmas,
    uniform_sigmas,
)
from training.data.shards import EncodedPairs, ShardError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> EncodedPairs:
    return EncodedPairs(write_encoded(tmp_path_factory.mktemp("encoded")))


def mixture(pairs: EncodedPairs, **weights: float) -> Mixture:
    rows = torch.arange(22)
    return Mixture(rows, pairs.columns["source"][:22], weights, seed=3)


def batches(pairs: EncodedPairs, rank: int = 0, world: int = 1, micro: int = 8, **changes) -> TrainingBatches:
    share = Share(rank=rank, world=world, global_batch=8, micro_batch=micro)
    settings = {"start": 0, "steps": 6, "drop_t5": 0.3, "text_width": 256, "seed": 3, "shared_noise": True}
    settings["sigmas"] = partial(uniform_sigmas, 0.0, 1.0)
    return TrainingBatches(pairs, mixture(pairs), share, **{**settings, **changes})


def test_an_epoch_is_every_pair_once_in_another_order_each_time(pairs: EncodedPairs):
    first, second = mixture(pairs).epoch(0), mixture(pairs).epoch(1)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(22))
    assert first.tolist() != second.tolist()
    assert torch.equal(first, mixture(pairs).epoch(0))


def test_weights_say_how_often_an_epoch_goes_through_a_source(pairs: EncodedPairs):
    mixed = mixture(pairs, hpdv3=2.0, pickapic=0.5)
    counts = Counter(pairs.columns["source"][row] for row in mixed.epoch(0).tolist())
    assert counts == {"hpdv3": 22, "pickapic": 6}  # of 11 each: twice, and half rounded to even
    assert len(mixed) == 28
    times = Counter(mixed.epoch(0).tolist())
    assert {times[row] for row in range(22) if pairs.columns["source"][row] == "hpdv3"} == {2}


def test_a_weight_for_a_source_that_is_not_there_is_named(pairs: EncodedPairs):
    with pytest.raises(ShardError, match="names hpdv4: the encoded sources are hpdv3, pickapic"):
        mixture(pairs, hpdv4=1.0)
    with pytest.raises(ShardError, match="no pair is left"):
        mixture(pairs, hpdv3=0.0, pickapic=0.0)


def test_the_last_batch_of_an_epoch_is_short(pairs: EncodedPairs):
    data = batches(pairs)
    assert [len(data.rows(step)) for step in range(6)] == [8, 8, 6, 8, 8, 6]
    seen = torch.cat([data.rows(step) for step in range(3)])
    assert sorted(seen.tolist()) == list(range(22))


@pytest.mark.parametrize(("world", "micro"), [(1, 3), (2, 8), (2, 3), (3, 2), (5, 8)])
def test_any_number_of_processes_sees_the_same_batch(pairs: EncodedPairs, world: int, micro: int):
    for step in (0, 2):
        whole = batches(pairs)[step]
        shared = [batches(pairs, rank, world, micro) for rank in range(world)]
        parts = [
            data[step * data.share.micro_steps + m] for data in shared for m in range(data.share.micro_steps)
        ]
        weight = torch.cat([part.weight for part in parts])
        real, kept = torch.argwhere(weight > 0).flatten(), whole.weight > 0
        for name in ("sigma", "prompt_embeds", "pooled", "weight", "label", "number"):
            joined = torch.cat([getattr(part, name) for part in parts])[real]
            assert torch.equal(joined, getattr(whole, name)[kept]), name
        for side in (0, 1):
            joined = torch.cat([part.noisy.chunk(2)[side] for part in parts])[real]
            assert torch.equal(joined, whole.noisy.chunk(2)[side][kept])
        assert weight.sum() == pytest.approx(batches(pairs).total_weight(step))


def test_both_sides_of_a_pair_share_noise_and_sigma(pairs: EncodedPairs):
    data, columns = batches(pairs), pairs.columns
    batch, rows = data[0], data.rows(0)
    chosen, rejected = (pairs.latents(columns[name][rows].tolist()) for name in ("chosen", "rejected"))
    sigma = batch.sigma.reshape(-1, 1, 1, 1)
    noisy = batch.noisy.chunk(2)
    one, two = (
        (side - (1 - sigma) * clean) / sigma for side, clean in zip(noisy, (chosen, rejected), strict=True)
    )
    assert torch.allclose(one, two, atol=1e-3)
    assert one.std() == pytest.approx(1.0, abs=0.1)
    assert not torch.allclose(one[0], one[1], atol=0.1)


def test_every_step_draws_noise_of_its_own(pairs: EncodedPairs):
    data, noise = batches(pairs, sigmas=partial(uniform_sigmas, 0.5, 1.0)), []
    for step in (0, 1):
        clean = pairs.latents(pairs.columns["chosen"][data.rows(step)].tolist())
        sigma = data[step].sigma.reshape(-1, 1, 1, 1)
        noise.append((data[step].noisy.chunk(2)[0] - (1 - sigma) * clean) / sigma)
    assert torch.corrcoef(torch.stack([noise[0].flatten(), noise[1].flatten()]))[0, 1].abs() < 0.1


def test_starting_later_continues_the_same_batches(pairs: EncodedPairs):
    whole, later = batches(pairs), batches(pairs, start=4)
    assert len(later) == 2
    assert torch.equal(later[0].noisy, whole[4].noisy)


def test_text_lengths_vary_by_step_and_t5_is_sometimes_left_out(pairs: EncodedPairs):
    data = batches(pairs, steps=200)
    lengths = Counter(data.t5_length(step) for step in range(200))
    assert set(lengths) == {None, 5, 8}
    assert lengths[None] / 200 == pytest.approx(0.3, abs=0.1)
    widths = {data[step].prompt_embeds.shape[1:] for step in range(8)}
    assert widths <= {(6, 256), (11, 256), (14, 256)}
    assert len(widths) > 1


def test_sigmas_fill_their_range_evenly(pairs: EncodedPairs):
    data = batches(pairs, steps=500, sigmas=partial(uniform_sigmas, 0.2, 0.6))
    drawn = torch.cat([data.sigmas(step) for step in range(500)])
    assert drawn.min() >= 0.2
    assert drawn.max() <= 0.6
    assert torch.histc(drawn, 4, 0.2, 0.6).tolist() == pytest.approx([1000] * 4, rel=0.12)


def test_neighbouring_keys_give_unrelated_numbers():
    draws = torch.stack([torch.randn(512, generator=generator(0, 4, step)) for step in range(40)])
    correlation = torch.corrcoef(draws) - torch.eye(40)
    assert correlation.abs().max() < 0.2


@pytest.mark.parametrize("world", [1, 2, 3])
def test_held_out_views_are_the_same_for_any_number_of_processes(pairs: EncodedPairs, world: int):
    def views(world: int) -> list[tuple[float, float]]:
        found = []
        for rank in range(world):
            data = HeldOutBatches(
                pairs,
                torch.arange(22, 28),
                rank=rank,
                world=world,
                micro_batch=5,
                sigmas_each=4,
                t5_length=5,
                text_width=256,
                seed=0,
            )
            for index in range(len(data)):
                batch = data[index]
                noisy = batch.noisy.flatten(1).sum(1)
                found += [
                    (float(s), float(n))
                    for s, n, w in zip(batch.sigma, noisy, batch.weight, strict=False)
                    if w > 0
                ]
        return sorted(found)

    assert len(views(world)) == 24
    assert views(world) == views(1)
    assert [sum(int(s * 4) == quarter for s, _ in views(world)) for quarter in range(4)] == [6] * 4


def test_each_side_has_a_noise_of_its_own_when_asked(pairs: EncodedPairs):
    batch = batches(pairs, shared_noise=False, sigmas=partial(uniform_sigmas, 0.5, 1.0))[0]
    data = batches(pairs)
    columns, rows = pairs.columns, data.rows(0)
    sigma = batch.sigma.reshape(-1, 1, 1, 1)
    clean = [pairs.latents(columns[name][rows].tolist()) for name in ("chosen", "rejected")]
    first, second = (
        ((side - (1 - sigma) * x) / sigma).flatten()
        for side, x in zip(batch.noisy.chunk(2), clean, strict=True)
    )
    for noise in (first, second):
        assert abs(noise.std().item() - 1) < 0.05
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 0.05


def test_logit_normal_sigmas_are_places_of_the_shifted_schedule():
    drawn = logit_normal_sigmas(3.0, torch.Generator().manual_seed(0), 40_000)
    even = drawn / (3 - 2 * drawn)  # the shift turned back
    torch.testing.assert_close(1000 * even, (1000 * even).round(), atol=2e-2, rtol=0)
    assert drawn.min() > 0
    assert drawn.max() <= 1
    # By hand: half of the places lie above 1/2, where the shift makes 3/4; 15.87 % above sigmoid(1) = .7311.
    assert abs((drawn > 0.75).float().mean().item() - 0.5) < 0.01
    assert abs((drawn > 3 * 0.7311 / (1 + 2 * 0.7311)).float().mean().item() - 0.1587) < 0.01
    torch.testing.assert_close(logit_normal_sigmas(1.0, torch.Generator().manual_seed(0), 40_000), even)


def test_every_pair_of_a_run_has_its_number(pairs: EncodedPairs):
    data = batches(pairs, micro=4)
    numbers = torch.cat([data[index].number for index in range(6)])
    assert numbers.unique().numel() == numbers.numel()
    other = batches(pairs, micro=4, seed=4)
    assert not set(other[0].number.tolist()) & set(numbers.tolist())
