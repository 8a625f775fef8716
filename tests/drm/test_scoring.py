"""The sampler's scorer: parts, memory, stages, changing prompts, and compiled blocks that score the same."""

import copy
import logging

import pytest
import torch

from drm import DRM, compiling, scoring
from drm.backbone import backbone_from_transformer
from drm.compiling import CompiledSteps
from drm.head import ConvHead
from drm.prepared import PLAIN
from drm.scoring import Scorer
from tests.tiny import randomise, tiny_transformer


@pytest.fixture(scope="module")
def deep():
    """Three blocks of width 128, heads after each, a table of decisive leads."""
    whole = tiny_transformer(128, 4, joint_attention_dim=48, pooled_projection_dim=32)
    heads = {n: randomise(ConvHead(128, 32), seed=n, gain=2.0) for n in (1, 2, 3)}
    metadata = {"decisive": {"1": {"sigma": [0.25, 0.75], "lead": [0.5, 1.5]}}}
    return DRM(backbone_from_transformer(whole, 3), heads.pop(3), metadata, heads).eval()


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


def go_on(depth, scores):
    """About two thirds, then about a third."""
    return scores > scores.sort().values[{1: 5, 2: 10}[depth]]


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
    assert scorer.depths == (1, 2, 3)
    assert scorer.dtype == torch.float32


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_chunks_change_nothing(deep, batch, chunk):
    """Nor in stages, where the rows of an item meet in go_on wherever the parts were cut."""
    latents, item, *text = batch
    whole, parts = Scorer(deep, *text), Scorer(deep, *text, chunk=chunk)
    torch.testing.assert_close(parts(latents, 0.4, item), whole(latents, 0.4, item), atol=1e-5, rtol=0)
    scores, depths = whole.staged(latents, 0.4, item, go_on)
    assert sorted(depths.unique().tolist()) == [1, 2, 3]
    found = parts.staged(latents, 0.4, item, go_on)
    torch.testing.assert_close(found[0], scores, atol=1e-5, rtol=0)
    assert torch.equal(found[1], depths)


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


def test_out_of_memory_in_stages(deep, batch):
    latents, item, *text = batch
    model, asked = copy.deepcopy(deep), []
    small = Small(model, most=4)

    def counted(depth, scores):
        asked.append(depth)
        return go_on(depth, scores)

    scores, depths = Scorer(model, *text).staged(latents, 0.4, item, counted)
    whole = Scorer(deep, *text).staged(latents, 0.4, item, go_on)
    torch.testing.assert_close(scores, whole[0], atol=1e-5, rtol=0)
    assert torch.equal(depths, whole[1])
    assert small.sizes[:4] == [15, 8, 4, 4]
    assert asked == [1, 2]


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
    left[0] = 4
    with pytest.raises(InterruptedError):
        scorer.staged(latents, 0.4, item, go_on)
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


def test_decisive_leads_come_in_the_shown_scale(deep, batch):
    model = copy.copy(deep)
    scorer = Scorer(model, *batch[2:])
    assert scorer.decisive(1, 0.5) == pytest.approx(1.0)
    assert scorer.decisive(1, 0.0) == pytest.approx(0.5)
    assert scorer.decisive(2, 0.5) is None
    model.metadata = deep.metadata | {"shown": {"scale": 0.1, "offset": 1.0}}
    assert scorer.decisive(1, 0.5) == pytest.approx(0.1)
    model.metadata = {}
    assert scorer.decisive(1, 0.5) is None


def test_it_carries_the_models_calibration(deep, batch):
    table = {"sigma": [0.5], "mean": [1.0], "std": [2.0]}
    calibrated = DRM(deep.backbone, deep.head, {"calibration": table})
    assert Scorer(calibrated, *batch[2:]).calibration == table
    assert Scorer(deep, *batch[2:]).calibration is None


def test_compiled_blocks_score_the_same(deep, batch):
    latents, item, *text = batch
    torch.compiler.reset()
    scorer = Scorer(deep, *text, compiled=CompiledSteps(True, "eager"))
    torch.testing.assert_close(scorer(latents, 0.4, item), wanted(deep, batch), atol=1e-5, rtol=0)
    assert [steps is PLAIN for steps in scorer.compiled.chosen.values()] == [False]
    staged = scorer.staged(latents, 0.4, item, go_on)
    plain = Scorer(deep, *text).staged(latents, 0.4, item, go_on)
    torch.testing.assert_close(staged[0], plain[0], atol=1e-5, rtol=0)
    assert torch.equal(staged[1], plain[1])


def test_compiled_survivors_come_in_few_shapes(deep, batch):
    latents, item, *text = batch
    compiled, sizes = CompiledSteps(True, "eager"), []
    scorer = Scorer(deep, *text, compiled=compiled)
    handle = deep.backbone.transformer_blocks[1].attn.to_q.register_forward_hook(
        lambda module, args, out: sizes.append(len(out))
    )
    for stays in (9, 10, 11, 13):
        scorer.staged(latents, 0.4, item, lambda d, s, stays=stays: torch.arange(15) < stays)
    handle.remove()
    assert {key[0] for key in compiled.chosen} == {16}


def test_blocks_of_one_structure_are_compiled_once(deep, batch):
    """Two structures of image stream (with and without dual attention) and, of the text's, the last block."""
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
    """On CUDA: plain until calls of a second each have cost what compiling is worth, then what is fastest."""
    seconds = {PLAIN: 1.0, "fast": 0.5}
    monkeypatch.setattr(compiling, "WORTH_SECONDS", 9.5)
    monkeypatch.setattr(compiling, "compile_steps", lambda *a, **k: "fast")
    monkeypatch.setattr(compiling, "seconds_of", lambda run, steps: seconds[steps])
    chooser, device = CompiledSteps(), torch.device("cuda")
    found = [chooser.fitting((4, 16, 8, 8), device, lambda steps: None) for _ in range(12)]
    assert found == [PLAIN] * 9 + ["fast"] * 3
    assert chooser.fitting((8, 16, 8, 8), device, lambda steps: None) is PLAIN
    seconds["fast"] = 2.0
    chooser = CompiledSteps()
    assert [chooser.fitting((4, 16), device, lambda steps: None) for _ in range(12)] == [PLAIN] * 12
    assert CompiledSteps(False).fitting((4, 16), device, lambda steps: None) is PLAIN


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
            assert list(scorer.compiled.chosen.values()) == [PLAIN]
    assert len([r for r in caplog.records if "not compiled" in r.message]) == 1
