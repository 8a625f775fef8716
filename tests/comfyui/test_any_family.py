"""Step-wise sampling and scoring with a head on the model that samples, for every family."""

import logging

import pytest
import torch

from tests.comfyui.families import FAMILIES, load_family
from tests.tiny import randomise

EULER = {"num_branches": 1, "noise_level": 0.0, "preset": "custom"}


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, pack):
    return load_family(request.param)


def head_for(pack, tiny, kind="conv", seed=0, **facts):
    """A random head on the tiny model's taps, as DRM Loader gives it."""
    from dataclasses import replace

    shared, heads = pack.module("drm.shared"), pack.module("drm.head")
    trunk = replace(pack.module("nodes.trunk").trunk_facts(tiny.model, tiny.taps), **facts)
    if kind == "conv":
        head = heads.ConvHead(16, hidden=16)
    else:
        head = heads.QueryHead(16, image_taps=len(tiny.taps), text_taps=0, num_heads=2)
    drm = randomise(shared.SharedDRM(trunk, head), seed).requires_grad_(False).eval()
    device = torch.device("cpu")
    return pack.module("nodes.adapters").patcher_class()(drm, load_device=device, offload_device=device)


def stepwise(pack, tiny, latent=None, drm=None, **settings):
    """(LATENT, trace) of Step-wise KSampler's own execute."""
    inputs = {
        **{"seed": 5, "steps": 4, "cfg": 2.0, "scheduler": "simple", "denoise": 1.0, "kind": "sde"},
        **{"num_branches": 3, "noise_level": 0.7, "branch_start": 0.0, "branch_end": 1.0},
        **{"positive": tiny.conditioning(0), "negative": tiny.conditioning(1), "model": tiny.model},
        **settings,
    }
    node = pack.module("nodes.sampler").StepwiseKSampler
    with torch.inference_mode():
        latent = latent or tiny.latent()
        return node.execute(latent_image=latent, drm=drm or head_for(pack, tiny), **inputs).result


def stock(tiny, latent=None, **settings):
    import nodes

    inputs = {"positive": tiny.conditioning(0), "negative": tiny.conditioning(1), "cfg": 2.0, **settings}
    with torch.inference_mode():
        out = nodes.common_ksampler(
            inputs.get("model", tiny.model),
            5,
            4,
            inputs["cfg"],
            "euler",
            "simple",
            inputs["positive"],
            inputs["negative"],
            latent or tiny.latent(),
            denoise=inputs.get("denoise", 1.0),
        )
    return out[0]["samples"]


def drawn_half(batch=1):
    mask = torch.zeros(batch, 1, 8, 8)
    mask[..., 4:] = 1
    return mask


@pytest.mark.parametrize("case", ["plain", "guidance 1", "odd", "image to image", "mask", "batch"])
def test_one_branch_without_noise_is_stock_euler_bit_for_bit(pack, tiny, case):
    latent, settings = {
        "plain": (tiny.latent(), {}),
        "guidance 1": (tiny.latent(), {"cfg": 1.0}),
        "odd": (tiny.latent(size=(7, 5)), {}),
        "image to image": (tiny.latent(seed=1), {"denoise": 0.6}),
        "mask": (tiny.latent(seed=2, noise_mask=drawn_half()), {}),
        "batch": (tiny.latent(batch=3, batch_index=[4, 0, 2]), {"positive": tiny.conditioning(7, batch=2)}),
    }[case]
    ours, trace = stepwise(pack, tiny, latent, **EULER, **settings)
    theirs = stock(tiny, latent, **settings)
    assert theirs.std() > 0.1
    assert theirs.shape == ours["samples"].shape
    assert torch.equal(ours["samples"], theirs)
    assert trace.spent["trunk"] == 0


def test_a_head_chooses_among_the_candidates(pack, tiny):
    before = stock(tiny)
    drm = head_for(pack, tiny, "query" if tiny.name in ("flux", "qwen_image") else "conv")
    latent, trace = stepwise(pack, tiny, drm=drm)
    assert latent["samples"].shape == tiny.latent()["samples"].shape
    assert latent["samples"].isfinite().all()
    for step in trace.steps[:-1]:
        assert len(set(step.scores[0])) == 3
        assert step.winner == [max(range(3), key=step.scores[0].__getitem__)]
    share = pack.module("nodes.trunk").share_of_pass(tiny.model.model, tiny.taps[-1])
    assert trace.spent["scored"] == 9
    assert trace.spent["trunk"] == pytest.approx(9 * share, abs=1e-3)
    assert torch.equal(stock(tiny), before)


def test_a_batch_is_its_items(pack, tiny):
    """With a prompt each, and each item's noise its own."""
    drm, two = head_for(pack, tiny), tiny.conditioning(7, batch=2)
    batch, trace = stepwise(pack, tiny, tiny.latent(batch=2), drm, positive=two)
    for i in range(2):
        own = [[two[0][0][i : i + 1], dict(two[0][1])]]
        for name in ("pooled_output", "conditioning_llama3"):
            if own[0][1].get(name) is not None:
                own[0][1][name] = own[0][1][name][i : i + 1]
        one, alone = stepwise(pack, tiny, tiny.latent(batch_index=[i]), drm, positive=own)
        torch.testing.assert_close(batch["samples"][i : i + 1], one["samples"], atol=2e-3, rtol=0)
        for step, single in zip(trace.steps[:-1], alone.steps[:-1], strict=True):
            assert step.scores[i] == pytest.approx(single.scores[0], abs=1e-3)


def test_a_kept_region_is_stock_s(pack, tiny):
    latent = tiny.latent(batch=2, seed=3, noise_mask=drawn_half())
    ours, theirs = stepwise(pack, tiny, latent)[0]["samples"], stock(tiny, latent)
    assert torch.equal(ours[..., :4], theirs[..., :4])
    assert (ours[..., 4:] - theirs[..., 4:]).abs().max() > 0.1


def score(pack, tiny, latent, drm=None, **settings):
    inputs = {
        **{"sigma": 0.4, "latent_is": "finished picture", "noise_draws": 1, "seed": 0},
        **{"positive": tiny.conditioning(0), "model": tiny.model},
        **settings,
    }
    node = pack.module("nodes.score").DRMScoreLatent
    with torch.inference_mode():
        return node.execute(drm=drm or head_for(pack, tiny), latent=latent, **inputs).result


def test_score_latent_reads_the_model(pack, tiny):
    latent, drm = tiny.latent(batch=3, seed=4), head_for(pack, tiny)
    before = stock(tiny)
    scores, _, best, ranked, _ = score(pack, tiny, latent, drm)
    assert len(set(scores)) == 3
    winner = max(range(3), key=scores.__getitem__)
    assert torch.equal(best["samples"][0], latent["samples"][winner])
    assert ranked["samples"].shape == latent["samples"].shape
    alone = [score(pack, tiny, {"samples": latent["samples"][i : i + 1]}, drm)[0][0] for i in range(3)]
    assert scores == pytest.approx(alone, abs=1e-3)
    assert score(pack, tiny, latent, drm, sigma=0.0)[0] != scores
    assert torch.equal(stock(tiny), before)


def test_score_latent_agrees_with_the_sampler(pack, tiny):
    """The winner of a step, left with its noise, gets the score that the step's trace has."""
    drm = head_for(pack, tiny)
    scored, seen = None, []
    shared = pack.module("drm.shared").SharedScorer
    own = shared.__call__

    def call(self, candidates, sigma, items):
        seen.append((candidates, sigma))
        return own(self, candidates, sigma, items)

    shared.__call__ = call
    try:
        _, trace = stepwise(pack, tiny, drm=drm)
    finally:
        shared.__call__ = own
    candidates, sigma = seen[1]
    format_ = tiny.model.get_model_object("latent_format")
    x = candidates.unsqueeze(2) if tiny.frames else candidates
    samples = format_.process_out(x / (1 - sigma))
    scored = score(pack, tiny, {"samples": samples}, drm, latent_is="leftover noise", sigma=sigma)[0]
    assert scored == pytest.approx(trace.steps[1].scores[0], abs=1e-3)


def test_step_wise_sampler_gives_the_picture_of_step_wise_ksampler(pack, tiny):
    import comfy.sample
    import comfy.samplers

    drm, latent = head_for(pack, tiny), tiny.latent()
    node = pack.module("nodes.sampler").StepwiseSampler
    guider = comfy.samplers.CFGGuider(tiny.model)
    guider.set_conds(tiny.conditioning(0), tiny.conditioning(1))
    guider.set_cfg(2.0)
    sigmas = comfy.samplers.calculate_sigmas(tiny.model.get_model_object("model_sampling"), "simple", 4)
    with torch.inference_mode():
        sampler, log = node.execute(drm, tiny.conditioning(0), 5, num_branches=3).result
        noise = comfy.sample.prepare_noise(latent["samples"], 5)
        samples = guider.sample(noise, latent["samples"], sampler, sigmas, seed=5)
    ours, trace = stepwise(pack, tiny, drm=drm)
    torch.testing.assert_close(samples, ours["samples"], atol=1e-5, rtol=0)
    assert log.find(samples).steps == trace.steps


def test_through_a_file_and_the_loader(pack, tmp_path):
    import folder_paths

    tiny = load_family("flux")
    folder_paths.add_model_folder_path("drm", str(tmp_path))
    drm = head_for(pack, tiny)
    pack.module("drm.checkpoint").save_drm(drm.model, tmp_path / "flux_taste.safetensors")
    loaded = pack.module("nodes.loader").DRMLoader.execute("flux_taste.safetensors", "bfloat16").result[0]
    assert torch.equal(
        stepwise(pack, tiny, drm=loaded)[0]["samples"], stepwise(pack, tiny, drm=drm)[0]["samples"]
    )


def refused(run, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400


def test_what_does_not_fit_is_refused_in_a_sentence(pack, inside):
    flux, qwen = load_family("flux"), load_family("qwen_image")
    head = head_for(pack, flux)
    refused(
        lambda: stepwise(pack, qwen, drm=head),
        "head was made for a flux model of 5 blocks and the MODEL is a qwen_image of 4: load the model",
    )
    refused(
        lambda: stepwise(pack, flux, drm=head_for(pack, flux, num_blocks=19)), "of 19 blocks and the MODEL"
    )
    wide = load_family("flux", change=lambda config: config.update(hidden_size=96, num_heads=3))
    refused(
        lambda: stepwise(pack, wide, drm=head), "made for tokens 64 wide and latents of 16 channels and the"
    )
    latent = {"samples": torch.ones(1, 4, 8, 8)}
    refused(
        lambda: stepwise(pack, flux, latent, head), "latents of 16 channels and this LATENT has 4: make it"
    )
    refused(
        lambda: score(pack, flux, flux.latent(seed=1), head, model=None), r"connect that MODEL to this node"
    )
    refused(lambda: score(pack, qwen, qwen.latent(seed=1), head), "made for a flux model of 5 blocks")
    narrow = [[torch.zeros(1, 7, 40), {"pooled_output": torch.zeros(1, 32)}]]
    refused(
        lambda: stepwise(pack, flux, drm=head, positive=narrow), "reads prompts of width 48 and this COND"
    )
    refused(
        lambda: stepwise(pack, flux, drm=inside.drm), r"\(Flux, 16 latent channels\) is not of the SD3 family"
    )
    video = {"samples": torch.zeros(1, 16, 3, 8, 8)}
    refused(lambda: stepwise(pack, qwen, video, head_for(pack, qwen)), "a DRM scores pictures")
    nan = {"samples": torch.full((1, 16, 8, 8), float("nan"))}
    refused(lambda: stepwise(pack, flux, nan, head), "latent_image holds NaN")
    broken = [[torch.full((1, 7, 48), float("nan")), {"pooled_output": torch.zeros(1, 32)}]]
    refused(
        lambda: stepwise(pack, flux, drm=head, positive=broken), "the scorer returned nan for batch item 0"
    )


def test_a_video_of_a_custom_sampler_is_refused(pack):
    import comfy.samplers

    tiny = load_family("wan")
    node = pack.module("nodes.sampler").StepwiseSampler
    guider = comfy.samplers.CFGGuider(tiny.model)
    guider.set_conds(tiny.conditioning(0), tiny.conditioning(1))
    video = torch.zeros(1, 16, 3, 8, 8)
    with torch.inference_mode():
        sampler, _ = node.execute(head_for(pack, tiny), tiny.conditioning(0), 5, num_branches=3).result
        refused(lambda: guider.sample(video, video, sampler, torch.tensor([1.0, 0.5, 0.0])), "a single frame")


def test_another_fine_tune_works_and_is_said_once(pack, caplog):
    base, tuned = load_family("flux"), load_family("flux", seed=1)
    drm = head_for(pack, base)
    with caplog.at_level(logging.WARNING):
        for tiny in (base, tuned, tuned):
            assert stepwise(pack, tiny, drm=drm)[0]["samples"].isfinite().all()
    said = [
        record.getMessage() for record in caplog.records if "not the one this head" in record.getMessage()
    ]
    assert len(said) == 1
    assert "% of its sampled weights are others" in said[0]


def test_other_number_formats(pack):
    """The same weights in bfloat16 are the same base; its tokens are near, its pictures finite."""
    for name in ("flux", "qwen_image", "z_image"):
        tiny, half = load_family(name), load_family(name, options={"dtype": torch.bfloat16})
        drm = head_for(pack, tiny)
        latent = tiny.latent(batch=3, seed=4)
        a, b = (score(pack, model, latent, drm)[0] for model in (tiny, half))
        assert a == pytest.approx(b, abs=0.3)
        assert a != b
        assert stepwise(pack, half, drm=drm)[0]["samples"].isfinite().all()


def test_cancel_in_the_middle_leaves_the_model_as_it_was(pack, monkeypatch):
    import comfy.model_management as mm

    tiny = load_family("flux")
    before, calls = stock(tiny), []

    def cancel():
        calls.append(1)
        if len(calls) == 3:
            raise mm.InterruptProcessingException

    monkeypatch.setattr(mm, "throw_exception_if_processing_interrupted", cancel)
    with pytest.raises(mm.InterruptProcessingException):
        stepwise(pack, tiny)
    monkeypatch.undo()
    assert torch.equal(stock(tiny), before)


def test_the_trainer_refuses_a_head_without_a_backbone(pack, inside):
    adapters = pack.module("nodes.adapters")
    prompts = adapters.ScoringPrompts(inside.positive, adapters.sd3_percent_to_sigma)
    head = head_for(pack, load_family("sd3"))
    refused(
        lambda: adapters.check_drm_fits(head, prompts, torch.zeros(1, 16, 8, 8), inside.model),
        "reads the MODEL's own tokens, which is not possible here: choose a DRM with a backbone of its own",
    )


def test_a_film_strip_changes_nothing_and_has_latents_as_the_vae_takes_them(pack, tiny):
    drm = head_for(pack, tiny)
    stepwise(pack, tiny, drm=drm)  # winner reuse is checked at its first use
    plain, trace = stepwise(pack, tiny, drm=drm)
    looked, film = stepwise(pack, tiny, drm=drm, film_strip=2)
    assert torch.equal(plain["samples"], looked["samples"])
    assert (film.steps, film.spent["reused"]) == (trace.steps, trace.spent["reused"])
    assert [fork.step for fork in film.forks] == [0, 1]
    for fork in film.forks:
        assert fork.x0.shape == (1, 3, *plain["samples"].shape[1:])
        assert bool(fork.x0.isfinite().all())
