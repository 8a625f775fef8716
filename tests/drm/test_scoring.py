"""The sampler's scorer: parts, memory, changing prompts, and compiled blocks that score the same."""

import copy
import logging

import pytest
import torch

from drm import DRM, compiling, scoring
from drm.backbone import backbone_from_transformer
from drm.compiling import CompiledSteps
from drm.head import ConvHead
from drm.scoring import Scorer
from tests.tiny import randomise, tiny_transformer


@pytest.fixture(scope="module")
def deep():
    """Three blocks of width 128."""
    whole = tiny_transformer(128, 4, joint_attention_dim=48, pooled_projection_dim=32)
    head = randomise(ConvHead(128, 32), seed=3, gain=2.0)
    return DRM(backbone_from_transformer(whole, 3), head).eval()


@pytest.fixture
def batch():
    """Candidates (15, ...) of three items with prompts of their own, the item of each, embeds, pooled."""
    generator = torch.Generator().manual_seed(3)
    shapes = (15, 16, 12, 8), (3, 20, 48), (3, 32)
    latents, embeds, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
    return latents, torch.arange(3).repeat_interleave(5).roll(4), embeds, pooled


def wanted(model, batch, sigma=0.4):
    latents, item, embeds, pooled = batch
    return model.score(latents, sigma, embeds[item], pooled[item])


class Small:
    """A DRM that fits `most` candidates into memory; `sizes` tells how many each call brought."""

    def __init__(self, model, most):
        self.sizes, self.most = [], most
        model.backbone.pos_embed.register_forward_pre_hook(lambda module, args: self.check(len(args[0])))

    def check(self, count):
        self.sizes.append(count)
        if count > self.most:
            raise torch.OutOfMemoryError("no memory for that many")


def test_scores_are_the_models(deep, batch):
    latents, item, *text = batch
    scorer = Scorer(deep, *text)
    for sigma in (0.4, 0.1, 0.4):
        torch.testing.assert_close(
            scorer(latents, sigma, item), wanted(deep, batch, sigma), atol=1e-5, rtol=0
        )
    assert scorer.dtype == torch.float32


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_chunks_change_nothing(deep, batch, chunk):
    latents, item, *text = batch
    whole, parts = Scorer(deep, *text), Scorer(deep, *text, chunk=chunk)
    torch.testing.assert_close(parts(latents, 0.4, item), whole(latents, 0.4, item), atol=1e-5, rtol=0)


def test_a_cpu_takes_what_its_cache_likes(deep, batch, monkeypatch):
    latents, item, *text = batch
    model = copy.deepcopy(deep)
    small = Small(model, most=100)
    monkeypatch.setattr(scoring, "CPU_TOKENS", 4 * (24 + 20) + 3)
    Scorer(model, *text)(latents, 0.4, item)
    assert small.sizes == [4, 4, 4, 3]


def test_out_of_memory_halves_the_parts_and_stays_there(deep, batch):
    latents, item, *text = batch
    model, freed = copy.deepcopy(deep), []
    small = Small(model, most=3)
    scorer = Scorer(model, *text, free=lambda: freed.append(True))
    torch.testing.assert_close(scorer(latents, 0.4, item), wanted(deep, batch), atol=1e-5, rtol=0)
    assert small.sizes == [15, 8, 4, 2, 2, 2, 2, 2, 2, 2, 1]
    assert len(freed) == 3
    scorer(latents[:4], 0.4, item[:4])
    assert small.sizes[11:] == [2, 2]


def test_out_of_memory_with_one_candidate_is_reported(deep, batch):
    latents, item, *text = batch
    model = copy.deepcopy(deep)
    Small(model, most=0)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        Scorer(model, *text)(latents, 0.4, item)


def test_other_errors_are_not_taken_for_it(deep, batch):
    latents, item, *text = batch
    with pytest.raises(ValueError, match="16 channels"):
        Scorer(deep, *text)(latents[:, :8], 0.4, item)


def test_it_can_be_stopped_between_parts(deep, batch):
    latents, item, *text = batch
    left = [2]

    def stop():
        left[0] -= 1
        if left[0] < 0:
            raise InterruptedError("stopped")

    scorer = Scorer(deep, *text, chunk=5, before=stop)
    with pytest.raises(InterruptedError):
        scorer(latents, 0.4, item)
    left[0] = 3
    torch.testing.assert_close(scorer(latents, 0.4, item), wanted(deep, batch), atol=1e-5, rtol=0)


def test_other_prompts_at_the_same_sigma(deep, batch):
    latents, item, embeds, pooled = batch
    scorer = Scorer(deep, embeds, pooled)
    before = scorer(latents, 0.4, item)
    scorer.read(embeds.flip(0), pooled.flip(0))
    after = scorer(latents, 0.4, item)
    torch.testing.assert_close(
        after, wanted(deep, (latents, item, embeds.flip(0), pooled.flip(0))), atol=1e-5, rtol=0
    )
    assert (after - before).abs().max() > 1e-3


def test_compiled_blocks_score_the_same(deep, batch):
    latents, item, *text = batch
    torch.compiler.reset()
    scorer = Scorer(deep, *text, compiled=CompiledSteps(True, "eager"))
    torch.testing.assert_close(scorer(latents, 0.4, item), wanted(deep, batch), atol=1e-5, rtol=0)
    assert list(scorer.compiled.chosen.values()) != [None]


def test_blocks_of_one_structure_are_compiled_once(deep, batch):
    """The first block, which gets its text projected, one with and one without dual attention, the last."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    latents, item, *text = batch
    sizes = {"joint_attention_dim": 48, "pooled_projection_dim": 32, "dual_attention_layers": (0, 1)}
    model = DRM(backbone_from_transformer(tiny_transformer(64, 5, **sizes), 4), ConvHead(64, 16)).eval()
    scorer = Scorer(model, *text, compiled=CompiledSteps(True, backend))
    torch.testing.assert_close(scorer(latents, 0.4, item), wanted(model, batch), atol=1e-5, rtol=0)
    assert len(graphs) == 4


def test_on_a_cpu_nothing_is_compiled_unasked(deep, batch):
    latents, item, *text = batch
    scorer = Scorer(deep, *text)
    scorer(latents, 0.4, item)
    assert scorer.compiled.chosen == {}
    assert Scorer(deep, *text).compiled is scorer.compiled


def test_what_a_shape_has_cost_decides(monkeypatch):
    """On CUDA: plain until calls of a second each have cost what compiling is worth, then what is faster."""
    seconds = {None: 1.0, "fast": 0.5}
    monkeypatch.setattr(compiling, "WORTH_SECONDS", 9.5)
    monkeypatch.setattr(compiling, "compile_step", lambda *a, **k: "fast")
    monkeypatch.setattr(compiling, "seconds_of", lambda run, step: seconds[step])
    chooser, device = CompiledSteps(), torch.device("cuda")
    found = [chooser.fitting((4, 16, 8, 8), device, lambda step: None) for _ in range(12)]
    assert found == [None] * 9 + ["fast"] * 3
    assert chooser.fitting((8, 16, 8, 8), device, lambda step: None) is None
    seconds["fast"] = 2.0
    chooser = CompiledSteps()
    assert [chooser.fitting((4, 16), device, lambda step: None) for _ in range(12)] == [None] * 12
    assert CompiledSteps(False).fitting((4, 16), device, lambda step: None) is None


def test_where_compiling_fails_blocks_stay_plain_and_it_is_said_once(deep, batch, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    torch.compiler.reset()
    compiling._tell_once.cache_clear()
    latents, item, *text = batch
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            scorer = Scorer(deep, *text, compiled=CompiledSteps(True, broken))
            torch.testing.assert_close(scorer(latents, 0.4, item), wanted(deep, batch), atol=1e-5, rtol=0)
            assert list(scorer.compiled.chosen.values()) == [None]
    assert len([r for r in caplog.records if "not compiled" in r.message]) == 1
