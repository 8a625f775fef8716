"""LoRA pairs on a network with SD3's layer names: what they add, what is left behind, what the file holds."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from drm.lora import Adapters, LoRAFileError, comfy_targets, load_lora, save_lora

WIDTH = 8


class Attention(nn.Module):
    def __init__(self, out: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        if out:
            self.proj = nn.Linear(WIDTH, WIDTH)


class Half(nn.Module):
    def __init__(self, out: bool, second: bool) -> None:
        super().__init__()
        self.attn = Attention(out)
        if second:
            self.attn2 = Attention(True)
        self.mlp = nn.Linear(WIDTH, WIDTH)


class Network(nn.Module):
    """Two blocks: dual attention in the first, no text output in the last, as in SD3.5."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.joint_blocks = nn.ModuleList(
            nn.ModuleDict({"x_block": Half(True, i == 0), "context_block": Half(i == 0, False)})
            for i in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.joint_blocks:
            for half in (block["x_block"], block["context_block"]):
                q, k, v = half.attn.qkv(x).chunk(3, dim=-1)
                x = torch.tanh(q + 2 * k) * v + x
                x = half.attn.proj(x) if hasattr(half.attn, "proj") else x
                if hasattr(half, "attn2"):
                    x = half.attn2.proj(half.attn2.qkv(x)[..., :WIDTH]) + x
        return x


def learned(network: nn.Module, rank: int = 2, alpha: float = 6.0) -> Adapters:
    adapters = Adapters(comfy_targets(network), rank, alpha, seed=1)
    with torch.no_grad():
        for index, up in enumerate(adapters.up):
            up.copy_(torch.randn(up.shape, generator=torch.Generator().manual_seed(index)))
    return adapters


def test_targets_are_named_as_diffusers_names_them():
    names = [target.name.removeprefix("transformer.") for target in comfy_targets(Network())]
    assert names == [
        *(f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"transformer_blocks.0.attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"),
        "transformer_blocks.0.attn.to_add_out",
        *(f"transformer_blocks.1.attn.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"transformer_blocks.1.attn.add_{part}_proj" for part in "qkv"),
    ]


def test_a_network_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="Linear has no attention of SD3's kind"):
        comfy_targets(nn.Linear(2, 2))


def test_at_the_start_and_switched_off_the_network_is_as_it_was():
    network, x = Network(), torch.randn(3, WIDTH)
    before = network(x)
    fresh, trained = Adapters(comfy_targets(network), 2, 4.0, seed=0), learned(network)
    with fresh.attached(network):
        assert torch.equal(network(x), before)
    with trained.attached(network):
        assert not torch.allclose(network(x), before, atol=1e-2)
        trained.enabled = False
        assert torch.equal(network(x), before)
    trained.enabled = True
    assert torch.equal(network(x), before)


def test_nothing_is_left_after_an_error():
    network, x = Network(), torch.randn(3, WIDTH)
    before, adapters = network(x), learned(network)
    with pytest.raises(RuntimeError, match="stop"), adapters.attached(network):
        raise RuntimeError("stop")
    assert torch.equal(network(x), before)
    assert not any(module._forward_hooks for module in network.modules())


def test_the_file_s_matrices_merged_by_hand_give_the_same_output():
    network, x = Network(), torch.randn(3, WIDTH)
    adapters = learned(network)
    with adapters.attached(network):
        expected = network(x)
    tensors = adapters.tensors()
    with torch.no_grad():
        for target in adapters.targets:
            change = tensors[f"{target.name}.lora_B.weight"] @ tensors[f"{target.name}.lora_A.weight"]
            network.get_submodule(target.layer).weight[target.rows[0] : target.rows[1]] += change
    assert torch.allclose(network(x), expected, atol=1e-5)


def test_gradients_reach_every_pair_and_no_base_weight():
    network = Network().requires_grad_(False)
    adapters = learned(network)
    with adapters.attached(network):
        network(torch.randn(3, WIDTH)).square().sum().backward()
    used = [t.name for t, up in zip(adapters.targets, adapters.up, strict=True) if up.grad is not None]
    assert used == [target.name for target in adapters.targets]
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_file_goes_on_where_it_stopped(tmp_path):
    network = Network()
    adapters = learned(network)
    save_lora(adapters.tensors(), tmp_path / "a.safetensors", {"steps": 3, "seed": 1})
    tensors, facts = load_lora(tmp_path / "a.safetensors")
    assert facts == {"steps": 3, "seed": 1}
    again = Adapters(comfy_targets(network), 2, 6.0, seed=9)
    again.load(tensors)
    for name, tensor in again.tensors().items():
        assert torch.allclose(tensor, tensors[name], atol=1e-6), name


def test_the_header_is_readable_by_others(tmp_path):
    save_lora(learned(Network()).tensors(), tmp_path / "a.safetensors", {"method": "step-grpo"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
    assert json.loads(metadata["drm"]) == {"method": "step-grpo"}
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


def test_loras_that_do_not_fit_are_named():
    network = Network()
    tensors = learned(network).tensors()
    with pytest.raises(LoRAFileError, match=r"add_k_proj.lora_A.weight is \(2, 8\), wanted \(4, 8\)"):
        Adapters(comfy_targets(network), 4, 4.0, seed=0).load(tensors)
    del tensors["transformer.transformer_blocks.1.attn.to_q.lora_A.weight"]
    with pytest.raises(LoRAFileError, match=r"to_q.lora_A.weight is not in the LoRA"):
        learned(network).load(tensors)


def test_a_file_without_what_was_written_about_it_is_refused(tmp_path):
    path = tmp_path / "bare.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"format": "pt", "kind": "drm-lora"})
    with pytest.raises(LoRAFileError, match="has lost what Step-GRPO wrote about it"):
        load_lora(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(LoRAFileError, match=r"is no .safetensors file"):
        load_lora(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(LoRAFileError, match="damaged or cut short"):
        load_lora(tmp_path / "cut.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(LoRAFileError, match="was not made by Step-GRPO"):
        load_lora(tmp_path / "other.safetensors")
    with pytest.raises(LoRAFileError, match=r"saved as .safetensors"):
        save_lora({}, tmp_path / "a.pt", {})
