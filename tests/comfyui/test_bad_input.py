"""Everything a user can get wrong, in a real server: one clear sentence, and the next prompt is fine."""

import itertools
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from drm import DRM, save_drm
from drm.backbone import BackboneConfig, TruncatedSD3
from drm.head import ConvHead
from tests.comfyui.graphs import custom_graph, node, score_graph, stepwise_graph
from tests.tiny import build_demo_family, randomise
from tools.comfy_server import PromptRejectedError

FRESH = itertools.count(1000)


def sd15_without_weights(path: Path) -> None:
    """A model of another family, with 4 latent channels: SD1.5's shapes, all zero, as a file with holes."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "context_dim": 768,
        "num_heads": 8,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "legacy": False,
    }
    network = UNetModel(
        **config, device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )
    header, offset = {}, 0
    for key, value in network.state_dict().items():
        header[key] = {
            "dtype": "F8_E4M3",
            "shape": list(value.shape),
            "data_offsets": [offset, offset + value.numel()],
        }
        offset += value.numel()
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def foreign_drm(path: Path, **shape: int) -> None:
    """A reward model made for another model family."""
    config = {"in_channels": 16, "joint_attention_dim": 256, "pooled_projection_dim": 256} | shape
    backbone = TruncatedSD3(
        BackboneConfig(num_kept=1, num_layers=2, num_attention_heads=1, pos_embed_max_size=24, **config)
    )
    save_drm(DRM(randomise(backbone, 0), ConvHead(64, hidden=32)), path)


@pytest.fixture(scope="module", autouse=True)
def bad_files(base_dir, family, pack):
    """The files that must be refused, beside the good ones."""
    folder = base_dir / "models"
    foreign_drm(folder / "drm" / "four_channels.safetensors", in_channels=4)
    foreign_drm(
        folder / "drm" / "other_text_encoder.safetensors", joint_attention_dim=128, pooled_projection_dim=64
    )
    whole = family.drm.read_bytes()
    (folder / "drm" / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "drm" / "no_file.safetensors").write_bytes(b"")
    torch.save({"head.weight": torch.zeros(3)}, folder / "drm" / "pickled.pt")
    (folder / "drm" / "renamed.safetensors").write_bytes((folder / "drm" / "pickled.pt").read_bytes())
    save_file(load_file(family.drm), folder / "drm" / "headless.safetensors")
    save_file(
        load_file(family.drm),
        folder / "drm" / "version.safetensors",
        {"format": "drm-reward-model", "version": "9"},
    )
    for name, value in (("nan", float("nan")), ("edited", 0.0)):
        with safe_open(family.drm, framework="pt") as file:
            header = file.metadata()
        weights = load_file(family.drm)
        next(weights[key] for key in weights if key.startswith("head.")).view(-1)[0] = value
        save_file(weights, folder / "drm" / f"{name}.safetensors", header)
    (folder / "drm" / "checkpoint.safetensors").write_bytes(family.checkpoint.read_bytes())
    (folder / "text_encoders" / "drm_file.safetensors").write_bytes(whole)
    (folder / "text_encoders" / "truncated.safetensors").write_bytes(family.text_encoder.read_bytes()[:-100])
    small = build_demo_family(base_dir / "small", text=128)
    (folder / "text_encoders" / "narrow.safetensors").write_bytes(small.text_encoder.read_bytes())
    (folder / "diffusion_models").mkdir(exist_ok=True)
    sd15_without_weights(folder / "diffusion_models" / "sd15.safetensors")
    latents = {"nan": torch.full((1, 16, 8, 8), float("nan")), "empty": torch.zeros(0, 16, 8, 8)}
    latents |= {"huge": torch.full((1, 16, 8, 8), 1e30)}
    latents |= {"video": torch.zeros(1, 16, 2, 8, 8), "sd15": torch.ones(1, 4, 8, 8)}
    for name, samples in latents.items():
        save_file(
            {"latent_tensor": samples, "latent_format_version_0": torch.tensor([])},
            base_dir / "input" / f"{name}.latent",
        )
    return folder


def with_drm(name, graph=stepwise_graph):
    prompt = graph()
    prompt["3"]["inputs"]["drm_name"] = name
    return prompt


def with_text_encoder(name, graph=stepwise_graph):
    prompt = graph()
    prompt["2"]["inputs"]["clip_name"] = name
    return prompt


def with_latent(name, graph):
    """The prompt with a LATENT from a file."""
    prompt = graph()
    target = {
        "StepwiseKSampler": "latent_image",
        "DRMScoreLatent": "latent",
        "SamplerCustomAdvanced": "latent_image",
    }
    prompt["90"] = node("LoadLatent", latent=f"{name}.latent")
    for entry in list(prompt.values()):
        if entry["class_type"] in target:
            entry["inputs"][target[entry["class_type"]]] = ["90", 0]
    return prompt


def linked(name, value, graph=stepwise_graph, kind="PrimitiveFloat"):
    """The prompt with a linked value, which no widget limits."""
    prompt = graph()
    prompt["90"] = node(kind, value=value)
    for entry in prompt.values():
        if name in entry["inputs"]:
            entry["inputs"][name] = ["90", 0]
    return prompt


def other_family(graph):
    """The prompt with a 4-channel model."""
    prompt = graph()
    prompt["90"] = node("UNETLoader", unet_name="sd15.safetensors", weight_dtype="fp8_e4m3fn")
    for entry in prompt.values():
        if "model" in entry["inputs"]:
            entry["inputs"]["model"] = ["90", 0]
    return prompt


def not_flow_matching():
    prompt = stepwise_graph()
    prompt["90"] = node("ModelSamplingDiscrete", model=["1", 0], sampling="eps", zsnr=False)
    prompt["7"]["inputs"]["model"] = ["90", 0]
    return prompt


def sized(width, height, graph=stepwise_graph):
    prompt = graph()
    prompt["6"]["inputs"] |= {"width": width, "height": height}
    return prompt


FAILS_RUNNING = {
    "missing DRM": (
        lambda: with_drm("gone.safetensors"),
        "there is no file 'gone.safetensors' in models/drm: put it there",
    ),
    "missing text encoder": (
        lambda: with_text_encoder("gone.safetensors"),
        "there is no file 'gone.safetensors' in models/text_encoders",
    ),
    "path out of the folder": (
        lambda: with_drm("../../secret.safetensors"),
        "there is no file '../../secret.safetensors'",
    ),
    "DRM with a NaN weight": (
        lambda: with_drm("nan.safetensors"),
        "nan.safetensors holds NaN or infinity in head.",
    ),
    "DRM whose weights were edited": (
        lambda: with_drm("edited.safetensors"),
        "edited.safetensors does not hold the weights its header was written for",
    ),
    "scores that overflow": (
        lambda: with_latent("huge", score_graph),
        "the scorer returned nan for batch item 0 at sigma 0",
    ),
    "DRM for 4 channels": (
        lambda: with_drm("four_channels.safetensors"),
        "DRM scores latents of 4 channels and this LATENT has 16: choose a DRM",
    ),
    "DRM for 4 channels, scoring": (
        lambda: with_drm("four_channels.safetensors", score_graph),
        "of 4 channels and this LATENT has 16",
    ),
    "DRM for 4 channels, custom": (
        lambda: with_drm("four_channels.safetensors", custom_graph),
        "of 4 channels and this LATENT has 16",
    ),
    "DRM for another prompt width": (
        lambda: with_drm("other_text_encoder.safetensors"),
        "reads prompts of width 128 (pooled 64) and this CONDITIONING has 256 (pooled 256)",
    ),
    "text encoder that does not fit": (
        lambda: with_text_encoder("narrow.safetensors"),
        "MODEL reads prompts of width 256 and this CONDITIONING has 128: load the text encoder that belongs",
    ),
    "text encoder that is none": (
        lambda: with_text_encoder("drm_file.safetensors"),
        "is not a text encoder of the demo family",
    ),
    "truncated text encoder": (
        lambda: with_text_encoder("truncated.safetensors"),
        "damaged or cut off, get the file again",
    ),
    "another family": (
        lambda: other_family(stepwise_graph),
        "(BaseModel, 4 latent channels) does not sample by flow matching",
    ),
    "not flow matching": (
        not_flow_matching,
        "does not sample by flow matching: step-wise sampling works with",
    ),
    "truncated DRM": (
        lambda: with_drm("truncated.safetensors"),
        "truncated.safetensors is damaged or cut short",
    ),
    "empty DRM file": (
        lambda: with_drm("no_file.safetensors"),
        "no_file.safetensors is damaged or cut short",
    ),
    "pickled DRM": (lambda: with_drm("pickled.pt"), "pickled.pt is not a .safetensors file"),
    "renamed pickle": (
        lambda: with_drm("renamed.safetensors"),
        "renamed.safetensors is damaged or cut short",
    ),
    "DRM without header": (
        lambda: with_drm("headless.safetensors"),
        "headless.safetensors has a reward model's weights without its header",
    ),
    "DRM of another version": (
        lambda: with_drm("version.safetensors"),
        "has format version 9, this code reads 1: update",
    ),
    "checkpoint as DRM": (
        lambda: with_drm("checkpoint.safetensors"),
        "is not a reward model, it looks like an SD3 diffusion checkpoint",
    ),
    "linked sigma too high": (
        lambda: linked("sigma", 1.5, score_graph),
        "sigma is 1.5: give a number from 0",
    ),
    "linked sigma below 0": (
        lambda: linked("sigma", -0.1, score_graph),
        "sigma is -0.1: give a number from 0",
    ),
    "leftover noise at sigma 0": (
        lambda: score_graph(latent_is="leftover noise"),
        "give the sigma at which its sampler stopped",
    ),
    "NaN latent": (lambda: with_latent("nan", stepwise_graph), "latent_image holds NaN or infinity"),
    "NaN latent, scoring": (lambda: with_latent("nan", score_graph), "the LATENT holds NaN or infinity"),
    "NaN latent, custom": (lambda: with_latent("nan", custom_graph), "hold NaN or infinity"),
    "empty batch": (
        lambda: with_latent("empty", stepwise_graph),
        "latent_image is empty, its shape is (0, 16, 8, 8)",
    ),
    "empty batch, scoring": (lambda: with_latent("empty", score_graph), "the LATENT is empty"),
    "video latent": (lambda: with_latent("video", score_graph), "a DRM scores pictures"),
    "SD1.5 latent": (
        lambda: with_latent("sd15", stepwise_graph),
        "this LATENT has 4: choose a DRM made for this model family",
    ),
    "linked k of 0": (
        lambda: linked("num_branches", 0, kind="PrimitiveInt"),
        "num_branches is 0: give a number from 1",
    ),
    "linked k of 0, custom": (
        lambda: linked("num_branches", 0, custom_graph, "PrimitiveInt"),
        "num_branches is 0",
    ),
    "unknown kind": (lambda: stepwise_graph(kind="ode"), "kind is 'ode': choose one of sde, cps"),
    "unknown scheduler": (lambda: stepwise_graph(scheduler="x"), "scheduler is 'x': choose one of simple"),
    "unknown state": (lambda: score_graph(latent_is="x"), "latent_is is 'x': choose one of finished picture"),
    "window upside down": (
        lambda: stepwise_graph(branch_start=0.8, branch_end=0.2),
        "branch_start is 0.8 and branch_end 0.2",
    ),
    "branches without noise": (
        lambda: stepwise_graph(noise_level=0.0),
        "raise the noise (noise_level 0.7 is usual) or set num_branches to 1",
    ),
    "cps with too much noise": (
        lambda: stepwise_graph(kind="cps", noise_level=1.5),
        "CPS is defined from 0 to 1",
    ),
    "picture too large": (
        lambda: sized(1024, 512),
        "the LATENT is 1024x512 pixels and the MODEL draws at most 384x384",
    ),
    "plot of a picture that is not there": (
        lambda: (
            custom_graph(noise_seed=77)
            | {"14": {**custom_graph()["14"], "inputs": custom_graph()["14"]["inputs"] | {"picture": 3}}}
        ),
        "picture is 3: this run drew 1, give a number from 1 to 1",
    ),
}

REFUSED = {
    "sigma too high": (lambda: score_graph(sigma=1.5), "1.5 bigger than max of 1"),
    "sigma below -1": (lambda: score_graph(sigma=-1.5), "-1.5 smaller than min of -1"),
    "k of 0": (lambda: stepwise_graph(num_branches=0), "0 smaller than min of 1"),
    "steps of 0": (lambda: stepwise_graph(steps=0), "0 smaller than min of 1"),
}


def next_prompt_is_fine(server):
    result = server.run(stepwise_graph("fine", seed=next(FRESH), steps=2))
    assert result.status == "success", result.error


def run_unless_refused(server, graph, sentence):
    """The run's Result, or None where a newer version looked at a choice before it ran anything."""
    try:
        return server.run(graph)
    except PromptRejectedError as refused:
        if "one of" in sentence and "Value not in list" in str(refused):
            return None
        raise


@pytest.mark.parametrize("case", FAILS_RUNNING)
def test_error_is_one_clear_sentence(server, case):
    build, sentence = FAILS_RUNNING[case]
    result = run_unless_refused(server, build(), sentence)
    if result is None:
        return
    assert result.status == "error", "it ran"
    assert sentence in result.error
    message = result.error.partition(": ")[2]
    assert "\n" not in message
    assert len(message) < 400
    next_prompt_is_fine(server)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_running(server, case):
    build, sentence = REFUSED[case]
    with pytest.raises(PromptRejectedError) as refused:
        server.run(build())
    assert sentence in str(refused.value)
    next_prompt_is_fine(server)
