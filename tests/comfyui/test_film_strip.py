"""DRM Film Strip: predictions at the forks of a path are what the model says there, and change nothing."""

import pytest
import torch
from PIL import Image


@pytest.fixture(scope="module")
def vae(inside):
    """A decoder that paints each latent in the shade of its mean, at 8 times the size."""

    class Shades:
        def decode(self, samples):
            shade = samples.mean(dim=1).sigmoid()[..., None].expand(-1, -1, -1, 3)
            return shade.repeat_interleave(8, 1).repeat_interleave(8, 2)

    return Shades()


@pytest.fixture(scope="module")
def kept(inside):
    return inside.run(inside.latent(batch=2), num_branches=3, steps=6, film_strip=4)


def test_looking_changes_nothing(inside, kept):
    latent, trace = inside.run(inside.latent(batch=2), num_branches=3, steps=6)
    assert torch.equal(latent["samples"], kept[0]["samples"])
    assert trace.steps == kept[1].steps
    assert trace.forks == []
    # Three candidates at four forks, on top of the calls that a run without a film strip makes.
    assert kept[1].spent["film"] == 3 * 4
    assert kept[1].spent["denoise"] == trace.spent["denoise"] == 6
    assert "film" not in trace.spent


def test_the_metadata_stay_plain(inside, kept):
    assert "forks" not in kept[1].to_json()
    assert inside.pack.module("drm.trace").Trace.from_json(kept[1].to_json()) == kept[1]


def test_forks_are_spread_over_the_steps_that_choose(inside, kept):
    fork_steps = inside.pack.module("nodes.forks").fork_steps
    assert fork_steps([0, 0, *[4] * 16, 0, 0], 4) == [2, 6, 10, 14]
    assert fork_steps([4, 0, 4, 0, 0], 4) == [0, 2]
    assert fork_steps([1, 1, 0], 4) == fork_steps([4, 4, 0], 0) == []
    assert [fork.step for fork in kept[1].forks] == [0, 1, 2, 3]


def test_the_chosen_one_is_predicted_as_the_next_step_sees_it(inside, kept):
    """The next step denoises the chosen candidate: the same call of the model, to rounding."""
    seen = []
    step_loop = inside.pack.module("nodes.step_loop")
    report = step_loop._report
    try:
        step_loop._report = lambda step, *others: seen.append(step["denoised"].clone())
        inside.run(inside.latent(batch=2), num_branches=3, steps=6)
    finally:
        step_loop._report = report
    to_latent = inside.model.model.process_latent_out
    for fork in kept[1].forks:
        winners = kept[1].steps[fork.step].winner
        for item, winner in enumerate(winners):
            chosen = fork.x0[item, fork.branches[item].index(winner)]
            expected = to_latent(seen[fork.step + 1])[item]
            torch.testing.assert_close(chosen, expected, atol=1e-5, rtol=1e-5)


def test_many_candidates_are_cut_to_the_best_and_the_chosen(inside):
    shown = inside.pack.module("nodes.forks")._shown
    scores = [float(i) for i in range(20)]
    assert shown(scores, 19) == list(range(12, 20))
    assert shown(scores, 3) == [3, *range(13, 20)]


@pytest.mark.parametrize("final", [False, True])
def test_it_is_a_picture_with_one_frame_a_fork(inside, kept, vae, final):
    execute = inside.pack.module("nodes.film").DRMFilmStrip.execute
    latent, trace = kept
    (image,) = execute(trace, vae, 2, 96, latent=latent if final else None).result
    picture = Image.fromarray((image[0] * 255).round().byte().numpy())
    red = torch.tensor(list(picture.tobytes())).reshape(picture.height, picture.width, 3)
    red = (red - torch.tensor([0xD1, 0x49, 0x5B])).abs().sum(dim=-1) < 12
    # A frame's upper edge is the only red line of a thumbnail's length.
    edges = (red.sum(dim=1) >= 90).int()
    assert int((edges.diff(prepend=torch.zeros(1)) == 1).sum()) == 2 * len(trace.forks)
    rows = len(trace.forks) + final
    assert picture.height == 30 + rows * (96 + 20 + 15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_branches": 3}, "set film_strip of the step-wise sampler to 1 to 4 and run again"),
        ({"num_branches": 1, "film_strip": 4}, "it needs num_branches of 2 or more"),
    ],
)
def test_a_run_without_forks_says_what_to_do(inside, vae, settings, message):
    trace = inside.run(steps=4, **settings)[1]
    with pytest.raises(ValueError, match=message):
        inside.pack.module("nodes.film").DRMFilmStrip.execute(trace, vae, 1, 96)


@pytest.mark.parametrize("picture", [0, 3])
def test_a_picture_that_is_not_there_is_refused(inside, kept, vae, picture):
    with pytest.raises(
        ValueError, match=rf"picture is {picture}: this run drew 2, give a number from 1 to 2"
    ):
        inside.pack.module("nodes.film").DRMFilmStrip.execute(kept[1], vae, picture, 96)


@pytest.mark.parametrize("film_strip", [-1, 5])
def test_a_linked_number_of_forks_past_the_widget_is_refused(inside, film_strip):
    with pytest.raises(ValueError, match=f"film_strip is {film_strip}: give a number of steps from 0"):
        inside.run(film_strip=film_strip)


def test_a_mask_keeps_the_picture_it_had(inside):
    """The kept region's bookkeeping belongs to the run: looking at a fork must not disturb it."""
    latent = inside.latent(batch=1)
    latent["noise_mask"] = torch.zeros(1, 1, 8 * latent["samples"].shape[-2], 8 * latent["samples"].shape[-1])
    latent["noise_mask"][..., : latent["noise_mask"].shape[-1] // 2] = 1
    plain, looked = (inside.run(latent, num_branches=3, steps=4, film_strip=n)[0] for n in (0, 4))
    assert torch.equal(plain["samples"], looked["samples"])
