"""The picture of benchmarks.stepwise: which ways belong to one curve, and that it is drawn."""

import json
import sys

from PIL import Image

from benchmarks import stepwise_plot


def row(way, ratio, k=4, naive=False):
    gain = [ratio / 2, ratio / 2 - 0.1, ratio / 2 + 0.1]
    settings = {"k": k, "naive": naive}
    return {
        "way": way,
        "time_ratio": ratio,
        "settings": settings,
        "pictures": 3,
        "drm_gain": gain,
        "judge_gain": gain,
    }


def test_ways_and_their_curves():
    assert stepwise_plot.curve_of(row("k = 4", 2.5, naive=True)) == "greedy, every step"
    assert stepwise_plot.curve_of(row("k = 1", 1.0, k=1, naive=True)) is None
    assert stepwise_plot.curve_of(row("balanced", 1.4)) == "presets"
    assert stepwise_plot.curve_of(row("best of 3", 2.9, k=0)) == "best of N"
    assert stepwise_plot.curve_of(row("k = 4, shared", 2.1)) is None


def test_the_picture(tmp_path, monkeypatch):
    rows = [
        row("plain", 1.0, k=0),
        row("k = 4", 2.5, naive=True),
        row("k = 4, shared", 2.1),
        row("best of 2", 1.9, k=0),
        row("fast", 1.2),
        row("balanced", 1.4),
    ]
    results, out = tmp_path / "stepwise.json", tmp_path / "stepwise.png"
    results.write_text(json.dumps({"prompts": 3, "rows": rows}))
    monkeypatch.setattr(sys, "argv", ["plot", "--results", str(results), "--out", str(out)])
    stepwise_plot.main()
    with Image.open(out) as picture:
        assert picture.size == (1320, 550)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50
