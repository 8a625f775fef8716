"""Steps that the Triton kernel and its twin both take; as a program, it takes them in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.drm.branching_cases OUT.pt

A process of its own, because Triton reads TRITON_INTERPRET as it is imported.
"""

import sys

import torch

from drm.branching import Candidates

DEFAULTS = {
    "shape": (2, 16, 8, 6),
    "sigma": 0.8,
    "sigma_next": 0.6,
    "sigma_max": 0.9,
    "seed": 2024,
    "step": 5,
    "items": [0, 1],
    "branches": [0, 1, 2],
    "noise_level": 0.7,
    "kind": "sde",
    "noise_scale": 1.0,
    "dtype": torch.float32,
    "winners": [1, 2],
    "rows": None,
}
CHANGES = {
    "sde": {},
    "cps": {"kind": "cps"},
    "cps of full noise": {"kind": "cps", "noise_level": 1.0},
    "no noise": {"noise_level": 0.0},
    "first step": {"sigma": 1.0, "sigma_next": 0.9},
    "first step just below 1": {"sigma": 0.9998, "sigma_next": 0.9},
    "bounded first step": {"sigma": 0.97, "sigma_next": 0.3, "sigma_max": 0.3, "noise_level": 2.0},
    "long step close to 1": {"sigma": 0.9997, "sigma_next": 0.8, "sigma_max": 0.9997},
    "step of no length": {"sigma": 1.0, "sigma_next": 1.0},
    "sigmas on the device": {"sigma": torch.tensor(0.8), "sigma_next": torch.tensor(0.6)},
    "a sigma per item": {"sigma": torch.tensor([1.0, 0.5]), "sigma_next": torch.tensor([0.9, 0.0])},
    "cps, a sigma per item": {
        "kind": "cps",
        "sigma": torch.tensor([1.0, 0.5]),
        "sigma_next": torch.tensor([0.9, 0.1]),
    },
    "one sigma per item": {"sigma": torch.tensor([0.7, 0.5]), "sigma_next": 0.2},
    "several blocks and a tail": {"shape": (2, 3, 21, 23)},
    "five elements": {"shape": (2, 1, 1, 5)},
    "one element": {"shape": (1, 1, 1, 1), "items": [3], "winners": [0]},
    "one branch": {"branches": [0], "winners": [0, 0]},
    "64-bit seed": {"seed": 2**64 - 3},
    "large stream numbers": {"items": [2**32 - 1, 2**31], "step": 2**32 - 2, "branches": [7, 2**32 - 1]},
    "items in a tensor": {"items": torch.tensor([9, 4])},
    "noise scale": {"noise_scale": 1.3},
    "bfloat16 candidates": {"dtype": torch.bfloat16},
    "float16 candidates": {"dtype": torch.float16},
    "any row's winner": {"winners": [2, 0, 1], "rows": [1, 1, 0]},
    "a winner drawn by nobody": {"winners": [6, 1]},
    "bfloat16 latents": {"latents": torch.bfloat16},
    "strided latents": {"strided": True},
}
# From sigma 1 to 1 with nothing kept, so that from x = velocity = 0 a candidate is its noise.
PURE = {"kind": "cps", "noise_level": 1.0, "sigma": 1.0, "sigma_next": 1.0, "latents": "zero"}
CHANGES["noise alone"] = {**PURE, "shape": (2, 16, 16, 16), "branches": [0, 1], "winners": [0, 1]}
CASES = {name: {**DEFAULTS, **change} for name, change in CHANGES.items()}

# Where the random words themselves are compared, bit for bit.
COUNTERS = 512
ADDRESSES = {
    "zero": {"seed": 0, "step": 0, "item": 0, "branch": 0},
    "small": {"seed": 7, "step": 3, "item": 4, "branch": 2},
    "64-bit seed": {"seed": 2**64 - 2, "step": 1, "item": 0, "branch": 1},
    "largest": {"seed": 2**63 + 1, "step": 2**32 - 1, "item": 2**32 - 1, "branch": 2**32 - 1},
}


def latents(case: dict, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """x and velocity: random or zero, of the case's dtype and layout."""
    generator = torch.Generator().manual_seed(1)
    wanted = case.get("latents", torch.float32)
    both = torch.randn(2, *case["shape"], generator=generator, dtype=torch.float32)
    both = (both * 0 if wanted == "zero" else both.to(wanted)).to(device)
    return tuple(both.mT.contiguous().mT) if "strided" in case else tuple(both)


def arguments(case: dict, device: torch.device | str = "cpu") -> dict:
    """The keywords that the twin and the kernel both take."""
    names = ("seed", "step", "items", "branches", "noise_level", "kind", "noise_scale", "dtype")
    settings = {name: case[name] for name in names}
    sigmas = tuple(case[name] for name in ("sigma", "sigma_next", "sigma_max"))
    move = [value.to(device) if isinstance(value, torch.Tensor) else value for value in sigmas]
    return {"sigmas": tuple(move), **settings}


def outcome(drawn: Candidates, case: dict) -> dict[str, torch.Tensor]:
    """Everything a step gives, on the CPU."""
    device = drawn.scored.device
    rows = None if case["rows"] is None else torch.tensor(case["rows"], device=device)
    state = drawn.state(torch.tensor(case["winners"], device=device), rows)
    std = drawn.std.reshape(-1).expand(len(drawn.scored))
    found = {"scored": drawn.scored, "std": std, "state": state}
    return {name: value.cpu() for name, value in found.items()}


def words(address: dict, counters: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The kernel's random words (4, counters) as int64."""
    from drm.branching_triton import signed

    from .philox_kernel import words_kernel

    found = torch.empty(4, counters, dtype=torch.int64, device=device)
    seed, stream = address["seed"], (address["item"], address["branch"])
    streams = torch.tensor(stream, dtype=torch.int64, device=device)
    halves = (signed(seed & 0xFFFFFFFF), signed(seed >> 32), signed(address["step"]))
    words_kernel[(1,)](found, streams, *halves, COUNTERS=counters)
    return found.cpu()


def main(path: str) -> None:
    from drm import branching_triton

    taken = {
        name: outcome(branching_triton.branch_step(*latents(case), **arguments(case)), case)
        for name, case in CASES.items()
    }
    drawn = {name: words(address, COUNTERS) for name, address in ADDRESSES.items()}
    torch.save({"steps": taken, "words": drawn}, path)


if __name__ == "__main__":
    main(sys.argv[1])
