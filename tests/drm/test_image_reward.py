"""ImageReward from its published file: the formula written out here, and bad folders each in a line."""

import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from drm.picture_scorers import load_picture_scorer
from tests.drm.test_picture_scorers import Harmful, pictures
from tests.tiny_scorers import BERT_WORDS, DEPTH, PATCH, SIDE, write_tiny_clip, write_tiny_image_reward

PROMPT, WORDS = "a red heart", ["[CLS]", "a", "red", "heart", "[SEP]"]


@pytest.fixture
def folder(tmp_path):
    return write_tiny_image_reward(tmp_path / "ImageReward")


def weights_in(folder):
    return torch.load(folder / "ImageReward.pt", weights_only=True)


def own_score(weights, words, pixels):
    """(score - its mean) / its std of one picture (3, side, side), without transformers."""

    def linear(x, name):
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    def norm(x, name, eps):
        return functional.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], eps)

    def attend(query, key, value):
        heads = [
            (q @ k.T / math.sqrt(64)).softmax(-1) @ v
            for q, k, v in zip(query.split(64, -1), key.split(64, -1), value.split(64, -1), strict=True)
        ]
        return torch.cat(heads, -1)

    eye, text = "blip.visual_encoder.", "blip.text_encoder."
    patches = functional.conv2d(
        pixels[None], weights[eye + "patch_embed.proj.weight"], weights[eye + "patch_embed.proj.bias"], PATCH
    )
    x = torch.cat([weights[eye + "cls_token"][0], patches[0].flatten(1).T]) + weights[eye + "pos_embed"][0]
    for i in range(DEPTH):
        block = f"{eye}blocks.{i}."
        mixed = attend(*linear(norm(x, block + "norm1", 1e-6), block + "attn.qkv").chunk(3, -1))
        x = x + linear(mixed, block + "attn.proj")
        wide = functional.gelu(linear(norm(x, block + "norm2", 1e-6), block + "mlp.fc1"))
        x = x + linear(wide, block + "mlp.fc2")
    seen = norm(x, eye + "norm", 1e-6)

    ids = [BERT_WORDS.index(word) for word in words]
    t = weights[text + "embeddings.word_embeddings.weight"][ids]
    t = t + weights[text + "embeddings.position_embeddings.weight"][: len(ids)]
    t = norm(t, text + "embeddings.LayerNorm", 1e-12)
    for i in range(DEPTH):
        for name, source in (("attention", None), ("crossattention", seen)):
            part = f"{text}encoder.layer.{i}.{name}."
            other = t if source is None else source
            read = attend(
                *(linear(a, f"{part}self.{b}") for a, b in ((t, "query"), (other, "key"), (other, "value")))
            )
            t = norm(t + linear(read, part + "output.dense"), part + "output.LayerNorm", 1e-12)
        layer = f"{text}encoder.layer.{i}."
        wide = functional.gelu(linear(t, layer + "intermediate.dense"))
        t = norm(t + linear(wide, layer + "output.dense"), layer + "output.LayerNorm", 1e-12)
    for place in (0, 2, 4, 6, 7):
        t = linear(t, f"mlp.layers.{place}")
    return (t[0, 0] - 0.16717362830052426) / 1.0333394966054072


def pixels_of(picture):
    """Resized, cut and normalised, for pictures whose shorter side is a whole multiple of the square's."""
    width, height = picture.size
    scale = SIDE / min(width, height)
    small = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    array = np.asarray(small, np.float32) / 255
    top, left = ((length - SIDE) // 2 for length in array.shape[:2])
    array = array[top : top + SIDE, left : left + SIDE]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.from_numpy((array - np.float32(mean)) / np.float32(std)).permute(2, 0, 1)


def sized(width, height):
    return [picture.resize((width, height)) for picture in pictures()]


@pytest.mark.parametrize("size", [(32, 32), (64, 128), (96, 64)])
def test_the_score_is_the_papers(folder, size):
    scores = load_picture_scorer(folder)(PROMPT, sized(*size))
    wanted = [own_score(weights_in(folder), WORDS, pixels_of(picture)) for picture in sized(*size)]
    torch.testing.assert_close(scores, torch.stack(wanted), rtol=1e-4, atol=1e-4)
    assert scores.dtype == torch.float32
    assert abs(scores[0] - scores[1]) > 1e-2


def test_long_prompts_are_cut_to_35_tokens(folder):
    scorer = load_picture_scorer(folder)
    picture = sized(32, 32)[0]
    words = ["[CLS]", *["cat", "##s"] * 16, "cat", "[SEP]"]
    wanted = own_score(weights_in(folder), words, pixels_of(picture))
    torch.testing.assert_close(scorer("cats " * 40, [picture])[0], wanted, rtol=1e-4, atol=1e-4)


def test_safetensors_come_first_and_halves_are_computed_in_float32(folder):
    weights = {key: value.half() for key, value in weights_in(folder).items()}
    wanted = own_score(
        {key: value.float() for key, value in weights.items()}, WORDS, pixels_of(sized(32, 32)[0])
    )
    save_file(weights, folder / "ImageReward-v1.0.safetensors")
    (folder / "ImageReward.pt").write_bytes(b"not read")
    scorer = load_picture_scorer(folder)
    assert {parameter.dtype for parameter in scorer.parameters()} == {torch.float32}
    torch.testing.assert_close(scorer(PROMPT, sized(32, 32))[0], wanted, rtol=1e-4, atol=1e-4)


def test_a_file_that_is_more_than_tensors_runs_nothing(folder, tmp_path):
    (folder / "ImageReward.pt").write_bytes(pickle.dumps(Harmful(tmp_path / "opened")))
    with pytest.raises(ValueError, match=r"cannot read .*ImageReward\.pt: .*download it again"):
        load_picture_scorer(folder)
    assert not (tmp_path / "opened").exists()


def test_damaged_foreign_and_incomplete_files(folder):
    path, weights = folder / "ImageReward.pt", weights_in(folder)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ValueError, match="cannot read"):
        load_picture_scorer(folder)
    for other in ({"model": weights}, [1, 2]):
        torch.save(other, path)
        with pytest.raises(ValueError, match="no dictionary of tensors"):
            load_picture_scorer(folder)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="it is no ImageReward file"):
        load_picture_scorer(folder)
    for gone in ("blip.text_encoder.encoder.layer.1.crossattention.self.key.bias", "mlp.layers.7.bias"):
        torch.save({key: value for key, value in weights.items() if key != gone}, path)
        with pytest.raises(ValueError, match=gone.split(".", 2)[2].replace(".", r"\.")):
            load_picture_scorer(folder)
    torch.save(weights | {"blip.visual_encoder.norm.weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="does not fit together: size mismatch for post_layernorm"):
        load_picture_scorer(folder)


def test_a_tokenizer_that_is_missing(folder):
    (folder / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json: put it .* google-bert/bert-base-uncased"):
        load_picture_scorer(folder)


def test_a_folder_tells_its_kind(folder, tmp_path):
    clip = write_tiny_clip(tmp_path / "clip")
    kinds = [type(load_picture_scorer(path)).__name__ for path in (folder, clip)]
    assert kinds == ["ImageReward", "CLIPScorer"]
