"""Heads after earlier blocks: their scores, their gradients, their place in a file."""

import copy

import pytest
import torch

from drm import DRM, DRMFileError, load_drm, save_drm
from drm.backbone import backbone_from_transformer
from drm.checkpoint import read_header
from drm.head import ConvHead
from drm.preference import decisive_lead, lead_at
from tests.tiny import randomise, tiny_transformer

SIZES = {"hidden": 128, "depth": 4, "joint_attention_dim": 48, "pooled_projection_dim": 32}


@pytest.fixture(scope="module")
def deep():
    """Three blocks of width 128, heads after each."""
    backbone = backbone_from_transformer(tiny_transformer(**SIZES, dual_attention_layers=(0,)), 3)
    heads = {blocks: randomise(ConvHead(128, 32), seed=blocks, gain=2.0) for blocks in (1, 2, 3)}
    return DRM(backbone, heads.pop(3), early_heads=heads).eval()


def test_last_column_is_the_score(deep, inputs):
    latents, *text = inputs
    columns = deep.forward_depths(latents, 0.4, *text)
    assert deep.depths == (1, 2, 3)
    assert columns.shape == (5, 3)
    assert columns.dtype == torch.float32
    assert torch.equal(columns[:, 2], deep(latents, 0.4, *text))
    assert columns.std(dim=0).min() > 0.01


@pytest.mark.parametrize("blocks", [1, 2])
def test_an_early_column_reads_the_tokens_after_its_block(deep, inputs, blocks):
    """The backbone cut there, whose last text stream is then never needed, gives the same image tokens."""
    import dataclasses

    from drm.backbone import backbone_from_state_dict

    latents, *text = inputs
    cut = dataclasses.replace(deep.backbone.config, num_kept=blocks)
    full = backbone_from_transformer(tiny_transformer(**SIZES, dual_attention_layers=(0,)), 4)
    shallow = DRM(backbone_from_state_dict(full.state_dict(), cut), deep.early_heads[str(blocks)])
    column = deep.depths.index(blocks)
    torch.testing.assert_close(
        deep.forward_depths(latents, 0.4, *text)[:, column], shallow(latents, 0.4, *text), atol=1e-5, rtol=0
    )


def test_gradients_reach_each_head_from_its_own_column(deep, inputs):
    model = copy.deepcopy(deep)
    model.forward_depths(inputs[0], 0.4, *inputs[1:])[:, 0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.early_heads["1"].parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.early_heads["2"].parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.head.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_keeps_them(deep, inputs, tmp_path, dtype):
    path = tmp_path / "deep.safetensors"
    deep.metadata = {"decisive": {"1": {"sigma": [0.5], "lead": [0.25]}}}
    save_drm(deep, path, dtype=dtype)
    loaded = load_drm(path)
    assert loaded.depths == (1, 2, 3)
    assert loaded.metadata["decisive"] == deep.metadata["decisive"]
    assert all(p.dtype == torch.float32 for p in loaded.early_heads.parameters())
    atol = 0 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(
        loaded.forward_depths(inputs[0], 0.4, *inputs[1:]),
        deep.forward_depths(inputs[0], 0.4, *inputs[1:]),
        atol=atol,
        rtol=0,
    )


def test_files_without_them_are_what_they_were(drm, inputs, tmp_path):
    path = tmp_path / "plain.safetensors"
    save_drm(drm, path)
    assert set(read_header(path)["architecture"]) == {"backbone", "head"}
    loaded = load_drm(path)
    assert loaded.depths == (2,)
    assert torch.equal(loaded.score(inputs[0], 0.4, *inputs[1:]), drm.score(inputs[0], 0.4, *inputs[1:]))
    assert loaded.forward_depths(inputs[0], 0.4, *inputs[1:]).shape == (5, 1)


def test_impossible_places_are_refused(deep, tmp_path):
    for blocks in (0, 3):
        with pytest.raises(ValueError, match="wanted numbers from 1 to 2"):
            DRM(deep.backbone, deep.head, early_heads={blocks: ConvHead(128, 32)})
    with pytest.raises(ValueError, match="width 64"):
        DRM(deep.backbone, deep.head, early_heads={1: ConvHead(64, 32)})


@pytest.mark.parametrize("early", [{"3": {"kind": "conv", "dim": 128}}, {"one": {}}, [1, 2]])
def test_broken_headers_are_refused(deep, tmp_path, early):
    import json

    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "deep.safetensors"
    save_drm(deep, path)
    with safe_open(path, framework="pt") as file:
        text = dict(file.metadata())
    header = json.loads(text["header"])
    header["architecture"]["early_heads"] = early
    save_file(load_file(path), path, metadata=text | {"header": json.dumps(header)})
    with pytest.raises(DRMFileError, match="cannot build"):
        load_drm(path)


def test_decisive_lead_by_hand():
    """Twenty groups of two: the final best is 0.0, 0.1 ... 1.9 behind the early leader. Leaving out the worst
    5 % of twenty, one group, the lead is the next one's.
    """
    early = torch.stack([torch.zeros(20), torch.arange(20) / 10], dim=1)
    final = torch.tensor([1.0, 0.0]).expand(20, 2)
    table = decisive_lead(early, final, torch.full((20,), 0.25), miss=0.05, num_bins=2)
    assert table == {"sigma": [0.25], "lead": [pytest.approx(1.8)]}
    assert decisive_lead(early, final, torch.full((20,), 0.25), 0.0, 2)["lead"] == [pytest.approx(1.9)]
    assert decisive_lead(early, early, torch.full((20,), 0.25), 0.0, 2)["lead"] == [0.0]


def test_decisive_lead_by_sigma_and_its_promise():
    generator = torch.Generator().manual_seed(0)
    final = torch.randn(4000, 4, generator=generator)
    sigma = torch.rand(4000, generator=generator)
    early = final + (0.2 + sigma)[:, None] * torch.randn(4000, 4, generator=generator)
    table = decisive_lead(early, final, sigma, miss=0.05, num_bins=4)
    assert table["sigma"] == [0.125, 0.375, 0.625, 0.875]
    assert table["lead"] == sorted(table["lead"])
    assert lead_at(0.5, table) == pytest.approx((table["lead"][1] + table["lead"][2]) / 2)
    stays = early >= early.amax(1, keepdim=True) - torch.tensor(table["lead"])[(sigma * 4).long()][:, None]
    lost = ~stays.gather(1, final.argmax(1, keepdim=True)).squeeze(1)
    assert 0.03 < lost.float().mean() <= 0.05


def test_decisive_lead_refuses_other_shapes():
    with pytest.raises(ValueError, match="wanted"):
        decisive_lead(torch.zeros(3), torch.zeros(3), torch.zeros(3))
