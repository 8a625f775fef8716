"""Checkpoints of a model shared out by FSDP go into a plain one, and back: on two CPU processes over gloo.

Accelerate wraps with FSDP on GPUs only, so torch's own fully_shard stands in for it here.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from tests.tiny import tiny_drm
from tests.training.processes import CONTEXT, TIMEOUT, free_port
from training.engine import checkpoints


def make(share_out: bool) -> tuple:
    drm = tiny_drm(hidden=128, depth=2, num_kept=2).train()
    if share_out:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        for block in drm.backbone.transformer_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(drm, mesh=mesh)
    # a large eps, because Adam turns the rounding of a tiny gradient into whole steps
    optimizer = torch.optim.AdamW(drm.parameters(), lr=1e-2, eps=1e-2)
    return drm, optimizer, checkpoints.Averaged(drm, 0.9)


def step(drm, optimizer, averaged, number: int) -> None:
    rng = torch.Generator().manual_seed(number)
    scores = drm(
        torch.randn(4, 16, 4, 4, generator=rng),
        torch.rand(4, generator=rng),
        torch.randn(4, 6, 256, generator=rng),
        torch.randn(4, 256, generator=rng),
    )
    (scores[:2] - scores[2:]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    averaged.update(number)


def _work(rank: int, world: int, port: int, folder: str, start: str, first: int, last: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    parts = make(share_out=world > 1)
    if start:
        checkpoints.restore(Path(start), *parts)
    for number in range(first, last):
        step(*parts, number)
    gathered = checkpoints.gather(*parts)
    if rank == 0:
        checkpoints.write(Path(folder), last, gathered, {}, keep=3)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def run(world: int, folder: Path, first: int, last: int, start: Path | None = None) -> dict:
    """Steps first to last on so many processes; the tensors of the checkpoint they leave."""
    from safetensors.torch import load_file

    port, folder_text = free_port(), str(folder)
    processes = [
        CONTEXT.Process(target=_work, args=(rank, world, port, folder_text, str(start or ""), first, last))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    assert [process.exitcode for process in processes] == [0] * world
    return load_file(checkpoints.folder_of(folder, last) / "state.safetensors")


def assert_same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    assert {name.split(".")[0] for name in one} == {"model", "ema", "optimizer"}
    for name, value in one.items():
        assert value.shape == two[name].shape, name
        assert torch.allclose(value, two[name], atol=1e-5), name


def test_shared_out_and_plain_runs_leave_the_same_checkpoint_and_take_each_other_s(tmp_path: Path):
    plain = run(1, tmp_path / "plain", 0, 4)
    assert_same(plain, run(2, tmp_path / "shared", 0, 4))
    run(2, tmp_path / "half", 0, 2)
    half = checkpoints.folder_of(tmp_path / "half", 2)
    assert_same(plain, run(1, tmp_path / "then_plain", 2, 4, start=half))
    assert_same(plain, run(2, tmp_path / "then_shared", 2, 4, start=half))


def test_averages_follow_the_weights_and_swapping_twice_is_nothing():
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 4.0)
    averaged = checkpoints.Averaged(layer, 0.5)
    torch.nn.init.constant_(layer.weight, 2.0)
    averaged.update(10_000)
    assert averaged.values[0].item() == 3.0
    averaged.swap()
    assert (layer.weight.item(), averaged.values[0].item()) == (3.0, 2.0)
    averaged.swap()
    assert (layer.weight.item(), averaged.values[0].item()) == (2.0, 3.0)


def test_early_averages_have_a_short_window():
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 0.0)
    averaged = checkpoints.Averaged(layer, 0.999)
    torch.nn.init.constant_(layer.weight, 5.0)
    averaged.update(0)
    assert averaged.values[0].item() == 4.5  # decay min(0.999, 1 / 10)
