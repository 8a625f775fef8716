"""Ways to spend and choose, in the loop: what is drawn and scored, who continues, runs that must agree."""

import math

import pytest
import torch

from drm.branching import branch_noise
from drm.flow import velocity_from_denoised
from drm.sde import transition
from drm.search import PATH_STREAMS, Search, gumbel
from drm.stepwise import Trace, sample_stepwise
from tests.drm.searching import SHAPE, SIGMAS, Brightness, Plain, denoise, noise

SEARCHES = {
    "full": Search(early_exit=False),
    "early exit": Search(),
    "softmax": Search(choice="softmax", temperature=0.03),
    "beam": Search(paths=3),
    "beam, early end": Search(paths=2, beam_end=0.5, early_exit=False),
    "beam and softmax": Search(paths=2, choice="softmax", temperature=0.03, early_exit=False),
    "good enough": Search(good_enough=0.55, early_exit=False),
    "good enough, early exit": Search(good_enough=0.55),
    "good enough beam": Search(good_enough=0.9, paths=3),
    "skip": Search(skip_below=1.2, early_exit=False),
    "skip, early exit": Search(skip_below=0.9),
    "skip beam": Search(skip_below=1.0, paths=2),
    "stride and fewer": Search(stride=2, last_branches=2, sigma_window=(0.95, 0.4)),
    "everything": Search(
        choice="softmax",
        temperature=0.02,
        paths=2,
        beam_end=0.7,
        last_branches=3,
        good_enough=0.9,
        skip_below=0.5,
    ),
}


def run(x=None, search=None, score=None, **settings):
    settings = {"num_branches": 4, "seed": 5, **settings}
    x = noise(3) if x is None else x
    return sample_stepwise(denoise, score or Brightness(), x, SIGMAS, search=search, **settings)


def candidates(x, step, branches, item=0, seed=5):
    """Branch numbers of one state (1, C, H, W) at a step, by the equations: (len(branches), C, H, W)."""
    sigma, sigma_next = SIGMAS[step], SIGMAS[step + 1]
    velocity = velocity_from_denoised(x, denoise(x, sigma), sigma)
    mean, std = transition(x, velocity, sigma, sigma_next, 0.7, "sde", SIGMAS[1])
    return torch.cat([mean + std * branch_noise(SHAPE, seed, step, item, branch) for branch in branches])


@pytest.mark.parametrize("name", SEARCHES)
def test_a_batch_equals_its_items_one_by_one(name):
    together, trace = run(noise(4), SEARCHES[name])
    for row in range(4):
        alone, own = run(noise(4)[row : row + 1], SEARCHES[name], item_ids=[row])
        assert torch.equal(together[row], alone[0])
        for ours, theirs in zip(trace.steps, own.steps, strict=True):
            assert ours.winner[row] == theirs.winner[0]
            if theirs.scores is not None:
                assert ours.scores[row] == theirs.scores[0]


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("num_branches", [4, 5])
def test_the_chunk_size_changes_nothing(name, num_branches):
    whole, reference = run(search=SEARCHES[name], num_branches=num_branches)
    for chunk_size in (1, 3, 8, 100):
        result, trace = run(search=SEARCHES[name], num_branches=num_branches, chunk_size=chunk_size)
        assert torch.equal(result, whole)
        assert trace.steps == reference.steps


@pytest.mark.parametrize("name", SEARCHES)
def test_a_trace_survives_json_and_says_what_was_spent(name):
    score = Brightness()
    _, trace = run(search=SEARCHES[name], score=score)
    assert Trace.from_json(trace.to_json()) == trace
    assert sum(trace.spent["scored"].values()) == sum(len(index) for _, index, _ in score.calls)
    # What the paths scored where a beam was merged on the way is in no step; nor is what filled a shape.
    if SEARCHES[name].beam_end == 1:
        assert sum(sum(step.drawn) for step in trace.steps) == sum(trace.spent["scored"].values())
    assert trace.search == SEARCHES[name].as_dict()
    assert run()[1].search is None


def test_k_of_one_without_noise_is_euler_whatever_the_search():
    plain, _ = run(num_branches=1, noise_level=0.0)
    for name, search in SEARCHES.items():
        if search.paths == 1:
            assert torch.equal(run(num_branches=1, noise_level=0.0, search=search)[0], plain), name


def test_candidates_left_behind_early_are_scored_no_deeper():
    """Of item 0's first step by hand: depth 1 drops what is over 0.05 behind, depth 2 what is left over."""
    score = Brightness(lead=0.05)
    _, trace = run(noise(1), Search(), score)
    drawn = candidates(noise(1), 0, range(4))
    first = score.at_depth(drawn, 1)
    expected, alive = [1] * 4, first >= first.max() - 0.05
    if alive.sum() > 1:
        second = score.at_depth(drawn, 2).masked_fill(~alive, -math.inf)
        expected = [2 if a else 1 for a in alive]
        alive = second >= second.max() - 0.05
        if alive.sum() > 1:
            expected = [3 if a else d for a, d in zip(alive, expected, strict=True)]
    assert trace.steps[0].depth == [expected]
    depths = {d for step in trace.steps if step.depth for d in step.depth[0]}
    assert depths == {1, 2, 3}
    assert sum(trace.spent["scored"].values()) == 4 * 7


def test_a_lead_nobody_has_is_the_full_search():
    full, reference = run(search=SEARCHES["full"])
    result, trace = run(search=Search(), score=Brightness(lead=1e9))
    assert torch.equal(result, full)
    assert trace.spent["scored"] == {"3": 4 * 3 * 7}
    assert reference.spent["scored"] == {"full": 4 * 3 * 7}
    plain, _ = run(search=Search(), score=Plain())
    assert torch.equal(plain, full)


def test_a_scorer_that_cannot_say_keeps_everyone():
    full, _ = run(search=SEARCHES["full"])
    assert torch.equal(run(search=Search(), score=Brightness(lead=None))[0], full)


def test_drawing_stops_at_a_good_enough_candidate():
    """Rounds of two; an item with one above mean + z std = 0.2 + 0.1257 * 0.1 in its first draws no more."""
    _, trace = run(search=Search(good_enough=0.55, early_exit=False))
    threshold = 0.2 + 0.1256613 * 0.1
    seen = set()
    for step in trace.steps[:-1]:
        for row in step.scores:
            assert len(row) == (2 if max(row[:2]) > threshold else 4)
            seen.add(len(row))
    assert seen == {2, 4}


def test_good_enough_reads_the_full_depth():
    """With early exits the round's leader goes all the way, so that its score means what was calibrated."""
    _, trace = run(search=Search(good_enough=0.55))
    drawn = set()
    for step in trace.steps[:-1]:
        for row, depth, winner in zip(step.scores, step.depth, step.winner, strict=True):
            full = [score if blocks == 3 else -math.inf for score, blocks in zip(row, depth, strict=True)]
            assert 3 in depth[:2]
            assert len(row) == (2 if max(full[:2]) > 0.2125661 else 4)
            assert full[winner] == max(full)
            drawn.add(len(row))
    assert drawn == {2, 4}


def test_alike_siblings_end_an_items_branching():
    """skip_below 1.2 stds of 0.1: after a step whose scores differ by less than 0.12 an item rests."""
    score = Plain()
    _, trace = run(noise(4), Search(skip_below=1.2), score)
    ended = [None] * 4
    for number, step in enumerate(trace.steps[:-1]):
        for row in range(4):
            if ended[row] is not None:
                assert step.scores is None or step.scores[row] == []
            elif max(step.scores[row]) - min(step.scores[row]) < 0.12:
                ended[row] = number
    assert None not in ended
    assert len(set(ended)) > 1


def test_an_item_that_rests_takes_euler_steps():
    _, trace = run(noise(1), Search(skip_below=1e6, early_exit=False), Plain())
    assert [step.drawn for step in trace.steps] == [[4]] + [[0]] * 7
    result, _ = run(noise(1), Search(skip_below=1e6, early_exit=False), Plain())
    first = candidates(noise(1), 0, range(4))
    x = first[Plain().at_depth(first, 3).argmax()][None]
    for step in range(1, 8):
        velocity = velocity_from_denoised(x, denoise(x, SIGMAS[step]), SIGMAS[step])
        x = x + velocity * (SIGMAS[step + 1] - SIGMAS[step]) if step < 7 else denoise(x, SIGMAS[step])
    torch.testing.assert_close(result, x, atol=1e-5, rtol=0)


def test_softmax_takes_the_highest_of_score_and_gumbel_noise():
    search = Search(choice="softmax", temperature=0.03, early_exit=False)
    _, trace = run(search=search, item_ids=[7, 8, 9])
    differ = 0
    for number, step in enumerate(trace.steps[:-1]):
        keys = torch.tensor(step.scores).double() / 0.03 + gumbel(5, number, [7, 8, 9], range(4))
        assert step.winner == keys.argmax(dim=1).tolist()
        differ += step.winner != torch.tensor(step.scores).argmax(dim=1).tolist()
    assert differ > 0


def test_a_cold_softmax_is_greedy_and_a_seed_repeats_a_warm_one():
    greedy, _ = run(search=SEARCHES["full"])
    cold = Search(choice="softmax", temperature=1e-9, early_exit=False)
    assert torch.equal(run(search=cold)[0], greedy)
    warm = SEARCHES["softmax"]
    assert torch.equal(run(search=warm)[0], run(search=warm)[0])
    assert not torch.equal(run(search=warm)[0], run(search=warm, seed=6)[0])


def test_a_beam_keeps_the_best_of_all_paths():
    """Two paths, three branches, one item, followed by hand: each path has its own velocity and streams."""
    score = Plain()
    result, trace = run(noise(1), Search(paths=2), score, num_branches=3)
    paths = [noise(1)]
    for step in range(7):
        drawn = torch.cat(
            [candidates(x, step, [p * PATH_STREAMS + j for j in range(3)]) for p, x in enumerate(paths)]
        )
        scores = score.at_depth(drawn, 3)
        torch.testing.assert_close(
            torch.tensor(trace.steps[step].scores[0]), scores.float(), atol=1e-5, rtol=0
        )
        order = scores.argsort(descending=True)[:2]
        assert trace.steps[step].kept[0] == order.tolist()
        assert trace.steps[step].winner[0] == order[0]
        paths = [drawn[i][None] for i in order]
    finished = torch.cat([denoise(x, SIGMAS[7]) for x in paths])
    final = score.at_depth(finished, 3)
    torch.testing.assert_close(torch.tensor(trace.steps[7].scores[0]), final.float(), atol=1e-5, rtol=0)
    assert trace.steps[7].winner == [int(final.argmax())]
    torch.testing.assert_close(result, finished[final.argmax()][None], atol=1e-5, rtol=0)
    assert trace.spent["denoise"] == 1 + 2 * 7


def test_a_beam_of_one_is_greedy_and_wider_beams_score_higher():
    greedy, _ = run()
    assert torch.equal(run(search=Search(paths=1, early_exit=False))[0], greedy)
    wide, _ = run(search=Search(paths=4, early_exit=False))
    score = Brightness()
    assert (score.at_depth(wide, 3) > score.at_depth(greedy, 3)).all()


def test_a_beam_that_ends_goes_on_with_its_best_path():
    _, trace = run(search=Search(paths=2, beam_end=0.5, early_exit=False))
    # One path at step 0, two at 1 to 3, one again from step 4 of 8.
    assert trace.spent["denoise"] == 1 + 2 * 3 + 4
    assert [len(step.scores[0]) for step in trace.steps[:-1]] == [4, 8, 8, 8, 4, 4, 4]
    assert [step.kept is not None for step in trace.steps] == [True] * 4 + [False] * 4


def test_more_paths_than_the_first_step_draws():
    _, trace = run(search=Search(paths=6, early_exit=False), num_branches=2)
    assert [len(step.scores[0]) for step in trace.steps] == [2, 4, 8, 12, 12, 12, 12, 6]
    assert [len(step.kept[0]) for step in trace.steps[:4]] == [2, 4, 6, 6]


def test_branch_zero_is_the_same_in_every_search():
    first = {}
    for count, search in ((2, None), (4, None), (4, SEARCHES["beam"]), (4, SEARCHES["good enough"])):
        score = Brightness()
        run(noise(1), search, score, num_branches=count)
        first[count, search] = score.calls[0][2]
    for drawn in first.values():
        assert torch.equal(drawn[:2], first[2, None])


@pytest.mark.parametrize("name", ["full", "beam", "good enough", "skip", "everything"])
def test_reimpose_reaches_every_candidate_and_the_result(name):
    kept = torch.zeros(1, 1, *SHAPE[1:])
    kept[..., :3] = 1

    def reimpose(x, sigma):
        assert x.shape == (3, *SHAPE)
        return torch.where(kept.bool(), torch.full_like(x, float(sigma)), x)

    score = Brightness()
    result, _ = run(search=SEARCHES[name], score=score, reimpose=reimpose)
    for sigma, _, drawn in score.calls:
        assert (drawn[..., :3] == sigma).all()
    assert (result[..., :3] == 0).all()


def test_candidates_come_in_the_scorers_dtype_and_continue_in_float32():
    class Half(Plain):
        dtype = torch.bfloat16

    score, seen = Half(), []

    def watched(x, sigma):
        seen.append(x)
        return denoise(x, sigma)

    result, _ = sample_stepwise(watched, score, noise(), SIGMAS, search=Search(paths=2))
    assert {drawn.dtype for _, _, drawn in score.calls} == {torch.bfloat16}
    assert {x.dtype for x in seen} == {torch.float32}
    assert result.dtype == torch.float32
    assert any(not torch.equal(x, x.bfloat16().float()) for x in seen[1:])


def test_cancel_in_the_middle_of_a_beam():
    calls, limit = [], 6

    def interrupt():
        calls.append(None)
        if len(calls) == limit:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(search=Search(paths=3), interrupt=interrupt)
    assert len(calls) == limit


def test_callback_tells_of_items_that_drew_fewer():
    events = []
    _, trace = run(search=Search(good_enough=0.55, early_exit=False), callback=events.append)
    for event, step in zip(events[:-1], trace.steps[:-1], strict=True):
        assert event["scores"].isnan().sum(dim=1).tolist() == [
            event["scores"].shape[1] - len(row) for row in step.scores
        ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search": Search(good_enough=0.9), "score": lambda *a: None}, "good_enough need.*calibration"),
        ({"search": Search(skip_below=0.2), "score": lambda *a: None}, "skip_below need.*calibration"),
        ({"seconds": 0.0}, "seconds is 0"),
        ({"seconds": math.nan}, "seconds is nan"),
    ],
)
def test_bad_input_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        run(**settings)
