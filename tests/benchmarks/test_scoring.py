"""The scoring benchmark, whole and small: the CPU's table of a tiny model, the GPU's table on a CPU."""

import json
import sys

import pytest
import torch

from benchmarks import scoring
from benchmarks.scoring_ways import Case, operations, products
from drm import save_drm
from drm.backbone import BackboneConfig
from tests.tiny import tiny_drm


def test_the_cpu_s_table(tmp_path, monkeypatch):
    path, out = tmp_path / "drm.safetensors", tmp_path / "scoring.json"
    save_drm(tiny_drm(64, 4, 3, joint_attention_dim=48, pooled_projection_dim=32), path)
    out.write_text(json.dumps({"gpu": {"card": "of another machine"}}))
    command = ["scoring", "--model", str(path), "--out", str(out), "--prompts", "2", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", command)
    scoring.main()
    found = json.loads(out.read_text())
    assert found["gpu"] == {"card": "of another machine"}
    cpu = found["cpu"]
    assert [row["k"] for row in cpu["rows"]] == [2, 4, 6]
    for row in cpu["rows"]:
        assert row["shared"]["operations"] < row["naive"]["operations"]
        assert row["patches of 4, shared"]["operations"] < row["patches of 4, naive"]["operations"]
        assert row["patches of 4, naive"]["operations_ratio"] < 0.6
    # What siblings share is saved more often the more there are.
    saved = [row["shared"]["operations_ratio"] for row in cpu["rows"]]
    assert saved == sorted(saved, reverse=True)
    assert cpu["shared_minus_one_at_a_time"]["float32"] < 1e-5
    for shares in cpu["profile"].values():
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["matrix products"] > 0


def test_the_gpu_s_table_on_a_cpu():
    config = BackboneConfig(
        num_kept=3,
        num_layers=4,
        num_attention_heads=1,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        dual_attention_layers=(0,),
        pos_embed_max_size=24,
    )
    torch.compiler.reset()
    rows = list(scoring.large_rows(config, {"64x64": 8}, 5, rounds=1, where="cpu"))
    assert [row["k"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert row["minus_one_at_a_time"]["shared"] < 5e-3
        assert row["minus_one_at_a_time"]["compiled"] < 5e-3
        assert row["share_of_products"].keys() >= {"naive", "shared", "compiled"}
        assert row["patches of 4, shared"]["operations_ratio"] < row["shared"]["operations_ratio"]
        assert all(value > 0 for value in row["teraflops"].values())


def test_operations_by_hand():
    a = torch.ones(3, 4)
    assert operations(lambda: a @ torch.ones(4, 5)) == 2 * 3 * 4 * 5


def test_products_are_those_of_the_blocks_layers():
    """Against what FlopCounterMode counts in the layers of a model without anything else in it."""
    sizes = {"num_kept": 2, "num_layers": 3, "num_attention_heads": 2, "joint_attention_dim": 32}
    config = BackboneConfig(**sizes, pooled_projection_dim=32, dual_attention_layers=(0,))
    drm = scoring.random_drm(config, torch.device("cpu")).float()
    case = Case.draw(drm, 1, 3, 8, 5, torch.device("cpu"))
    inside = []
    for name, module in drm.backbone.transformer_blocks.named_modules():
        if isinstance(module, torch.nn.Linear) and "norm" not in name:
            module.register_forward_hook(lambda m, x, out: inside.append(2 * x[0].numel() * out.shape[-1]))
    case.naive(drm)
    layers = products(config, 3, 8, 5, torch.device("cpu"))
    assert sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in layers) == sum(inside)
