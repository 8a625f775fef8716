"""bfloat16 where it is computed, float32 where it would be emulated."""

import logging

import pytest
import torch

from drm import precision


@pytest.mark.parametrize(
    ("setting", "native", "half"),
    [("bf16", True, True), ("bf16", False, False), ("no", True, False), ("no", False, False)],
)
def test_a_run_is_in_bfloat16_where_it_asks_and_the_processor_can(monkeypatch, setting, native, half):
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: native)
    assert precision.runs_in_bfloat16(setting, "cpu") is half


def test_it_is_said_once_and_only_where_it_was_asked_for(monkeypatch, caplog):
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: False)
    precision._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        precision.runs_in_bfloat16("no", "cpu")
        assert not caplog.records
        for _ in range(3):
            precision.runs_in_bfloat16("bf16", "cpu")
    assert [record.message.count("in float32") for record in caplog.records] == [1]


@pytest.mark.parametrize(
    ("avx512", "amx", "native"), [(0, 0, False), (1, 0, True), (0, 1, True), (1, 1, True)]
)
def test_a_cpu_computes_it_with_either_set_of_instructions(monkeypatch, avx512, amx, native):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512), raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx), raising=False)
    assert precision.computes_bfloat16("cpu") is native
