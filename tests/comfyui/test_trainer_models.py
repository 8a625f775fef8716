"""Step-GRPO LoRA Trainer on MODELs of every kind it may be given: each learns and is left as it was."""

import pytest
import torch
from safetensors.torch import save_file

from drm.sd3.comfy_layout import to_comfy_layout
from tests.comfyui.inside import write_lora
from tests.comfyui.test_trainer import output  # noqa: F401
from tests.comfyui.training_graphs import files, train
from tests.tiny import build_demo_family, tiny_transformer


def load(path, **options):
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(path), model_options=options)


def network_file(path, **kind):
    """A transformer of another kind of SD3 in ComfyUI's layout, in half precision."""
    transformer = tiny_transformer(**kind)
    weights = to_comfy_layout(transformer.state_dict(), transformer.config)
    save_file({name: value.half().contiguous() for name, value in weights.items()}, path)
    return path


def learns_and_leaves(inside, model, output):  # noqa: F811
    """Trains on the MODEL: something was learned, it draws bit for bit as before; what was trained."""
    before = inside.ksampler(model=model)
    trained, lora, *_ = train(inside, model=model, name="kind", iterations=1, preview_every=1)
    assert torch.equal(inside.ksampler(model=model), before)
    assert any(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name)
    assert (inside.ksampler(model=trained) - before).abs().max() > 1e-3
    assert len(files(output)) == 1
    return lora


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_in_fewer_bits(inside, family, output, dtype):  # noqa: F811
    model = load(family.checkpoint, dtype=dtype)
    assert model.model.diffusion_model.joint_blocks[0].x_block.attn.qkv.weight.dtype == dtype
    learns_and_leaves(inside, model, output)
    assert model.model.diffusion_model.joint_blocks[0].x_block.attn.qkv.weight.dtype == dtype


def test_layers_that_keep_their_cast_weights(inside, family, output):  # noqa: F811
    """What newer ComfyUI's layers do: the weight cast in a KSampler's inference mode serves later calls."""
    model = load(family.checkpoint, dtype=torch.bfloat16)
    layers = [
        layer
        for layer in model.model.diffusion_model.joint_blocks.modules()
        if isinstance(layer, torch.nn.Linear)
    ]

    def keep(layer):
        def forward(x):
            signature = float(layer.weight.detach().float().abs().sum())
            if getattr(layer, "_v_signature", None) != signature:
                layer._v_signature = signature
                layer._v_weight, layer._v_bias = layer.weight.to(x.dtype), layer.bias.to(x.dtype)
            return torch.nn.functional.linear(x, layer._v_weight, layer._v_bias)

        layer.forward = forward

    for layer in layers:
        keep(layer)
    inside.ksampler(model=model)
    assert all(layer._v_weight.is_inference() for layer in layers)
    learns_and_leaves(inside, model, output)


def test_weights_of_a_prompt_are_hashed_as_any_others(inside, pack):
    """Inference tensors, as a DRM loaded in a prompt has them, and ordinary ones of the same values."""
    weights_hash = pack.module("nodes.grpo.files").weights_hash
    with torch.inference_mode():
        frozen = torch.nn.Linear(64, 64)
    ordinary = torch.nn.Linear(64, 64)
    with torch.no_grad():
        ordinary.weight.copy_(frozen.weight.clone())
        ordinary.bias.copy_(frozen.bias.clone())
    assert frozen.weight.is_inference()
    with torch.inference_mode(False), torch.enable_grad():
        assert weights_hash(frozen) == weights_hash(ordinary)
    assert weights_hash(inside.drm.model) != weights_hash(inside.model.model.diffusion_model)


@pytest.mark.parametrize(
    "kind",
    [{"qk_norm": None, "dual_attention_layers": ()}, {"dual_attention_layers": ()}],
    ids=["sd3", "large"],
)
def test_the_other_networks_of_the_family(inside, tmp_path, output, kind):  # noqa: F811
    lora = learns_and_leaves(inside, load(network_file(tmp_path / "network.safetensors", **kind)), output)
    assert not any("attn2" in name for name in lora)


def test_a_shifted_schedule(inside, output):  # noqa: F811
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    (model,) = ModelSamplingSD3().patch(inside.model, shift=1.5)
    learns_and_leaves(inside, model, output)


def with_hooks(inside, path, **settings):
    """The CLIP whose CONDITIONINGs carry a LoRA for the MODEL, as Create Hook LoRA and Set CLIP Hooks do."""
    import comfy.hooks
    from comfy_extras.nodes_hooks import SetClipHooks
    from safetensors.torch import load_file

    hooks = comfy.hooks.create_hook_lora(load_file(path), 1.0, 1.0)
    return SetClipHooks().apply_hooks(inside.clip, hooks=hooks, **settings)[0]


def test_hooks_on_the_text_encoder_take_part(inside, tmp_path, output):  # noqa: F811
    path = write_lora(tmp_path / "hook.safetensors", 128)
    clip = with_hooks(inside, path, schedule_clip=False, apply_to_conds=True)
    before = inside.ksampler(), inside.ksampler(positive=inside.encode("red heart", clip))
    assert (before[0] - before[1]).abs().max() > 1e-2
    plain, hooked = train(inside, name="plain"), train(inside, name="hooked", clip=clip)
    assert plain[2]["loss"] != hooked[2]["loss"]
    assert torch.equal(inside.ksampler(), before[0])
    assert torch.equal(inside.ksampler(positive=inside.encode("red heart", clip)), before[1])


def test_a_file_is_not_gone_on_from_with_another_text_encoder(inside, family, tmp_path, output):  # noqa: F811
    """What the MODEL draws is compared: a text encoder has no weights of its own in the file's name."""
    train(inside)
    kept = [path.read_bytes() for path in (*files(output), *files(output, ".resume"))]
    path = write_lora(tmp_path / "hook.safetensors", 128)
    clip = with_hooks(inside, path, schedule_clip=False, apply_to_conds=True)
    other = build_demo_family(tmp_path / "other", seed=9).text_encoder
    load_clip = inside.pack.module("nodes.demo_clip").load_demo_clip
    for changed in (clip, load_clip(str(other))):
        with pytest.raises(ValueError, match=r"drew other pictures before the training .* another name"):
            train(inside, clip=changed)
    assert [path.read_bytes() for path in (*files(output), *files(output, ".resume"))] == kept
    assert "went on after iteration 2" in train(inside, clip=load_clip(str(family.text_encoder)))[5]
