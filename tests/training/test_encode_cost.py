"""What encoding costs and how it is cut up: numbers worked out by hand."""

import dataclasses

import pytest
import torch

from training.config import ConfigError, EncodeConfig, SourceConfig
from training.data import shards
from training.data.encode_cost import Cost, forecast, row_bytes
from training.data.encode_plan import Shards, check, is_held_out, prompt_shard_size, source_names


def test_forecast_scales_what_was_measured():
    cost = Cost(
        pairs=500,
        pictures=800,
        prompts=100,
        picture_bytes=131_072,
        prompt_bytes=3_047_424,
        pictures_per_second=40.0,
        prompts_per_second=10.0,
    )
    stored, hours = forecast(cost)
    assert stored == 2000 * (104_857_600 + 304_742_400) == 819_200_000_000
    assert hours == pytest.approx(2000 * (20 + 10) / 3600)
    assert forecast(dataclasses.replace(cost, prompts_per_second=None))[1] is None


def test_rows_of_sd35_medium_weigh_what_their_shapes_say():
    assert row_bytes({"latents": (16, 64, 64)}, torch.float16) == 131_072
    text = {"clip": (77, 2048), "pooled": (2048,), "t5_77": (77, 4096), "t5_256": (256, 4096)}
    assert row_bytes(text, torch.float16) == 3_047_424


def test_shards_and_names():
    parts = Shards("images", 10, 4, shards.image_shard)
    assert [list(parts.rows(s)) for s in range(len(parts))] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert parts.batches(1, 3) == [[4, 5, 6], [7]]
    assert prompt_shard_size(2048) == 256
    assert prompt_shard_size(1) == 1
    sources = [SourceConfig(format=f, path="none") for f in ("hpdv3", "pickapic", "hpdv3", "hpdv3")]
    assert source_names(tuple(sources)) == ["hpdv3", "pickapic", "hpdv3-2", "hpdv3-3"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shard_size", 0),
        ("batch_images", 0),
        ("batch_prompts", -1),
        ("workers", -1),
        ("t5_lengths", (77, 0)),
        ("held_out", 1.5),
        ("bad_rows", -0.1),
        ("sources", ()),
        ("resolution", 20),
        ("out", ""),
    ],
)
def test_an_impossible_setting_is_named(key, value):
    sources = (SourceConfig(format="jsonl", path="pairs.jsonl"),)
    config = EncodeConfig(**{"encoders": "none", "sources": sources, "out": "none", key: value})
    with pytest.raises(ConfigError, match=rf"encode.{key}.* is .*: wanted"):
        check(config)


def test_the_held_out_share_is_drawn_by_hash():
    share = sum(is_held_out(f"prompt {i}", 0.1, 0) for i in range(5000)) / 5000
    assert share == pytest.approx(0.1, abs=0.015)
    assert not any(is_held_out(f"prompt {i}", 0.0, 0) for i in range(100))
    assert all(is_held_out(f"prompt {i}", 1.0, 0) for i in range(100))
    assert any(is_held_out(f"prompt {i}", 0.5, 0) != is_held_out(f"prompt {i}", 0.5, 1) for i in range(100))
