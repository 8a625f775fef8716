"""An imported DiNa-LRM in the nodes: it scores as the published model does, and it steers."""

import pytest
import torch

from tests.comfyui.graphs import score_graph, stepwise_graph
from tests.tiny import tiny_transformer
from tests.training.dina_release import write_release
from training.import_dina import main

NAME = "dina.safetensors"


@pytest.fixture(scope="module")
def dina(family, tmp_path_factory):
    """A release on the demo checkpoint, and its import among the server's reward models."""
    transformer = tiny_transformer(128, 2, joint_attention_dim=256, pooled_projection_dim=256)
    # The checkpoint is in half precision.
    release = write_release(
        tmp_path_factory.mktemp("dina") / "release",
        transformer.half().float(),
        num_transformer_layers=2,
        visual_head_idx=[1, 2],
        text_head_idx=[1],
    )
    out = family.drm.with_name(NAME)
    arguments = "--base", family.checkpoint, "--release", release.folder, "--out", out
    assert main([str(argument) for argument in arguments]) == 0
    yield release
    out.unlink()


@pytest.fixture(scope="module")
def patcher(dina, inside):
    return inside.pack.module("nodes.adapters").load_drm_patcher("drm", NAME, "float32")


def published_score(dina, inside, x, sigma):
    embeds, options = inside.positive[0]
    repeat = len(x), 1, 1
    return (dina.raw(x, sigma, embeds.repeat(repeat), options["pooled_output"].repeat(repeat[:2])) + 10) / 10


def test_score_latent_shows_the_published_score(dina, patcher, inside):
    node = inside.pack.module("nodes.score").DRMScoreLatent
    latent = inside.latent(batch=5, seed=1)
    settings = {"latent_is": "finished picture", "noise_draws": 1, "seed": 3}
    with torch.inference_mode():
        clean = node.execute(
            drm=patcher, latent=latent, positive=inside.positive, sigma=0.0, **settings
        ).result
        noised = node.execute(
            drm=patcher, latent=latent, positive=inside.positive, sigma=0.4, **settings
        ).result
    x0 = (latent["samples"] - 0.0609) * 1.5305
    wanted = published_score(dina, inside, x0, 0.0)
    assert wanted.std() > 0.01
    torch.testing.assert_close(torch.tensor(clean[0]), wanted, atol=1e-4, rtol=0)
    noise = inside.pack.module("drm.branching").branch_noise((16, 8, 8), 3, 0, 0, 0)
    wanted = published_score(dina, inside, 0.6 * x0 + 0.4 * noise, 0.4)
    torch.testing.assert_close(torch.tensor(noised[0]), wanted, atol=1e-4, rtol=0)


def test_ksampler_keeps_the_branch_it_scores_best(patcher, inside):
    samples, trace = inside.run(drm=patcher, num_branches=3, steps=4)
    steps = [step for step in trace.steps if step.scores is not None]
    assert len(steps) == 3
    for step in steps:
        (scores,), (winner,) = step.scores, step.winner
        assert max(scores) - min(scores) > 1e-4
        assert scores.index(max(scores)) == winner
    other = inside.run(num_branches=3, steps=4)[0]
    assert (samples["samples"] - other["samples"]).abs().max() > 0.01
    assert torch.isfinite(samples["samples"]).all()


def test_bfloat16_keeps_the_head_in_float32(dina, inside):
    rough = inside.pack.module("nodes.adapters").load_drm_patcher("drm", NAME, "bfloat16")
    assert {p.dtype for p in rough.model.head.parameters()} == {torch.float32}
    assert {p.dtype for p in rough.model.backbone.parameters()} == {torch.bfloat16}
    x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    embeds, options = inside.positive[0]
    got = rough.model.score(x, 0.4, embeds, options["pooled_output"])
    torch.testing.assert_close(got, published_score(dina, inside, x, 0.4), atol=0.05, rtol=0)


def test_in_a_real_server(dina, server):
    for graph in (score_graph(seed=901), stepwise_graph("dina", num_branches=2, seed=902)):
        graph["3"]["inputs"]["drm_name"] = NAME
        result = server.run(graph)
        assert result.status == "success", result.error
        if "9" not in graph:
            (text,) = result.outputs["8"]["text"]
            assert len({line.split(": ")[1] for line in text.splitlines()}) == 3
