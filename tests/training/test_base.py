"""Every layout of one base gives one backbone; every other file is refused in a sentence."""

import json

import pytest
import torch
from safetensors.torch import save_file

from drm import save_drm
from drm.backbone import backbone_from_transformer
from drm.sd3.base_model import BaseError, load_backbone, load_transformer
from drm.sd3.comfy_layout import PREFIX, to_comfy_layout
from tests.tiny import tiny_drm, tiny_transformer

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def transformer():
    """3 blocks of width 192, dual attention in the first and the last.

    Frozen, as what is loaded is: torch may take other kernels for weights that ask for gradients.
    """
    transformer = tiny_transformer(192, 3, dual_attention_layers=(0, 2), joint_attention_dim=40)
    return transformer.requires_grad_(False)


def comfy(transformer, dtype=torch.float32, prefix=PREFIX):
    state_dict = to_comfy_layout(transformer.state_dict(), transformer.config)
    return {prefix + key: value.to(dtype) for key, value in state_dict.items()}


@pytest.fixture(scope="module")
def bases(transformer, tmp_path_factory):
    """One model in every layout people have it in."""
    folder = tmp_path_factory.mktemp("bases")
    save_file(comfy(transformer, prefix=""), folder / "bare.safetensors")
    extra = {"first_stage_model.decoder.conv_in.weight": torch.zeros(3)}
    save_file(comfy(transformer) | extra, folder / "with_vae.safetensors")
    for dtype in (torch.float16, torch.bfloat16):
        save_file(comfy(transformer, dtype), folder / f"{str(dtype)[6:]}.safetensors")
    transformer.save_pretrained(folder / "pipeline" / "transformer")
    transformer.save_pretrained(folder / "alone")
    transformer.save_pretrained(folder / "several", max_shard_size="1MB")
    transformer.save_pretrained(folder / "variant", variant="fp16")
    return folder


def velocity(transformer):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 16, 6, 10), (2, 7, 40), (2, 256)
    latents, prompt_embeds, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
    with torch.no_grad():
        return transformer(latents, prompt_embeds, pooled, torch.tensor([100.0, 700.0]), return_dict=False)[0]


def run(backbone, taps=False):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 16, 6, 10), (2, 7, 40), (2, 256)
    latents, prompt_embeds, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
    with torch.no_grad():
        features = backbone.features(latents, torch.tensor([100.0, 700.0]), prompt_embeds, pooled)
    return (*features.image, *features.text, features.temb) if taps else features.tokens


NAMES = ("bare.safetensors", "with_vae.safetensors", "pipeline", "alone", "several", "variant")


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_gives_the_same_whole_transformer(transformer, bases, name):
    loaded = load_transformer(bases / name)
    assert torch.equal(velocity(loaded), velocity(transformer))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("num_kept", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_every_layout_gives_the_same_features(transformer, bases, name, num_kept):
    backbone = load_backbone(bases / name, num_kept)
    torch.testing.assert_close(
        run(backbone), run(backbone_from_transformer(transformer, num_kept)), atol=1e-4, rtol=0
    )
    assert len(list((bases / "several").glob("*.safetensors"))) > 3


def test_every_layout_gives_the_same_taps(transformer, bases):
    taps = {"image_taps": (0, 2), "text_taps": (1, 2)}
    wanted = run(backbone_from_transformer(transformer, 2, **taps), taps=True)
    assert [len(tensor.shape) for tensor in wanted] == [3, 3, 3, 3, 2]
    for name in NAMES:
        got = run(load_backbone(bases / name, 2, **taps), taps=True)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_files(transformer, bases, name):
    """Computed in float32, they give what their rounded weights give."""
    rounded = tiny_transformer(192, 3, dual_attention_layers=(0, 2), joint_attention_dim=40)
    rounded.load_state_dict(transformer.state_dict())
    rounded = rounded.to(getattr(torch, name)).float()
    backbone = load_backbone(bases / f"{name}.safetensors", 2)
    assert backbone.dtype == torch.float32
    torch.testing.assert_close(run(backbone), run(backbone_from_transformer(rounded, 2)), atol=1e-4, rtol=0)
    half = load_backbone(bases / f"{name}.safetensors", 2, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["with_vae.safetensors", "several"])
def test_only_what_is_kept_is_read(bases, name, monkeypatch):
    """Of three blocks one is kept, without its unused text output: that much is read, and nothing twice."""
    import drm.sd3.base_model as module

    read, original = [], module._open

    class Counting:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, key):
            tensor = self.file.get_tensor(key)
            read.append(tensor.numel())
            return tensor

    monkeypatch.setattr(module, "_open", lambda path: Counting(original(path)))
    backbone = load_backbone(bases / name, 1)
    kept = sum(value.numel() for value in backbone.state_dict().values())
    modulation = 4 * 192 * (192 + 1)
    assert sum(read) == kept + modulation


def test_the_file_may_go_once_it_is_read(transformer, tmp_path):
    path = tmp_path / "base.safetensors"
    save_file(comfy(transformer), path)
    backbone = load_backbone(path, 2)
    path.write_bytes(b"")
    assert torch.equal(run(backbone), run(backbone_from_transformer(transformer, 2)))


def test_missing(tmp_path):
    with pytest.raises(BaseError, match=r"nothing.safetensors is not there: give an SD3"):
        load_backbone(tmp_path / "nothing.safetensors", 1)
    with pytest.raises(BaseError, match="is not there"):
        load_backbone(tmp_path / "no_folder", 1)


@pytest.mark.parametrize("keep", [0, 7, 0.3, 0.999])
@pytest.mark.parametrize("name", ["bare.safetensors", f"pipeline/transformer/{WEIGHTS}"])
def test_cut_short(bases, tmp_path, name, keep):
    whole = (bases / name).read_bytes()
    folder = tmp_path / "base"
    folder.mkdir()
    path = folder / (bases / name).name
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    if "pipeline" in name:
        (folder / "config.json").write_text((bases / name).with_name("config.json").read_text())
        path = folder
    with pytest.raises(BaseError, match=r"damaged or cut short .*download it again"):
        load_backbone(path, 1)


# The first names of the real files, each enough to know its family by.
FOREIGN = {
    "an SDXL checkpoint": [
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.label_emb.0.0.weight",
        "first_stage_model.decoder.conv_in.weight",
    ],
    "an SD1.5 or SD2 checkpoint": [
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model.decoder.conv_in.weight",
    ],
    "an SD1.5 or SDXL checkpoint": ["input_blocks.0.0.weight", "label_emb.0.0.weight"],
    "a diffusers UNet": [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "conv_in.weight",
    ],
    "a Flux-type diffusion checkpoint": [
        "double_blocks.0.img_attn.qkv.weight",
        "single_blocks.0.linear1.weight",
        "img_in.weight",
    ],
    "a Flux transformer of diffusers": [
        "single_transformer_blocks.0.attn.to_q.weight",
        "transformer_blocks.0.attn.to_q.weight",
    ],
    "a LoRA": [
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
    ],
    "a LoRA: give sd3.5_medium": ["diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight"],
    "a diffusers transformer: give the folder": ["transformer_blocks.0.attn.to_q.weight"],
}


@pytest.mark.parametrize("message", FOREIGN)
def test_other_families_are_named(tmp_path, message):
    path = tmp_path / "foreign.safetensors"
    save_file({key: torch.zeros(2, 2) for key in FOREIGN[message]}, path)
    with pytest.raises(BaseError, match=f"not an SD3 or SD3.5 checkpoint, it looks like {message}"):
        load_backbone(path, 1)


def test_a_reward_model_is_no_base(tmp_path):
    save_drm(tiny_drm(), tmp_path / "drm.safetensors")
    with pytest.raises(BaseError, match="it looks like a reward model"):
        load_backbone(tmp_path / "drm.safetensors", 1)


@pytest.mark.parametrize("name", ["model.ckpt", "model.gguf"])
def test_other_formats_are_refused_unopened(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(BaseError, match=r"not a .safetensors file"):
        load_backbone(tmp_path / name, 1)


def test_scaled_eight_bit_weights_are_refused(transformer, tmp_path):
    """Without their scales they would load, as another model. In a text encoder they do not matter."""
    state_dict = comfy(transformer)
    key = "joint_blocks.0.x_block.attn.qkv.scale_weight"
    save_file(state_dict | {f"text_encoders.{key}": torch.ones(1)}, tmp_path / "clip.safetensors")
    assert load_backbone(tmp_path / "clip.safetensors", 1).config.num_layers == 3
    save_file(state_dict | {PREFIX + key: torch.ones(1)}, tmp_path / "scaled.safetensors")
    with pytest.raises(BaseError, match="8-bit weights with scales: give it in float16"):
        load_backbone(tmp_path / "scaled.safetensors", 1)


def test_plain_eight_bit_weights_are_read(transformer, tmp_path):
    save_file(comfy(transformer, torch.float8_e4m3fn), tmp_path / "fp8.safetensors")
    exact = run(backbone_from_transformer(transformer, 2))
    rough = run(load_backbone(tmp_path / "fp8.safetensors", 2))
    assert 1e-3 < (rough - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_folders_that_are_no_base(tmp_path):
    with pytest.raises(BaseError, match=r"has no transformer/config.json: give"):
        load_backbone(tmp_path, 1)
    (tmp_path / "unet").mkdir()
    with pytest.raises(BaseError, match=r"it has a unet/ \(SD1.5 or SDXL\)"):
        load_backbone(tmp_path, 1)
    (tmp_path / "transformer").mkdir()
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(BaseError, match="describes a FluxTransformer2DModel: wanted a SD3Transformer2DModel"):
        load_backbone(tmp_path, 1)
    config.write_text("{")
    with pytest.raises(BaseError, match=r"config.json is damaged or cut short"):
        load_backbone(tmp_path, 1)
    config.write_text("[]")
    with pytest.raises(BaseError, match="no JSON object"):
        load_backbone(tmp_path, 1)
    config.write_text(json.dumps({"_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(BaseError, match="has no diffusion_pytorch_model"):
        load_backbone(tmp_path, 1)
    (tmp_path / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "b"}}))
    with pytest.raises(BaseError, match="b is not there"):
        load_backbone(tmp_path, 1)


@pytest.mark.parametrize("num_kept", [0, 4])
@pytest.mark.parametrize("name", ["bare.safetensors", "pipeline"])
def test_more_blocks_than_there_are(bases, name, num_kept):
    with pytest.raises(BaseError, match=f"num_kept is {num_kept}: wanted 1 to 3, the model's blocks"):
        load_backbone(bases / name, num_kept)


def test_the_last_blocks_text_cannot_be_tapped(bases):
    with pytest.raises(BaseError, match="block 3 is the model's last, it has no text output"):
        load_backbone(bases / "bare.safetensors", 3, text_taps=(3,))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("joint_blocks.0.x_block.mlp.fc1.weight", r"without joint_blocks.0.x_block.mlp.fc1.weight"),
        ("joint_blocks.0.x_block.attn2.ln_q.weight", r"without joint_blocks.0.x_block.attn2.ln_q.weight"),
        ("context_embedder.weight", r"context_embedder.weight is missing"),
    ],
)
def test_a_checkpoint_with_a_hole(transformer, tmp_path, key, message):
    state_dict = comfy(transformer, prefix="")
    del state_dict[key]
    save_file(state_dict, tmp_path / "hole.safetensors")
    with pytest.raises(BaseError, match=message):
        load_backbone(tmp_path / "hole.safetensors", 2)


def test_a_folder_whose_weights_are_not_its_configs(bases, tmp_path):
    config = json.loads((bases / "alone" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "joint_attention_dim": 48}))
    (tmp_path / WEIGHTS).symlink_to(bases / "alone" / WEIGHTS)
    with pytest.raises(BaseError, match=r"context_embedder.weight has shape \(192, 40\), wanted \(192, 48\)"):
        load_backbone(tmp_path, 2)
    (tmp_path / "config.json").write_text(json.dumps({**config, "dual_attention_layers": [0, 1]}))
    with pytest.raises(BaseError, match=r"transformer_blocks.1.\S+ (is missing|has shape)"):
        load_backbone(tmp_path, 2)


@pytest.mark.parametrize("layout", ["bare.safetensors", "alone"])
def test_coarse_tokens_of_a_base(transformer, bases, layout):
    wanted = backbone_from_transformer(transformer, 2, coarse=2)
    found = load_backbone(bases / layout, 2, coarse=2)
    assert found.config.patch_size == wanted.config.patch_size == 4
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, atol=1e-6, rtol=1e-6)


def test_tokens_too_coarse_for_a_base(bases):
    with pytest.raises(BaseError, match=r"bare.safetensors cannot be the base: tokens cannot be 7 times"):
        load_backbone(bases / "bare.safetensors", 2, coarse=7)
