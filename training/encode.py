"""Pictures and prompts of preference sets to latents and embeddings, once; training needs no encoder then.

    python -m training.encode --config training/configs/drm_sd35_medium.yaml
    accelerate launch --config_file training/configs/accelerate_8gpu.yaml -m training.encode --config FILE

Every picture and prompt is encoded once however many pairs name it (encode_plan.py lists them). Shard s is
made by process s mod N; it is there whole or not at all, so a run that was stopped, by kill -9 or a full
disk, goes on where it was and ends in the same files. Decoding runs in worker processes ahead of the VAE.
What cannot be decoded or is not finite is listed in report.json, and its pairs are left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from training.config import ConfigError, DRMConfig, EncodeConfig, read_config
from training.data import shards
from training.data.batches import generator
from training.data.decode_ahead import WorkerDied, decode_ahead
from training.data.encode_cost import Cost, rate_of, row_bytes, summary
from training.data.encode_plan import (
    Plan,
    PlanError,
    Shards,
    check,
    identity,
    is_held_out,
    make_plan,
    prompt_shard_size,
    source_names,
)
from training.data.encoders import EncoderError, SD3Encoders
from training.data.readers import ReaderError
from training.engine.checkpoints import why_not_written
from training.engine.launch import TrainingError, only_run_in

POSTERIOR = 21  # a stream of generator()
PATIENCE = datetime.timedelta(hours=12)  # how long processes wait for the one that reads the sources


class EncodeError(RuntimeError):
    """The pass stopped; the message says why and what to do. Finished shards are kept."""


ERRORS = (ConfigError, ReaderError, PlanError, EncoderError, EncodeError, WorkerDied, TrainingError)


class Encoding:
    """One process's part of the pass."""

    def __init__(self, config: EncodeConfig, state: PartialState) -> None:
        self.config, self.state = config, state
        self.folder, self.dtype = Path(config.out), getattr(torch, config.dtype)
        text_dtype = torch.bfloat16 if state.device.type == "cuda" else torch.float32
        self.encoders = SD3Encoders.from_folder(config.encoders, state.device, text_dtype)
        self.latent_shapes = {"latents": self.encoders.latent_shape(config.resolution)}
        self.prompt_shapes = self.encoders.prompt_shapes(config.t5_lengths)
        self.seconds = {"pictures": 0.0, "prompts": 0.0, "waiting": 0.0}
        self.encoded = {"pictures": 0, "prompts": 0}

    def run(self) -> Cost | None:
        """Encodes what is missing; on the main process writes the pair table and says what it cost."""
        if self.state.is_main_process:
            for left_over in self.folder.rglob("*.tmp"):  # of a run killed while it wrote
                left_over.unlink()
            make_plan(self.config, identity(self.config, self.encoders.describe()))
        self.state.wait_for_everyone()
        self.plan = Plan(self.folder / "plan")
        size = self.config.shard_size
        self.pictures = Shards("images", self.plan.num_pictures, size, shards.image_shard)
        self.prompts = Shards("prompts", self.plan.num_prompts, prompt_shard_size(size), shards.prompt_shard)
        self.check_space()
        self.state.wait_for_everyone()  # no shard is written while another process counts what is missing
        self.encode_pictures()
        self.encode_prompts()
        self.state.wait_for_everyone()
        figures = gather_object([(self.encoded, self.seconds)])
        return self.finish(figures) if self.state.is_main_process else None

    # what is there and what is missing

    def bad_file(self, part: Shards, shard: int) -> Path:
        return self.folder / "plan" / f"{part.kind}-{shard:05d}.bad.json"

    def bad(self, part: Shards, shard: int) -> dict[int, str]:
        """{number: reason} of the rows a finished shard lacks."""
        path = self.bad_file(part, shard)
        return {int(k): v for k, v in json.loads(path.read_text()).items()} if path.is_file() else {}

    def is_whole(self, part: Shards, shard: int) -> bool:
        """Whether the shard's file is there with all its rows; a damaged one is made again."""
        try:
            with safe_open(part.path(self.folder, shard), "pt") as file:
                rows = file.get_slice(next(iter(file.keys()))).get_shape()[0]
        except (OSError, SafetensorError, StopIteration):
            return False
        return rows == len(part.rows(shard)) - len(self.bad(part, shard))

    def missing(self, part: Shards) -> list[int]:
        return [shard for shard in range(len(part)) if not self.is_whole(part, shard)]

    def mine(self, part: Shards) -> list[int]:
        """The missing shards that are this process's."""
        n, i = self.state.num_processes, self.state.process_index
        return [shard for shard in self.missing(part) if shard % n == i]

    def check_space(self) -> None:
        """EncodeError before hours are spent when the disk cannot hold what is missing."""
        parts = ((self.pictures, self.latent_shapes), (self.prompts, self.prompt_shapes))
        needed = sum(
            len(part.rows(shard)) * row_bytes(shapes, self.dtype)
            for part, shapes in parts
            for shard in self.missing(part)
        )
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise EncodeError(
                f"{needed / 1e9:.1f} GB are still to be written and {free / 1e9:.1f} GB are free for"
                f" {self.folder}: give another `out`, fewer t5_lengths or a lower resolution"
            )

    # encoding

    def encode_pictures(self) -> None:
        """This process's missing image shards; the plan fixes the batches, so a shard is always the same."""
        mine, size = self.mine(self.pictures), self.config.batch_images
        batches = [batch for shard in mine for batch in self.pictures.batches(shard, size)]
        if mine:
            self.encoders.load_vae()  # before the clock runs
        pin = self.state.device.type == "cuda"
        decoded = decode_ahead(
            self.folder / "plan",
            self.config.resolution,
            self.config.fit,
            batches,
            workers=self.config.workers,
            pin_memory=pin,
        )
        with self.progress("pictures", sum(map(len, batches))) as bar:
            for shard in mine:
                parts, bad = [], {}
                for batch in self.pictures.batches(shard, size):
                    asked = time.monotonic()
                    numbers, pixels, reasons = next(decoded)
                    self.seconds["waiting"] += time.monotonic() - asked
                    bad |= reasons
                    if numbers:
                        latents = self.encoders.encode_pixels(pixels, self.draws(numbers))
                        parts.append(self.keep_finite({"latents": latents}, numbers, bad))
                    bar.update(len(batch))
                self.write(self.pictures, shard, parts, self.latent_shapes, bad)
        self.count("pictures", bar)

    def draws(self, numbers: list[int]) -> list[torch.Generator] | None:
        """What samples the posterior of each picture; None for its mean."""
        if self.config.posterior == "mean":
            return None
        return [generator(self.config.seed, POSTERIOR, number) for number in numbers]

    def encode_prompts(self) -> None:
        """This process's missing prompt shards."""
        mine, size = self.mine(self.prompts), self.config.batch_prompts
        if mine:
            self.encoders.load_text(t5=bool(self.config.t5_lengths))
        with self.progress("prompts", sum(len(self.prompts.rows(shard)) for shard in mine)) as bar:
            for shard in mine:
                parts, bad = [], {}
                for batch in self.prompts.batches(shard, size):
                    embeds = self.embed([self.plan.prompt(number) for number in batch])
                    parts.append(self.keep_finite(embeds, batch, bad))
                    bar.update(len(batch))
                self.write(self.prompts, shard, parts, self.prompt_shapes, bad)
        self.count("prompts", bar)

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        clip, pooled = self.encoders.clip_embeds(prompts)
        lengths = self.config.t5_lengths
        t5 = {f"t5_{length}": self.encoders.t5_embeds(prompts, length) for length in lengths}
        return {"clip": clip, "pooled": pooled, **t5}

    def keep_finite(
        self, tensors: dict[str, Tensor], numbers: list[int], bad: dict[int, str]
    ) -> dict[str, Tensor]:
        """The rows finite in the dtype they are stored in, on the CPU; the others go to `bad`."""
        stored = {name: tensor.to(self.dtype) for name, tensor in tensors.items()}
        finite = torch.stack([tensor.flatten(1).isfinite().all(1) for tensor in stored.values()]).all(0).cpu()
        for place in torch.argwhere(~finite).flatten().tolist():
            number = numbers[place]
            if "latents" in tensors:
                bad[number] = f"latents are not finite: {self.plan.picture(number).name}"
            else:
                bad[number] = f"embedding is not finite: {self.plan.prompt(number)[:200]!r}"
        return {name: tensor.cpu()[finite] for name, tensor in stored.items()}

    def write(self, part: Shards, shard: int, parts: list[dict], shapes: dict, bad: dict[int, str]) -> None:
        """The shard's bad rows, then the shard; stops the pass when too many are bad."""
        none = {name: torch.zeros(0, *shape, dtype=self.dtype) for name, shape in shapes.items()}
        tensors = {name: torch.cat([one[name] for one in [none, *parts]]) for name in shapes}
        listing = self.bad_file(part, shard)
        try:
            if bad:
                text = json.dumps(dict(sorted(bad.items())), indent=1)
                shards.replace_atomically(listing, lambda path: path.write_text(text))
            else:
                listing.unlink(missing_ok=True)
            if part is self.pictures:
                shards.write_image_shard(self.folder, shard, tensors["latents"])
            else:
                shards.write_prompt_shard(self.folder, shard, tensors)
        except (OSError, SafetensorError) as error:
            raise EncodeError(
                f"cannot write {part.path(self.folder, shard)} ({why_not_written(error)}): start again, the"
                " finished shards are kept"
            ) from error
        if bad:
            _, report = self.plan.usable(*((bad, {}) if part is self.pictures else ({}, bad)))
            report.write(self.folder / "report.json")
            report.check(self.config.bad_rows, self.folder / "report.json")

    def progress(self, what: str, total: int) -> tqdm:
        """A bar with rate and time left, on the main process only."""
        n = self.state.num_processes
        self.begun = time.monotonic()
        return tqdm(
            desc=what if n == 1 else f"{what} (process 1 of {n})",
            total=total,
            unit="",
            mininterval=1,
            dynamic_ncols=True,
            disable=not self.state.is_main_process,
        )

    def count(self, what: str, bar: tqdm) -> None:
        self.encoded[what], self.seconds[what] = bar.total, time.monotonic() - self.begun

    # the end

    def places(self, part: Shards) -> tuple[np.ndarray, dict[int, str]]:
        """(total,) where each planned row lies in the shards, -1 for the bad ones; and why they are bad."""
        bad: dict[int, str] = {}
        for shard in range(len(part)):
            bad |= self.bad(part, shard)
        good = np.ones(part.total, bool)
        good[list(bad)] = False
        return np.where(good, np.cumsum(good) - 1, -1), bad

    def finish(self, figures: list[tuple[dict, dict]]) -> Cost:
        """report.json, pairs.parquet and, last, meta.json."""
        missing = [
            str(part.path(self.folder, shard))
            for part in (self.pictures, self.prompts)
            for shard in self.missing(part)
        ]
        if missing:
            raise EncodeError(f"{missing[0]} is missing after the pass: start again")
        pictures, bad_pictures = self.places(self.pictures)
        prompts, bad_prompts = self.places(self.prompts)
        keep, report = self.plan.usable(bad_pictures, bad_prompts)
        report.write(self.folder / "report.json")
        report.check(self.config.bad_rows, self.folder / "report.json")
        if not keep.any():
            raise EncodeError(f"no pair is left: see {self.folder}/report.json")
        self.write_pairs(keep, pictures, prompts)
        shards.write_meta(self.folder, self.meta(int(keep.sum())))
        return Cost(
            pairs=int(keep.sum()),
            pictures=int((pictures >= 0).sum()),
            prompts=int((prompts >= 0).sum()),
            picture_bytes=row_bytes(self.latent_shapes, self.dtype),
            prompt_bytes=row_bytes(self.prompt_shapes, self.dtype),
            pictures_per_second=rate_of("pictures", figures),
            prompts_per_second=rate_of("prompts", figures),
            waiting=sum(s["waiting"] for _, s in figures) / (sum(s["pictures"] for _, s in figures) or 1),
        )

    def write_pairs(self, keep: np.ndarray, pictures: np.ndarray, prompts: np.ndarray) -> None:
        pairs, config = self.plan.pairs, self.config
        held_out = np.array(
            [
                is_held_out(self.plan.prompt(number), config.held_out, config.seed)
                for number in range(self.plan.num_prompts)
            ]
        )
        shards.write_pairs(
            self.folder,
            {
                "prompt": prompts[pairs["prompt"][keep]],
                "chosen": pictures[pairs["chosen"][keep]],
                "rejected": pictures[pairs["rejected"][keep]],
                "weight": pairs["weight"][keep],
                "label": pairs["label"][keep],
                "source": self.plan.sources.filter(keep).to_pylist(),
                "held_out": held_out[pairs["prompt"][keep]],
                "row": self.plan.rows.filter(keep).to_pylist(),
            },
        )

    def meta(self, pairs: int) -> dict:
        config = self.config
        names = source_names(config.sources)
        return {
            "latent": list(self.latent_shapes["latents"]),
            "t5_lengths": list(config.t5_lengths),
            "dtype": config.dtype,
            "resolution": config.resolution,
            "fit": config.fit,
            "posterior": config.posterior,
            "encoders": self.encoders.describe(),
            "weights": {name: source.weight for name, source in zip(names, config.sources, strict=True)},
            "held_out": config.held_out,
            "seed": config.seed,
            "pairs": pairs,
        }


def _state() -> PartialState:
    """This process among the others; on CPUs accelerate asks to be told so."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=PATIENCE)


def encode(config: EncodeConfig) -> Cost | None:
    """Writes the encoded folder `config.out`; what it cost, on the main process."""
    from transformers.utils import logging

    check(config)
    logging.disable_progress_bar()
    try:
        encoding = Encoding(config, _state())
        with only_run_in(Path(config.out), "encode.out"):
            return encoding.run()
    except torch.OutOfMemoryError as error:
        raise EncodeError(
            "the GPU's memory is full: lower batch_images or batch_prompts and start again"
        ) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # its signal may arrive anywhere
            raise
        raise WorkerDied.saying(error) from error


def main(arguments: list[str] | None = None) -> None:
    """The command line; ends with status 1 and one line on stderr when the pass cannot go on."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see training/configs")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="go over the file")
    args = parser.parse_args(arguments)
    try:
        config = read_config(args.config, DRMConfig, args.settings).encode
        if config is None:
            raise ConfigError(f"{args.config} has no section `encode`: see training/configs for one")
        cost = encode(config)
        if cost is not None:
            print("\n".join(summary(cost, Path(config.out))))
    except KeyboardInterrupt:
        print("stopped: the same command goes on from the finished shards", file=sys.stderr, flush=True)
        os._exit(130)
    except (
        ConfigError,
        ReaderError,
        PlanError,
        EncoderError,
        EncodeError,
        WorkerDied,
        TrainingError,
        OSError,
    ) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # The other processes may wait for this one: leave at once, the launcher ends them.
        os._exit(1)


if __name__ == "__main__":
    main()
