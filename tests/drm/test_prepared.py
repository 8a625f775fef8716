"""One walk through the blocks, sharing what siblings have in common or not: diffusers' own forward."""

import copy

import pytest
import torch
from diffusers.models import attention

from drm import DRM
from drm.backbone import BackboneConfig, Features, TruncatedSD3
from drm.head import ConvHead, QueryHead
from drm.sd3 import joint_block
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
    """A random reward model of a kind; one with taps has a QueryHead."""
    config = BackboneConfig(**SHAPE | KINDS[kind])
    backbone = randomise(TruncatedSD3(config), seed)
    if config.image_taps:
        head = QueryHead(128, len(config.image_taps), len(config.text_taps), width=64, num_heads=4)
        return DRM(backbone, randomise(head, seed + 1)).eval()
    return DRM(backbone, randomise(ConvHead(128, 32), seed + 3, gain=2.0)).eval()


@pytest.fixture(scope="module")
def models():
    return {kind: make(kind) for kind in KINDS}


def draw(size: tuple[int, int] = (12, 8), siblings: int = 4):
    """Candidates of three prompts, out of order, with the prompt of each."""
    generator = torch.Generator().manual_seed(1)
    item = torch.tensor([0, 1, 2]).repeat_interleave(siblings).roll(2)
    latents = torch.randn(len(item), 16, *size, generator=generator)
    return latents, item, torch.randn(3, 20, 48, generator=generator), torch.randn(3, 32, generator=generator)


def theirs(model: DRM, latents, sigma, embeds, pooled):
    """The score by diffusers' own blocks, each through its own forward."""
    backbone, forward = model.backbone, attention.JointTransformerBlock.forward
    tokens = backbone.pos_embed(latents.to(backbone.dtype))
    temb = backbone.time_text_embed(torch.full((len(latents),), 1000 * sigma), pooled.to(backbone.dtype))
    context = backbone.context_embedder(embeds.to(backbone.dtype))
    config, image, text = backbone.config, [tokens], [context]
    for block in backbone.transformer_blocks:
        context, tokens = forward(block, tokens, context, temb)
        image.append(tokens)
        text.append(context)
    taps = [image[i] for i in config.image_taps], [text[i] for i in config.text_taps]
    return model._judge(Features(tokens, *taps, temb), latents)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(12, 8), (2, 14)])
def test_equals_diffusers_own_forward(models, kind, size):
    model, (latents, item, embeds, pooled) = models[kind], draw(size)
    with torch.no_grad():
        wanted = theirs(model, latents, 0.4, embeds[item], pooled[item])
        own = model(latents, 0.4, embeds[item], pooled[item])
    assert wanted.std() > 0.003
    found = model.score_prepared(latents, model.prepare(0.4, embeds, pooled), item)
    for scores in (own, found, model.score(latents, 0.4, embeds[item], pooled[item])):
        torch.testing.assert_close(scores, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["dual", "taps", "no norms"])
def test_gradients_are_diffusers_own(models, kind, checkpointing):
    model, (latents, item, embeds, pooled) = copy.deepcopy(models[kind]), draw()
    theirs(model, latents, 0.4, embeds[item], pooled[item]).square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.backbone.gradient_checkpointing = checkpointing
    model(latents, 0.4, embeds[item], pooled[item]).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3)


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
    with torch.no_grad():
        found = joint_block._feed_forward(half.ff, tokens)
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
        model.score_prepared(latents[..., :7], shared, item)
