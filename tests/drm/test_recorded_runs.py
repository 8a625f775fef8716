"""Greedy, softmax, windows, masks, both kinds and batches: bit for bit what was recorded."""

import hashlib
import json

import pytest

from drm.branching import branch_noise
from tests.drm.recorded_runs import RECORD, SHAPE, cases, outcome

RECORDED = json.loads(RECORD.read_text())
# The noise of one address where the record was made: elsewhere logarithms and cosines may round otherwise.
NOISE = "968b2b0b"


def same_rounding() -> bool:
    noise = branch_noise((64, *SHAPE), 1, 2, 3, 4)
    return hashlib.sha256(noise.numpy().tobytes()).hexdigest().startswith(NOISE)


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_run_comes_out_the_same(name):
    found, recorded = outcome(cases()[name]), RECORDED[name]
    assert found["winners"] == recorded["winners"]
    assert found["latents"] == pytest.approx(recorded["latents"], abs=2e-4)
    assert found["scores"] == pytest.approx(recorded["scores"], abs=2e-3)
    if same_rounding():
        assert found["sha256"] == recorded["sha256"]


def test_every_case_is_recorded():
    assert cases().keys() == RECORDED.keys()
