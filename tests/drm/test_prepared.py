"""Blocks walked by hand with what siblings share: equal to diffusers' own forward and to one at a time."""

import copy
import dataclasses

import pytest
import torch

from drm import DRM, prepared
from drm.backbone import BackboneConfig, TruncatedSD3
from drm.head import ConvHead, QueryHead
from tests.tiny import randomise

SHAPE = {
    "num_kept": 3,
    "num_layers": 4,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 24,
}
KINDS = {
    "plain": {},
    "dual": {"dual_attention_layers": (0, 1)},
    "dual to the end": {"dual_attention_layers": (0, 1, 2)},
    "no norms": {"qk_norm": None},
    "one block": {"num_kept": 1, "dual_attention_layers": (0,)},
    "taps": {"dual_attention_layers": (0,), "image_taps": (0, 2, 3), "text_taps": (0, 1, 3)},
    "image taps": {"image_taps": (1, 3), "text_taps": ()},
}


def make(kind: str, seed: int = 0) -> DRM:
    """A random reward model of a kind; one with taps has a QueryHead, the others heads after each block."""
    config = BackboneConfig(**SHAPE | KINDS[kind])
    backbone = randomise(TruncatedSD3(config), seed)
    if config.image_taps:
        head = QueryHead(128, len(config.image_taps), len(config.text_taps), width=64, num_heads=4)
        return DRM(backbone, randomise(head, seed + 1)).eval()
    heads = {n: randomise(ConvHead(128, 32), seed + n, gain=2.0) for n in range(1, config.num_kept + 1)}
    return DRM(backbone, heads.pop(config.num_kept), early_heads=heads).eval()


@pytest.fixture(scope="module")
def models():
    return {kind: make(kind) for kind in KINDS}


def draw(size: tuple[int, int] = (12, 8), siblings: int = 4):
    """Candidates of three prompts, out of order, with the prompt of each."""
    generator = torch.Generator().manual_seed(1)
    item = torch.tensor([0, 1, 2]).repeat_interleave(siblings).roll(2)
    latents = torch.randn(len(item), 16, *size, generator=generator)
    return latents, item, torch.randn(3, 20, 48, generator=generator), torch.randn(3, 32, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(12, 8), (2, 14)])
def test_equals_the_modules_own_forward(models, kind, size):
    model, (latents, item, embeds, pooled) = models[kind], draw(size)
    with torch.no_grad():
        wanted = model(latents, 0.4, embeds[item], pooled[item])
    assert wanted.std() > 0.003
    found = model.score_prepared(latents, model.prepare(0.4, embeds, pooled), item)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        model.score(latents, 0.4, embeds[item], pooled[item]), wanted, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("kind", ["dual", "taps", "no norms"])
def test_bfloat16_equals_one_at_a_time(models, kind):
    model, (latents, item, embeds, pooled) = copy.deepcopy(models[kind]).bfloat16(), draw()
    found = model.score_prepared(latents, model.prepare(0.4, embeds, pooled), item)
    alone = [
        model.score(latents[row : row + 1], 0.4, embeds[item[row]][None], pooled[item[row]][None])
        for row in range(len(item))
    ]
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-3, rtol=0)
    with torch.no_grad():
        own, exact = (m(latents, 0.4, embeds[item], pooled[item]) for m in (model, models[kind]))
    # Their roundings differ, one is as good as the other.
    assert (found - exact).square().mean().sqrt() < 1.5 * (own - exact).square().mean().sqrt() + 2e-4


@pytest.mark.parametrize("kind", ["dual", "taps"])
def test_under_autocast(models, kind):
    model, (latents, item, embeds, pooled) = models[kind], draw()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        wanted = model(latents, 0.4, embeds[item], pooled[item])
        found = model.score_prepared(latents, model.prepare(0.4, embeds, pooled), item)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)


def test_bfloat16_layer_and_gelu_in_one():
    """Where oneDNN offers it, the two are one call, at least as near to float32 as the two of them."""
    model = make("plain")
    block, tokens = model.backbone.transformer_blocks[0], torch.randn(50, 128)
    exact = block.ff(tokens)
    half, tokens = copy.deepcopy(block).bfloat16(), tokens.bfloat16()
    found = prepared._feed_forward(half.ff, tokens)
    assert (found - exact).square().mean() <= 1.1 * (half.ff(tokens) - exact).square().mean()


@pytest.mark.parametrize("kind", ["dual", "taps"])
def test_adapters_in_place_of_layers_count(models, kind):
    import peft

    model, (latents, item, embeds, pooled) = copy.deepcopy(models[kind]), draw()
    before = model.score(latents, 0.4, embeds[item], pooled[item])
    targets = ["to_q", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "to_add_out", "ff.net.0.proj"]
    targets += ["ff_context.net.2", "norm1.linear", "norm1_context.linear", "context_embedder"]
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    peft.inject_adapter_in_model(settings, model.backbone)
    adapters = {name: p for name, p in model.backbone.named_parameters() if "lora_" in name}
    for parameter in adapters.values():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        wanted = model(latents, 0.4, embeds[item], pooled[item])
    assert (wanted - before).abs().max() > 1e-3
    found = model.score_prepared(latents, model.prepare(0.4, embeds, pooled), item)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_the_shared_work_is_done_once_for_a_prompt(models):
    """Text projection, time embedding, every modulation and the first block's text see three rows, not 12."""
    model, (latents, item, embeds, pooled) = models["dual"], draw()
    seen = {}
    handles = [
        module.register_forward_hook(lambda m, a, out, name=name: seen.setdefault(name, []).append(len(a[0])))
        for name, module in model.backbone.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    model.score_prepared(latents, model.prepare(0.4, embeds, pooled), item)
    for handle in handles:
        handle.remove()
    once = ("context_embedder", "time_text_embed", "norm1")
    first_text = tuple(f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv")
    for name, rows in seen.items():
        shared = any(part in name for part in once) or name in first_text
        assert rows == [3 if shared else 12], name


def test_prepared_once_serves_several_calls(models):
    model, (latents, item, embeds, pooled) = models["dual"], draw()
    shared = model.prepare(0.4, embeds, pooled)
    first = model.score_prepared(latents, shared, item)
    model.score_prepared(latents.flip(0), shared, item)
    assert torch.equal(model.score_prepared(latents, shared, item), first)


def test_each_depth_and_a_walk_in_stages(models):
    model, (latents, item, embeds, pooled) = models["dual"], draw()
    with torch.no_grad():
        columns = model.forward_depths(latents, 0.4, embeds[item], pooled[item])
    shared = model.prepare(0.4, embeds, pooled)
    for stop, depth in enumerate(model.depths):
        scores, depths = model.score_staged(
            latents, shared, item, lambda d, s, stop=depth: torch.full((12,), d < stop)
        )
        torch.testing.assert_close(scores, columns[:, stop], atol=1e-5, rtol=0)
        assert depths.tolist() == [depth] * 12


def test_rows_that_stop_keep_their_score_and_others_go_on(models):
    model, (latents, item, embeds, pooled) = models["dual"], draw()
    with torch.no_grad():
        columns = model.forward_depths(latents, 0.4, embeds[item], pooled[item])
    rows = {1: [1, 4, 5, 7, 10], 2: [2, 5, 10]}
    asked = []

    def go_on(depth, scores):
        asked.append((depth, scores.clone()))
        return torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor(rows[depth]), True)

    scores, depths = model.score_staged(latents, model.prepare(0.4, embeds, pooled), item, go_on)
    # Row 2 stopped after the first block; that it is asked for again changes nothing.
    assert depths.tolist() == [1, 2, 1, 1, 2, 3, 1, 2, 1, 1, 3, 1]
    torch.testing.assert_close(scores, columns[torch.arange(12), depths - 1], atol=1e-5, rtol=0)
    assert [depth for depth, _ in asked] == [1, 2]
    torch.testing.assert_close(asked[0][1], columns[:, 0], atol=1e-5, rtol=0)
    stopped = torch.tensor([row not in rows[1] for row in range(12)])
    assert (asked[1][1][stopped] == -torch.inf).all()
    torch.testing.assert_close(asked[1][1][~stopped], columns[~stopped, 1], atol=1e-5, rtol=0)


def test_only_the_rows_that_go_on_are_computed(models):
    model, (latents, item, embeds, pooled) = models["dual"], draw()
    seen = []
    blocks = model.backbone.transformer_blocks
    handles = [
        blocks[0].attn.to_q.register_forward_hook(lambda m, a, out: seen.append(("image 1", len(out)))),
        blocks[0].attn.to_add_out.register_forward_hook(lambda m, a, out: seen.append(("text 1", len(out)))),
        blocks[1].attn.to_q.register_forward_hook(lambda m, a, out: seen.append(("image 2", len(out)))),
    ]
    model.score_staged(
        latents, model.prepare(0.4, embeds, pooled), item, lambda d, s: (torch.arange(12) < 5) & (d < 2)
    )
    for handle in handles:
        handle.remove()
    assert seen == [("image 1", 12), ("text 1", 5), ("image 2", 5)]


@pytest.mark.parametrize("kind", ["taps", "image taps", "one block"])
def test_without_early_heads_there_is_one_stage(models, kind):
    model, (latents, item, embeds, pooled) = models[kind], draw()

    def never(depth, scores):
        raise AssertionError("nobody is asked after the last depth")

    shared = model.prepare(0.4, embeds, pooled)
    scores, depths = model.score_staged(latents, shared, item, never)
    assert torch.equal(scores, model.score_prepared(latents, shared, item))
    assert depths.tolist() == [model.num_blocks] * 12


def test_taps_survive_the_rows_that_leave(models):
    """A QueryHead at the end reads taps from before the early head that some rows left at."""
    last, (latents, item, embeds, pooled) = models["taps"], draw()
    model = DRM(last.backbone, last.head, early_heads={2: randomise(ConvHead(128, 32), 5)}).eval()
    with torch.no_grad():
        columns = model.forward_depths(latents, 0.4, embeds[item], pooled[item])
    stays = torch.arange(12) % 3 == 1
    scores, depths = model.score_staged(
        latents, model.prepare(0.4, embeds, pooled), item, lambda depth, scores: stays
    )
    torch.testing.assert_close(scores, torch.where(stays, columns[:, 1], columns[:, 0]), atol=1e-5, rtol=0)
    assert depths.tolist() == torch.where(stays, 3, 2).tolist()


def test_shown_scores_at_every_depth(models):
    model, (latents, item, embeds, pooled) = copy.copy(models["dual"]), draw()
    model.metadata = {"shown": {"scale": 0.1, "offset": 1.0}}
    plain, shared = models["dual"], model.prepare(0.4, embeds, pooled)
    for go_on in (lambda d, s: s > s.median(), lambda d, s: s < -9):
        found = model.score_staged(latents, shared, item, go_on)[0]
        raw = plain.score_staged(latents, shared, item, go_on)[0]
        torch.testing.assert_close(found, 0.1 * raw + 1.0)


def test_wrong_input_is_refused(models):
    model, (latents, item, embeds, pooled) = models["dual"], draw()
    with pytest.raises(ValueError, match="wanted 0"):
        model.prepare(1.5, embeds, pooled)
    with pytest.raises(ValueError, match="wants width 48"):
        model.prepare(0.5, embeds[..., :40], pooled)
    shared = model.prepare(0.5, embeds, pooled)
    with pytest.raises(ValueError, match="16 channels"):
        model.score_prepared(latents[:, :4], shared, item)
    with pytest.raises(ValueError, match="multiples of 2"):
        model.score_staged(latents[..., :7], shared, item, lambda d, s: s > 0)


def test_rows_joined_are_the_rows_taken_apart(models):
    model, (latents, item, embeds, pooled) = models["taps"], draw()
    shared = model.prepare(0.4, embeds, pooled)
    rows = prepared.walk(model.backbone, shared, prepared.enter(model.backbone, latents, shared, item), 2)
    again = prepared.Rows.join([rows.take(slice(0, 5)), rows.take(torch.arange(5, 12))])
    for field in dataclasses.fields(rows):
        one, other = getattr(rows, field.name), getattr(again, field.name)
        for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (one, other)), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
