"""Step-GRPO LoRA Trainer with a head on the model's own tokens, for every family: it learns, the head goes on
reading the model as it came, and the stock loader reads what is saved.
"""

from dataclasses import replace

import pytest
import torch

from tests.comfyui.families import FAMILIES, load_family
from tests.comfyui.test_any_family import head_for
from tests.comfyui.test_trainer import output  # noqa: F401
from tests.comfyui.training_graphs import SMALL, files

# ComfyUI's layers of these rotate positions by a kernel that has no backward pass.
NO_GRADIENT = ("ernie_image", "anima")


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name not in NO_GRADIENT])
def tiny(request, pack):
    return load_family(request.param)


class Texts:
    """A CLIP of embeddings by chance: the tiny models have no text encoders."""

    def __init__(self, tiny) -> None:
        self.tiny = tiny

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list:
        return self.tiny.conditioning(sum(text.encode()))


def train(pack, tiny, drm, **changes):
    settings = {"prompts": "one\ntwo", "width": 64, "height": 64, "steps": 3, "num_branches": 2, "rank": 2}
    settings |= {"iterations": 2, "preview_every": 2, "prompts_per_iteration": 1, "cfg": 1.5, **changes}
    trainer = pack.module("nodes.trainer").StepGRPOLoRATrainer
    with torch.inference_mode():
        inputs = {"model": tiny.model, "drm": drm, "clip": Texts(tiny)}
        return trainer.execute(**inputs | SMALL | settings).result


def velocity(tiny, model, seed: int = 3):
    """The network's own answer for random latents, through ComfyUI."""
    import comfy.model_management
    import comfy.samplers

    comfy.model_management.load_models_gpu([model])
    guider, found = comfy.samplers.CFGGuider(model), []
    guider.set_conds(tiny.conditioning(0), [])

    class Ask(comfy.samplers.Sampler):
        def sample(self, wrap, sigmas, extra_args, callback, noise, *_, **__):
            found.append(wrap(noise, torch.full((1,), 0.6), **extra_args))
            return noise

    noise = tiny.latent(seed=seed)["samples"]
    with torch.inference_mode():
        guider.sample(noise, torch.zeros_like(noise), Ask(), torch.tensor([1.0, 0.0]), disable_pbar=True)
    return found[0]


@pytest.fixture
def seen(pack, monkeypatch):
    """After every iteration: the head's score of one state, and the learned network's velocity there."""
    learner = pack.module("nodes.grpo.learner").Learner
    found, own = [], learner.iterate

    def iterate(self, policy):
        figures, x = own(self, policy), self.noise([7])
        score = self.scorer(policy, self.models.drm, 0, 1)
        with torch.no_grad():
            velocity = policy.velocity(0, x, 0.5)
            found.append((float(score(x, 0.5, torch.zeros(1, dtype=torch.long))), velocity.clone()))
        return figures

    monkeypatch.setattr(learner, "iterate", iterate)
    return found


def test_learns_with_a_head_on_its_own_tokens_and_the_stock_loader_reads_it(pack, tiny, output, seen):  # noqa: F811
    import comfy.lora
    import comfy.sd
    import comfy.utils

    before = velocity(tiny, tiny.model)
    trained, lora, _, steps, image, report = train(pack, tiny, head_for(pack, tiny))
    assert steps == 2
    (score, velocity_before), (score_after, velocity_after) = seen
    assert score == score_after  # of the model as it came
    assert not torch.equal(velocity_before, velocity_after)
    assert torch.isfinite(image).all()
    assert "probability ratio before the first update: exactly 1" in report
    assert torch.equal(velocity(tiny, tiny.model), before)
    assert any(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name)

    known = comfy.lora.model_lora_keys_unet(tiny.model.model, {})
    saved = comfy.utils.load_torch_file(str(files(output)[0]))
    assert saved.keys() == lora.keys()
    assert {name.removesuffix(".lora_A.weight") for name in saved if "lora_A" in name} <= known.keys()
    loaded = comfy.sd.load_lora_for_models(tiny.model, None, saved, 1.0, 0.0)[0]
    drawn = velocity(tiny, loaded)
    assert (drawn - before).abs().max() > 1e-5
    torch.testing.assert_close(drawn, velocity(tiny, trained), rtol=0, atol=1e-6)


def test_what_is_saved_draws_as_what_was_learned(pack, tiny):
    """Random matrices on the network in place, and the same through ComfyUI's own patches."""
    import comfy.sd

    lora = pack.module("drm.lora")
    targets = pack.module("nodes.grpo.learner").targets_of(tiny.model.model)
    adapters = lora.Adapters(targets, rank=2, alpha=4.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for up in adapters.up:
            up.copy_(0.05 * torch.randn(up.shape, generator=generator))
    plain = velocity(tiny, tiny.model)
    with adapters.attached(pack.module("nodes.adapters").network_of(tiny.model.model)):
        learned = velocity(tiny, tiny.model)
    patched = velocity(tiny, comfy.sd.load_lora_for_models(tiny.model, None, adapters.tensors(), 1.0, 0.0)[0])
    size = (learned - plain).abs().max()
    assert size > 1e-3
    assert (patched - learned).abs().max() < 1e-3 * size


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_finite_differences(pack, tiny, recompute):
    """Of a random sum of the velocity along a random direction of the matrices, in float32."""
    policies, trainer = pack.module("nodes.grpo.comfy_policy"), pack.module("nodes.grpo.learner")
    network = pack.module("nodes.adapters").network_of(tiny.model.model)
    adapters = pack.module("drm.lora").Adapters(trainer.targets_of(tiny.model.model), 2, 4.0, seed=0)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(up.shape, generator=generator) for up in adapters.up]
    x = torch.randn(1, tiny.channels, 8, 8, generator=generator)
    weights = torch.randn(x.shape, generator=generator)

    def measure(policy):
        policy.recompute = recompute

        def value(shift: float) -> torch.Tensor:
            with torch.no_grad():
                for up, direction in zip(adapters.up, directions, strict=True):
                    up.copy_(shift * direction)
            return (policy.velocity(0, x, 0.7) * weights).sum()

        value(0.0).backward()
        pairs = zip(adapters.up, directions, strict=True)
        # the last block's text leads nowhere in some families
        slope = sum((up.grad * way).sum() for up, way in pairs if up.grad is not None)
        with torch.no_grad():
            return slope, (value(1e-3) - value(-1e-3)) / 2e-3

    with adapters.attached(network):
        slope, difference = policies.within_sampling(
            measure,
            tiny.model,
            [],
            network,
            prompts={0: tiny.conditioning(0)},
            negative=tiny.conditioning(1),
            cfg=1.0,
            latents=tiny.latent()["samples"],
            seed=0,
        )
    assert float(slope) == pytest.approx(float(difference), rel=0.02)


def test_a_family_that_is_not_known_is_refused_in_a_sentence(pack):
    class Base:
        diffusion_model = torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match="is a Linear, whose tokens no head can read yet"):
        pack.module("nodes.grpo.learner").targets_of(Base())


def test_a_family_without_a_backward_pass_is_refused_in_a_sentence(pack, monkeypatch):
    trunk = pack.module("nodes.trunk")
    monkeypatch.setitem(trunk.FAMILIES, "WanModel", replace(trunk.FAMILIES["WanModel"], attention=()))
    with pytest.raises(ValueError, match="no LoRA can be learned on a MODEL of wan"):
        pack.module("nodes.grpo.learner").targets_of(load_family("wan").model.model)


def test_comfyui_is_told_that_it_trains_and_for_how_long(pack):
    """By this newer versions choose operations that have a backward pass."""
    import comfy.model_management as mm

    tiny = load_family("flux")
    policies = pack.module("nodes.grpo.comfy_policy")
    network = pack.module("nodes.adapters").network_of(tiny.model.model)
    asked = {"prompts": {0: tiny.conditioning(0)}, "negative": tiny.conditioning(1), "cfg": 1.0, "seed": 0}
    asked["latents"] = tiny.latent()["samples"]
    before = getattr(mm, "in_training", False)
    told = policies.within_sampling(lambda policy: mm.in_training, tiny.model, [], network, **asked)

    def broken(policy):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        policies.within_sampling(broken, tiny.model, [], network, **asked)
    assert (told, mm.in_training) == (True, before)
