"""Encoded folders: what is written is read back, and what is damaged is named."""

import pickle
from pathlib import Path

import pytest
import torch

from tests.training.encoded import write_encoded
from training.data import shards
from training.data.shards import EncodedPairs, ShardError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_encoded(tmp_path / "encoded")


def test_rows_come_back_from_whichever_shard_holds_them(folder: Path):
    from safetensors.torch import load_file

    pairs = EncodedPairs(folder)
    parts = [load_file(path)["latents"] for path in sorted(folder.glob("images-*"))]
    assert [len(part) for part in parts] == [12, 12, 6]
    whole = torch.cat(parts).float()
    for wanted in ([0], [11, 12], [29, 0, 23, 24]):
        assert torch.equal(pairs.latents(wanted), whole[wanted])
    assert pairs.latent_shape == (16, 4, 4)
    assert len(pairs) == 28


def test_text_is_clip_filled_to_t5_s_width_then_t5(folder: Path):
    pairs = EncodedPairs(folder)
    assert pairs.t5_lengths == (5, 8)
    embeds, pooled = pairs.prompts([0, 6], 8)
    assert (embeds.shape, pooled.shape) == ((2, 14, 256), (2, 256))
    assert not embeds[:, :6, 128:].any()
    assert embeds[:, :6, :128].all()
    assert embeds[:, 6:].all()
    alone, _ = pairs.prompts([0, 6], None, 256)
    assert torch.equal(alone, embeds[:, :6])


def test_it_travels_to_worker_processes(folder: Path):
    pairs = EncodedPairs(folder)
    before = pairs.latents([3])
    again = pickle.loads(pickle.dumps(pairs))  # noqa: S301 - what DataLoader does
    assert torch.equal(again.latents([3]), before)


def test_a_failed_write_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError, match="stop"):
        shards.replace_atomically(tmp_path / "file", lambda path: (path.write_text("half"), _stop()))
    assert list(tmp_path.iterdir()) == []


def _stop() -> None:
    raise RuntimeError("stop")


def damage(folder: Path, how: str) -> None:
    if how == "no meta":
        (folder / "meta.json").unlink()
    elif how == "newer":
        (folder / "meta.json").write_text('{"format": "drm-encoded-pairs", "version": 2}')
    elif how == "cut":
        path = folder / "images-00001.safetensors"
        path.write_bytes(path.read_bytes()[:200])
    elif how == "missing":
        (folder / "images-00002.safetensors").unlink()
    elif how == "no pairs":
        (folder / "pairs.parquet").unlink()
    elif how == "no prompts":
        for path in folder.glob("prompts-*"):
            path.unlink()


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("no meta", "no finished encoded pairs .* run training.encode first"),
        ("newer", "version 2, wanted drm-encoded-pairs 1"),
        ("cut", "images-00001.safetensors is damaged or cut short"),
        ("missing", "a shard is missing"),
        ("no pairs", "pairs.parquet cannot be read"),
        ("no prompts", "there are no shards"),
    ],
)
def test_damage_is_named(folder: Path, how: str, sentence: str):
    damage(folder, how)
    with pytest.raises(ShardError, match=sentence):
        EncodedPairs(folder)
