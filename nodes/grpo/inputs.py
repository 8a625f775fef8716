"""What Step-GRPO LoRA Trainer is given, checked before anything is loaded."""

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import folder_paths

from ...drm.text_files import EncodingError, read_text
from ..adapters import check_choice

if TYPE_CHECKING:
    from ...drm.forward_rl import ForwardSettings
    from ...drm.grpo import GRPOSettings
    from ...drm.model import DRM
    from ...drm.shared import SharedDRM

METHODS = ["step-grpo", "grpo", "nft", "awm", "step-nft", "step-awm"]
LARGEST_FILE = 4 << 20
# Of a picture in nft and awm, as AWM's authors have it; never more than there are sigmas to learn at.
NOISE_LEVELS = 6
# Every 4th prompt is kept aside, where there are enough of them.
KEPT_ASIDE, FEWEST_TO_KEEP = 4, 4
PICTURES = 8
# Pixels of a side, where the DRM was made for no fewer.
USUAL = 512


def read_prompts(text: str) -> list[str]:
    """One prompt a line, equal ones once; one line that ends in .txt names a file of the input folder."""
    name = named_file(text)
    lines = (_read_file(name) if name else text).splitlines()
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise ValueError(
            "there are no prompts: write one a line, or the name of a text file (.txt) that lies in ComfyUI's"
            " input folder"
        )
    return prompts


def named_file(text: str) -> str | None:
    """The file of the input folder that stands where prompts could, if one does."""
    lines = text.strip().splitlines()
    return lines[0].strip() if len(lines) == 1 and lines[0].lower().endswith(".txt") else None


def prompts_fingerprint(text: str) -> str:
    """Changes when the prompts do, also those in a file, without reading it."""
    name = named_file(text)
    if name is None:
        return text
    status = (Path(folder_paths.get_input_directory()) / name).stat()
    return f"{name}:{status.st_mtime_ns}:{status.st_size}"


def _read_file(name: str) -> str:
    folder = Path(folder_paths.get_input_directory()).resolve()
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        raise ValueError(f"prompts: '{name}' lies outside ComfyUI's input folder; put the file into {folder}")
    if not path.is_file():
        raise ValueError(
            f"prompts: there is no file '{name}' in ComfyUI's input folder; put it into {folder}"
        )
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"prompts: '{name}' has {path.stat().st_size} bytes, wanted at most {LARGEST_FILE}")
    try:
        return read_text(path)
    except EncodingError as error:
        raise ValueError(f"prompts: {error}") from error


def usual_side(drm: "DRM | SharedDRM") -> int:
    """Pixels of a side of the pictures that a reward model learned from, else that its own network was made
    for, at most USUAL; USUAL where neither is known.
    """
    learned = getattr(drm, "metadata", {}).get("resolution")
    if isinstance(learned, int) and learned > 0 and learned % 16 == 0:
        return min(USUAL, learned)
    backbone = getattr(drm, "backbone", None)
    return USUAL if backbone is None else min(USUAL, 8 * backbone.config.sample_size)


@dataclass(frozen=True, kw_only=True)
class Training:
    """The node's inputs; names as there. ValueError for what linked values bring past the widgets' limits."""

    prompts: tuple[str, ...]
    width: int
    height: int
    steps: int
    cfg: float
    num_branches: int
    prompts_per_iteration: int
    iterations: int
    learning_rate: float
    rank: int
    alpha: float
    kl_weight: float
    noise_level: float
    seed: int
    method: str
    save_every: int
    preview_every: int
    ema_decay: float
    name: str

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        wrong = [
            (self.iterations < 1, "iterations", "at least 1"),
            (self.steps < 2, "steps", "at least 2, the last one has no noise to learn from"),
            (self.prompts_per_iteration < 1, "prompts_per_iteration", "at least 1"),
            (not self.learning_rate > 0, "learning_rate", "above 0 (0.0001 is usual)"),
            (self.rank < 1, "rank", "at least 1 (32 is usual)"),
            (not self.alpha > 0, "alpha", "above 0 (twice the rank is usual)"),
            (self.width < 16 or self.width % 16, "width", "a multiple of 16"),
            (self.height < 16 or self.height % 16, "height", "a multiple of 16"),
            (self.save_every < 1, "save_every", "at least 1"),
            (self.preview_every < 1, "preview_every", "at least 1"),
            (not 0 <= self.ema_decay < 1, "ema_decay", "from 0 (off) to below 1"),
            (not re.search(r"[^\s/\\.]", self.name), "name", "a name for the LoRA file"),
            ((self.iterations * self.per_iteration) >> 32, "iterations", "fewer"),
        ]
        for is_wrong, field, wanted in wrong:
            if is_wrong:
                raise ValueError(f"{field} is {getattr(self, field)!r}: wanted {wanted}")
        _ = self.settings  # refuses what it cannot train with

    @property
    def settings(self) -> "GRPOSettings":
        from ...drm.grpo import GRPOSettings

        return GRPOSettings(
            method=self.method,
            num_branches=self.num_branches,
            noise_level=self.noise_level,
            kl_weight=self.kl_weight,
        )

    @property
    def forward(self) -> "ForwardSettings":
        from ...drm.forward_rl import ForwardSettings

        return ForwardSettings(noise_levels=min(NOISE_LEVELS, self.steps - 1))

    @property
    def group(self) -> int:
        """Latents of one prompt that pass the network together."""
        return 1 if self.method == "step-grpo" else self.num_branches

    @property
    def per_iteration(self) -> int:
        return self.prompts_per_iteration * self.group

    @functools.cached_property
    def held_out(self) -> list[int]:
        """Numbers of the prompts kept aside; all of them, to be drawn from other seeds, when they are few."""
        count = len(self.prompts)
        if count < FEWEST_TO_KEEP:
            return list(range(count))
        return list(range(0, count, KEPT_ASIDE))[: PICTURES // 2]

    @functools.cached_property
    def learned(self) -> list[int]:
        """Numbers of the prompts that are trained on."""
        count = len(self.prompts)
        if count < FEWEST_TO_KEEP:
            return list(range(count))
        aside = set(self.held_out)
        return [number for number in range(count) if number not in aside]


def lora_path(name: str) -> Path:
    """Where a LoRA of this name is saved, without its ending: never outside loras/ of the output folder."""
    output = folder_paths.get_output_directory()
    try:
        folder, filename, *_ = folder_paths.get_save_image_path(os.path.join("loras", name.strip()), output)
        inside = Path(folder).resolve().is_relative_to((Path(output) / "loras").resolve())
    except OSError as error:
        raise ValueError(
            f"the output folder {output} cannot be written to ({error}): give the server one it may"
        ) from error
    except Exception as error:  # ComfyUI refuses with a plain Exception
        raise ValueError(_outside(name)) from error
    if not inside:
        raise ValueError(_outside(name))
    probe = Path(folder) / f".{filename}.{os.getpid()}.tmp"
    try:
        probe.touch()
    except OSError as error:
        raise ValueError(
            f"the folder {folder} cannot be written to ({error}): give the server one it may"
        ) from error
    finally:
        probe.unlink(missing_ok=True)
    return Path(folder) / filename


def _outside(name: str) -> str:
    return f"name is '{name}': it leaves loras/ of ComfyUI's output folder; give a plain name"
