"""The GPU benchmark, whole, on a CPU at a tiny size, in a process of its own as ComfyUI needs one."""

import json
import subprocess
import sys

from benchmarks.gpu import TINY_SIZES, WAYS
from tools.comfy_server import ROOT


def run(tmp_path, *arguments):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--no-tests", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())["rows"]


def test_every_part_leaves_its_rows(tmp_path):
    rows = run(tmp_path)
    sampling = [row for row in rows if row["part"] == "sampling"]
    assert [(row["size"], row["way"]) for row in sampling] == [
        (size, way) for size in TINY_SIZES for way in ("stock", *WAYS)
    ]
    assert all(len(row["seconds"]) == 3 and row["ratio"] > 0 for row in sampling)
    assert {row["ratio"] for row in sampling if row["way"] == "stock"} == {1.0}
    trainer = next(row for row in rows if row["part"] == "trainer")
    assert "failed" not in trainer, trainer
    assert next(row for row in rows if row["part"] == "memory")["rows"]


def test_what_has_no_time_is_left_out_by_name(tmp_path):
    rows = run(tmp_path, "--minutes", "0")
    assert {row["part"]: row["left_out"] for row in rows} == dict.fromkeys(
        [*(f"sampling {size}" for size in TINY_SIZES), "trainer", "memory"], "no time left"
    )
