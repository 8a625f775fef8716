"""A reward model as one .safetensors file whose header says everything needed to rebuild it.

Safetensors metadata is text to text; ours is
    format   "drm-reward-model"
    version  "1"
    header   JSON: architecture {backbone {kind, ...}, head {kind, ...}}, sigma (convention), text_length,
             calibration, shown (scale and offset of the score people see), sha256 of the weights,
             metadata (anything its maker wrote)
The weights are `backbone.*` in any float dtype and `head.*` in float32; a file of backbone kind "shared" has
`reader.*` in float32 in the backbone's place (shared.py). Older files may have `early_heads.*`
too, which are not used. The file is written beside its target and renamed, so a reader never sees half of
one.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .backbone import KIND, BackboneConfig, TruncatedSD3
from .head import ConvGNHead, ConvHead, QueryHead
from .model import DRM
from .shared import KIND as SHARED
from .shared import SharedDRM, TrunkFacts

FORMAT = "drm-reward-model"
VERSION = 1
SIGMA_CONVENTION = "x = (1 - sigma) * x0 + sigma * noise; timestep = 1000 * sigma"
# Heads after earlier blocks, which files of the first versions have.
_UNUSED = "early_heads."
_OURS = ("backbone.transformer_blocks.", "reader.taps.")
_OWN_FIELDS = ("text_length", "calibration", "shown")

# What else people have in their folders, told by a piece of a key that only it (or what follows) has.
_LOOKS_LIKE = (
    ("lora_", "a LoRA"),
    ("backbone.transformer_blocks.", "a reward model"),
    ("joint_blocks.", "an SD3 diffusion checkpoint"),
    ("conditioner.embedders.", "an SDXL checkpoint"),
    ("cond_stage_model.", "an SD1.5 or SD2 checkpoint"),
    ("input_blocks.", "an SD1.5 or SDXL checkpoint"),
    ("down_blocks.", "a diffusers UNet (SD1.5, SDXL) or VAE"),
    ("double_blocks.", "a Flux-type diffusion checkpoint"),
    ("single_transformer_blocks.", "a Flux transformer of diffusers"),
    ("transformer_blocks.", "a diffusers transformer"),
    ("text_model.", "a CLIP text encoder"),
    ("encoder.block.", "a T5 text encoder"),
    ("decoder.", "a VAE"),
)


class DRMFileError(ValueError):
    """The file is not a reward model this version can load; the message says what it is and what to do."""


class _Digest:
    """sha256 over names and weights, given in the order of their names."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, key: str, value: Tensor) -> None:
        self._hash.update(key.encode())
        # A 0-d tensor has no bytes to view.
        self._hash.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = _Digest()
    for key in sorted(tensors):
        digest.add(key, tensors[key])
    return digest.hexdigest()


# (path, time of change, size) of files whose weights this process has read whole and found sound.
_SOUND: set[tuple[str, int, int]] = set()


def save_drm(
    drm: DRM | SharedDRM,
    path: str | os.PathLike,
    metadata: dict | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the model to path (.safetensors), atomically.

    metadata: JSON-able facts, added over drm.metadata; text_length, calibration and shown have places of
    their own in the header. dtype: what the backbone is stored in, its own dtype when not given; the head
    stays float32. Raises DRMFileError when the file cannot be written; what was there before then stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise DRMFileError(f"{path.name}: reward models are saved as .safetensors, choose such a name")
    facts = {**drm.metadata, **(metadata or {})}
    tensors = {
        key: value.detach().to("cpu", dtype if key.startswith("backbone.") else None).contiguous()
        for key, value in drm.state_dict().items()
    }
    backbone = (SHARED, drm.trunk) if isinstance(drm, SharedDRM) else (KIND, drm.backbone.config)
    header = {
        "architecture": {
            "backbone": {"kind": backbone[0], **backbone[1].to_dict()},
            "head": drm.head.to_dict(),
        },
        "sigma": SIGMA_CONVENTION,
        **{name: facts.pop(name, None) for name in _OWN_FIELDS},
        "sha256": _digest(tensors),
        "metadata": facts,
    }
    text = {"format": FORMAT, "version": str(VERSION), "header": json.dumps(header, allow_nan=False)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=text)
        # safetensors writes files for their owner alone; models are shared.
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        raise DRMFileError(
            f"{path} could not be written ({error}): look at the disk and its rights"
        ) from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    # What stands in for the folder may be a file.
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def looks_like(keys: Iterable[str]) -> str:
    """What a file of weights seems to be, from the names in it: the tail of a sentence."""
    keys = list(keys)
    for piece, name in _LOOKS_LIKE:
        if any(piece in key for key in keys):
            return f"it looks like {name}"
    return f"it holds {', '.join(keys[:3]) or 'nothing'}"


def _open(path: Path):
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        raise DRMFileError(
            f"{path.name} is not a .safetensors file: reward models are loaded from that format"
            " only, because opening other formats can run code"
        )
    if not path.is_file():
        raise DRMFileError(f"{path} is not there: put the reward model's .safetensors file in that place")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DRMFileError(
            f"{path.name} is damaged or cut short ({error}): download or copy it again"
        ) from error


def _parse_header(name: str, text: dict[str, str], keys: Iterable[str]) -> dict:
    keys = list(keys)
    if text.get("format") != FORMAT and any(key.startswith(_OURS) for key in keys):
        raise DRMFileError(
            f"{name} has a reward model's weights without its header: another program saved it, take the"
            " file as it was made"
        )
    if text.get("format") != FORMAT:
        raise DRMFileError(
            f"{name} is not a reward model, {looks_like(keys)}: choose a file saved by drm.save_drm"
        )
    version = text.get("version", "")
    if not version.isdigit() or int(version) != VERSION:
        raise DRMFileError(
            f"{name} has format version {version or 'none'}, this code reads {VERSION}: update ComfyUI-DRM"
        )
    try:
        header = json.loads(text["header"])
        _ = header["architecture"]["backbone"], header["architecture"]["head"]
    except (KeyError, TypeError, ValueError) as error:
        raise DRMFileError(f"{name} has a broken header ({error!r}): download or save it again") from error
    _check_shown(name, header.get("shown"))
    return {"format": FORMAT, "version": int(version), **header}


def _check_shown(name: str, shown: object) -> None:
    try:
        good = shown is None or (math.isfinite(shown["offset"]) and 0 < shown["scale"] < math.inf)
    except (KeyError, TypeError):
        good = False
    if not good:
        raise DRMFileError(
            f"{name} shows its score as {shown}: wanted a scale above 0 and an offset, save it again"
        )


def read_header(path: str | os.PathLike) -> dict:
    """The header as a dict (format, version, architecture, sigma, ..., metadata), without reading the
    weights.

    Raises DRMFileError as `load_drm` does.
    """
    path = Path(path)
    with _open(path) as file:
        return _parse_header(path.name, file.metadata() or {}, file.keys())


def _build(name: str, architecture: dict) -> DRM | SharedDRM:
    try:
        backbone = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in architecture["backbone"].items()
        }
        # Files from before the field had a name for it are SD3's.
        kind = backbone.pop("kind", KIND)
        if kind not in (KIND, SHARED):
            raise ValueError(
                f"its backbone is of kind {kind!r}, known are {KIND!r} and {SHARED!r}; update ComfyUI-DRM"
            )
        with torch.device("meta"):
            if kind == SHARED:
                return SharedDRM(TrunkFacts(**backbone), _build_head(architecture["head"]))
            return DRM(TruncatedSD3(BackboneConfig(**backbone)), _build_head(architecture["head"]))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DRMFileError(f"{name} describes a model this code cannot build: {error}") from error


def _build_head(head: dict) -> ConvHead | ConvGNHead | QueryHead:
    # Files from before there was a second kind say none.
    kind, arguments = head.get("kind", "conv"), {key: value for key, value in head.items() if key != "kind"}
    if kind == "conv":
        return ConvHead(**arguments)
    if kind == "conv_gn":
        return ConvGNHead(**arguments)
    if kind == "query":
        return QueryHead(**arguments)
    raise ValueError(
        f"its head is of kind {kind!r}, known are 'conv', 'conv_gn' and 'query'; update ComfyUI-DRM"
    )


def _sound_weights(
    path: Path, file: object, keys: list[str], sha256: str | None
) -> Iterator[tuple[str, Tensor]]:
    """Every weight by name; the first time a file is read, finite and of the header's sha256 or refused."""
    status = path.stat()
    mark = (str(path.resolve()), status.st_mtime_ns, status.st_size)
    digest = None if mark in _SOUND else _Digest()
    for key in keys:
        value = file.get_tensor(key)
        if digest is not None:
            digest.add(key, value)
            if not bool(value.isfinite().all()):
                raise DRMFileError(
                    f"{path.name} holds NaN or infinity in {key}: its training went wrong or it is damaged,"
                    " take an earlier checkpoint or download it again"
                )
        yield key, value
    if digest is None:
        return
    if sha256 not in (None, digest.hexdigest()):
        raise DRMFileError(
            f"{path.name} does not hold the weights its header was written for (their sha256 differs): it was"
            " edited or damaged, download or save it again"
        )
    _SOUND.add(mark)


def load_drm(
    path: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> DRM | SharedDRM:
    """The model of a file saved by save_drm, in eval mode; its backbone in dtype, its head in float32. A file
    that holds a head for another model's tokens gives a SharedDRM, which is all float32.

    Raises DRMFileError, in one sentence, for a missing, damaged or foreign file, one of a newer version, one
    with NaN or infinity among its weights, and for any format but .safetensors.
    """
    path = Path(path)
    with _open(path) as file:
        header = _parse_header(path.name, file.metadata() or {}, file.keys())
        drm = _build(path.name, header["architecture"])
        expected = {key: value.shape for key, value in drm.state_dict().items()}
        found = {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        described = {key: shape for key, shape in found.items() if not key.startswith(_UNUSED)}
        wrong = sorted(set(expected.items()) ^ set(described.items()))
        if wrong:
            raise DRMFileError(
                f"{path.name} does not hold the weights its header describes ({wrong[0][0]} differs): it was"
                " edited or mixed up, download or save it again"
            )
        tensors = {}
        for key, value in _sound_weights(path, file, sorted(found), header.get("sha256")):
            if key not in expected:
                continue
            kept = dtype if key.startswith("backbone.") else torch.float32
            tensors[key] = value.to(device, kept, copy=True)
    drm.load_state_dict(tensors, assign=True)
    drm.metadata = dict(header.get("metadata") or {})
    drm.metadata |= {name: header[name] for name in _OWN_FIELDS if header.get(name) is not None}
    return drm.eval()


def load_whole_drm(
    path: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> DRM:
    """`load_drm` of a file that must have a backbone of its own; DRMFileError for one that has not."""
    drm = load_drm(path, device, dtype)
    if isinstance(drm, SharedDRM):
        raise DRMFileError(
            f"{Path(path).name} is a head that reads the tokens of a {drm.trunk.family} model and has no"
            " backbone of its own, which is needed here: choose a whole reward model"
        )
    return drm
