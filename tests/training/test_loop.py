"""The training loop: stopped and resumed equals never stopped, and a diverged run says so."""

import itertools
import json

import pytest
import torch
from torch import nn

from training.demo.loop import LoopConfig, learning_rate_at, train

CONFIG = LoopConfig(steps=12, learning_rate=0.01, warmup=3, decay=0.1, ema=0.9, save_every=4, log_every=1)


def fit(folder, *, stop_at=None, scale=1.0):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)

    def loss_fn(step, generator):
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(5, 3, generator=generator)
        return scale * (model(x) - x[:, :2]).square().mean(), {"mean": x.mean().item()}

    return model, train(model, loss_fn, CONFIG, folder, name="toy")


@pytest.mark.parametrize("stop_at", [4, 7, 11])
def test_resumed_run_equals_one_never_stopped(tmp_path, stop_at):
    whole, whole_averaged = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "stopped", stop_at=stop_at)
    resumed, resumed_averaged = fit(tmp_path / "stopped")
    for a, b in ((whole, resumed), (whole_averaged, resumed_averaged)):
        for expected, got in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_averaged_weights_lag_behind_and_logs_hold_every_step(tmp_path):
    model, averaged = fit(tmp_path)
    assert not torch.equal(model.weight, averaged.weight)
    rows = [json.loads(line) for line in (tmp_path / "toy.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(12))
    assert len({row["mean"] for row in rows}) == 12  # every step has data of its own
    assert not list(tmp_path.glob("*.tmp"))


def test_learning_rate_warms_up_and_falls_to_its_floor():
    rates = [learning_rate_at(step, CONFIG) for step in range(13)]
    assert rates[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert rates[3] == pytest.approx(0.01)
    assert rates[12] == pytest.approx(0.001)
    assert all(a > b for a, b in itertools.pairwise(rates[3:]))


def test_divergence_is_named(tmp_path):
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        fit(tmp_path, scale=float("nan"))
