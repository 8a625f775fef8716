"""Training runs as real processes on the CPU: several of them over gloo, or one that is killed.

A fork server that has imported the trainer once makes each process cheap.
"""

import importlib
import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

from training.config import DRMConfig
from training.grpo.step_grpo_config import StepGRPOConfig

Config = DRMConfig | StepGRPOConfig
TRAINERS = {
    DRMConfig: ("training.reward.reward_trainer", "RewardTrainer"),
    StepGRPOConfig: ("training.grpo.step_grpo_trainer", "StepGRPOTrainer"),
}
CONTEXT = multiprocessing.get_context("forkserver")
# What the trainers import late is most of a short run.
LATE = ["peft", "diffusers.models.transformers.transformer_sd3", "torch.utils.tensorboard"]
LATE += ["torch.distributed.checkpoint.state_dict"]
CONTEXT.set_forkserver_preload([*(module for module, _ in TRAINERS.values()), "tests.tiny", *LATE])
TIMEOUT = 240


def _run(config: Config, rank: int, world: int, port: int, errors: str | None, zero: str | None) -> None:
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    if world > 1 or zero is not None:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if zero is not None:
        environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": zero}
        environment |= {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    if zero is not None:
        from accelerate import PartialState

        PartialState(cpu=True)  # accelerate knows DeepSpeed on GPUs only
    sys.stderr = open(errors or os.devnull, "w", buffering=1)  # noqa: SIM115 - open until the process ends
    module, name = TRAINERS[type(config)]
    getattr(importlib.import_module(module), name)(config).run()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(config: Config, world: int = 1, errors: Path | None = None, zero: str | None = None) -> list:
    """Processes that train `config` together; zero: DeepSpeed's stage."""
    port = free_port()
    processes = [
        CONTEXT.Process(target=_run, args=(config, rank, world, port, str(errors) if errors else None, zero))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def train(config: Config, world: int = 1, zero: str | None = None) -> None:
    """Train to the end; every process must end well."""
    processes = start(config, world, zero=zero)
    for process in processes:
        process.join(TIMEOUT)
    assert [process.exitcode for process in processes] == [0] * world


def train_and_kill(config: Config, lines: int, delay: float) -> None:
    """Kill -9 the run `delay` seconds after its log has so many lines (0: after its folder is there)."""
    (process,) = start(config)
    log, deadline = Path(config.train.out) / "log.jsonl", time.monotonic() + TIMEOUT
    while len(log_lines(log)) < lines and process.is_alive():
        assert time.monotonic() < deadline, "the run wrote no log"
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()


def log_lines(path: Path) -> list[dict]:
    """Whole lines of a run's log."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            found.append(json.loads(line))
    return found


def numbers(path: Path) -> list[dict]:
    """The log without what the clock says."""
    clock = {"samples_per_second", "waiting", "seconds"}
    return [{key: value for key, value in row.items() if key not in clock} for row in log_lines(path)]


def _command(module: str, arguments: list[str], errors: str, file_limit: int | None) -> None:
    import resource

    import torch

    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    if file_limit:  # as a full disk does, writing past it fails
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.stderr = open(errors, "w", buffering=1)  # noqa: SIM115 - open until the process ends
    importlib.import_module(module).main(arguments)


def begin(
    arguments: list[str], errors: Path, file_limit: int | None = None, module: str = "training.train_drm"
) -> multiprocessing.Process:
    """`python -m module` with these arguments, running; errors: the file of what it prints."""
    process = CONTEXT.Process(target=_command, args=(module, arguments, str(errors), file_limit))
    process.start()
    return process


def command(
    arguments: list[str], folder: Path, file_limit: int | None = None, module: str = "training.train_drm"
) -> tuple[int, list[str]]:
    """`python -m module` with these arguments: its exit status and the error lines it printed."""
    errors = folder / "stderr.txt"
    process = begin(arguments, errors, file_limit, module)
    process.join(TIMEOUT)
    lines = errors.read_text().replace("\r", "\n").splitlines()
    assert not any("Traceback" in line for line in lines), lines
    return process.exitcode, [line for line in lines if line.startswith("error: ")]
