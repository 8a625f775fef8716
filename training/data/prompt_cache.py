"""Prompts and their embeddings, made once: what Step-GRPO's training reads instead of text encoders.

    python -m training.prompts --encoders models/sd3.5 --out data/prompts train.txt held_out.txt

A prompt file has one prompt a line; empty lines and lines that start with # are left out. The folder has a
set for each way its embeddings were made, named by a hash of that way, and a set a file for each prompt,
named by a hash of the prompt:

    <set>/made_with.json        {"format": "drm-prompts", "version": 2, "encoders": ..., "t5_length": T, ...}
    <set>/<prompt>.safetensors  prompt_embeds (T, D), pooled (P,), and in its metadata the prompt itself

A file is renamed into place when it is whole and never changed, so any number of runs may read and write one
folder. CFG's empty prompt is a prompt of every set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drm.ranges import Range
from drm.text_files import EncodingError, read_text
from training.config import Tokens
from training.engine.atomic import replace_atomically

if TYPE_CHECKING:
    from accelerate import Accelerator

    from training.data.encoders import SD3Encoders

FORMAT, VERSION = "drm-prompts", 2
BATCH = 16
T5Length = Annotated[int, Range(0, 4096)]

Encode = Callable[[list[str]], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """`prompts`, `held_out`: text files, one prompt a line. `encoded`: the folder of their embeddings, made
    at the first start when `encoders`, a diffusers SD3 folder, is given.
    """

    prompts: str
    encoded: str
    held_out: str | None = None
    encoders: str | None = None
    t5_length: Tokens | None = 256


class PromptError(ValueError):
    """The prompts or their embeddings cannot be used; the message says which and what to do."""


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a text file, each once, in order; PromptError when there are none."""
    try:
        lines = read_text(path).splitlines()
    except EncodingError as error:
        raise PromptError(f"cannot read the prompts: {error}") from error
    except OSError as error:
        raise PromptError(f"cannot read the prompts {path}: {error.strerror}") from error
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise PromptError(f"{path} has no prompts: write one a line")
    return list(dict.fromkeys(found))


def set_folder(folder: str | Path, made_with: dict) -> Path:
    """Where the embeddings made in this way are. made_with: JSON values; "encoders" is their fingerprint."""
    return Path(folder) / _digest(json.dumps(made_with, sort_keys=True))[:16]


def write_prompts(
    folder: str | Path,
    prompts: Sequence[str],
    encode: Encode,
    made_with: dict,
    *,
    rank: int = 0,
    world: int = 1,
) -> PromptCache:
    """One process's part of the embeddings of `prompts` and "" that the set does not have yet.

    encode: prompts -> prompt_embeds (B, T, D), pooled (B, P).
    """
    cache = PromptCache(set_folder(folder, made_with))
    cache.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "version": VERSION, **made_with}, indent=1)
    replace_atomically(cache.folder / "made_with.json", lambda path: path.write_text(text))
    own = cache.missing(["", *prompts][rank::world])
    for start in range(0, len(own), BATCH):
        part = own[start : start + BATCH]
        for prompt, embeds, pooled in zip(part, *encode(part), strict=True):
            _write_row(cache.path(prompt), prompt, {"prompt_embeds": embeds, "pooled": pooled})
    return cache


def _write_row(path: Path, prompt: str, row: dict[str, Tensor]) -> None:
    row = {name: tensor.cpu().half().clone() for name, tensor in row.items()}

    def save(temporary: Path) -> None:
        save_file(row, temporary, {"prompt": prompt})
        temporary.chmod(0o644)  # safetensors makes files only their owner can read

    replace_atomically(path, save)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class PromptCache:
    """One set of embeddings, by prompt; what others add to it is there at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, prompt: str) -> Path:
        return self.folder / f"{_digest(prompt)}.safetensors"

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Those without embeddings, each once."""
        return [prompt for prompt in dict.fromkeys(prompts) if not self.path(prompt).is_file()]

    def embeds(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """prompt_embeds (B, T, D) and pooled (B, P) in float32; "" is the empty prompt."""
        embeds, pooled = zip(*(self._row(prompt) for prompt in prompts), strict=True)
        return torch.stack(embeds).float(), torch.stack(pooled).float()

    def _row(self, prompt: str) -> tuple[Tensor, Tensor]:
        path = self.path(prompt)
        try:
            with safe_open(path, "pt") as file:
                found = (file.metadata() or {}).get("prompt")
                row = file.get_tensor("prompt_embeds"), file.get_tensor("pooled")
        except (OSError, SafetensorError) as error:
            raise PromptError(
                f"{path}, the embeddings of {prompt!r}, cannot be read ({error}): delete it and make it again"
            ) from error
        if found != prompt:
            raise PromptError(f"{path} is of {found!r}, wanted {prompt!r}: delete it and make it again")
        return row


def find_set(folder: str | Path, t5_length: int | None) -> PromptCache:
    """The one set of a folder made with this t5_length, or by encoders that have none; PromptError."""
    sets = {path.parent: _read_made_with(path) for path in sorted(Path(folder).glob("*/made_with.json"))}
    if not sets:
        raise PromptError(
            f"{folder} holds no prompt embeddings of version {VERSION}: make them with"
            " `python -m training.prompts`, or name data.encoders"
        )
    fitting = [path for path, made_with in sets.items() if made_with.get("t5_length", t5_length) == t5_length]
    if not fitting:
        found = " and ".join(str(made_with["t5_length"]) for made_with in sets.values())
        raise PromptError(
            f"{folder} has embeddings made with t5_length {found}, wanted {t5_length}: set data.t5_length, or"
            " name data.encoders"
        )
    if len(fitting) > 1:
        raise PromptError(
            f"{folder} has embeddings made in {len(fitting)} ways"
            f" ({', '.join(path.name for path in fitting)}): name data.encoders, or delete all but one"
        )
    return PromptCache(fitting[0])


def _read_made_with(path: Path) -> dict:
    try:
        made_with = json.loads(path.read_text())
        kind = made_with.pop("format"), made_with.pop("version")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise PromptError(f"{path} is damaged ({error}): delete its folder and make it again") from error
    if kind != (FORMAT, VERSION):
        raise PromptError(f"{path} is {kind[0]} {kind[1]}, wanted {FORMAT} {VERSION}: make it again")
    return made_with


def open_encoders(folder: str, t5_length: int | None, device: str | torch.device) -> tuple[SD3Encoders, dict]:
    """SD3's encoders, not loaded yet, and what embeddings of theirs are made with."""
    from training.data.encoders import EncoderError, SD3Encoders

    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        encoders = SD3Encoders.from_folder(folder, device=device, dtype=dtype)
    except EncoderError as error:
        raise PromptError(str(error)) from error
    fingerprint = encoders.describe(encoders.text_parts)["hash"]
    dtype_name = str(dtype).removeprefix("torch.")
    return encoders, {"encoders": fingerprint, "t5_length": t5_length, "dtype": dtype_name}


def sd3_encode(encoders: SD3Encoders, t5_length: int | None) -> Encode:
    """What turns prompts into SD3's embeddings; loads the encoders."""
    from training.data.encoders import EncoderError

    try:
        encoders.load_text(t5=t5_length is not None and encoders.has_t5)
    except EncoderError as error:
        raise PromptError(str(error)) from error

    def encode(prompts: list[str]) -> tuple[Tensor, Tensor]:
        try:
            return encoders.encode_prompts(prompts, t5_length)
        except EncoderError as error:
            raise PromptError(str(error)) from error

    return encode


def open_or_make(config: PromptsConfig, prompts: list[str], accelerator: Accelerator) -> PromptCache:
    """The cache with all these prompts in it, made as the configuration says.

    With `encoders`, all processes make what is missing; without, PromptError when something is missing.
    """
    if not config.encoders:
        cache = find_set(config.encoded, config.t5_length)
        if missing := cache.missing(["", *prompts]):
            raise PromptError(
                f"{cache.folder} has no embedding of {missing[0]!r} and {len(missing) - 1} more: make them"
                " with `python -m training.prompts`, or name data.encoders"
            )
        return cache
    encoders, made_with = open_encoders(config.encoders, config.t5_length, accelerator.device)
    cache = PromptCache(set_folder(config.encoded, made_with))
    missing = cache.missing(["", *prompts])
    accelerator.wait_for_everyone()  # nobody may look for what another already writes
    if missing:
        rank, world = accelerator.process_index, accelerator.num_processes
        encode = sd3_encode(encoders, config.t5_length)
        write_prompts(config.encoded, prompts, encode, made_with, rank=rank, world=world)
    accelerator.wait_for_everyone()
    return cache
