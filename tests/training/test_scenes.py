"""The demo's world: captions, what answers them, what is held out, and the detectors that look."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from training.data.shards import EncodedPairs
from training.demo import detector, fit, icons, learning, rated_drawings, scenes, text
from training.demo.autoencoder import build_autoencoder
from training.demo.generator import Generator
from training.demo.scenes import Caption, Group, Placed, Seen, errors, parse


def thing(word: str) -> int:
    return next(i for i, row in enumerate(scenes.things()) if row.word == word)


CAT, TREE, CAR, FISH = map(thing, ("cat", "tree", "car", "fish"))


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("a blue car", Caption((Group(1, CAR, "blue"),))),
        ("three cats", Caption((Group(3, CAT),))),
        ("two fish", Caption((Group(2, FISH),))),
        ("a cat and a blue tree", Caption((Group(1, CAT), Group(1, TREE, "blue")))),
        ("a cat left of a tree", Caption((Group(1, CAT), Group(1, TREE)), "left of")),
        ("two cats and a palm tree", Caption((Group(2, CAT), Group(1, thing("palm tree"))))),
        ("an octopus", Caption((Group(1, thing("octopus")),))),
    ],
)
def test_a_caption_is_read_as_it_is_written(text, caption):
    assert str(caption) == text
    assert parse(text) == parse(text.upper()) == caption


@pytest.mark.parametrize("text", ["", "a unicorn", "cats", "five cats", "a cat on a tree", "a purple cat"])
def test_what_is_not_of_this_world_is_refused_in_a_sentence(text):
    with pytest.raises(ValueError, match="is no caption of the demo's world: wanted such as"):
        parse(text)


def seen(*shown: tuple) -> list[Seen]:
    return [Seen(number, colour, x, y) for number, colour, x, y in shown]


BLUE_CAT_LEFT_OF_TREE = "a blue cat left of a tree"


@pytest.mark.parametrize(
    ("text", "shown", "wrong"),
    [
        ("two cats", [(CAT, "", 20, 20), (CAT, "", 90, 90)], 0),
        ("two cats", [(CAT, "", 20, 20)], 1),  # one missing
        ("two cats", [], 2),
        ("two cats", [(CAT, "", 20, 20), (CAT, "", 90, 90), (CAR, "", 60, 20)], 1),  # one too many
        ("two cats", [(CAT, "", 20, 20), (CAR, "", 90, 90)], 2),  # another thing: one missing, one extra
        ("two cats", [(CAT, "", 20, 20), (CAT, "blue", 90, 90)], 0.5),
        ("a cat and a blue tree", [(CAT, "blue", 20, 20), (TREE, "", 90, 90)], 1),  # colours changed over
        (BLUE_CAT_LEFT_OF_TREE, [(CAT, "blue", 20, 60), (TREE, "", 100, 60)], 0),
        (BLUE_CAT_LEFT_OF_TREE, [(CAT, "blue", 100, 60), (TREE, "", 20, 60)], 1),  # turned
        (BLUE_CAT_LEFT_OF_TREE, [(CAT, "", 100, 60), (TREE, "", 20, 60)], 1.5),  # turned, and not blue
        (BLUE_CAT_LEFT_OF_TREE, [(CAT, "blue", 60, 20), (TREE, "", 70, 100)], 1),  # above
        (BLUE_CAT_LEFT_OF_TREE, [(CAT, "blue", 20, 60)], 1),
        ("a cat below a tree", [(CAT, "", 60, 100), (TREE, "", 60, 30)], 0),
    ],
)
def test_errors_worked_out_by_hand(text, shown, wrong):
    assert errors(parse(text), seen(*shown)) == wrong


def test_scenes_answer_their_caption_and_edited_ones_do_not():
    rng = np.random.default_rng(0)
    for _ in range(400):
        caption = scenes.random_caption(rng)
        scene, other = scenes.place(caption, rng), scenes.edited(caption, rng)
        assert errors(caption, scene) == 0
        assert errors(caption, scenes.place(other, rng)) > 0
        assert parse(str(caption)) == caption
        for placed in scene:
            half = placed.pixels / 2
            assert half <= min(placed.x, placed.y)
            assert max(placed.x, placed.y) <= 128 - half


def test_nobody_asks_for_the_colour_that_a_thing_has_by_nature():
    assert scenes.things()[thing("heart")].colours == ("", "green", "blue", "yellow")
    rng = np.random.default_rng(1)
    captions = [scenes.random_caption(rng) for _ in range(500)]
    assert all(g.colour in scenes.things()[g.thing].colours for c in captions for g in c.groups)


def test_a_tenth_of_the_combinations_is_held_out_of_what_is_trained_on_and_in_half_of_what_is_asked():
    numbers = range(len(scenes.things()))
    pairs = [("beside", a, b) for a in numbers for b in numbers if a < b]
    assert np.mean([scenes.is_held_out(pair) for pair in pairs]) == pytest.approx(0.1, abs=0.02)
    rng = np.random.default_rng(2)
    assert not any(scenes.held_out(scenes.trained_caption(rng)) for _ in range(300))
    asked = scenes.benchmark_captions(200)
    assert [scenes.held_out(caption) for caption in asked] == [False, True] * 100
    assert len(set(asked)) == 200
    assert asked == scenes.benchmark_captions(300)[:200]
    swapped = Caption((Group(1, TREE), Group(1, CAT)))
    assert scenes.held_out(swapped) == scenes.held_out(Caption(swapped.groups[::-1]))


def circle(colour: tuple[int, int, int]) -> Image.Image:
    y, x = np.mgrid[:32, :32] - 15.5
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[x**2 + y**2 < 200] = (*colour, 255)
    return Image.fromarray(pixels, "RGBA")


def test_a_tint_keeps_shape_and_shade():
    icon = np.asarray(circle((200, 200, 200))).copy()
    icon[10:14, 10:14, :3] = 20  # a dark eye
    tinted = np.asarray(icons.tinted(Image.fromarray(icon, "RGBA"), "blue"))
    np.testing.assert_array_equal(tinted[..., 3], icon[..., 3])
    assert tinted[16, 20, :3].tolist() == pytest.approx(icons.TINTS["blue"], abs=12)
    assert tinted[12, 12, :3].astype(int).sum() < tinted[16, 20, :3].astype(int).sum() / 2
    assert icons.tinted(Image.fromarray(icon, "RGBA"), "").tobytes() == icon.tobytes()


class Says(torch.nn.Module):
    """A detector that says what it is told."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.logits


def test_what_a_detector_says_is_read_cell_by_cell():
    logits = torch.full((1, 1 + len(scenes.things()) + 5, 16, 16), -5.0)
    for y, x, number, colour, sure in ((3, 4, CAT, 1, 4.0), (3, 5, CAR, 1, 3.0), (12, 9, TREE, 0, 2.0)):
        logits[0, 0, y, x] = sure
        logits[0, 1 + number, y, x] = logits[0, 1 + len(scenes.things()) + colour, y, x] = 9.0
    # (3, 5) is a neighbour of a cell that is surer: one thing, not two
    assert detector.detect(Says(logits), torch.zeros(1, 3, 128, 128)) == [
        (Seen(CAT, "red", 36.0, 28.0), Seen(TREE, "", 76.0, 100.0))
    ]


def test_detection_loss_worked_out_by_hand():
    scene = [(Placed(CAT, "green", 36.0, 28.0, 40),)]
    assert detector.targets(scene).tolist() == [[0, 3, 4, CAT, 2]]
    logits = torch.zeros(1, 1 + len(scenes.things()) + 5, 16, 16)
    centre = (256 - 1 + 20) / 256 * np.log(2)  # every cell undecided, the one with the centre counts twenty
    wanted = 4 * centre + np.log(len(scenes.things())) + np.log(5)
    assert detector.detection_loss(logits, detector.targets(scene)).item() == pytest.approx(wanted, rel=1e-5)


def test_a_small_detector_learns_to_find_circles():
    """Three things stand in as circles of three colours; unseen places."""
    shapes = {0: (255, 0, 0), 1: (0, 0, 255), 2: (0, 160, 0)}
    rng = np.random.default_rng(3)

    def draw(count: int) -> tuple[torch.Tensor, list]:
        pictures, answers = np.full((count, 64, 64, 3), 255, np.uint8), []
        for n in range(count):
            number, x, y = int(rng.integers(3)), *rng.integers(16, 48, 2).tolist()
            image = Image.fromarray(pictures[n])
            image.paste(circle(shapes[number]), (x - 16, y - 16), circle(shapes[number]))
            pictures[n] = np.asarray(image)
            answers.append((Placed(number, "", float(x), float(y), 32),))
        return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1, answers

    network = detector.Detector(width=32, depth=2, seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    for _ in range(60):
        pictures, answers = draw(16)
        detector.detection_loss(network(pictures), detector.targets(answers)).backward()
        optimizer.step()
        optimizer.zero_grad()
    pictures, answers = draw(32)
    found = detector.detect(network.eval(), pictures)
    right = [len(f) == 1 and f[0].thing == a[0].thing for f, a in zip(found, answers, strict=True)]
    assert np.mean(right) > 0.9


def test_judge_and_rater_share_nothing():
    judge, rater = detector.build_judge(), detector.build_rater()
    assert judge.out.weight.shape != rater.out.weight.shape
    again = detector.build_judge()
    assert all(torch.equal(a, b) for a, b in zip(judge.parameters(), again.parameters(), strict=True))


def quadratic(folder, steps: int, stop_at: int | None = None) -> torch.Tensor:
    """Weights after a run of `fit` towards random targets, cut off at a step and begun again."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(f'{{"steps": {steps}}}')
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)

    def loss(step: int, rng: torch.Generator) -> torch.Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=rng)
        return (network(x) - x[:, :2]).square().mean()

    fit.fit(network, loss, folder, name="line", minutes=1, learning_rate=0.05, ema=0.9)
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_a_fit_that_was_stopped_is_the_one_that_was_not(tmp_path):
    whole = quadratic(tmp_path / "whole", 40)
    with pytest.raises(KeyboardInterrupt):
        quadratic(tmp_path / "parted", 40, stop_at=23)
    assert torch.equal(quadratic(tmp_path / "parted", 40), whole)
    assert not torch.equal(quadratic(tmp_path / "shorter", 20), whole)


def test_the_rate_warms_up_and_falls_to_a_fiftieth():
    rates = [fit.rate_at(step, 1000, 1.0) for step in (0, 19, 20, 509, 510, 999)]
    assert rates[:3] == [0.05, 1.0, 1.0]
    assert rates[3] > 0.51 > rates[4] - 1e-9
    assert rates[5] == pytest.approx(0.02, abs=1e-4)


def test_a_plan_is_made_once(tmp_path):
    steps = fit.planned(tmp_path, 0.01, lambda number: None)
    assert fit.planned(tmp_path, 100.0, lambda number: pytest.fail("timed again")) == steps >= 1


def test_a_warm_start_keeps_its_latents(tmp_path):
    """A generator knows them; only what decodes them learns."""
    torch.manual_seed(0)
    begun = {key: value.contiguous() for key, value in build_autoencoder().state_dict().items()}
    save_file(begun, tmp_path / "autoencoder.safetensors")
    pictures = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    (tmp_path / "out" / "autoencoder").mkdir(parents=True)
    for name in ("trained", "small"):
        np.save(tmp_path / "out" / f"{name}.npy", pictures)
    (tmp_path / "out" / "autoencoder" / "plan.json").write_text('{"steps": 2}')
    learned = learning.make_autoencoder(tmp_path / "out", 1.0, tmp_path).state_dict()
    same = {key for key in begun if torch.equal(learned[key].cpu(), begun[key])}
    assert same == {key for key in begun if key.startswith("encoder.")}


def darkness(pictures):
    return 255 - torch.from_numpy(pictures).float().mean((1, 2, 3))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two parts of four captions, each drawn in two ways by a random generator, rated by chance, encoded."""
    out = tmp_path_factory.mktemp("drawn")
    names = text.tokenizer_of([thing.word for thing in scenes.things()], 16)
    torch.manual_seed(0)
    generator = Generator(names).eval()
    statistics = {"mean": 0.0, "std": 1.0}
    rng = np.random.default_rng(0)

    def rate(rater, pictures, captions):
        assert pictures.shape == (8, 128, 128, 3)
        return [detector.Opinion((), float(rng.integers(0, 3)) / 2) for _ in captions]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rated_drawings, "CAPTIONS", 4)
        patched.setattr(rated_drawings, "KEPT_BACK", 4)
        patched.setattr(rated_drawings, "WAYS", ((2, 1.0, 0.0), (2, 2.0, 0.7)))
        patched.setattr(rated_drawings, "opinions", rate)
        family = generator, names, build_autoencoder().eval(), statistics, None
        parts = rated_drawings.draw_all(out, 0.0, *family)
        folder = rated_drawings.write_encoded(
            out,
            parts,
            lambda pictures: darkness(pictures)[:, None, None, None].expand(-1, 16, 16, 16),
            generator,
            names,
        )
        captions = [caption for part in range(parts) for caption in rated_drawings.captions_of(part)]
    return out, folder, captions


def test_drawings_become_pairs_that_training_reads(drawn):
    out, folder, captions = drawn
    pairs = EncodedPairs(folder)
    errors = torch.cat([load_file(out / "drawings" / f"{n:05d}.safetensors")["errors"] for n in range(2)])
    differing = int((errors[:, 0] != errors[:, 1]).sum())
    sources = pairs.columns["source"]
    ids_of_edits = [
        (int(pairs.columns["chosen"][row]), int(pairs.columns["rejected"][row]))
        for row, source in enumerate(sources)
        if source == "edited"
    ]
    shown = darkness(rated_drawings.edits(out / "source", captions, 0)).reshape(-1, 2).tolist()
    assert (sources.count("drawings"), sources.count("edited")) == (differing, 8 * rated_drawings.EDITS)
    for row, source in enumerate(sources):
        prompt, chosen, rejected = (int(pairs.columns[c][row]) for c in ("prompt", "chosen", "rejected"))
        if source == "drawings":
            assert chosen // 2 == rejected // 2 == prompt
            assert errors[prompt, chosen % 2] < errors[prompt, rejected % 2]
        else:
            assert min(chosen, rejected) >= 16
            # what stands for a picture's latents here is how dark the picture is
            order = ids_of_edits.index((chosen, rejected))
            assert order // rated_drawings.EDITS == prompt
            dark = [float(pairs.latents([picture])[0, 0, 0, 0]) for picture in (chosen, rejected)]
            assert dark == pytest.approx(shown[order], rel=1e-2)
    kept_back = {str(captions[0]), str(captions[4])}
    held_out = [str(captions[int(p)]) in kept_back for p in pairs.columns["prompt"]]
    assert pairs.columns["held_out"].tolist() == held_out


def test_better_drawings_come_first_and_equal_ones_are_no_pair():
    errors = torch.tensor([1.0, 0.0, 1.0, 0.5])
    assert list(rated_drawings.ranked_pairs(errors)) == [(1, 0), (3, 0), (1, 2), (1, 3), (3, 2)]
