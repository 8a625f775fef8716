"""The policy: guidance, whose gradients flow where, the frozen reference, and its names."""

from pathlib import Path

import pytest
import torch

from drm.lora import LoRAFileError
from drm.sd3.base_model import load_transformer
from tests.tiny import build_demo_family
from training.grpo.diffusers_policy import DiffusersPolicy, build_policy
from training.grpo.step_grpo_config import PolicyConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo_family(tmp_path_factory.mktemp("policy"), hidden=128, depth=2, text=128).checkpoint


@pytest.fixture
def policy(base: Path) -> DiffusersPolicy:
    config = PolicyConfig(base=str(base), drm="none", lora_rank=4, lora_alpha=8.0, precision="no")
    return build_policy(config, seed=3, device=torch.device("cpu"))


def inputs(seed: int = 0) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], tuple]:
    rng = torch.Generator().manual_seed(seed)
    x, embeds, pooled = (torch.randn(s, generator=rng) for s in ((3, 16, 4, 6), (4, 5, 128), (4, 128)))
    return x, (embeds[:3], pooled[:3]), (embeds[3:], pooled[3:])


def teach(policy: DiffusersPolicy) -> None:
    rng = torch.Generator().manual_seed(1)
    for parameter in policy.learned.values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=rng)


def base_velocity(base: Path, x: torch.Tensor, prompt: tuple) -> torch.Tensor:
    with torch.no_grad():
        arguments = x, prompt[0], prompt[1], torch.full((len(x),), 600.0)
        return load_transformer(base)(*arguments, return_dict=False)[0]


def test_fresh_adapters_change_nothing_and_the_seed_decides_them(base: Path, policy: DiffusersPolicy):
    x, prompt, _ = inputs()
    assert torch.equal(policy.velocity(x, 0.6, *prompt), base_velocity(base, x, prompt))
    config = PolicyConfig(base=str(base), drm="none", lora_rank=4, lora_alpha=8.0, precision="no")
    same, other = (build_policy(config, seed=seed, device=torch.device("cpu")).tensors() for seed in (3, 4))
    mine = policy.tensors()
    assert all(torch.equal(mine[name], same[name]) for name in mine)
    assert any(not torch.equal(mine[name], other[name]) for name in mine)


def test_guidance_by_hand(policy: DiffusersPolicy):
    teach(policy)
    x, prompt, empty = inputs()
    with torch.no_grad():
        with_, without = (
            policy.velocity(x, 0.6, *(part.expand(3, *part.shape[1:]) for part in pair))
            for pair in (prompt, empty)
        )
        found = policy.guided(x, 0.6, prompt, empty, 3.0)
        assert torch.allclose(found, 3 * with_ - 2 * without, atol=1e-5)
        assert torch.equal(policy.guided(x, 0.6, prompt, empty, 1.0), with_)


def test_gradients_flow_through_the_prompt_s_branch_alone(policy: DiffusersPolicy):
    teach(policy)
    x, prompt, empty = inputs()
    (2.5 * policy.velocity(x, 0.6, *prompt)).square().mean().backward()  # any scalar will do
    policy.zero_grad()
    policy.guided(x, 0.6, prompt, empty, 2.5).sum().backward()
    guided = {name: p.grad.clone() for name, p in policy.learned.items() if p.grad is not None}
    policy.zero_grad()
    (2.5 * policy.velocity(x, 0.6, *prompt)).sum().backward()
    for name, p in policy.learned.items():
        if p.grad is not None:
            assert torch.allclose(guided[name], p.grad, atol=1e-4)
    frozen = [p for name, p in policy.named_parameters() if ".lora_" not in name]
    assert frozen
    assert all(p.grad is None for p in frozen)


def test_the_reference_is_the_base_and_learning_goes_on_after_it(base: Path, policy: DiffusersPolicy):
    teach(policy)
    x, prompt, _ = inputs()
    before = policy.velocity(x, 0.6, *prompt)
    with policy.reference(), torch.no_grad():
        assert torch.equal(policy.velocity(x, 0.6, *prompt), base_velocity(base, x, prompt))
    after = policy.velocity(x, 0.6, *prompt)
    assert torch.equal(before, after)
    before.sum().backward()  # its graph was made before the adapters were switched off and on
    assert all(p.requires_grad for p in policy.learned.values())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.learned.values())


def test_every_attention_layer_of_both_streams_learns(policy: DiffusersPolicy):
    names = {name.removeprefix("transformer.transformer_blocks.0.") for name in policy.tensors()}
    layers = {name.rsplit(".lora_", 1)[0] for name in names if not name.startswith("transformer.")}
    both = {"to_q", "to_k", "to_v", "to_out.0"}
    added = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    assert layers == {f"attn.{name}" for name in both | added} | {f"attn2.{name}" for name in both}


def test_tensors_go_out_and_come_back(base: Path, policy: DiffusersPolicy):
    teach(policy)
    tensors = policy.tensors()
    name = "transformer.transformer_blocks.1.attn.to_q.lora_B.weight"
    own = policy.learned["transformer_blocks.1.attn.to_q.lora_B.default.weight"]
    assert torch.equal(tensors[name], 2 * own)  # alpha / rank
    fresh = build_policy(
        PolicyConfig(base=str(base), drm="none", lora_rank=4, lora_alpha=2.0, precision="no"),
        seed=0,
        device=torch.device("cpu"),
    )
    fresh.load(tensors)
    x, prompt, _ = inputs()
    assert torch.allclose(fresh.velocity(x, 0.6, *prompt), policy.velocity(x, 0.6, *prompt), atol=1e-5)
    tensors[name] = tensors[name][:, :2]
    with pytest.raises(LoRAFileError, match=r"is \(128, 2\), wanted \(128, 4\)"):
        fresh.load(tensors)
