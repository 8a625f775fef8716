"""DRM Head Trainer in ComfyUI: files for other nodes, stops that lose nothing, sentences for the rest."""

import os

import pytest
import torch

from drm.picks import Batch, write_batch
from tests.comfyui.families import load_family

SETTINGS = {"steps": 4, "rate": 1e-3, "seed": 0}


@pytest.fixture
def folders(inside, tmp_path, monkeypatch):
    """ComfyUI's output and models folders, empty."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    return tmp_path


def latents(number, shape=(3, 16, 8, 8)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def write(folders, count, name="taste", prompts=5, **changes):
    """`count` batches of three, the picked one of each brighter than the rest."""
    folder = folders / "output" / "drm_picks" / name
    for i in range(count):
        batch = Batch(
            **{"prompt": f"a heart {i % prompts}", "batch_index": (0, 1, 2), "picks": (i % 3,), **changes}
        )
        samples = latents(i)
        samples[i % 3] += 1
        pictures = [torch.zeros(1, dtype=torch.uint8) for _ in range(3)]
        write_batch(folder / f"20260101_000000_{i:08x}.safetensors", batch, samples, pictures)
    return folder


def train(inside, picks="taste", model=None, clip=None, blocks="", name="head", **changes):
    """(DRM, file, report, plot) of the node."""
    node = inside.pack.module("nodes.head_trainer").DRMHeadTrainer
    with torch.inference_mode():
        return node.execute(
            model=model or inside.model,
            clip=clip or inside.clip,
            picks=picks,
            blocks=blocks,
            name=name,
            **{**SETTINGS, **changes},
        ).result


def weights(path):
    from safetensors.torch import load_file

    return load_file(path)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_picks_become_a_drm_for_the_other_nodes(inside, folders):
    write(folders, 12)
    picture = inside.ksampler()
    drm, file, report, plot = train(inside)
    assert file == "head.safetensors"
    path = folders / "models" / "drm" / file
    assert str(path) in report
    assert "24 pairs in 12 batches of 5 prompts" in report
    assert (plot.shape[0], plot.shape[3]) == (1, 3)
    assert float(plot.std()) > 0.01
    assert drm.model.trunk.taps == (1,)
    assert drm.model.metadata["picks"] == {"from": "taste", "batches": 12, "pairs": 24, "prompts": 5}
    assert 0 <= drm.model.metadata["accuracy"]["accuracy"] <= 1
    assert drm.model.metadata["calibration"]["sigma"] == [0.125, 0.375, 0.625, 0.875]
    assert [p.name for p in path.parent.iterdir()] == [file]
    assert torch.equal(inside.ksampler(), picture)
    drawn = inside.stepwise(inside.latent(2), drm=drm)
    assert bool(drawn.isfinite().all())
    score = inside.pack.module("nodes.score").DRMScoreLatent.execute
    settings = {"sigma": 0.0, "latent_is": "finished picture", "noise_draws": 1, "seed": 0}
    with torch.inference_mode():
        scores = score(drm, {"samples": latents(1)}, inside.positive, **settings, model=inside.model)
    assert len(set(scores.result[0])) == 3


def test_a_seed_gives_the_same_file_and_a_killed_run_too(inside, folders, monkeypatch):
    write(folders, 6)
    train(inside, name="whole")
    train(inside, name="again")
    path = folders / "models" / "drm"
    whole = weights(path / "whole.safetensors")
    assert same(whole, weights(path / "again.safetensors"))
    run = inside.pack.module("nodes.head_run").HeadRun
    training = inside.pack.module("drm.head_training").HeadTrainer
    advance = training.advance

    def killed(self, read):
        if self.progress.step == 2:
            raise KeyboardInterrupt
        advance(self, read)

    with monkeypatch.context() as patch:
        patch.setattr(training, "advance", killed)
        patch.setattr(run, "_stopped", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            train(inside, name="killed")
    assert [p.name for p in path.glob("killed*")] == ["killed.resume"]
    report = train(inside, name="killed")[2]
    assert "went on after step 2" in report
    assert same(whole, weights(path / "killed.safetensors"))
    assert not same(whole, weights(folders / "models/drm" / train(inside, name="other", seed=1)[1]))


def test_cancel_keeps_the_best_so_far_and_goes_on(inside, folders, monkeypatch):
    import comfy.model_management as mm

    write(folders, 6)
    training = inside.pack.module("drm.head_training").HeadTrainer
    look = training.look

    def cancelled(self, read):
        look(self, read)
        if self.progress.step == 3:
            mm.interrupt_current_processing(True)

    monkeypatch.setattr(training, "look", cancelled)
    with pytest.raises(mm.InterruptProcessingException):
        train(inside)
    path = folders / "models" / "drm" / "head.safetensors"
    drm = inside.pack.module("drm.checkpoint").load_drm(path)
    assert (drm.metadata["stopped"], drm.metadata["steps_done"]) == (True, 3)
    monkeypatch.setattr(training, "look", look)
    drm, _, report, _ = train(inside)
    assert "went on after step 3" in report
    assert "stopped" not in drm.model.metadata


def test_other_picks_do_not_go_on_from_the_state_of_these(inside, folders):
    write(folders, 6)
    run, _ = prepared(inside)
    run._save_state()
    assert run._load() == 0  # no step done
    run.trainer.progress.step = 3
    run._save_state()
    assert run._load() == 3
    write(folders, 7)
    assert prepared(inside)[0]._load() == 0


def prepared(inside):
    node = inside.pack.module("nodes.head_trainer")
    return node.prepare(inside.model, inside.clip, "taste", "", "head", None, None, "", **SETTINGS)


def test_two_batches_of_latents_stand_in_for_picks(inside, folders):
    better, worse = ({"samples": latents(i, (4, 16, 8, 8))} for i in range(2))
    report = train(inside, picks="", better=better, worse=worse, prompt="red heart")[2]
    assert "4 pairs in 4 batches of 1 prompts" in report
    assert "WARNING: too few to tell: all picks are of one prompt" in report
    prompts = "red heart\nsun\ncat\ndog"
    report = train(inside, picks="", better=better, worse=worse, prompt=prompts)[2]
    assert "of 4 prompts" in report
    assert "WARNING: too few to tell it from guessing" in report
    for changes, words in (
        ({"better": better}, "worse is not connected"),
        ({"better": better, "worse": {"samples": latents(0)}}, "give two batches of one shape"),
        ({"better": better, "worse": worse, "prompt": "a\nb"}, "prompt has 2 lines and better 4 items"),
    ):
        with pytest.raises(ValueError, match=words):
            train(inside, **changes)


def test_one_pick_is_learned_from_and_said_to_be_too_few(inside, folders):
    write(folders, 1)
    report = train(inside)[2]
    assert "2 pairs in 1 batches" in report
    assert "WARNING: too few to tell" in report


def test_a_damaged_record_is_named_and_skipped(inside, folders):
    paths = sorted(write(folders, 3).iterdir())
    paths[1].write_bytes(paths[1].read_bytes()[:-50])
    report = train(inside)[2]
    assert f"skipped: {paths[1].name} is damaged or cut short" in report
    assert "4 pairs in 2 batches" in report


def test_ten_thousand_picks_take_no_longer(inside, folders, monkeypatch):
    first = next(write(folders, 1).iterdir())
    for i in range(1, 10_000):
        os.link(first, first.with_name(f"20260101_000001_{i:08x}.safetensors"))
    monkeypatch.setattr(inside.pack.module("drm.head_training"), "_MOST_HELD_OUT", 1)
    report = train(inside, steps=1)[2]
    assert "20000 pairs in 10000 batches" in report


def broken_clip(inside):
    """A text encoder whose embeddings are NaN, so that the MODEL's tokens are."""

    class Broken:
        def tokenize(self, text):
            return text

        def encode_from_tokens_scheduled(self, text):
            ((embeds, options),) = inside.encode(text)
            return [[embeds * float("nan"), options]]

    return Broken()


def test_what_does_not_fit_is_a_sentence(inside, folders):
    write(folders, 2)
    facts = inside.pack.module("nodes.pick").facts_of(inside.model)
    write(folders, 2, name="two", model={**facts, "num_blocks": 9})
    write(folders, 2, name="own", model=facts)
    folder = write(folders, 1, name="video")
    frames = Batch(prompt="", batch_index=(0,), picks=(0,))
    write_batch(
        folder / "20260101_000000_00000000.safetensors",
        frames,
        torch.zeros(2, 16, 3, 8, 8),
        [torch.zeros(1, dtype=torch.uint8) for _ in range(2)],
    )
    (folders / "models" / "drm").mkdir(parents=True)
    (folders / "models" / "drm" / "whole.safetensors").write_bytes(inside.files.drm.read_bytes())
    assert "file:" in train(inside, picks="own")[2]
    for changes, words in (
        ({"picks": "nothing"}, "nothing is not there: pick in a DRM Pick node"),
        ({"picks": "../taste"}, "not a path"),
        ({"picks": "two"}, "picked on a sd3 model of 9 blocks, 128 wide and the MODEL is a sd3 model of 2"),
        ({"picks": "video"}, "3 frames: a head is learned from pictures"),
        ({"name": "whole"}, "is there already and is no head of this trainer"),
        ({"name": "a/b"}, "not a path"),
        ({"blocks": "1, x"}, "blocks is '1, x': give numbers"),
        ({"blocks": "9"}, r"blocks \[9\] are to be read: wanted ascending numbers from 1 to 2"),
        ({"steps": 0}, "steps is 0"),
        ({"rate": 0.0}, "rate is 0"),
        ({"clip": broken_clip(inside)}, "tokens at sigma .* hold NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=words):
            train(inside, **changes)


class Encoder:
    """A text encoder of a tiny family; prompts have as many tokens as words."""

    def __init__(self, tiny):
        self.tiny = tiny

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        return self.tiny.conditioning(len(text) % 2, length=len(text.split()) + 3)


@pytest.mark.parametrize("name", ["qwen_image", "flux"])
def test_other_families_and_prompts_of_different_lengths(inside, folders, name):
    tiny = load_family(name)
    shape = (3, *tiny.latent()["samples"].shape[1:])
    folder = folders / "output" / "drm_picks" / "taste"
    for i, prompt in enumerate(("a", "a b", "a b c d", "b")):
        batch = Batch(prompt=prompt, batch_index=(0, 1, 2), picks=(1,))
        pictures = [torch.zeros(1, dtype=torch.uint8) for _ in range(3)]
        write_batch(folder / f"20260101_000000_{i:08x}.safetensors", batch, latents(i, shape), pictures)
    drm, _, report, _ = train(inside, model=tiny.model, clip=Encoder(tiny), steps=2)
    assert drm.model.trunk.family == name
    assert "8 pairs in 4 batches of 4 prompts" in report


def test_a_head_of_the_command_line_rides_on_the_stock_model(pack, inside, family, tmp_path, caplog):
    """What training.train_drm saves with model.backbone shared, on the checkpoint that ComfyUI loads."""
    from drm import save_drm
    from training.config import ModelConfig
    from training.reward import trainable

    made = ModelConfig(
        base=str(family.checkpoint), train="head", backbone="shared", num_kept=2, head_hidden=32
    )
    network = trainable.build(made, seed=0).eval()
    save_drm(trainable.plain(network), tmp_path / "shared.safetensors")
    loaded = pack.module("nodes.head_run").as_patcher(tmp_path / "shared.safetensors")
    latent = inside.latent(batch=3, seed=1)
    node = pack.module("nodes.score").DRMScoreLatent
    settings = {"sigma": 0.0, "latent_is": "finished picture", "noise_draws": 1, "seed": 0}
    with torch.inference_mode():
        scores, *_ = node.execute(
            drm=loaded, latent=latent, positive=inside.positive, model=inside.model, **settings
        ).result
    embeds, options = inside.positive[0]
    x = (latent["samples"] - 0.0609) * 1.5305
    with torch.no_grad():
        wanted = network(x, 0.0, embeds.float(), options["pooled_output"].float())
    assert scores == pytest.approx(wanted.tolist(), abs=1e-3)
    assert "not the one this head was made on" not in caplog.text
