"""The MODEL as a trunk: tokens of every family as an ordinary pass has them, and a model left as it was."""

import pytest
import torch

from tests.comfyui.families import FAMILIES, load_family

SIGMA = 0.6


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, pack):
    return load_family(request.param)


@pytest.fixture(scope="module")
def trunk(pack):
    return pack.module("nodes.trunk")


def read(pack, model, positive, like, work):
    """work(Trunk of `taps`, guider, model options) while ComfyUI has the model in place."""
    with torch.inference_mode():
        return pack.module("nodes.trunk").while_sampling(model, positive, like, work)


def tokens_of(pack, tiny, x, positive, taps, sigma=SIGMA, items=None, like=None, model=None):
    """Taps of x, each with the prompt of its item of the batch `like`."""
    trunk, adapters = pack.module("nodes.trunk"), pack.module("nodes.adapters")
    model, like = model or tiny.model, x if like is None else like
    prompts = adapters.ScoringPrompts(positive, lambda percent: 1 - percent)

    def work(guider, options):
        source = trunk.Trunk(guider.inner_model, options, prompts, like, taps)
        rows = torch.arange(len(x)) if items is None else items
        return source(adapters.without_frames(x), sigma, rows)

    return read(pack, model, positive, like, work)


def recorded(pack, tiny, x, positive, number, sigma=SIGMA, model=None):
    """What leaves a block in a whole conditional pass of stock ComfyUI."""
    import comfy.samplers

    trunk, seen = pack.module("nodes.trunk"), []

    def work(guider, options):
        block = trunk.blocks_of(guider.inner_model)[number - 1]
        hook = block.register_forward_hook(
            lambda module, inputs, output: seen.append(
                output.clone()
                if isinstance(output, torch.Tensor)
                else [o if o is None else o.clone() for o in output]
            )
        )
        conds, levels = [guider.conds["positive"]], torch.full((len(x),), sigma)
        try:
            comfy.samplers.calc_cond_batch(guider.inner_model, conds, x, levels, options)
        finally:
            hook.remove()

    read(pack, model or tiny.model, positive, x, work)
    return seen[0]


def stock(tiny, latent=None, model=None, **settings):
    import nodes

    settings = {"seed": 5, "steps": 3, "cfg": 2.0, "denoise": 1.0, **settings}
    with torch.inference_mode():
        out = nodes.common_ksampler(
            model or tiny.model,
            settings["seed"],
            settings["steps"],
            settings["cfg"],
            "euler",
            "simple",
            tiny.conditioning(0),
            tiny.conditioning(1),
            latent or tiny.latent(),
            denoise=settings["denoise"],
        )
    return out[0]["samples"]


def blocks(trunk, tiny):
    return trunk.blocks_of(tiny.model.model)


def image_of(outputs, length):
    """The `length` image tokens in a block's output, found without nodes/trunk.py: those of its streams and
    slices that are so long, by hand for each kind of output.
    """
    if isinstance(outputs, torch.Tensor):
        outputs = outputs.flatten(1, -2)
        return [outputs[:, start : start + length] for start in range(outputs.shape[1] - length + 1)]
    return [stream for stream in outputs if stream is not None and stream.shape[1] == length]


def test_the_table_names_every_family(trunk, tiny):
    facts = trunk.trunk_facts(tiny.model, tiny.taps)
    assert facts.family == tiny.name
    assert facts.num_blocks == len(blocks(trunk, tiny))
    assert facts.latent_channels == tiny.channels
    assert facts.fingerprint["layout"] == "comfyui"
    assert len(facts.fingerprint["values"]) == 64


@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_a_stopped_pass_has_what_a_whole_pass_has(pack, trunk, tiny, size):
    """At every depth, bit for bit, odd sizes too."""
    x = tiny.latent(2, size, seed=1)["samples"]
    positive, depth = tiny.conditioning(0, length=9), len(blocks(trunk, tiny))
    found = tokens_of(pack, tiny, x, positive, tuple(range(1, depth + 1)))
    patch = tiny.patch
    assert (found.rows, found.columns) == tuple(-(-side // patch) for side in size)
    length = found.rows * found.columns
    for number, tokens in enumerate(found.tokens, start=1):
        assert tokens.shape == (2, length, trunk.trunk_facts(tiny.model, (1,)).width)
        whole = image_of(recorded(pack, tiny, x, positive, number), length)
        assert any(torch.equal(tokens, part) for part in whole), number
        alone = tokens_of(pack, tiny, x, positive, (number,))
        assert torch.equal(alone.tokens[0], tokens), number


@pytest.mark.parametrize("size", [(8, 6), (7, 5)])
def test_a_patch_changes_its_own_token_most(pack, trunk, tiny, size):
    x = tiny.latent(1, size, seed=1)["samples"]
    depth, changed = len(blocks(trunk, tiny)), x.clone()
    patch = tiny.patch
    changed[..., 2 * patch : 3 * patch, patch : 2 * patch] += 3
    for taps in ((1,), (depth,)):
        before, after = (tokens_of(pack, tiny, z, tiny.conditioning(0), taps) for z in (x, changed))
        moved = (after.tokens[0] - before.tokens[0]).abs().sum(dim=(0, 2))
        assert moved.argmax() == 2 * before.columns + 1


def test_pictures_are_bit_equal_before_and_after(pack, trunk, tiny):
    before = stock(tiny)
    x = tiny.latent(2, seed=1)["samples"]
    tokens_of(pack, tiny, x, tiny.conditioning(0), tiny.taps)
    assert torch.equal(stock(tiny), before)
    assert not any(block._forward_hooks for block in blocks(trunk, tiny))


def test_candidates_have_their_own_prompts_and_nothing_of_each_other(pack, tiny):
    """Five candidates of two items with a prompt each, in one pass and one by one."""
    like, x = tiny.latent(2, seed=2)["samples"], tiny.latent(5, seed=1)["samples"]
    both, items = tiny.conditioning(0, batch=2), torch.tensor([0, 1, 1, 0, 1])
    together = tokens_of(pack, tiny, x, both, tiny.taps, items=items, like=like)
    for i in range(5):
        row = slice(i, i + 1)
        own = [[value[items[row]], dict(options)] for value, options in both]
        for name in ("pooled_output", "conditioning_llama3"):
            if own[0][1].get(name) is not None:
                own[0][1][name] = own[0][1][name][items[row]]
        alone = tokens_of(pack, tiny, x[row], own, tiny.taps)
        for a, b in zip(together.tokens, alone.tokens, strict=True):
            torch.testing.assert_close(a[row], b, atol=5e-5 * max(1.0, float(b.std())), rtol=0)
    swapped = tokens_of(pack, tiny, x, both, tiny.taps, items=1 - items, like=like)
    assert (swapped.tokens[-1] - together.tokens[-1]).abs().max() > 1e-3


def with_lora(trunk, tiny, strength=1.0):
    """The MODEL with something on a weight of its first block."""
    model, network = tiny.model.clone(), tiny.model.model.diffusion_model
    name, weight = next(
        (name, value)
        for name, value in network.named_parameters()
        if value.ndim == 2
        and name.endswith("weight")
        and name.startswith(trunk.family_of(tiny.model.model).lists)
    )
    delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)) / weight.shape[-1] ** 0.5
    model.add_patches({f"diffusion_model.{name}": ("diff", (delta,))}, strength)
    return model


def test_a_lora_is_read_and_taken_off_again(pack, trunk, tiny):
    x, positive, last = tiny.latent(1, seed=1)["samples"], tiny.conditioning(0), tiny.taps[-1]
    plain, picture = tokens_of(pack, tiny, x, positive, tiny.taps), stock(tiny)
    patched = with_lora(trunk, tiny)
    found = tokens_of(pack, tiny, x, positive, tiny.taps, model=patched)
    whole = recorded(pack, tiny, x, positive, last, model=patched)
    length = found.rows * found.columns
    assert any(torch.equal(found.tokens[-1], part) for part in image_of(whole, length))
    assert (found.tokens[-1] - plain.tokens[-1]).abs().max() > 1e-2
    # The fingerprint is the base's, whatever is on it.
    assert trunk.trunk_facts(patched, (1,)) == trunk.trunk_facts(tiny.model, (1,))
    again = tokens_of(pack, tiny, x, positive, tiny.taps)
    assert all(torch.equal(a, b) for a, b in zip(again.tokens, plain.tokens, strict=True))
    assert torch.equal(stock(tiny), picture)


def test_areas_masks_and_ranges_steer_but_are_not_read(pack, tiny):
    x = tiny.latent(1, seed=1)["samples"]
    plain = tiny.conditioning(0)
    area = {"area": (4, 4, 0, 0), "strength": 0.3, "mask": torch.ones(1, 8, 8), "start_percent": 0.9}
    steered = [[plain[0][0], {**plain[0][1], **area}]]
    a, b = (tokens_of(pack, tiny, x, positive, tiny.taps) for positive in (plain, steered))
    assert all(torch.equal(one, other) for one, other in zip(a.tokens, b.tokens, strict=True))


def test_shares_of_a_pass(trunk, tiny):
    base, depth = tiny.model.model, len(blocks(trunk, tiny))
    shares = [trunk.share_of_pass(base, number) for number in range(1, depth + 1)]
    assert shares == sorted(shares)
    assert shares[-1] == 1


def test_a_network_not_in_the_table_is_refused_in_one_sentence(pack, trunk, monkeypatch):
    tiny = load_family("flux")
    monkeypatch.delitem(trunk.FAMILIES, "Flux")
    with pytest.raises(ValueError, match="network is a Flux, whose tokens no head can read yet: use a mod"):
        trunk.trunk_facts(tiny.model, (1,))


def test_references_stand_behind_and_are_not_read(pack, trunk):
    """Edit models: the image's own tokens, which the reference changes."""
    for name in ("flux", "flux2", "qwen_image"):
        tiny = load_family(name)
        x = tiny.latent(1, (8, 6), seed=1)["samples"]
        reference = tiny.latent(1, (6, 4), seed=8)["samples"]
        edit = tiny.conditioning(0, reference_latents=[reference])
        depth = len(blocks(trunk, tiny))
        found = tokens_of(pack, tiny, x, edit, tuple(range(1, depth + 1)))
        length = found.rows * found.columns
        plain = tokens_of(pack, tiny, x, tiny.conditioning(0), (depth,))
        assert (found.tokens[-1] - plain.tokens[0]).abs().max() > 1e-3
        other = x.clone()
        other[..., 0, 0] += 3
        moved = tokens_of(pack, tiny, other, edit, (1, depth))
        for a, b in ((moved.tokens[0], found.tokens[0]), (moved.tokens[1], found.tokens[-1])):
            assert a.shape[1] == length
            assert (a - b).abs().sum(dim=(0, 2)).argmax() == 0


def test_caches_do_not_answer_for_the_network(pack, trunk):
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    for name in ("flux", "z_image"):
        tiny = load_family(name)
        x, positive = tiny.latent(2, seed=1)["samples"], tiny.conditioning(0)
        plain = tokens_of(pack, tiny, x, positive, tiny.taps)
        for node, settings in (
            (EasyCacheNode, (0.2, 0.0, 1.0, False)),
            (LazyCacheNode, (0.2, 0.0, 1.0, False)),
        ):
            cached = node.execute(tiny.model, *settings).result[0]
            before = stock(tiny, model=cached)
            found = tokens_of(pack, tiny, x, positive, tiny.taps, model=cached)
            assert all(torch.equal(a, b) for a, b in zip(found.tokens, plain.tokens, strict=True))
            assert torch.equal(stock(tiny, model=cached), before)


def test_weights_in_eight_bits(pack, trunk):
    """fp8 weights, cast as they are used: still what a whole pass has, and near the full ones."""
    for name in ("flux", "qwen_image", "z_image"):
        tiny, small = load_family(name), load_family(name, options={"dtype": torch.float8_e4m3fn})
        x, positive = tiny.latent(2, seed=1)["samples"], tiny.conditioning(0)
        assert small.model.model_dtype() == torch.float8_e4m3fn
        found = tokens_of(pack, small, x, positive, small.taps)
        length = found.rows * found.columns
        whole = image_of(recorded(pack, small, x, positive, small.taps[-1]), length)
        assert any(torch.equal(found.tokens[-1], part) for part in whole)
        full = tokens_of(pack, tiny, x, positive, tiny.taps).tokens[0]
        assert 0 < (found.tokens[0].float() - full).std() / full.std() < 0.2


def test_a_model_that_is_partly_offloaded(pack, trunk):
    """Weights that are cast at every use, with a LoRA worked in then too."""
    tiny = load_family("flux")
    x, positive = tiny.latent(2, seed=1)["samples"], tiny.conditioning(0)
    patched = with_lora(trunk, tiny)
    plain = tokens_of(pack, tiny, x, positive, tiny.taps, model=patched)
    patched.detach()
    with torch.inference_mode():
        patched.load(torch.device("cpu"), lowvram_model_memory=1)
    assert patched.model.model_lowvram
    found = tokens_of(pack, tiny, x, positive, tiny.taps, model=patched)
    for a, b in zip(found.tokens, plain.tokens, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_compiled_model_is_not_compiled_for_it(pack, trunk):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    tiny, compiled = load_family("flux"), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = tiny.model.clone()
    set_torch_compile_wrapper(model, backend=backend)
    x, positive = tiny.latent(2, seed=1)["samples"], tiny.conditioning(0)
    found = tokens_of(pack, tiny, x, positive, tiny.taps, model=model)
    plain = tokens_of(pack, tiny, x, positive, tiny.taps)
    assert all(torch.equal(a, b) for a, b in zip(found.tokens, plain.tokens, strict=True))
    assert compiled == []
