"""DRM Score Latent and the adapters below it, in this process."""

import copy

import pytest
import torch


@pytest.fixture
def score(inside):
    """(scores, ranks, best, sorted) of DRM Score Latent."""
    node = inside.pack.module("nodes.score").DRMScoreLatent
    defaults = {"sigma": 0.0, "latent_is": "finished picture", "noise_draws": 1, "seed": 0}

    def run(latent, **settings):
        inputs = {"drm": inside.drm, "positive": inside.positive, **defaults, **settings}
        with torch.inference_mode():
            return node.execute(latent=latent, **inputs).result

    return run


def model_space(samples):
    return (samples - 0.0609) * 1.5305


def own_score(inside, x, sigma):
    """What drm itself says about latents in model space."""
    embeds, options = inside.positive[0]
    return inside.drm.model.score(x, sigma, embeds, options["pooled_output"])


def test_scores_are_those_of_the_model_in_model_space(inside, score):
    latent = inside.latent(batch=5, seed=1)
    scores = score(latent)[0]
    wanted = own_score(inside, model_space(latent["samples"]), 0.0)
    torch.testing.assert_close(torch.tensor(scores), wanted, atol=1e-4, rtol=0)


def test_ranking_best_and_sorted(inside, score):
    masks = torch.rand(4, 1, 8, 8)
    latent = inside.latent(batch=4, seed=2, batch_index=[7, 3, 9, 4], noise_mask=masks)
    scores, ranks, best, ordered, _ = score(latent)
    order = sorted(range(4), key=lambda i: -scores[i])
    assert ordered["batch_index"] == [latent["batch_index"][i] for i in order]
    assert torch.equal(ordered["samples"], latent["samples"][order])
    assert torch.equal(ordered["noise_mask"], masks[order])
    assert best["batch_index"] == ordered["batch_index"][:1]
    assert torch.equal(best["samples"], latent["samples"][order[:1]])
    assert torch.equal(best["noise_mask"], masks[order[:1]])
    assert ranks.splitlines()[0] == f"1. picture {best['batch_index'][0] + 1}: {max(scores):+.2f}"
    assert len(ranks.splitlines()) == 4


def test_one_mask_for_all_stays_one_mask(inside, score):
    mask = torch.rand(1, 1, 8, 8)
    best = score(inside.latent(batch=3, seed=2, noise_mask=mask))[2]
    assert torch.equal(best["noise_mask"], mask)


def test_best_can_be_drawn_again_by_its_batch_index(inside, score):
    drawn = {"samples": inside.ksampler(inside.latent(batch=3))}
    best = score(drawn)[2]
    again = inside.ksampler(inside.latent(batch_index=best["batch_index"]))
    torch.testing.assert_close(again, best["samples"], atol=1e-4, rtol=0)


def test_noise_is_shared_by_the_batch_and_averaged_over_draws(inside, score):
    latent = inside.latent(batch=2, seed=3)
    latent["samples"][1] = latent["samples"][0]
    scores = score(latent, sigma=0.5, noise_draws=3, seed=4)[0]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)

    branch_noise = inside.pack.module("drm.branching").branch_noise
    x0 = model_space(latent["samples"][:1])
    draws = [0.5 * x0 + 0.5 * branch_noise((16, 8, 8), 4, 0, 0, draw) for draw in range(3)]
    singles = torch.cat([own_score(inside, x, 0.5) for x in draws])
    assert singles.std() > 1e-3
    assert scores[0] == pytest.approx(singles.mean().item(), abs=1e-4)


def test_leftover_noise_is_scored_as_the_sampler_left_it(inside, score):
    import comfy.sample
    import comfy.samplers

    states = []
    latent = inside.latent()
    noise = comfy.sample.prepare_noise(latent["samples"], 6)
    sampler = comfy.samplers.KSampler(inside.model, 4, torch.device("cpu"), "euler", "simple", 1.0)
    with torch.inference_mode():
        samples = comfy.sample.sample_custom(
            inside.model,
            noise,
            1.0,
            comfy.samplers.sampler_object("euler"),
            sampler.sigmas[:3],
            inside.positive,
            inside.negative,
            latent["samples"],
            callback=lambda step, x0, x, steps: states.append((x0, x)),
        )
    sigma, sigma_next = float(sampler.sigmas[1]), float(sampler.sigmas[2])
    x0, x = states[-1]
    left = x0 + (x - x0) * (sigma_next / sigma)
    leftover = inside.pack.module("nodes.adapters").model_latents(samples, sigma_next)
    torch.testing.assert_close(leftover, left, atol=1e-5, rtol=0)
    scores = score({"samples": samples}, sigma=sigma_next, latent_is="leftover noise")[0]
    assert scores[0] == pytest.approx(own_score(inside, left, sigma_next).item(), abs=1e-4)


def test_a_score_does_not_depend_on_the_batch(inside, score):
    latent = inside.latent(batch=20, seed=5)
    together = score(latent)[0]
    alone = [score({"samples": latent["samples"][i : i + 1]})[0][0] for i in (0, 7, 19)]
    assert alone == pytest.approx([together[i] for i in (0, 7, 19)], abs=1e-5)


@pytest.mark.parametrize("size", [(9, 8), (7, 13)])
def test_odd_sizes_are_scored(inside, score, size):
    samples = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(0))
    scores = score({"samples": samples})[0]
    patch = inside.drm.model.backbone.config.patch_size
    missing = (0, -size[1] % patch, 0, -size[0] % patch)
    padded = torch.nn.functional.pad(model_space(samples), missing, mode="circular")
    torch.testing.assert_close(torch.tensor(scores), own_score(inside, padded, 0.0), atol=1e-4, rtol=0)


def test_odd_sizes_are_scored_with_coarse_tokens(inside, score):
    backbone, model = inside.pack.module("drm.backbone"), inside.drm.model
    weights, config = backbone.coarsened(model.backbone.state_dict(), model.backbone.config, 2)
    coarse = backbone.TruncatedSD3(config)
    coarse.load_state_dict(weights)
    drm = type(model)(coarse, model.head, model.metadata).requires_grad_(False).eval()
    patcher = type(inside.drm)(drm, inside.drm.load_device, inside.drm.offload_device)
    samples = torch.randn(2, 16, 10, 7, generator=torch.Generator().manual_seed(0))
    scores = score({"samples": samples}, drm=patcher)[0]
    padded = torch.nn.functional.pad(model_space(samples), (0, 1, 0, 2), mode="circular")
    embeds, options = inside.positive[0]
    wanted = drm.score(padded, 0.0, embeds, options["pooled_output"])
    torch.testing.assert_close(torch.tensor(scores), wanted, atol=1e-4, rtol=0)


def test_out_of_memory_halves_the_chunk(inside, score, monkeypatch):
    import comfy.model_management as mm

    latent = inside.latent(batch=7, seed=6)
    wanted = score(latent)[0]
    own, sizes = inside.drm.model.score_prepared, []

    def small_memory(x, *rest):
        sizes.append(len(x))
        if len(x) > 3:
            raise mm.OOM_EXCEPTION("no memory for that many")
        return own(x, *rest)

    monkeypatch.setattr(inside.drm.model, "score_prepared", small_memory)
    assert score(latent)[0] == pytest.approx(wanted, abs=1e-5)
    assert sizes == [7, 4, 2, 2, 2, 1]


def test_out_of_memory_with_one_picture_is_reported(inside, score, monkeypatch):
    import comfy.model_management as mm

    def no_memory(*_):
        raise mm.OOM_EXCEPTION("nothing fits")

    monkeypatch.setattr(inside.drm.model, "score_prepared", no_memory)
    with pytest.raises(mm.OOM_EXCEPTION, match="nothing fits"):
        score(inside.latent(batch=2, seed=6))


@pytest.fixture
def prompts(inside):
    """The embeddings chosen at a sigma out of entries with options."""
    adapters = inside.pack.module("nodes.adapters")
    embeds, pooled = inside.positive[0][0], inside.positive[0][1]["pooled_output"]

    def choose(sigma, *options):
        entries = [[embeds + i, {"pooled_output": pooled, **option}] for i, option in enumerate(options)]
        chosen, _ = adapters.ScoringPrompts(entries, adapters.sd3_percent_to_sigma).at(sigma, 1, "cpu")
        return round((chosen - embeds).mean().item())

    return choose


def test_the_first_full_picture_prompt_is_scored(prompts):
    assert prompts(0.5, {}, {}) == 0
    assert prompts(0.5, {"area": (4, 4, 0, 0)}, {"mask": torch.ones(1, 8, 8)}, {}) == 2
    assert prompts(0.5, {"area": (4, 4, 0, 0)}, {"mask": torch.ones(1, 8, 8)}) == 0


def test_the_prompt_that_holds_at_the_sigma_is_scored(prompts):
    early, late = {"start_percent": 0.0, "end_percent": 0.4}, {"start_percent": 0.4, "end_percent": 1.0}
    assert [prompts(sigma, early, late) for sigma in (1.0, 0.9, 0.8, 0.3, 0.0)] == [0, 0, 1, 1, 1]


def test_sigmas_of_percentages_are_comfyuis(inside):
    ours = inside.pack.module("nodes.adapters").sd3_percent_to_sigma
    theirs = inside.model.get_model_object("model_sampling").percent_to_sigma
    for percent in (0.0, 0.25, 0.5, 0.9, 1.0):
        assert ours(percent) == pytest.approx(float(theirs(percent)), abs=1e-6)


@pytest.mark.parametrize("native", [True, False])
def test_auto_dtype_on_a_cpu_is_bfloat16_only_where_the_cpu_computes_it(inside, monkeypatch, native):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    patcher = inside.pack.module("nodes.adapters").load_drm_patcher("drm", inside.files.drm.name, "auto")
    expected = torch.bfloat16 if native else torch.float32
    assert {p.dtype for p in patcher.model.backbone.parameters()} == {expected}


def test_bfloat16_keeps_the_head_in_float32(inside, score):
    patcher = inside.pack.module("nodes.adapters").load_drm_patcher("drm", inside.files.drm.name, "bfloat16")
    assert {p.dtype for p in patcher.model.head.parameters()} == {torch.float32}
    assert {p.dtype for p in patcher.model.backbone.parameters()} == {torch.bfloat16}
    latent = inside.latent(batch=3, seed=7)
    exact, rough = score(latent)[0], score(latent, drm=patcher)[0]
    assert rough == pytest.approx(exact, abs=0.1)


def test_another_length_of_prompt_than_it_was_trained_on_is_said_once(inside, score, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setitem(inside.drm.model.metadata, "text_length", 589)
    for seed in (1, 2):
        score(inside.latent(seed=seed))
    said = [record.message for record in caplog.records if "was trained on prompts" in record.message]
    assert len(said) == 1
    assert "of 589 tokens and this CONDITIONING has 20" in said[0]
    assert "T5TokenizerOptions" not in said[0]  # the demo's prompts have no T5
    caplog.clear()
    monkeypatch.setitem(inside.drm.model.metadata, "text_length", 20)
    score(inside.latent(seed=3))
    assert not [record for record in caplog.records if "was trained on prompts" in record.message]


@pytest.mark.parametrize(("wanted", "length", "asked"), [(589, 154, 512), (333, 154, 256)])
def test_it_is_said_which_node_makes_a_prompt_as_long_as_in_training(inside, wanted, length, asked):
    advice = inside.pack.module("nodes.adapters")._longer_t5(wanted, length)
    assert f"T5TokenizerOptions node with min_length {asked} in front of CLIP Text Encode" in advice
    assert inside.pack.module("nodes.adapters")._longer_t5(length, wanted) == ""


def test_that_node_makes_it_as_long(inside):
    """ComfyUI's own tokenizer of SD3's T5, with that option: as many tokens, padded with T5's pad, 0."""
    from comfy.text_encoders.sd3_clip import T5XXLTokenizer

    tokenizer = T5XXLTokenizer()
    (short,) = tokenizer.tokenize_with_weights("a cat")
    (long,) = tokenizer.tokenize_with_weights("a cat", tokenizer_options={"t5xxl_min_length": 512})
    assert (len(short), len(long)) == (77, 512)
    assert {token for token, *_ in long[len(short) :]} == {0}
    assert long[: len(short)] == short


def test_a_card_with_little_room_holds_all_of_the_drm_or_nothing(inside):
    """Plain torch layers work on one device: ComfyUI may neither load nor take away a part of them."""
    import comfy.model_patcher as stock

    adapters = inside.pack.module("nodes.adapters")
    meta, cpu = torch.device("meta"), torch.device("cpu")
    module = adapters.load_drm_patcher("drm", inside.files.drm.name, "float32").model
    for kind, devices in ((stock.ModelPatcher, {"meta", "cpu"}), (adapters.WholePatcher, {"meta"})):
        patcher = kind(copy.deepcopy(module), load_device=meta, offload_device=cpu)
        patcher.partially_load(meta, extra_memory=patcher.model_size() // 2)
        assert {parameter.device.type for parameter in patcher.model.parameters()} == devices
    assert patcher.partially_unload(cpu, memory_to_free=1) == 0
    assert {parameter.device.type for parameter in patcher.model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("hint", "sigma"),
    [
        ({"generated picture": 0.4, "real picture": 0.1}, 0.4),
        (0.25, 0.25),
        ("much", 0.0),
        (7, 0.0),
        (None, 0.0),
    ],
)
def test_sigma_as_the_file_says(inside, score, monkeypatch, hint, sigma):
    latent = inside.latent(batch=2, seed=3)
    monkeypatch.setitem(inside.drm.model.metadata, "sigma_hint", hint)
    assert score(latent, sigma=-1.0)[0] == score(latent, sigma=sigma)[0]
    if sigma:
        assert score(latent, sigma=-1.0)[0] != score(latent, sigma=0.0)[0]


def test_leftover_noise_needs_its_sigma(inside, score):
    with pytest.raises(ValueError, match=r"sigma is -1.0: give a number from 0"):
        score(inside.latent(), sigma=-1.0, latent_is="leftover noise")


def test_the_sheet_is_there_with_a_vae_alone(inside, score):
    """Pictures of a known colour a latent: the sheet begins with that of the best."""

    class Shades:
        def decode(self, samples):
            places = torch.arange(len(samples)).reshape(-1, 1, 1, 1) / 10
            return places.expand(-1, 32, 32, 3)

    latent = inside.latent(batch=5, seed=9)
    scores, *_, sheet = score(latent, vae=Shades())
    best = max(range(5), key=scores.__getitem__)
    assert sheet[0, 20, 20].tolist() == pytest.approx([best / 10] * 3, abs=0.01)
    assert type(score(latent)[-1]).__name__ == "ExecutionBlocker"
