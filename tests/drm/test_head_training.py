"""A head learned from picks on a trunk that is a plain function: what it learns, how it is judged."""

import json

import pytest
import torch
from torch import Tensor

from drm import held_out
from drm.head_training import PAIRS, Compared, HeadTrainer, draw, split_by_prompt
from drm.shared import Taps, TrunkFacts

TRUNK = TrunkFacts(family="sd3", width=8, num_blocks=2, taps=(1, 2), latent_channels=4)


def read(x, sigma, prompts):
    """Tokens of 2 x 2 latents, as a trunk may have them."""
    tokens = torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)
    return Taps([tokens[..., :8], tokens[..., 8:]], x.shape[-2] // 2, x.shape[-1] // 2)


def compared(number, count=4, shape=(4, 4, 4)):
    """Pictures of which the one with the largest first channel is picked."""
    latents = torch.randn(count, *shape, generator=torch.Generator().manual_seed(number))
    latents[:, 0] += 2 * torch.randn(count, 1, 1, generator=torch.Generator().manual_seed(number + 1000))
    best = int(latents[:, 0].mean(dim=(1, 2)).argmax())
    return Compared(
        prompt=f"prompt {number % 25}",
        picks=(best,),
        count=count,
        shape=shape,
        latents=lambda rows: latents[list(rows)],
    )


def trainer(batches, steps=10, seed=3, **changes):
    learned, aside = split_by_prompt(batches, seed)
    return HeadTrainer(TRUNK, learned, aside, **{"steps": steps, "rate": 1e-3, "seed": seed, **changes})


def finish(one):
    while not one.done:
        while one.progress.step < one.next_look:
            one.advance(read)
        one.look(read)
    return one


@pytest.fixture(scope="module")
def batches():
    return [compared(i) for i in range(50)]


def test_a_taste_is_learned_and_held_to_prompts_not_seen(batches):
    one = finish(trainer(batches, steps=40))
    facts = one.facts(read)
    table = facts["accuracy"]
    assert table["accuracy"] > 0.75
    assert table["interval"][0] > 0.5
    assert table["interval"][0] < table["accuracy"] < table["interval"][1]
    assert (table["prompts"], table["pairs"]) == (5, 30)
    assert table["by_sigma"][0] > table["by_sigma"][3]
    assert facts["calibration"]["sigma"] == list(held_out.SIGMAS)
    assert one.progress.best.loss == min(look.loss for look in one.progress.looks)
    assert not {batch.prompt for batch in one.learned} & {batch.prompt for batch in one.held_out}


def test_the_split_is_by_prompt_and_leaves_something_to_learn_from(batches):
    learned, aside = split_by_prompt(batches, 0)
    assert (len(learned), len(aside)) == (40, 10)
    assert split_by_prompt(batches, 1)[1] != aside
    one_prompt = [compared(0), compared(25)]
    assert split_by_prompt(one_prompt, 0) == (one_prompt, [])
    learned, aside = split_by_prompt([compared(0), compared(1)], 0)
    assert (len(learned), len(aside)) == (1, 1)


def test_ten_thousand_batches_cost_what_a_hundred_cost():
    many = [compared(0, count=2)] * 10_000
    learned, aside = split_by_prompt(
        [Compared(**{**vars(batch), "prompt": f"{i}"}) for i, batch in enumerate(many)], 0
    )
    assert (len(learned), len(aside)) == (10_000 - 64, 64)
    one = HeadTrainer(TRUNK, learned, aside, steps=1, rate=1e-3, seed=0)
    assert finish(one).progress.step == 1
    assert len(one.prompts(1)) <= 64 + PAIRS


def test_a_step_is_a_function_of_seed_and_number(batches):
    drawn = draw(batches, 5, 2)
    assert drawn == draw(batches, 5, 2)
    assert drawn != draw(batches, 5, 3)
    assert [int(4 * pair.sigma) for pair in drawn] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert all(pair.win == pair.compared.picks[0] != pair.lose for pair in drawn)


def test_both_sides_have_noise_of_their_own(batches):
    seen = []

    def record(x: Tensor, sigma: float, prompts: list[str]) -> Taps:
        seen.append((x, sigma))
        return read(x, sigma, prompts)

    same = Compared(**{**vars(compared(0)), "latents": lambda rows: torch.zeros(len(rows), 4, 4, 4)})
    HeadTrainer(TRUNK, [same], [], steps=1, rate=1e-3, seed=0).advance(record)
    for x, sigma in seen:
        win, lose = x.chunk(2)
        assert float((win - lose).abs().min()) > 0
        assert abs(float(x.std()) / sigma - 1) < 0.2


def test_a_run_that_was_stopped_gives_the_same_head(batches):
    whole = finish(trainer(batches))
    for stop in (4, 5):
        first = trainer(batches)
        while first.progress.step < stop:
            first.advance(read)
            if first.progress.step == first.next_look:
                first.look(read)
        tensors, facts = first.state()
        second = trainer(batches)
        second.go_on({name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(facts)))
        finish(second)
        assert second.progress == whole.progress
        for name, value in whole.kept.state_dict().items():
            assert torch.equal(value, second.kept.state_dict()[name]), name


def test_batches_of_different_sizes_learn_together():
    one = finish(trainer([compared(i, shape=(4, 4, 4) if i % 2 else (4, 6, 8)) for i in range(8)], steps=2))
    assert one.progress.step == 2


def test_one_prompt_says_nothing_of_others():
    one = finish(trainer([compared(0)], steps=3))
    assert one.facts(read)["accuracy"] is None
    assert one.progress.best.step == 3
    assert len(one.facts(read)["calibration"]["mean"]) == 4


def test_what_cannot_be_learned_from_is_refused(batches):
    alone = Compared(**{**vars(compared(0, count=1)), "picks": (0,)})
    with pytest.raises(ValueError, match="say of no picture that it is better"):
        HeadTrainer(TRUNK, [alone], [], steps=1, rate=1e-3, seed=0)
    one = trainer(batches)

    def nan(x: Tensor, sigma: float, prompts: list[str]) -> Taps:
        taps = read(x, sigma, prompts)
        return Taps([taps.tokens[0], taps.tokens[1] * float("nan")], taps.rows, taps.columns)

    with pytest.raises(ValueError, match=r"tokens at sigma .* hold NaN or infinity: load it in bfloat16"):
        one.advance(nan)


def test_intervals_by_hand():
    # Wilson's for 8 of 10, as every table has it.
    low, high = held_out.wilson(0.8, 10)
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    assert held_out.wilson(1.0, 10)[1] == 1.0
    # Prompts that are all alike speak for themselves alone; those that differ by chance, for their pairs.
    assert held_out.interval(torch.full((4,), 0.5), 400) == held_out.wilson(0.5, 4)
    values = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert held_out.interval(values, 400) == held_out.wilson(0.5, 4)
    low, high = held_out.interval(torch.tensor([0.4, 0.6, 0.5, 0.55, 0.45]), 50)
    assert (low, high) == held_out.wilson(0.5, 50)
