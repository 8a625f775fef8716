"""The file of Step-GRPO LoRA Trainer draws the same in ComfyUI, in diffusers and in the training itself."""

from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from drm.sd3.comfy_layout import from_comfy_layout
from tests.comfyui.test_trainer import output  # noqa: F401
from tests.comfyui.training_graphs import files, train


@pytest.fixture
def trained(inside, output):  # noqa: F811
    """The trainer's MODEL and the path of its file."""
    model, *_ = train(inside, learning_rate=0.02)
    return model, files(output)[0]


def pipeline(checkpoint):
    """diffusers' pipeline around the checkpoint's transformer."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    config, weights = from_comfy_layout(load_file(checkpoint))
    transformer = SD3Transformer2DModel(**config).eval()
    transformer.load_state_dict({name: value.float() for name, value in weights.items()})
    nothing = dict.fromkeys(
        (
            "vae",
            "text_encoder",
            "tokenizer",
            "text_encoder_2",
            "tokenizer_2",
            "text_encoder_3",
            "tokenizer_3",
        )
    )
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **nothing
    )


@torch.no_grad()
def drawn_by_diffusers(pipe, inside, steps=4, seed=11):
    """The latent that inside.ksampler(cfg=1) draws, by diffusers' transformer."""
    import comfy.sample
    import comfy.samplers

    sampling = inside.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps).tolist()
    embeds, options = inside.positive[0]
    x = comfy.sample.prepare_noise(torch.zeros(1, 16, 8, 8), seed)
    for sigma, sigma_next in pairwise(sigmas):
        (velocity,) = pipe.transformer(
            x,
            encoder_hidden_states=embeds,
            pooled_projections=options["pooled_output"],
            timestep=torch.tensor([1000 * sigma]),
            return_dict=False,
        )
        x = x + (sigma_next - sigma) * velocity
    return inside.pack.module("nodes.adapters").LATENT_FORMAT.process_out(x)


def test_diffusers_draws_the_same(inside, trained, family):
    model, path = trained
    pipe = pipeline(family.checkpoint)
    plain, learned = inside.ksampler(cfg=1.0), inside.ksampler(cfg=1.0, model=model)
    assert (learned - plain).abs().max() > 1e-2
    assert (drawn_by_diffusers(pipe, inside) - plain).abs().max() <= 1e-4
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    assert (drawn_by_diffusers(pipe, inside) - learned).abs().max() <= 1e-4


def test_comfyui_s_loader_draws_the_same(inside, trained):
    import comfy.sd

    model, path = trained
    tensors = load_file(path)

    def with_lora(base, strength):
        return comfy.sd.load_lora_for_models(base, None, tensors, strength, 0.0)[0]

    learned, plain = inside.ksampler(model=model), inside.ksampler()
    assert (inside.ksampler(model=with_lora(inside.model, 1.0)) - learned).abs().max() <= 1e-4
    assert (inside.ksampler(model=with_lora(inside.model, 0.0)) - plain).abs().max() <= 1e-6
    assert (inside.ksampler(model=with_lora(model, -1.0)) - plain).abs().max() <= 1e-4


def test_the_training_itself_drew_the_same(inside, trained, pack):
    """The pictures after, drawn with the LoRA as hooks, are those of the MODEL that is handed out."""
    model, path = trained
    policies, lora = pack.module("nodes.grpo.comfy_policy"), pack.module("drm.lora")
    tensors, facts = lora.load_lora(path)
    network, settings = inside.model.model.diffusion_model, facts["settings"]
    adapters = lora.Adapters(lora.comfy_targets(network), settings["rank"], settings["alpha"], 0)
    adapters.load(tensors)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(3))

    def velocity(model, hooked):
        def run(policy):
            with torch.no_grad():
                if not hooked:
                    return policy.velocity(0, x, 0.8)
                with adapters.attached(network):
                    return policy.velocity(0, x, 0.8)

        return policies.within_sampling(
            run,
            model,
            [inside.drm],
            network,
            prompts={0: inside.positive},
            negative=inside.negative,
            cfg=2.0,
            latents=torch.zeros(1, 16, 8, 8),
            seed=0,
        )

    plain, learned, merged = (
        velocity(inside.model, False),
        velocity(inside.model, True),
        velocity(model, False),
    )
    assert (learned - plain).abs().max() > 1e-3
    assert (learned - merged).abs().max() <= 1e-4
