"""Result files keep what was measured before a run was cut short."""

import json

import pytest

from benchmarks.growing import grow, without_gpu


def test_every_row_is_written_as_it_comes(tmp_path):
    path = tmp_path / "new" / "rows.json"

    def rows():
        yield {"k": 1}
        assert json.loads(path.read_text()) == {"cpu": {"threads": 1, "rows": [{"k": 1}]}}
        yield {"k": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grow(path, "cpu", {"threads": 1}, rows=rows())
    assert json.loads(path.read_text())["cpu"]["rows"] == [{"k": 1}, {"k": 2}]


def test_other_parts_stay(tmp_path):
    path = tmp_path / "rows.json"
    grow(path, "cpu", {}, rows=iter([{"k": 1}]))
    without_gpu(path)
    assert json.loads(path.read_text())["gpu"] == "not measured: no GPU was at hand"
    grow(path, "gpu", {"card": "a card"}, rows=iter([{"k": 2}]), others=iter([{"k": 3}]))
    without_gpu(path)
    assert json.loads(path.read_text()) == {
        "cpu": {"rows": [{"k": 1}]},
        "gpu": {"card": "a card", "rows": [{"k": 2}], "others": [{"k": 3}]},
    }
