"""Prompts and their embeddings, made once: what Step-GRPO's training reads instead of text encoders.

    python -m training.prompts --encoders models/sd3.5 --out data/prompts train.txt held_out.txt

A prompt file has one prompt a line; empty lines and lines that start with # are left out. The folder:

    prompts.jsonl                 {"prompt": "..."} a line; line i is row i; row 0 is the empty prompt of CFG
    embeddings-00000.safetensors  prompt_embeds (n, T, D), pooled (n, P): rows of ROWS_EACH prompts a file
    meta.json                     {"format": "drm-prompts", "version": 1, "length": T, "encoders": {...}}

meta.json is written last, so a folder that has one is whole. Rows are read through the file map one by one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drm.ranges import Range
from drm.text_files import EncodingError, read_text
from training.config import argument
from training.grpo.config import PromptsConfig
from training.shards import replace_atomically

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT, VERSION = "drm-prompts", 1
ROWS_EACH = 512
BATCH = 16
T5Length = Annotated[int, Range(0, 4096)]

Encode = Callable[[list[str]], tuple[Tensor, Tensor]]


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


def write_prompts(
    folder: Path, prompts: Sequence[str], encode: Encode, *, rank: int = 0, world: int = 1
) -> None:
    """One process's part of the files; afterwards, when all have done theirs, `finish` makes them a folder.
    encode: prompts -> prompt_embeds (B, T, D), pooled (B, P).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        (folder / "meta.json").unlink(missing_ok=True)
    rows = with_empty(prompts)
    for index in range(rank, -(-len(rows) // ROWS_EACH), world):
        part = rows[index * ROWS_EACH : (index + 1) * ROWS_EACH]
        found = [encode(part[i : i + BATCH]) for i in range(0, len(part), BATCH)]
        tensors = {
            name: torch.cat([one[i].cpu() for one in found]).half().contiguous()
            for i, name in enumerate(("prompt_embeds", "pooled"))
        }

        def save(temporary: Path, tensors: dict[str, Tensor] = tensors) -> None:
            save_file(tensors, temporary)
            temporary.chmod(0o644)  # safetensors makes files only their owner can read

        replace_atomically(_shard(folder, index), save)


def finish(folder: Path, prompts: Sequence[str], facts: dict) -> None:
    """prompts.jsonl and meta.json, by one process when every file of embeddings is there."""
    text = "".join(
        json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in with_empty(prompts)
    )
    replace_atomically(folder / "prompts.jsonl", lambda path: path.write_text(text, encoding="utf-8"))
    meta = {"format": FORMAT, "version": VERSION, **facts}
    replace_atomically(folder / "meta.json", lambda path: path.write_text(json.dumps(meta)))


def with_empty(prompts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(["", *prompts]))


def _shard(folder: Path, index: int) -> Path:
    return folder / f"embeddings-{index:05d}.safetensors"


class PromptCache:
    """A folder of embeddings, by prompt."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            lines = (self.folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line)["prompt"] for line in lines]
        except (OSError, ValueError, KeyError) as error:
            raise PromptError(
                f"{self.folder} holds no finished prompt embeddings ({error}): make them with"
                " `python -m training.prompts`, or name data.encoders"
            ) from error
        if (self.meta.get("format"), self.meta.get("version")) != (FORMAT, VERSION):
            raise PromptError(f"{self.folder}/meta.json is no {FORMAT} of version {VERSION}: make it again")
        self.rows = {prompt: row for row, prompt in enumerate(rows)}
        self._files: dict[int, object] = {}

    def missing(self, prompts: Sequence[str]) -> list[str]:
        return [prompt for prompt in prompts if prompt not in self.rows]

    def embeds(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """prompt_embeds (B, T, D) and pooled (B, P) in float32; "" is the empty prompt."""
        places = [divmod(self.rows[prompt], ROWS_EACH) for prompt in prompts]
        embeds, pooled = (
            torch.stack([self._open(index).get_slice(name)[row : row + 1][0] for index, row in places])
            for name in ("prompt_embeds", "pooled")
        )
        return embeds.float(), pooled.float()

    def _open(self, index: int):
        if index not in self._files:
            path = _shard(self.folder, index)
            try:
                self._files[index] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise PromptError(f"{path} cannot be read ({error}): make the embeddings again") from error
        return self._files[index]


def sd3_encode(folder: str, t5_length: int | None, device: str | torch.device) -> tuple[Encode, dict]:
    """What turns prompts into SD3's embeddings, and the facts about it for meta.json."""
    from training.encoders import EncoderError, SD3Encoders

    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        encoders = SD3Encoders.from_folder(folder, device=device, dtype=dtype)
        encoders.load_text(t5=t5_length is not None and encoders.has_t5)
    except EncoderError as error:
        raise PromptError(str(error)) from error
    return lambda prompts: encoders.encode_prompts(prompts, t5_length), {
        "t5_length": t5_length,
        "encoders": encoders.describe(),
    }


def open_or_make(config: PromptsConfig, prompts: list[str], accelerator: Accelerator) -> PromptCache:
    """The cache with all these prompts in it; made here, by all processes, when it lacks one and there are
    encoders to make it with.
    """
    folder = Path(config.encoded)
    cache = PromptCache(folder) if (folder / "meta.json").is_file() or not config.encoders else None
    missing = cache.missing(prompts) if cache else prompts
    if missing and not config.encoders:
        raise PromptError(
            f"{folder} has no embedding of {missing[0]!r} and {len(missing) - 1} more: make them with"
            " `python -m training.prompts`, or name data.encoders"
        )
    accelerator.wait_for_everyone()  # nobody may look for what another already writes
    if missing:
        encode, facts = sd3_encode(config.encoders, config.t5_length, accelerator.device)
        rank, world = accelerator.process_index, accelerator.num_processes
        write_prompts(folder, prompts, encode, rank=rank, world=world)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            finish(folder, prompts, facts)
        accelerator.wait_for_everyone()
        cache = PromptCache(folder)
    return cache


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="text files, a prompt a line")
    parser.add_argument("--encoders", required=True, help="diffusers SD3 folder: text encoders, tokenizers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--t5-length", type=argument(T5Length), default=256, help="0 leaves T5 out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    try:
        prompts = list(dict.fromkeys(prompt for path in args.files for prompt in read_prompts(path)))
        encode, facts = sd3_encode(args.encoders, args.t5_length or None, args.device)
        write_prompts(args.out, prompts, encode)
        finish(args.out, prompts, facts)
    except (PromptError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(prompts)} prompts -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
