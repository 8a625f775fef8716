"""Winner reuse: a step's conditional pass goes on from the scoring of the winner, and gives the same."""

import pytest
import torch

from tests.comfyui.families import FAMILIES, load_family
from tests.comfyui.test_any_family import drawn_half, head_for, stepwise

# A block of these is not told which rows are conditional.
UNTOLD = ("ernie_image",)


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name not in UNTOLD])
def tiny(request, pack):
    return load_family(request.param)


@pytest.fixture
def reuse(pack):
    module = pack.module("nodes.reuse")
    module._CHECKED.clear()
    return module


def without(reuse, monkeypatch, run):
    with monkeypatch.context() as patched:
        patched.setattr(reuse, "plain", lambda *_: False)
        return run()


@pytest.mark.parametrize("case", ["guidance", "no guidance", "batch", "texts of two lengths"])
def test_gives_what_an_ordinary_pass_gives(pack, tiny, reuse, monkeypatch, case):
    settings = {
        "guidance": {},
        "no guidance": {"cfg": 1.0},
        "batch": {"positive": tiny.conditioning(7, batch=2)},
        "texts of two lengths": {"negative": tiny.conditioning(1, length=11)},
    }[case]
    latent, drm = tiny.latent(batch=2 if case == "batch" else 1), head_for(pack, tiny)
    run = lambda: stepwise(pack, tiny, latent, drm, steps=5, **settings)  # noqa: E731
    plain, plain_trace = without(reuse, monkeypatch, run)
    checked, _ = run()
    ours, trace = run()
    assert reuse._CHECKED[tiny.model.model.diffusion_model]
    items = len(latent["samples"])
    share = pack.module("nodes.trunk").share_of_pass(tiny.model.model, tiny.taps[-1])
    assert trace.spent["reused"] == pytest.approx(4 * items * share, abs=1e-3)
    assert plain_trace.spent["reused"] == 0
    assert [step.winner for step in trace.steps] == [step.winner for step in plain_trace.steps]
    for other in (checked, ours):
        difference = (other["samples"] - plain["samples"]).abs().max() / plain["samples"].std()
        assert difference < 1e-4


def test_leaves_the_model_as_it_was(pack, tiny, reuse):
    before = stepwise(pack, tiny, num_branches=1, noise_level=0.0)[0]["samples"]
    stepwise(pack, tiny)
    assert not any(
        "forward" in vars(block) for block in pack.module("nodes.trunk").blocks_of(tiny.model.model)
    )
    assert torch.equal(stepwise(pack, tiny, num_branches=1, noise_level=0.0)[0]["samples"], before)


def test_walks_less(pack, tiny, reuse):
    """Rows that pass a tapped block, of all the run."""
    drm = head_for(pack, tiny)
    stepwise(pack, tiny, drm=drm)
    block, rows = pack.module("nodes.trunk").blocks_of(tiny.model.model)[0], []
    own = type(block).forward

    def count(self, *args, **kwargs):
        if self is block:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            rows.append(len(tensors[0]))
        return own(self, *args, **kwargs)

    type(block).forward = count
    try:
        stepwise(pack, tiny, drm=drm, steps=4)
    finally:
        type(block).forward = own
    # The first step whole, the others the negative alone; three steps score three candidates.
    assert sum(rows) == 2 + 3 * 1 + 3 * 3


def patched(tiny, how):
    model = tiny.model.clone()
    if how == "wrapper":
        model.set_model_unet_function_wrapper(
            lambda apply, arguments: apply(arguments["input"], arguments["timestep"], **arguments["c"])
        )
    elif how == "block patch":
        model.set_model_patch_replace(
            lambda args, extra: extra["original_block"](args), "dit", "double_block", 0
        )
    elif how == "cache":
        from comfy_extras.nodes_easycache import EasyCacheNode

        model = EasyCacheNode.execute(model, 0.2, 0.0, 1.0, False).result[0]
    return model


@pytest.mark.parametrize("how", ["wrapper", "block patch", "cache", "area", "two prompts", "mask", "range"])
def test_falls_back_where_passes_may_differ(pack, reuse, how):
    tiny = load_family("flux")
    latent, positive = tiny.latent(), tiny.conditioning(0)
    if how == "area":
        positive = [[positive[0][0], {**positive[0][1], "area": (4, 4, 0, 0)}]]
    elif how == "two prompts":
        positive = positive + tiny.conditioning(3)
    elif how == "range":
        positive = [[positive[0][0], {**positive[0][1], "start_percent": 0.0, "end_percent": 0.9}]]
    elif how == "mask":
        latent = tiny.latent(seed=1, noise_mask=drawn_half())
    out, trace = stepwise(pack, tiny, latent, positive=positive, model=patched(tiny, how))
    assert trace.spent["reused"] == 0
    assert out["samples"].isfinite().all()


def test_a_pass_that_differs_ends_it(pack, reuse, monkeypatch):
    tiny = load_family("flux")
    drm = head_for(pack, tiny)
    plain = without(reuse, monkeypatch, lambda: stepwise(pack, tiny, drm=drm))[0]
    real = reuse._joined

    def wrong(rows):
        return reuse._map(real(rows), lambda part: part.flip(1))

    monkeypatch.setattr(reuse, "_joined", wrong)
    ours, trace = stepwise(pack, tiny, drm=drm)
    assert reuse._CHECKED[tiny.model.model.diffusion_model] is False
    assert trace.spent["reused"] == 0
    assert torch.equal(ours["samples"], plain["samples"])


@pytest.mark.parametrize(
    ("told", "forward"),
    [
        (True, lambda x, vec, transformer_options={}: x),
        (True, lambda *args, **kwargs: args[0]),
        (False, lambda x, rotary, temb: x),  # Ernie-Image's, which newer versions have
    ],
)
def test_stays_out_of_blocks_that_are_not_told_which_rows_are_conditional(pack, reuse, told, forward):
    block = torch.nn.Identity()
    block.forward = forward
    assert reuse._told(block) is told
