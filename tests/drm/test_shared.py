"""A head without a network: its file, its scores, and what it says of a base that is not its own."""

import pytest
import torch

from drm import DRM, SharedDRM, load_drm, save_drm
from drm.checkpoint import DRMFileError, load_whole_drm, read_header
from drm.head import ConvHead, QueryHead
from drm.shared import SharedScorer, Taps, TrunkFacts, fingerprint, unlike
from drm.stepwise import sample_stepwise
from tests.tiny import randomise

FACTS = {"family": "flux", "width": 24, "num_blocks": 8, "taps": (2, 5), "latent_channels": 16}


def shared(kind="conv", **facts):
    trunk = TrunkFacts(**{**FACTS, **facts})
    if kind == "conv":
        head = ConvHead(8, hidden=16)
    else:
        head = QueryHead(8, image_taps=len(trunk.taps), text_taps=0, num_heads=2)
    return randomise(SharedDRM(trunk, head, {"name": "taste", "licence": "CC0"}), 0).eval()


def taps(count=3, rows=4, columns=6, width=24, number=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randn(count, rows * columns, width, generator=generator) for _ in range(number)]
    return Taps(tokens, rows, columns)


@pytest.mark.parametrize("kind", ["conv", "query"])
def test_file_is_bit_equal_and_says_what_it_belongs_to(tmp_path, kind):
    path = tmp_path / "taste.safetensors"
    drm = shared(kind, fingerprint={"layout": "comfyui", "shapes": "ab", "values": [1.0, 2.0]})
    save_drm(drm, path, metadata={"accuracy": {"held_out": 0.75}, "calibration": {"sigma": [0.5]}})
    loaded = load_drm(path, dtype=torch.bfloat16)
    assert isinstance(loaded, SharedDRM)
    assert loaded.trunk == drm.trunk
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.score(taps(), 0.4), drm.score(taps(), 0.4))
    facts = {"licence": "CC0", "accuracy": {"held_out": 0.75}, "calibration": {"sigma": [0.5]}}
    assert facts.items() <= loaded.metadata.items()
    backbone = read_header(path)["architecture"]["backbone"]
    assert (backbone["kind"], backbone["family"], backbone["taps"]) == ("shared", "flux", [2, 5])
    assert path.stat().st_size < 200_000


def test_a_file_of_a_kind_not_known_is_refused(drm, tmp_path, monkeypatch):
    path = tmp_path / "future.safetensors"
    monkeypatch.setattr("drm.checkpoint.SHARED", "rented")
    save_drm(shared(), path)
    monkeypatch.undo()
    with pytest.raises(DRMFileError, match="its backbone is of kind 'rented', known are 'sd3' and 'shared'"):
        load_drm(path)


def test_own_backbones_load_as_before(drm, inputs, tmp_path):
    path = tmp_path / "own.safetensors"
    save_drm(drm, path)
    loaded = load_drm(path)
    assert isinstance(loaded, DRM)
    assert torch.equal(loaded.score(inputs[0], 0.4, *inputs[1:]), drm.score(inputs[0], 0.4, *inputs[1:]))


def test_where_a_backbone_is_needed_a_head_is_refused(drm, tmp_path):
    save_drm(shared(), tmp_path / "taste.safetensors")
    save_drm(drm, tmp_path / "own.safetensors")
    assert isinstance(load_whole_drm(tmp_path / "own.safetensors"), DRM)
    with pytest.raises(DRMFileError, match="is a head that reads the tokens of a flux model"):
        load_whole_drm(tmp_path / "taste.safetensors")


@pytest.mark.parametrize("kind", ["conv", "query"])
def test_scores_depend_on_every_tap_on_sigma_and_on_nothing_else_in_the_batch(kind):
    drm, seen = shared(kind), taps()
    scores = drm.score(seen, 0.4)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    assert (scores - drm.score(seen, 0.6)).abs().min() > 1e-4
    for i in range(2):
        other = [tokens.flip(2) if i == place else tokens for place, tokens in enumerate(seen.tokens)]
        assert (scores - drm.score(Taps(other, seen.rows, seen.columns), 0.4)).abs().min() > 1e-4
    alone = torch.cat([drm.score(Taps([t[i : i + 1] for t in seen.tokens], 4, 6), 0.4) for i in range(3)])
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)
    each = drm.score(seen, torch.tensor([0.4, 0.6, 0.4]))
    torch.testing.assert_close(each[[0, 2]], scores[[0, 2]], atol=1e-5, rtol=0)


def test_half_tokens_and_the_score_people_see():
    drm = shared()
    half = Taps([tokens.bfloat16() for tokens in taps().tokens], 4, 6)
    torch.testing.assert_close(drm.score(half, 0.4), drm.score(taps(), 0.4), atol=0.05, rtol=0)
    raw = drm.score(taps(), 0.4)
    drm.metadata["shown"] = {"scale": 2.0, "offset": 3.0}
    torch.testing.assert_close(drm.score(taps(), 0.4), 2 * raw + 3)


@pytest.mark.parametrize("wrong", [{"width": 25}, {"number": 1}, {"number": 3}])
def test_taps_of_another_model_are_refused(wrong):
    with pytest.raises(ValueError, match=r"the taps have shapes .*wanted 2 of \(24, 24\), as the flux model"):
        shared().score(taps(**wrong), 0.4)


@pytest.mark.parametrize("wrong", [(), (0, 2), (5, 2), (2, 2), (2, 9)])
def test_blocks_that_are_not_there_are_refused(wrong):
    with pytest.raises(ValueError, match="ascending numbers from 1 to 8"):
        TrunkFacts(**{**FACTS, "taps": wrong})


def test_a_query_head_for_other_taps_is_refused():
    with pytest.raises(ValueError, match="reads 3 image and 0 text taps: wanted 2 and 0"):
        SharedDRM(TrunkFacts(**FACTS), QueryHead(8, image_taps=3, text_taps=0, num_heads=2))


def trunk(x, sigma, items):
    """Tokens of width 24 that carry the latent, sigma and the item."""
    patches = torch.nn.functional.pixel_unshuffle(x.float(), 2).flatten(2).transpose(1, 2)
    told = torch.full_like(patches[..., :4], sigma) + items[:, None, None]
    tokens = torch.cat((patches[..., :20], told), dim=-1)
    return Taps([tokens, tokens.sin()], x.shape[-2] // 2, x.shape[-1] // 2)


def test_scorer_parts_its_candidates_when_memory_runs_out():
    x, items = torch.randn(10, 16, 8, 8), torch.arange(10) % 2
    sizes, freed = [], []

    def scarce(latents, sigma, rows):
        sizes.append(len(latents))
        if len(latents) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return trunk(latents, sigma, rows)

    scorer = SharedScorer(shared(), scarce, free=lambda: freed.append(1))
    whole = SharedScorer(shared(), trunk)
    torch.testing.assert_close(scorer(x, 0.5, items), whole(x, 0.5, items), atol=1e-5, rtol=0)
    assert sizes == [10, 5, 3, 3, 3, 1]
    assert len(freed) == 2
    assert (scorer.walked, whole.walked) == (25, 10)
    assert scorer.parts.largest == 3


def test_steers_stepwise_sampling():
    scorer = SharedScorer(shared(), trunk)
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    _, trace = sample_stepwise(
        lambda x, sigma: 0.5 * x, scorer, noise, torch.linspace(1, 0, 5), num_branches=3, seed=1
    )
    assert scorer.walked == trace.spent["scored"] == 2 * 3 * 3
    assert all(len(set(row)) == 3 for step in trace.steps[:-1] for row in step.scores)


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    named = {f"blocks.{i}.w": torch.randn(6, 5, generator=generator) for i in range(40)}
    return named | {"blocks.0.bias": torch.zeros(5)}


def test_a_fingerprint_tells_bases_apart():
    known = fingerprint(weights(), "comfyui")
    assert len(known["values"]) == 64
    assert unlike(known, fingerprint(weights(), "comfyui")) is None
    for dtype in (torch.bfloat16, torch.float16):
        half = {name: value.to(dtype) for name, value in weights().items()}
        assert unlike(known, fingerprint(half, "comfyui")) is None
    tuned = {name: 1.02 * value for name, value in weights().items()}
    assert unlike(known, fingerprint(tuned, "comfyui")) == "100 % of its sampled weights are others"
    fewer = dict(list(weights().items())[5:])
    assert unlike(known, fingerprint(fewer, "comfyui")) == "its blocks have other weights, by name or shape"


def test_what_a_fingerprint_cannot_tell_it_does_not_say():
    known = fingerprint(weights(), "comfyui")
    packed = {name: value.to(torch.uint8) for name, value in weights(1).items()}
    assert fingerprint(packed, "comfyui")["values"] == []
    assert unlike(known, fingerprint(packed, "comfyui")) is None
    assert unlike(known, fingerprint(weights(1), "diffusers")) is None
    assert unlike(known, None) is None
    assert unlike(None, known) is None
