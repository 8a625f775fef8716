"""Files of picks: what picks imply, the way through the backlog, what is refused."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from drm.picks import (
    Batch,
    PicksError,
    backlog,
    check_one_model,
    check_picks,
    discard,
    folder_of,
    keep_for_later,
    pairs_of,
    read_picture,
    read_records,
    read_waiting,
    settle,
    undo,
    write_batch,
)

MODEL = {
    "family": "sd3",
    "width": 256,
    "num_blocks": 4,
    "latent_channels": 16,
    "fingerprint": {"layout": "comfyui", "shapes": "a", "values": [1.0, 2.0]},
}


def batch(**changes):
    return Batch(**{"prompt": "a heart", "batch_index": (4, 5, 6), "seed": 7, "model": MODEL, **changes})


def latents(count=3, channels=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, channels, 4, 4, generator=generator)


def pictures(count=3):
    return [torch.tensor([0xFF, 0xD8, i], dtype=torch.uint8) for i in range(count)]


def record(folder, number, count=3, channels=16, **changes):
    path = folder / f"20260101_000000_{number:08x}.safetensors"
    facts = {"picks": (1,), "batch_index": tuple(range(count)), **changes}
    write_batch(path, batch(**facts), latents(count, channels), pictures(count))
    return path


def test_the_implied_pairs_by_hand():
    assert pairs_of((2, 0), 4) == [(2, 0), (2, 1), (2, 3), (0, 1), (0, 3)]
    assert pairs_of((1, 0), 2) == [(1, 0)]
    assert pairs_of((0,), 1) == []
    assert pairs_of((), 3) == []


def test_a_batch_waits_in_the_backlog_until_it_is_picked_from(tmp_path):
    name = keep_for_later(tmp_path, batch(), latents(), pictures())
    assert backlog(tmp_path) == [name]
    assert read_waiting(tmp_path, name).batch == batch()
    assert read_picture(tmp_path, name, 2) == b"\xff\xd8\x02"
    settle(tmp_path, name, (2, 0))
    assert backlog(tmp_path) == []
    (found,), broken = read_records(tmp_path)
    assert (found.batch, found.shape, broken) == (batch(picks=(2, 0)), (3, 16, 4, 4), [])
    assert torch.equal(found.latents([2, 0]), latents().half().float()[[2, 0]])
    assert read_picture(tmp_path, name, 2) == b"\xff\xd8\x02"


def test_undo_takes_back_what_was_picked_last(tmp_path):
    names = [keep_for_later(tmp_path, batch(), latents(), pictures()) for _ in range(2)]
    for age, name in enumerate(sorted(names, reverse=True)):
        settle(tmp_path, name, (1,))
        os.utime(tmp_path / f"{name}.safetensors", (age, age))
    last = min(names)
    assert undo(tmp_path) == last
    assert backlog(tmp_path) == [last]
    assert read_waiting(tmp_path, last).batch == batch()
    discard(tmp_path, last)
    assert undo(tmp_path) == max(names)
    assert backlog(tmp_path) == [max(names)]
    assert undo(tmp_path / "nothing") is None


def test_a_stop_between_writing_and_removing_leaves_one(tmp_path, monkeypatch):
    name = keep_for_later(tmp_path, batch(), latents(), pictures())
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: (_ for _ in ()).throw(OSError("stopped")))
        with pytest.raises(OSError, match="stopped"):
            settle(tmp_path, name, (1,))
    assert backlog(tmp_path) == []
    assert [found.batch.picks for found in read_records(tmp_path)[0]] == [(1,)]


def test_latents_of_one_frame_keep_it(tmp_path):
    name = keep_for_later(tmp_path, batch(), latents().unsqueeze(2), pictures())
    assert read_waiting(tmp_path, name).shape == (3, 16, 1, 4, 4)


@pytest.mark.parametrize(
    "name", ["", "..", "../a", "a/b", "/etc", "a\\b", ".a", "a ", "a" * 65, "a\n", None, 3]
)
def test_a_name_is_no_path(tmp_path, name):
    with pytest.raises(ValueError, match="letters, digits"):
        folder_of(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "my_taste", "Mein Geschmack 2", "v1.2-b", "好み"])
def test_names_people_give(tmp_path, name):
    assert folder_of(tmp_path, name).parent == tmp_path


@pytest.mark.parametrize("name", ["x", "../20260101_000000_00000001", None, 5])
def test_a_record_has_a_name_of_ours(tmp_path, name):
    with pytest.raises(ValueError, match="wanted a name that this node gave"):
        settle(tmp_path, name, (0,))


@pytest.mark.parametrize("picks", [[], [3], [-1], [0, 0], [True], ["0"], [0.0], None, {"0": 1}])
def test_picks_are_different_rows(picks):
    with pytest.raises(ValueError, match="from 0 to 2"):
        check_picks(picks, 3)


def test_nan_and_missing_pictures_are_not_kept(tmp_path):
    broken = latents()
    broken[1, 0, 0, 0] = float("nan")
    with pytest.raises(PicksError, match="3 latents, of which 2 are finite"):
        keep_for_later(tmp_path, batch(), broken, pictures())
    with pytest.raises(PicksError, match="and 2 pictures"):
        keep_for_later(tmp_path, batch(), latents(), pictures(2))
    assert backlog(tmp_path) == []


def test_a_damaged_file_in_the_middle_is_named_and_the_rest_read(tmp_path):
    paths = [record(tmp_path, i) for i in range(6)]
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    paths[2].write_bytes(b"")
    save_file({"x": torch.zeros(1)}, paths[3])
    header = json.dumps({"prompt": "a", "picks": [9], "batch_index": []})
    save_file({"latents": latents()}, paths[4], {"kind": "drm-picks", "version": "1", "header": header})
    found, broken = read_records(tmp_path)
    assert [one.path for one in found] == [paths[0], paths[5]]
    wanted = ["damaged or cut short", "damaged or cut short", "is no file of picks", "from 0 to 2"]
    assert all(path.name in text for path, text in zip(paths[1:5], broken, strict=True))
    assert all(words in text for words, text in zip(wanted, broken, strict=True))


def test_a_folder_that_is_not_there_or_has_only_a_backlog(tmp_path):
    with pytest.raises(PicksError, match=r"nothing is not there: pick in a DRM Pick node of that name"):
        read_records(tmp_path / "nothing")
    keep_for_later(tmp_path, batch(), latents(), pictures())
    with pytest.raises(PicksError, match="holds no picks but 1 batches to pick from later"):
        read_records(tmp_path)


def test_nan_that_got_into_a_file_is_named(tmp_path):
    path = record(tmp_path, 0)
    whole = latents().half()
    whole[0, 0, 0, 0] = float("nan")
    header = json.dumps({"prompt": "a", "picks": [1], "batch_index": [0, 1, 2]})
    save_file({"latents": whole}, path, {"kind": "drm-picks", "version": "1", "header": header})
    (found,), _ = read_records(tmp_path)
    assert len(found.latents([1, 2])) == 2
    with pytest.raises(PicksError, match=f"{path.name} holds NaN"):
        found.latents([0])


def test_ten_thousand_batches_are_opened_by_their_headers(tmp_path):
    first = record(tmp_path, 0)
    for i in range(1, 10_000):
        os.link(first, tmp_path / f"20260101_000000_{i:08x}.safetensors")
    found, broken = read_records(tmp_path)
    assert (len(found), broken) == (10_000, [])


def test_picks_of_two_models_are_not_mixed(tmp_path):
    record(tmp_path, 0)
    assert check_one_model(read_records(tmp_path)[0], MODEL) == []
    record(tmp_path, 1, model=None)
    other = {**MODEL, "fingerprint": {**MODEL["fingerprint"], "values": [1.0, 3.0]}}
    record(tmp_path, 2, model=other)
    (said,) = check_one_model(read_records(tmp_path)[0], MODEL)
    assert said.startswith("1 of 3 batches were picked on another fine-tune (50 % of its sampled weights")
    path = record(tmp_path, 3, model={**MODEL, "family": "flux", "num_blocks": 57})
    with pytest.raises(PicksError, match=f"{path.name} was picked on a flux model of 57 blocks") as error:
        check_one_model(read_records(tmp_path)[0], MODEL)
    assert "the MODEL is a sd3 model of 4 blocks, 256 wide" in str(error.value)
    path.unlink()
    path = record(tmp_path, 4, channels=4, model=None)
    with pytest.raises(PicksError, match="latents of 4 channels and the MODEL draws 16"):
        check_one_model(read_records(tmp_path)[0], MODEL)
