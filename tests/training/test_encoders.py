"""SD3Encoders against diffusers' own pipeline on a random SD3 folder."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.preference_fixtures import tile
from tests.training.sd3_folder import build_pipeline
from training.data.encoders import EncoderError, SD3Encoders, prepare_picture

PROMPTS = ["a cat on the moon, noto style", "sample 3", "house " * 200]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    return build_pipeline(folder), folder


@pytest.fixture(scope="module")
def encoders(made):
    return SD3Encoders.from_folder(made[1])


def pipeline_prompts(pipeline, prompts, length):
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    return embeds, pooled


@pytest.mark.parametrize("length", [77, 128, 256])
def test_prompts_are_the_pipelines(made, encoders, length):
    wanted = pipeline_prompts(made[0], PROMPTS, length)
    embeds, pooled = encoders.encode_prompts(PROMPTS, length)
    assert embeds.shape == (3, 77 + length, 128)
    torch.testing.assert_close(embeds, wanted[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(pooled, wanted[1], rtol=1e-5, atol=2e-5)


def test_without_t5_only_clips_tokens_remain(encoders):
    embeds, pooled = encoders.encode_prompts(PROMPTS, None)
    longer, longer_pooled = encoders.encode_prompts(PROMPTS, 77)
    assert torch.equal(embeds, longer[:, :77])
    assert torch.equal(pooled, longer_pooled)
    assert not embeds[..., 96:].any()  # CLIP's 32 + 64 wide states, then zeros
    assert embeds[..., :96].abs().mean() > 0.1


def test_t5s_77_tokens_are_no_slice_of_its_256(encoders):
    short, long = encoders.t5_embeds(PROMPTS[:1], 77), encoders.t5_embeds(PROMPTS[:1], 256)
    assert (short - long[:, :77]).abs().max() > 0.01


def test_a_folder_without_t5_gives_what_its_pipeline_gives(tmp_path):
    pipeline = build_pipeline(tmp_path / "sd3", t5=False)
    encoders = SD3Encoders.from_folder(tmp_path / "sd3")
    assert not encoders.has_t5
    wanted = pipeline_prompts(pipeline, PROMPTS, 77)
    embeds, pooled = encoders.encode_prompts(PROMPTS, 77)
    torch.testing.assert_close(embeds, wanted[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(pooled, wanted[1], rtol=1e-5, atol=2e-5)
    assert encoders.prompt_shapes(()) == {"clip": (77, 96), "pooled": (96,)}
    with pytest.raises(EncoderError, match=r"no text_encoder_3 \(T5\): set t5_lengths"):
        encoders.prompt_shapes((77,))


def test_latents_are_the_posteriors_mean_in_model_space(made, encoders):
    pipeline = made[0]
    pictures = [tile(0, 0), tile(1, 2)]
    pixels = pipeline.image_processor.preprocess(pictures, height=128, width=128)
    with torch.no_grad():
        wanted = (pipeline.vae.encode(pixels).latent_dist.mean - 0.0609) * 1.5305
    latents = encoders.encode_pictures(pictures, 128)
    assert latents.shape == (2, *encoders.latent_shape(128)) == (2, 16, 16, 16)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(latents, encoders.encode_pictures(pictures, 128))  # no sample


def test_the_vae_stays_in_float32_beside_half_precision_text(made):
    half = SD3Encoders.from_folder(made[1], dtype=torch.bfloat16)
    assert half.encode_prompts(PROMPTS[1:2], 77)[0].dtype == torch.bfloat16
    assert next(half.vae.parameters()).dtype == torch.float32


def test_the_centre_square_is_taken_at_the_wanted_size():
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste((0, 0, 255), (100, 0, 200, 100))
    tall = wide.rotate(90, expand=True)
    for picture in (wide, tall):  # the filter sees a little over the square's edge
        assert (prepare_picture(picture, 64)[4:-4, 4:-4] == np.array([0, 0, 255])).all()
    lines = Image.fromarray(np.indices((256, 256)).sum(0).astype(np.uint8) % 2 * 255).convert("RGB")
    assert abs(prepare_picture(lines, 64).astype(int) - 128).max() <= 2  # antialiased to grey


def test_shapes_of_what_is_stored(encoders):
    assert encoders.prompt_shapes((77, 256)) == {
        "clip": (77, 96),
        "pooled": (96,),
        "t5_77": (77, 128),
        "t5_256": (256, 128),
    }
    with pytest.raises(EncoderError, match="resolution is 120: wanted a multiple of 16"):
        encoders.latent_shape(120)


def test_description_changes_with_the_encoders_configuration(made, tmp_path):
    folder = shutil.copytree(made[1], tmp_path / "copy")
    assert SD3Encoders.from_folder(folder).describe()["folder"] == "copy"
    hashes = [SD3Encoders.from_folder(folder).describe()["hash"] for folder in (made[1], folder)]
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps(config | {"shift_factor": 0.1}))
    hashes.append(SD3Encoders.from_folder(folder).describe()["hash"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_missing_foreign_and_damaged_parts_are_named(made, tmp_path):
    with pytest.raises(EncoderError, match="has no vae: wanted a diffusers folder of SD3"):
        SD3Encoders.from_folder(tmp_path / "nowhere")
    folder = shutil.copytree(made[1], tmp_path / "sd3")
    weights = folder / "text_encoder_2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(EncoderError, match=r"text_encoder_2 cannot be loaded .* download it again"):
        SD3Encoders.from_folder(folder).encode_prompts(PROMPTS, 77)
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps(config | {"latent_channels": 4}))
    with pytest.raises(EncoderError, match="4 latent channels, SD3's makes 16"):
        SD3Encoders.from_folder(folder)


def test_a_whole_picture_is_pressed_into_a_square():
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste((0, 0, 255), (150, 0, 300, 100))
    square = prepare_picture(wide, 64, "square")
    assert square.shape == (64, 64, 3)
    assert (square[:, :28] == np.array([255, 0, 0])).all()
    assert (square[:, 36:] == np.array([0, 0, 255])).all()
    wanted = wide.resize((64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(square, np.asarray(wanted))


def test_samples_of_the_posterior_have_its_spread_and_their_own_seed(made, encoders):
    pixels = torch.from_numpy(np.stack([prepare_picture(tile(0, 0), 128)] * 2))

    def sample(*seeds):
        return encoders.encode_pixels(pixels, [torch.Generator().manual_seed(seed) for seed in seeds])

    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = made[0].vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape[1:], generator=torch.Generator().manual_seed(7))
    wanted = (posterior.mean[0] + posterior.std[0] * noise - 0.0609) * 1.5305
    found = sample(7, 8)
    torch.testing.assert_close(found[0], wanted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found, sample(7, 8))
    mean = encoders.encode_pixels(pixels)
    assert (found[0] - mean[0]).abs().mean() > 0
