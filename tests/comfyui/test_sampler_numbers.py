"""Step-wise KSampler against stock KSampler, number by number, in this process."""

import pytest
import torch

from tests.comfyui.inside import write_lora

EULER = {"num_branches": 1, "noise_level": 0.0}
SCHEDULERS = [
    "simple",
    "sgm_uniform",
    "karras",
    "exponential",
    "ddim_uniform",
    "beta",
    "normal",
    "linear_quadratic",
    "kl_optimal",
]


def assert_same_as_stock(inside, latent=None, **settings):
    ours = inside.stepwise(latent, **EULER, **settings)
    stock = inside.ksampler(latent, **settings)
    assert stock.std() > 0.1
    assert (ours - stock).abs().max() <= 1e-5
    return stock


def drawn_half(size=8):
    """A noise mask whose left half is kept and whose right half is drawn."""
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 2 :] = 1
    return mask


def test_every_scheduler_of_this_comfyui_is_tested(inside):
    import comfy.samplers

    assert comfy.samplers.SCHEDULER_NAMES == SCHEDULERS


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_one_branch_without_noise_is_stock_euler(inside, scheduler):
    assert_same_as_stock(inside, scheduler=scheduler)


def test_image_to_image_is_stock_euler(inside):
    latent = inside.latent(seed=1)
    partly = assert_same_as_stock(inside, latent, denoise=0.6)
    assert (partly - inside.ksampler(latent)).abs().max() > 0.1


@pytest.mark.parametrize("kept", [0.0, 0.35])
def test_masked_latent_is_stock_euler(inside, kept):
    mask = drawn_half().clamp_min(kept)
    assert_same_as_stock(inside, inside.latent(seed=2, noise_mask=mask))


def test_batch_of_three_with_two_prompts_is_stock_euler(inside):
    other = inside.encode("yellow moon, noto style")
    two = [
        [
            torch.cat([inside.positive[0][0], other[0][0]]),
            {"pooled_output": torch.cat([p[0][1]["pooled_output"] for p in (inside.positive, other)])},
        ]
    ]
    batch = assert_same_as_stock(inside, inside.latent(batch=3), positive=two)
    one = inside.ksampler(inside.latent(batch=3))
    torch.testing.assert_close(batch[0], one[0], atol=1e-4, rtol=0)
    assert (batch[1] - one[1]).abs().max() > 1e-3


def test_lora_is_stock_euler(inside, tmp_path):
    import comfy.sd
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(write_lora(tmp_path / "lora.safetensors", hidden=128)))
    patched, _ = comfy.sd.load_lora_for_models(inside.model, None, lora, 1.0, 0.0)
    with_lora = assert_same_as_stock(inside, model=patched)
    assert (with_lora - inside.ksampler()).abs().max() > 1e-3


def test_batch_index_gives_stock_starting_noise(inside):
    assert_same_as_stock(inside, inside.latent(batch=2, batch_index=[3, 1]))


@pytest.mark.parametrize("num_branches", [1, 2, 5])
def test_one_policy_evaluation_a_step_whatever_k(inside, num_branches):
    calls = []

    def count(apply_model, arguments):
        calls.append(len(arguments["input"]))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    model = inside.model.clone()
    model.set_model_unet_function_wrapper(count)
    inside.stepwise(model=model, steps=4, num_branches=num_branches, cfg=1.0)
    assert calls == [1] * 4


def watch_scorer(inside, monkeypatch, see):
    """see(candidates, sigma) at every call of the reward model."""
    scorer = inside.pack.module("nodes.adapters").Scorer
    own = scorer.__call__

    def call(self, candidates, sigma, *rest):
        see(candidates, sigma)
        return own(self, candidates, sigma, *rest)

    monkeypatch.setattr(scorer, "__call__", call)


def recorded_scores(inside, monkeypatch, **settings):
    """(sigma, batch size) of every call of the reward model in a run, and the run's sigmas."""
    calls = []
    watch_scorer(inside, monkeypatch, lambda candidates, sigma: calls.append((sigma, len(candidates))))
    _, trace = inside.run(**settings)
    return calls, [step.sigma for step in trace.steps] + [trace.steps[-1].sigma_next]


def test_candidates_are_scored_at_sigma_next_and_never_at_the_end(inside, monkeypatch):
    calls, sigmas = recorded_scores(inside, monkeypatch, steps=4, num_branches=3)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert calls == [(sigma, 3) for sigma in sigmas[1:-1]]


def test_the_window_limits_scoring(inside, monkeypatch):
    calls, sigmas = recorded_scores(inside, monkeypatch, steps=8, branch_start=0.25, branch_end=0.5)
    assert [sigma for sigma, _ in calls] == sigmas[3:5]


def test_one_branch_scores_nothing(inside, monkeypatch):
    assert recorded_scores(inside, monkeypatch, num_branches=1)[0] == []


def test_many_candidates_are_scored_in_chunks(inside, monkeypatch):
    calls, _ = recorded_scores(inside, monkeypatch, steps=2, num_branches=40)
    assert sum(size for _, size in calls) >= 40
    assert max(size for _, size in calls) <= 16


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_kept_region_is_bit_for_bit_stock(inside, kind):
    latent = inside.latent(batch=2, seed=3, noise_mask=drawn_half())
    ours = inside.stepwise(latent, num_branches=3, kind=kind)
    stock = inside.ksampler(latent)
    assert torch.equal(ours[..., :4], stock[..., :4])
    torch.testing.assert_close(ours[..., :4], latent["samples"][..., :4], atol=1e-5, rtol=0)
    assert (ours[..., 4:] - stock[..., 4:]).abs().max() > 0.1


def test_candidates_are_scored_with_the_kept_region_in_place(inside, monkeypatch):
    seen = []
    watch_scorer(inside, monkeypatch, lambda candidates, sigma: seen.append(candidates))
    inside.stepwise(inside.latent(seed=3, noise_mask=drawn_half()), num_branches=3)
    for candidates in seen:
        assert torch.equal(candidates[0, ..., :4], candidates[1, ..., :4])
        assert not torch.equal(candidates[0, ..., 4:], candidates[1, ..., 4:])


def test_differential_diffusion_keeps_its_kept_region(inside):
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    model = DifferentialDiffusion.execute(inside.model).result[0]
    mask = torch.linspace(0, 1, 8).expand(1, 1, 8, 8).clone()
    latent = inside.latent(seed=3, noise_mask=mask)
    ours, stock = inside.stepwise(latent, model=model), inside.ksampler(latent, model=model)
    assert torch.equal(ours[..., 0], stock[..., 0])
    assert ours.isfinite().all()


def changes(inside, latent, model=None, seeds=range(6), **settings):
    """Mean change of the soft region (mask 0.5) by seed, of one way to sample."""
    found = []
    for seed in seeds:
        if "sampler_name" in settings:
            out = inside.ksampler(latent, model=model, seed=seed, **settings)
        else:
            out = inside.stepwise(latent, model=model, seed=seed, **settings)
        found.append((out - latent["samples"])[..., 3:6].abs().mean().item())
    return found


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
@pytest.mark.parametrize(("kind", "num_branches"), [("sde", 1), ("sde", 3), ("cps", 3)])
@pytest.mark.parametrize("differential", [False, True])
def test_soft_masks_change_as_much_as_in_stock(inside, noise_level, kind, num_branches, differential):
    """A region of mask 0.5 moves as far as euler and euler_ancestral move it, within their own spread."""
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    mask = torch.tensor([0, 0, 0, 0.5, 0.5, 0.5, 1, 1]).expand(1, 1, 8, 8).clone()
    latent = inside.latent(seed=3, noise_mask=mask)
    model = DifferentialDiffusion.execute(inside.model).result[0] if differential else inside.model
    stock = [
        change
        for name in ("euler", "euler_ancestral")
        for change in changes(inside, latent, model, sampler_name=name)
    ]
    ours = changes(inside, latent, model, noise_level=noise_level, kind=kind, num_branches=num_branches)
    spread = max(stock) - min(stock)
    assert min(stock) - spread / 2 < sum(ours) / len(ours) < max(stock) + spread / 2, (stock, ours)


def test_a_sampler_that_wraps_this_one_may_bring_a_mask(inside):
    """As Detail Daemon does: a plain function with inner_model and sigmas takes the model's place."""
    import comfy.sample
    import comfy.samplers

    def wrapped(sampler):
        def sample(model, x, sigmas, **options):
            def f(x, sigma, **kwargs):
                return model(x, sigma, **kwargs)

            f.inner_model, f.sigmas = model.inner_model, sigmas
            return sampler.sampler_function(f, x, sigmas, **sampler.extra_options, **options)

        return comfy.samplers.KSAMPLER(sample)

    def run(sampler):
        latent = inside.latent(seed=3)["samples"]
        noise = comfy.sample.prepare_noise(latent, 11)
        sigmas = comfy.samplers.calculate_sigmas(inside.model.get_model_object("model_sampling"), "simple", 4)
        prompts = (inside.positive, inside.negative)
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                inside.model, noise, 2.0, wrapped(sampler), sigmas, *prompts, latent, noise_mask=drawn_half()
            )

    node = inside.pack.module("nodes.sampler").StepwiseSampler
    options = {"kind": "sde", "branch_start": 0.0, "branch_end": 1.0, "seed": 11}
    stock = run(comfy.samplers.ksampler("euler"))
    quiet = node.execute(inside.drm, inside.positive, num_branches=1, noise_level=0.0, **options).result[0]
    assert torch.equal(run(quiet), stock)
    branching = node.execute(inside.drm, inside.positive, num_branches=3, noise_level=0.7, **options).result[
        0
    ]
    drawn = run(branching)
    assert torch.equal(drawn[..., :4], stock[..., :4])
    assert (drawn[..., 4:] - stock[..., 4:]).abs().max() > 0.1


@pytest.mark.parametrize("steps", [3, 6, 20])
def test_a_schedule_that_starts_just_below_one_is_no_noisier_than_stock(inside, steps):
    """ddim_uniform's first sigma is 0.999 and below: the SDE's 1 - sigma must not blow the noise up there."""
    latent = inside.latent(batch=8)
    stock = inside.ksampler(latent, scheduler="ddim_uniform", steps=steps)
    for noise_level in (0.7, 1.0):
        ours = inside.stepwise(
            latent, scheduler="ddim_uniform", steps=steps, num_branches=1, noise_level=noise_level
        )
        assert 0.7 < ours.std() / stock.std() < 1.5


def test_a_schedule_that_repeats_its_sigmas(inside, monkeypatch):
    """More steps than the model has sigmas: `simple` gives some twice, and nothing is drawn there."""
    import comfy.samplers

    sampling = inside.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 1500)
    assert (sigmas.diff() == 0).any()
    assert sigmas[0] == sigmas[1] == 1
    model = inside.model.clone()
    model.set_model_sampler_calc_cond_batch_function(lambda arguments: [0.5 * arguments["input"]] * 2)
    out, trace = inside.run(model=model, steps=1500, num_branches=2, branch_end=0.004)
    assert out["samples"].isfinite().all()
    scored = [step.scores is not None for step in trace.steps[:6]]
    assert scored == [bool(sigmas[i + 1] < sigmas[i]) for i in range(6)]


def test_items_follow_their_own_winners(inside):
    samples, trace = inside.run(inside.latent(batch=4), num_branches=4, steps=6)
    winners = [step.winner for step in trace.steps[:-1]]
    assert any(len(set(row)) > 1 for row in winners)
    for step in trace.steps[:-1]:
        assert step.winner == [max(range(4), key=row.__getitem__) for row in step.scores]
    assert samples["samples"].shape == (4, 16, 8, 8)


def test_part_of_a_batch_repeats_the_whole(inside):
    whole, trace = inside.run(inside.latent(batch=3), num_branches=3)
    for item in range(3):
        alone, own = inside.run(inside.latent(batch_index=[item]), num_branches=3)
        torch.testing.assert_close(alone["samples"][0], whole["samples"][item], atol=1e-4, rtol=0)
        assert [step.winner[0] for step in own.steps] == [step.winner[item] for step in trace.steps]


def test_branches_change_the_picture_and_a_seed_repeats_it(inside):
    first = inside.stepwise(num_branches=4)
    assert torch.equal(first, inside.stepwise(num_branches=4))
    assert (first - inside.stepwise(num_branches=4, seed=12)).abs().max() > 0.1
    assert (first - inside.ksampler()).abs().max() > 0.1


def test_more_branches_win_higher_scores(inside):
    def first_best(k):
        return max(inside.run(num_branches=k)[1].steps[0].scores[0])

    assert first_best(2) < first_best(16)


def test_denoise_zero_returns_the_latent_and_an_empty_trace(inside):
    latent = inside.latent(seed=4)
    out, trace = inside.run(latent, denoise=0.0)
    assert torch.equal(out["samples"], latent["samples"])
    assert trace.steps == []


def test_one_step_is_one_euler_step(inside):
    torch.testing.assert_close(inside.stepwise(steps=1), inside.ksampler(steps=1), atol=1e-5, rtol=0)


def test_inputs_are_left_alone(inside):
    latent = inside.latent(batch=2, seed=5, noise_mask=drawn_half())
    before = {key: value.clone() for key, value in latent.items()}
    inside.stepwise(latent)
    assert latent.keys() == before.keys()
    assert all(torch.equal(latent[key], before[key]) for key in before)
    assert inside.model.get_additional_models() == []


@pytest.mark.parametrize("size", [(9, 8), (7, 11)])
def test_odd_sizes_are_padded_as_the_policy_pads_them(inside, size):
    latent = {"samples": torch.zeros(1, 16, *size)}
    assert inside.stepwise(latent).shape == (1, 16, *size)


def test_policy_and_drm_stay_in_memory_together(inside):
    import comfy.model_management as mm

    mm.unload_all_models()
    inside.stepwise()
    loaded = [entry.model.model for entry in mm.current_loaded_models if entry.model is not None]
    assert any(model is inside.model.model for model in loaded)
    assert any(model is inside.drm.model for model in loaded)
