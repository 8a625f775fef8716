"""The Triton kernel against its twin in torch: same bits in the integers, 1e-6 in the normals, case by case.

Everywhere through Triton's interpreter, in one process of its own; with a GPU, on it as well.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from drm import branching
from drm.branching import branch_step, candidate_noise, philox4x32
from drm.grpo import GRPOSettings, roll_out
from tests.conftest import ROOT
from tests.drm.branching_cases import ADDRESSES, CASES, COUNTERS, arguments, latents, outcome, words

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# A float16 or bfloat16 of nearly equal float32 numbers may be the neighbour.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("interpreted") / "taken.pt"
    subprocess.run(
        [sys.executable, "-m", "tests.drm.branching_cases", str(path)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
    )
    return torch.load(path)


def check_step(found: dict[str, torch.Tensor], case: dict, interpreted: bool) -> None:
    twin = outcome(branching._twin(*latents(case), **arguments(case)), case)
    close = {"atol": 2e-6, "rtol": 1e-6}
    torch.testing.assert_close(found["state"], twin["state"], **close)
    torch.testing.assert_close(found["std"], twin["std"], **close)
    tolerance = TOLERANCE[case["dtype"]]
    torch.testing.assert_close(found["scored"], twin["scored"], atol=2e-6, rtol=tolerance)
    # The winner's state is the very candidate that was scored.
    rows = range(len(found["state"])) if case["rows"] is None else case["rows"]
    for state, row, winner in zip(found["state"], rows, case["winners"], strict=True):
        if winner in case["branches"]:
            scored = found["scored"][row, case["branches"].index(winner)]
            # Triton's interpreter cuts a bfloat16 off where the GPU and torch round it.
            cut = tolerance if interpreted and case["dtype"] == torch.bfloat16 else 0.0
            torch.testing.assert_close(state.to(case["dtype"]), scored, rtol=cut, atol=0.0)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_equals_twin(interpreted, name):
    check_step(interpreted["steps"][name], CASES[name], interpreted=True)
    assert CASES.keys() == interpreted["steps"].keys()


def check_noise(found: dict[str, torch.Tensor]) -> None:
    """Normals themselves within 1e-6 of the twin's: 16 thousand, as far out as 4."""
    case = CASES["noise alone"]
    noise = candidate_noise(case["shape"][1:], case["seed"], case["step"], case["items"], case["branches"])
    torch.testing.assert_close(found["scored"], noise, atol=1e-6, rtol=1e-6)
    assert noise.abs().max() > 3.5


def test_interpreted_normals(interpreted):
    check_noise(interpreted["steps"]["noise alone"])


@pytest.mark.parametrize("name", ADDRESSES)
def test_interpreted_words_are_equal_bit_for_bit(interpreted, name):
    check_words(interpreted["words"][name], ADDRESSES[name])


def check_words(found: torch.Tensor, address: dict) -> None:
    counter, *constant = (
        torch.arange(COUNTERS),
        *(torch.tensor([address[part]]) for part in ("step", "item", "branch")),
    )
    low, high = address["seed"] & 0xFFFFFFFF, address["seed"] >> 32
    expected = philox4x32(counter, *constant, low, high)
    assert torch.equal(found, torch.stack([word.expand(COUNTERS) for word in expected]))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_twin_on_the_gpu(name):
    kernel, case = branching._kernel(torch.device("cuda")), CASES[name]
    assert kernel is not None
    drawn = kernel.branch_step(*latents(case, "cuda"), **arguments(case, "cuda"))
    check_step(outcome(drawn, case), case, interpreted=False)


@pytest.mark.gpu
@on_gpu
def test_normals_on_the_gpu():
    kernel, case = branching._kernel(torch.device("cuda")), CASES["noise alone"]
    drawn = kernel.branch_step(*latents(case, "cuda"), **arguments(case, "cuda"))
    check_noise(outcome(drawn, case))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", ADDRESSES)
def test_words_are_equal_bit_for_bit_on_the_gpu(name):
    check_words(words(ADDRESSES[name], COUNTERS, "cuda"), ADDRESSES[name])


@pytest.mark.gpu
@on_gpu
def test_the_gpu_draws_with_the_kernel_waits_for_nothing_and_repeats_itself():
    x = torch.randn(3, 16, 64, 64, device="cuda")
    sigmas = torch.linspace(1, 0, 11, device="cuda")
    address = {"seed": 5, "items": [0, 1, 2], "branches": range(4), "sigma_max": sigmas[1]}
    branch_step(x, -x, sigmas[0], sigmas[1], step=0, **address)  # compiles, copies the stream numbers
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = [branch_step(x, -x, sigmas[1], sigmas[2], step=1, **address) for _ in range(2)]
        states = [one.state(torch.zeros(3, dtype=torch.long, device="cuda")) for one in drawn]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert branching._kernel(x.device) is not None
    assert torch.equal(drawn[0].scored, drawn[1].scored)
    assert torch.equal(states[0], drawn[0].scored[:, 0])
    alone = branch_step(x[1:2], -x[1:2], sigmas[1], sigmas[2], step=1, **{**address, "items": [1]})
    assert torch.equal(alone.scored[0], drawn[0].scored[1])


# The kernel's arguments that are no float32 tensor: "*" for pointers, numbers by value.
TYPES = {
    **dict.fromkeys(("level", "kept", "noise_scale"), "fp32"),
    **dict.fromkeys(("count", "seed_low", "seed_high", "step", "elements"), "i32"),
    **dict.fromkeys(("items", "branches", "rows"), "*i64"),
    **dict.fromkeys(("STRIDE", "STRIDE_NEXT", "STRIDE_MAX", "CPS", "EVEN", "COUNTERS"), "constexpr"),
}


def compiled(capability: int, cps: bool, counters: int, types: dict[str, str]):
    """The kernel for an NVIDIA GPU that need not be there, by the compiler that comes with Triton."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from drm.branching_triton import WARPS, _candidates_kernel

    names = _candidates_kernel.arg_names
    signature = {name: (TYPES | types).get(name, "*fp32") for name in names}
    constants = {"STRIDE": 0, "STRIDE_NEXT": 0, "STRIDE_MAX": 0, "CPS": cps}
    constants |= {"EVEN": True, "COUNTERS": counters}
    constants |= {name: None for name, kind in types.items() if kind == "constexpr"}
    aligned = [name for name in names if signature[name].startswith("*") or name == "elements"]
    source = ASTSource(
        fn=_candidates_kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options), counters // (32 * WARPS)


@pytest.mark.parametrize(
    ("capability", "cps", "counters"), [(80, False, 256), (90, False, 512), (90, True, 256)]
)
def test_compiles_without_a_gpu_into_wide_reads_and_writes(capability, cps, counters):
    """x and velocity are read once, 16 bytes a thread, and bfloat16 candidates written 8 bytes a thread."""
    step = {"drawn": "*bf16", "rows": "constexpr"}
    candidates, per_thread = compiled(capability, cps, counters, step)
    state, _ = compiled(capability, cps, counters, {})
    assert candidates.asm["cubin"]
    assert state.asm["cubin"]
    ptx = candidates.asm["ptx"]
    assert ptx.count("ld.global.v4.b32") == 2 * per_thread
    assert ptx.count("st.global.v2.b32") == per_thread
    assert "fma.rn.f32" in ptx
    assert "atom." not in ptx
    assert "local" not in ptx
    assert state.asm["ptx"].count("st.global.v4.b32") == per_thread


@pytest.mark.parametrize("method", ["step-grpo", "grpo"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])])
def test_trainers_draw_on_any_device_and_their_ratio_starts_at_one(method, device):
    gain = torch.full((), 0.3, device=device, requires_grad=True)
    noise = torch.randn(4, 16, 8, 8, device=device)
    figures = roll_out(
        lambda x, sigma: gain * x * sigma,
        lambda candidates, sigma, item: candidates.mean(dim=(1, 2, 3)),
        noise,
        torch.linspace(1, 0, 5, device=device),
        GRPOSettings(method=method, num_branches=4, min_std=0.0, kl_weight=0.0),
        seed=3,
        items=[0, 1, 2, 3],
        backward=lambda loss: loss.backward(),
    )
    assert figures.ratio_error == 0
    assert gain.grad.abs() > 0
