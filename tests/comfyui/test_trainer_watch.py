"""The alarm of Step-GRPO LoRA Trainer, and what it draws, by numbers worked out by hand."""

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def watch(pack):
    return pack.module("nodes.grpo.watch")


def follow(watch, points, patience=2):
    """The alarm after each (reward, held-out score)."""
    watched = watch.Watch(start=0.0, patience=patience)
    for iteration, (reward, held_out) in enumerate(points, start=1):
        look = watch.Look(iteration=iteration, reward=reward, held_out=held_out, diversity=1.0, kl=0.0)
        watched.add(look)
        yield watched.cheated, watched.best.iteration


def test_stops_when_reward_rises_and_held_out_falls(watch):
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, 1.5), (4.0, 1.0)]
    assert list(follow(watch, points)) == [(False, 1), (False, 2), (False, 2), (True, 2)]


def test_goes_on_while_both_fall(watch):
    points = [(2.0, 2.0), (1.0, 1.0), (1.5, 1.0), (1.9, 0.0)]
    assert not any(cheated for cheated, _ in follow(watch, points))


def test_recovery_starts_the_count_again(watch):
    points = [(1.0, 1.0), (2.0, 0.5), (3.0, 1.5), (4.0, 1.0), (5.0, 1.4)]
    assert [cheated for cheated, _ in follow(watch, points)] == [False, False, False, False, True]


def test_watch_survives_its_file(watch):
    watched = watch.Watch(start=0.5)
    watched.add(watch.Look(iteration=1, reward=1.0, held_out=2.0, diversity=0.9, kl=0.1))
    assert watch.Watch.from_dict(watched.to_dict()) == watched


def test_diversity_is_the_mean_distance(watch):
    first = torch.stack([torch.zeros(2, 1, 1), torch.full((2, 1, 1), 3.0)])  # every element 3 apart
    second = torch.stack([torch.zeros(2, 1, 1), torch.full((2, 1, 1), 1.0)])
    assert watch.diversity([first, second]) == pytest.approx(2.0)
    assert watch.diversity([first[:1].repeat(3, 1, 1, 1)]) == 0


def test_smooth_forgets(pack):
    smooth = pack.module("nodes.grpo.picture").smooth
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([1.0, 3.0], weight=0.5) == pytest.approx([1.0, (0.5 * 1 + 3) / 1.5])


def test_grid_lays_pictures_in_rows(pack):
    from PIL import Image

    picture = pack.module("nodes.grpo.picture")
    red, blue = (Image.new("RGB", (10, 6), colour) for colour in ("red", "blue"))
    sheet = picture.grid([("before", [red, blue]), ("after", [blue, red])])
    assert sheet.size == (2 * 14 + 4, 2 * 32)
    at = [sheet.getpixel((x, y)) for y in (25, 57) for x in (8, 22)]
    assert at == [(255, 0, 0), (0, 0, 255), (0, 0, 255), (255, 0, 0)]


def test_curve_is_drawn_from_its_numbers(pack):
    draw = pack.module("nodes.grpo.picture").draw_curve
    rising = draw([0.0, 1.0, 2.0], [(0, 0.0), (3, 1.0)], 3)
    falling = draw([2.0, 1.0, 0.0], [(0, 1.0), (3, 0.0)], 3)
    assert rising.size == (560, 300)
    assert rising.tobytes() != falling.tobytes()
    assert draw([], [], 3).size == draw([1.0], [(0, 1.0)], 1).size == (560, 300)


def test_time_left_is_that_of_iterations_and_looks_to_come(pack):
    """Of 20 iterations 7 are done, with looks after 5: 13 iterations of 2 s and looks after 10, 15 and 20."""
    run = SimpleNamespace(
        training=SimpleNamespace(iterations=20, preview_every=5),
        state=SimpleNamespace(progress=SimpleNamespace(iteration=7)),
        took={"iteration": [9.0, 2.0, 2.0, 1.5, 2.0], "look": [4.0, 3.0, 3.0]},
        _looked=5,
    )
    assert pack.module("nodes.grpo.run").Run.seconds_left.fget(run) == 13 * 2 + 3 * 3
