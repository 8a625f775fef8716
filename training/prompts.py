"""Embed prompts once, so that fine-tuning needs no text encoder.

python -m training.prompts --encoders models/sd3.5 --out data/prompts train.txt held_out.txt
"""

import argparse
import sys
from pathlib import Path

import torch

from training.config import argument
from training.data.prompt_cache import (
    PromptError,
    T5Length,
    open_encoders,
    read_prompts,
    sd3_encode,
    write_prompts,
)


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
        t5_length = args.t5_length or None
        encoders, made_with = open_encoders(args.encoders, t5_length, args.device)
        write_prompts(args.out, prompts, sd3_encode(encoders, t5_length), made_with)
    except (PromptError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(prompts)} prompts -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
