"""The sampling loop: what is called when, which candidate continues, and runs that must agree."""

import math

import pytest
import torch

from drm.branching import branch_noise
from drm.flow import schedule, velocity_from_denoised
from drm.sde import sde_step
from drm.stepwise import Trace, sample_stepwise

SHAPE = (4, 6, 4)
SIGMAS = schedule(6)


def denoise(x, sigma):
    """Some smooth network: depends on x, on sigma, and mixes neighbours; each item on its own."""
    return 0.6 * torch.tanh(x.roll(1, dims=-1)) * (1 - 0.5 * sigma) + 0.2


def closeness(candidates, sigma, item_index):
    """Prefers a bright first channel, differently for every batch row."""
    return candidates[:, 0].mean(dim=(1, 2)) * torch.where(item_index % 2 == 0, 1.0, -1.0)


class Recorder:
    """A scorer and a denoiser that note how they are called."""

    def __init__(self, score=closeness):
        self.denoised, self.scored, self._score = [], [], score

    def denoise(self, x, sigma):
        assert sigma.ndim == 0
        self.denoised.append((x.clone(), float(sigma)))
        return denoise(x, sigma)

    def score(self, candidates, sigma, item_index):
        assert isinstance(sigma, float)
        assert candidates.dtype == torch.float32
        assert item_index.dtype == torch.long
        self.scored.append((candidates.clone(), sigma, item_index.tolist()))
        return self._score(candidates, sigma, item_index)


def noise(batch=2, seed=0):
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(seed))


def euler(x, sigmas, start=0):
    """k-diffusion's sample_euler, in its own order of operations."""
    for i in range(start, len(sigmas) - 1):
        d = (x - denoise(x, sigmas[i])) / sigmas[i].expand(len(x))[:, None, None, None]
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return x


def test_one_quiet_branch_is_euler_bit_for_bit():
    for steps in (1, 2, 7, 20):
        sigmas = schedule(steps)
        result, trace = sample_stepwise(denoise, None, noise(3), sigmas, num_branches=1, noise_level=0.0)
        assert torch.equal(result, euler(noise(3), sigmas))
        assert [step.scores for step in trace.steps] == [None] * steps
    partial = schedule(9)[4:]
    assert torch.equal(
        sample_stepwise(denoise, None, noise(), partial, num_branches=1, noise_level=0.0, kind="cps")[0],
        euler(noise(), partial),
    )


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("num_branches", [1, 2, 5])
def test_calls(kind, num_branches):
    """One denoise a step; k candidates an item at sigma_next; none on the last step, which returns x0."""
    seen = Recorder()
    result, trace = sample_stepwise(
        seen.denoise, seen.score, noise(3), SIGMAS, num_branches=num_branches, kind=kind
    )
    assert [sigma for _, sigma in seen.denoised] == SIGMAS[:-1].tolist()
    expected = [float(sigma) for sigma in SIGMAS[1:-1] for _ in range(3)] if num_branches > 1 else []
    assert [sigma for _, sigma, _ in seen.scored] == expected
    assert all(len(candidates) == num_branches for candidates, _, _ in seen.scored)
    assert [index for _, _, index in seen.scored[:3]] == [[row] * num_branches for row in range(3)][
        : len(seen.scored)
    ]
    assert torch.equal(result, denoise(seen.denoised[-1][0], SIGMAS[-2]))
    assert trace.steps[-1].scores is None
    assert [(s.sigma, s.sigma_next) for s in trace.steps] == list(
        zip(SIGMAS[:-1].tolist(), SIGMAS[1:].tolist(), strict=True)
    )


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_the_loop_written_out(kind):
    """Two items, three branches, against the equations followed by hand with sde_step and branch_noise."""
    result, trace = sample_stepwise(
        denoise,
        closeness,
        noise(),
        SIGMAS,
        num_branches=3,
        noise_level=0.5,
        kind=kind,
        seed=99,
        item_ids=[4, 8],
    )
    for row, item in enumerate([4, 8]):
        x = noise()[row : row + 1]
        for step in range(len(SIGMAS) - 2):
            sigma, sigma_next = SIGMAS[step], SIGMAS[step + 1]
            velocity = velocity_from_denoised(x, denoise(x, sigma), sigma)
            candidates = torch.cat(
                [
                    sde_step(
                        x,
                        velocity,
                        sigma,
                        sigma_next,
                        branch_noise(SHAPE, 99, step, item, branch)[None],
                        noise_level=0.5,
                        kind=kind,
                        sigma_max=SIGMAS[1],
                    ).sample
                    for branch in range(3)
                ]
            )
            scores = closeness(candidates, float(sigma_next), torch.full((3,), row))
            torch.testing.assert_close(torch.tensor(trace.steps[step].scores[row]), scores, atol=1e-5, rtol=0)
            assert trace.steps[step].winner[row] == int(scores.argmax())
            x = candidates[scores.argmax()][None]
        torch.testing.assert_close(result[row : row + 1], denoise(x, SIGMAS[-2]), atol=1e-5, rtol=0)


def test_each_item_follows_its_own_winner():
    """Rows 0 and 1 start alike and share a noise stream; their scorers disagree, so their winners do."""
    x = noise(1).expand(2, -1, -1, -1)
    result, trace = sample_stepwise(denoise, closeness, x, SIGMAS, num_branches=4, item_ids=[0, 0])
    assert trace.steps[0].winner[0] != trace.steps[0].winner[1]
    assert result[0, 0].mean() > result[1, 0].mean()


def test_the_best_continues_whatever_its_place():
    for place in range(4):

        def prefer(candidates, sigma, item_index, place=place):
            return (torch.arange(len(candidates)) == place).float()

        seen = Recorder(prefer)
        _, trace = sample_stepwise(seen.denoise, seen.score, noise(1), SIGMAS, num_branches=4)
        assert [s.winner for s in trace.steps] == [[place]] * 5 + [[0]]
        for step in range(5):
            assert torch.equal(seen.denoised[step + 1][0][0], seen.scored[step][0][place])


def test_branch_zero_does_not_depend_on_how_many_there_are():
    first = {}
    for count in (2, 4):
        seen = Recorder()
        sample_stepwise(seen.denoise, seen.score, noise(1), SIGMAS, num_branches=count)
        first[count] = seen.scored[0][0]
    assert torch.equal(first[4][:2], first[2])
    always_first = Recorder(lambda candidates, sigma, index: -torch.arange(len(candidates)).float())
    chosen, _ = sample_stepwise(denoise, always_first.score, noise(1), SIGMAS, num_branches=4)
    alone, _ = sample_stepwise(denoise, None, noise(1), SIGMAS, num_branches=1)
    assert torch.equal(chosen, alone)


@pytest.mark.parametrize("chunk_size", [None, 2, 8, 100])
def test_a_batch_equals_its_items_one_by_one(chunk_size):
    def score(candidates, sigma, item_index):
        return candidates[:, 0].mean(dim=(1, 2))

    settings = {"num_branches": 4, "seed": 5, "chunk_size": chunk_size}
    together, trace = sample_stepwise(denoise, score, noise(3), SIGMAS, **settings)
    for row in range(3):
        alone, own = sample_stepwise(
            denoise, score, noise(3)[row : row + 1], SIGMAS, item_ids=[row], **settings
        )
        assert torch.equal(together[row], alone[0])
        assert [s.winner[row] for s in trace.steps] == [s.winner[0] for s in own.steps]


def test_runs_repeat_and_seeds_differ():
    def run(seed):
        return sample_stepwise(denoise, closeness, noise(), SIGMAS, seed=seed)[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert not torch.equal(run(1), run(1 + 2**40))


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 7, 64, 5000])
def test_a_thousand_branches_come_in_even_chunks(chunk_size):
    """Same result for every chunk size; every call has one shape, within the size asked for."""
    seen, sigmas = Recorder(), schedule(3)
    settings = {"num_branches": 1000, "seed": 3}
    result, trace = sample_stepwise(
        seen.denoise, seen.score, noise(2), sigmas, chunk_size=chunk_size, **settings
    )
    whole, reference = sample_stepwise(denoise, closeness, noise(2), sigmas, chunk_size=2000, **settings)
    sizes = {len(candidates) for candidates, _, _ in seen.scored}
    assert len(sizes) == 1
    assert max(sizes) <= (chunk_size or 16)
    assert [s.winner for s in trace.steps] == [s.winner for s in reference.steps]
    assert len(trace.steps[0].scores[0]) == 1000
    assert torch.equal(result, whole)


def test_window():
    """Ten steps, branching from 0.3 to 0.6: steps 3, 4 and 5; the rest is Euler."""
    seen, sigmas = Recorder(), schedule(10)
    result, trace = sample_stepwise(seen.denoise, seen.score, noise(1), sigmas, start=0.3, end=0.6)
    assert [step.scores is not None for step in trace.steps] == [3 <= i < 6 for i in range(10)]
    assert torch.equal(seen.denoised[3][0], euler(noise(1), sigmas[:4]))
    torch.testing.assert_close(result, euler(seen.denoised[6][0], sigmas, start=6))
    empty, _ = sample_stepwise(denoise, closeness, noise(1), sigmas, start=0.4, end=0.4)
    torch.testing.assert_close(empty, euler(noise(1), sigmas))


def test_noise_scale():
    seen = {}
    for scale in (1.0, 0.5):
        seen[scale] = Recorder()
        sample_stepwise(denoise, seen[scale].score, noise(1), SIGMAS, num_branches=2, noise_scale=scale)
    wide, narrow = (seen[scale].scored[0][0] for scale in (1.0, 0.5))
    torch.testing.assert_close(narrow[0] - narrow[1], (wide[0] - wide[1]) / 2, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("num_branches", [1, 4])
def test_reimpose_reaches_every_candidate_and_the_result(num_branches):
    kept = torch.zeros(1, 1, *SHAPE[1:])
    kept[..., :3] = 1

    def reimpose(x, sigma):
        assert x.shape == (2, *SHAPE)
        return torch.where(kept.bool(), torch.full_like(x, float(sigma)), x)

    seen = Recorder()
    result, _ = sample_stepwise(
        seen.denoise, seen.score, noise(), SIGMAS, num_branches=num_branches, reimpose=reimpose
    )
    for candidates, sigma, _ in seen.scored:
        assert (candidates[..., :3] == sigma).all()
        assert (candidates[..., 3] != sigma).any()
    for x, sigma in seen.denoised[1:]:
        assert (x[..., :3] == sigma).all()
    assert (result[..., :3] == 0).all()


def test_callback_and_interrupt():
    events, ticks = [], []

    def interrupt():
        ticks.append(len(events))
        if len(ticks) == 7:
            raise InterruptedError

    sample_stepwise(denoise, closeness, noise(), SIGMAS, callback=events.append)
    assert [event["step"] for event in events] == list(range(6))
    assert torch.equal(events[0]["x"], noise())
    assert torch.equal(events[0]["denoised"], denoise(noise(), SIGMAS[0]))
    assert events[2]["scores"].shape == (2, 4)
    assert events[5]["scores"] is None
    assert (events[2]["sigma"], events[2]["sigma_next"]) == (float(SIGMAS[2]), float(SIGMAS[3]))
    with pytest.raises(InterruptedError):
        sample_stepwise(denoise, closeness, noise(), SIGMAS, num_branches=40, interrupt=interrupt)


def test_one_step_and_no_step():
    result, trace = sample_stepwise(denoise, closeness, noise(), schedule(1))
    assert torch.equal(result, denoise(noise(), torch.tensor(1.0)))
    assert len(trace.steps) == 1
    for sigmas in ([], [0.5]):
        latents = noise()
        result, trace = sample_stepwise(denoise, closeness, latents, sigmas)
        assert result is latents
        assert trace.steps == []


def test_half_precision_inputs_are_sampled_in_float32():
    seen = Recorder(lambda *args: closeness(*args).to(torch.bfloat16))
    result, _ = sample_stepwise(seen.denoise, seen.score, noise().half(), SIGMAS)
    assert result.dtype == torch.float32
    assert {x.dtype for x, _ in seen.denoised} == {torch.float32}


def test_trace_survives_json():
    _, trace = sample_stepwise(denoise, closeness, noise(), SIGMAS, seed=2**64 - 1, start=0.2)
    again = Trace.from_json(trace.to_json())
    assert again == trace
    assert again.steps[1].scores is None
    assert len(again.steps[3].scores) == 2
    with pytest.raises(ValueError, match="not a step-wise sampling trace"):
        Trace.from_json('{"steps": 3}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_branches": 0}, "num_branches is 0"),
        ({"noise_level": 0.0}, "all 4 candidates"),
        ({"noise_scale": 0.0}, "all 4 candidates"),
        ({"noise_scale": -1.0}, "noise_scale is -1.0"),
        ({"kind": "ddim"}, "'sde' or 'cps'"),
        ({"start": 0.7, "end": 0.3}, "window is 0.7 to 0.3"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"score": None}, "no scorer"),
        ({"sigmas": [14.6, 3.0, 0.0]}, "flow-matching"),
        ({"sigmas": [0.5, float("nan"), 0.0]}, "flow-matching"),
        ({"sigmas": [0.5, 0.8, 0.0]}, "must fall"),
        ({"sigmas": [0.5, 0.0, 0.0]}, "must fall"),
        ({"latents": torch.zeros(0, *SHAPE)}, "non-empty"),
        ({"latents": torch.full((1, *SHAPE), math.nan)}, "NaN"),
        ({"item_ids": [0]}, "1 item_ids for a batch of 2"),
        ({"score": lambda c, s, i: torch.full((len(c),), math.nan)}, "returned nan for batch item 0"),
        ({"score": lambda c, s, i: torch.zeros(len(c), 1)}, "not one each"),
    ],
)
def test_bad_input_is_refused(change, message):
    settings = {"score": closeness, "latents": noise(), "sigmas": SIGMAS, "num_branches": 4, **change}
    positional = [settings.pop(name) for name in ("score", "latents", "sigmas")]
    with pytest.raises(ValueError, match=message):
        sample_stepwise(denoise, *positional, **settings)
