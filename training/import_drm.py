"""The DRM authors' reward models as DRM files, and DRM files as theirs.

    python -m training.import_drm --base sd3.5_medium.safetensors \\
        --checkpoint checkpoint-N/model.safetensors --out models/drm/NAME.safetensors
    python -m training.import_drm --base sd3.5_medium.safetensors \\
        --export models/drm/NAME.safetensors --out checkpoint-N/model.safetensors

The base, one file or a diffusers folder, says the network's shape; SD3.5-Medium keeps 21 of 24 blocks,
SD3.5-Large 33 of 38, another depth needs --num-kept. On export the blocks that ours does not hold come from
the base. Only .safetensors are read. Nothing is written when something does not fit.
"""

import argparse
import sys
from pathlib import Path
from typing import Annotated

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drm import DRM, DRMFileError, save_drm
from drm.backbone import BackboneConfig, is_kept
from drm.checkpoint import load_whole_drm, looks_like
from drm.ranges import Range
from drm.sd3.base_model import BaseError, load_transformer, transformer_config
from training.config import argument
from training.engine.atomic import replace_atomically
from training.reward.authors_layout import HEAD, KEPT, TRANSFORMER, AuthorsFileError, from_authors, to_authors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FACTS = {
    "source": "the DRM authors' training code",
    "text_length": 589,  # CLIP's 77 and T5's 512
    "training_text_length": 589,
}


def import_drm(
    base: Path,
    checkpoint: Path,
    out: Path,
    *,
    num_kept: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> DRM:
    """Writes the authors' reward model to out, its backbone in dtype, and returns it in float32.

    Raises AuthorsFileError, BaseError or DRMFileError; then out is as it was.
    """
    _check_name(out)
    config = transformer_config(base)
    depth = config["num_layers"]
    num_kept = num_kept or KEPT.get(depth)
    if num_kept is None:
        raise AuthorsFileError(f"the base has {depth} blocks, not 24 or 38: say with --num-kept how many")
    try:
        kept = BackboneConfig.from_diffusers(config, num_kept, keeps_output=True)
    except ValueError as error:
        raise AuthorsFileError(f"--num-kept and the base do not fit: {error}") from error
    drm = from_authors(_read(checkpoint, num_kept), kept)
    drm.metadata |= FACTS | {"name": out.stem}
    save_drm(drm, out, dtype=dtype)
    return drm


def export_drm(base: Path, drm: Path, out: Path) -> None:
    """Writes a reward model as the authors' code reads it. Raises as import_drm does."""
    _check_name(out)
    tensors = to_authors(load_whole_drm(drm), load_transformer(base).state_dict())
    out.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # safetensors makes files only their owner can read

    replace_atomically(out, write)


def _check_name(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise AuthorsFileError(f"{out.name}: weights are saved as .safetensors, choose such a name")


def _read(path: Path, num_kept: int) -> dict[str, Tensor]:
    """The checkpoint's weights in float32; those that are cut off as shapes on the meta device."""
    if path.suffix != ".safetensors":
        raise AuthorsFileError(
            f"{path.name} is not a .safetensors file: other formats can run code when they are read, give"
            " checkpoint-N/model.safetensors"
        )
    if not path.is_file():
        raise AuthorsFileError(f"{path} is not there: give checkpoint-N/model.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if not any(key.startswith((TRANSFORMER, HEAD)) for key in keys):
                raise AuthorsFileError(
                    f"{path.name} is no checkpoint of the authors' training, {looks_like(keys)}: give"
                    " checkpoint-N/model.safetensors"
                )
            tensors = {}
            for key in keys:
                name = key.removeprefix(TRANSFORMER)
                if key.startswith(HEAD) or is_kept(name, num_kept, keeps_output=True):
                    tensors[key] = file.get_tensor(key).float()
                else:
                    tensors[key] = torch.empty(file.get_slice(key).get_shape(), device="meta")
    except (SafetensorError, OSError) as error:
        raise AuthorsFileError(
            f"{path.name} is damaged or cut short ({error}): download or copy it again"
        ) from error
    bad = next((k for k, v in tensors.items() if v.device.type != "meta" and not v.isfinite().all()), None)
    if bad:
        raise AuthorsFileError(f"{path.name} holds NaN or infinity in {bad}: take an earlier checkpoint")
    return tensors


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="SD3.5: one file, or a diffusers folder")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--checkpoint", type=Path, help="the authors' checkpoint-N/model.safetensors")
    way.add_argument("--export", type=Path, help="a DRM file with the head conv_gn")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-kept", type=argument(Annotated[int, Range(1, 1024)]), help="blocks that stay")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the DRM file's backbone")
    args = parser.parse_args(arguments)
    try:
        if args.export:
            export_drm(args.base, args.export, args.out)
        else:
            import_drm(args.base, args.checkpoint, args.out, num_kept=args.num_kept, dtype=DTYPES[args.dtype])
    except (AuthorsFileError, BaseError, DRMFileError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{'checkpoint' if args.export else 'reward model'} -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
