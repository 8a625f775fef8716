"""What a head is learned from: picks in model space, prompts as CONDITIONINGs, tokens of the MODEL.

read(x (n, C, H, W), sigma, prompts) -> drm.shared.Taps        what drm.head_training calls
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from . import adapters, trunk

if TYPE_CHECKING:
    from ..drm.head_training import Compared
    from ..drm.picks import Record
    from ..drm.shared import Taps

# Embeddings kept at once; those of SD3's encoders take up to 5 MB each.
MOST_PROMPTS = 256
AT_ONCE = 16


def read_folder(folder: Path, own: dict) -> tuple[list["Record"], list[str]]:
    """The batches of a folder that say which picture is better than which, and notes on the rest.

    own: a TrunkFacts' dict of the MODEL. ValueError when nothing is left, or for batches of another model.
    """
    from ..drm.picks import check_one_model, pairs_of, read_records

    records, notes = read_records(folder)
    notes = [f"skipped: {sentence}" for sentence in notes]
    for record in records:
        if len(record.shape) == 5 and record.shape[2] > 1:
            raise ValueError(
                f"{record.path.name} holds videos of {record.shape[2]} frames: a head is learned from"
                " pictures, give another name of picks"
            )
    notes += check_one_model(records, own)
    telling = [record for record in records if pairs_of(record.batch.picks, record.shape[0])]
    if not telling:
        raise ValueError(
            f"none of {len(records)} batches in {folder} says which picture is better than another"
            f" ({'; '.join(notes) or 'they are of one picture each'}): pick from batches of two and more"
        )
    return telling, notes


def compared_records(
    records: Sequence["Record"], model: comfy.model_patcher.ModelPatcher
) -> list["Compared"]:
    """Their latents are read from the files when they are asked for."""
    from ..drm.head_training import Compared

    def reader(record: "Record") -> Callable[[Sequence[int]], Tensor]:
        return lambda rows: in_model_space(record.latents(rows), model)

    return [
        Compared(
            prompt=record.batch.prompt,
            picks=record.batch.picks,
            count=record.shape[0],
            shape=(record.shape[1], *record.shape[-2:]),
            latents=reader(record),
        )
        for record in records
    ]


def compared_latents(
    better: dict, worse: dict, prompt: str, model: comfy.model_patcher.ModelPatcher
) -> list["Compared"]:
    """Pairs of two LATENTs, item by item; prompt: one for all, or one a line for each pair."""
    from ..drm.head_training import Compared

    sides = [adapters.latent_tensor(latent, what) for latent, what in ((better, "better"), (worse, "worse"))]
    if sides[0].shape != sides[1].shape:
        raise ValueError(
            f"better has shape {tuple(sides[0].shape)} and worse {tuple(sides[1].shape)}: give two batches of"
            " one shape, whose items belong together"
        )
    channels = model.get_model_object("latent_format").latent_channels
    if sides[0].shape[1] != channels:
        raise ValueError(
            f"better and worse have {sides[0].shape[1]} channels and the MODEL draws {channels}: make them"
            " with the model that is connected"
        )
    lines = [line.strip() for line in prompt.splitlines() if line.strip()] or [""]
    if len(lines) not in (1, len(sides[0])):
        raise ValueError(
            f"prompt has {len(lines)} lines and better {len(sides[0])} items: give one line, or one a pair"
        )
    pairs = [in_model_space(torch.stack(pair), model) for pair in zip(*sides, strict=True)]

    def reader(pair: Tensor) -> Callable[[Sequence[int]], Tensor]:
        return lambda rows: pair[list(rows)]

    return [
        Compared(
            prompt=lines[i % len(lines)],
            picks=(0,),
            count=2,
            shape=tuple(pair.shape[1:]),
            latents=reader(pair),
        )
        for i, pair in enumerate(pairs)
    ]


def in_model_space(samples: Tensor, model: comfy.model_patcher.ModelPatcher) -> Tensor:
    """(n, C, H, W) float32 of a LATENT's samples."""
    samples = comfy.sample.fix_empty_latent_channels(model, samples)
    return adapters.without_frames(
        adapters.model_latents(samples, latent_format=model.get_model_object("latent_format"))
    )


class Prompts:
    """CONDITIONINGs by their text, encoded when needed; not more than MOST_PROMPTS stay without need."""

    def __init__(self, clip: object, model: comfy.model_patcher.ModelPatcher) -> None:
        self.clip, self.percent_to_sigma = clip, model.get_model_object("model_sampling").percent_to_sigma
        self.known: dict[str, adapters.ScoringPrompts] = {}

    def need(self, texts: Iterable[str]) -> None:
        texts = list(texts)
        for text in texts:
            if text not in self.known:
                mm.throw_exception_if_processing_interrupted()
                positive = adapters.encode_prompt(self.clip, text)
                self.known[text] = adapters.ScoringPrompts(positive, self.percent_to_sigma)
        if len(self.known) > MOST_PROMPTS:
            self.known = {text: self.known[text] for text in texts}


class Reader:
    """read, while ComfyUI has the MODEL in place. frames: whether the model's latents are 5-D."""

    def __init__(
        self, guider: comfy.samplers.CFGGuider, options: dict, prompts: Prompts, taps: tuple[int, ...]
    ) -> None:
        from ..drm.scoring import Parts

        self.base, self.options, self.prompts, self.taps = guider.inner_model, options, prompts, taps
        self.device = guider.model_patcher.load_device
        self.frames = guider.model_patcher.get_model_object("latent_format").latent_dimensions == 3
        self.parts = Parts(
            None,
            mm.throw_exception_if_processing_interrupted,
            adapters.is_out_of_memory,
            mm.soft_empty_cache,
        )

    def __call__(self, x: Tensor, sigma: float, prompts: Sequence[str]) -> "Taps":
        from ..drm.shared import Taps

        grid = trunk.token_grid(adapters.network_of(self.base), *x.shape[-2:])
        tokens: list[Tensor] = [x.new_empty(0)] * len(x)
        for rows in self._alike(sigma, prompts):
            source = self._trunk(x, sigma, [prompts[row] for row in rows])
            found = self.parts.run(len(rows), AT_ONCE, lambda part, s=source, r=rows: s(x, sigma, r, part))
            for row, own in zip(rows, found, strict=True):
                tokens[row] = own
        return Taps(list(torch.stack(tokens).unbind(1)), *grid)

    def _alike(self, sigma: float, prompts: Sequence[str]) -> list[list[int]]:
        """Rows whose prompts have embeddings of one shape, and so go together."""
        found: dict[str, list[int]] = {}
        for row, text in enumerate(prompts):
            prompt = self.prompts.known[text].read_at(sigma)
            shapes = {name: _shape(value) for name, value in prompt.options.items()}
            found.setdefault(repr((prompt.embeds.shape, shapes)), []).append(row)
        return list(found.values())

    def _trunk(self, x: Tensor, sigma: float, texts: Sequence[str]) -> Callable:
        """(x, sigma, rows, part of them) -> tokens (n, taps, L, width)."""
        unique = list(dict.fromkeys(texts))
        positive = joined([self.prompts.known[text].read_at(sigma) for text in unique])
        like = x.new_zeros(len(unique), *x.shape[1:], device=self.device)
        source = trunk.Trunk(
            self.base,
            self.options,
            adapters.ScoringPrompts(positive, self.prompts.percent_to_sigma),
            like.unsqueeze(2) if self.frames else like,
            self.taps,
        )
        items = torch.tensor([unique.index(text) for text in texts])

        def tokens(x: Tensor, sigma: float, rows: Sequence[int], part: slice) -> Tensor:
            taps = source(x[rows[part]].to(self.device), sigma, items[part])
            return torch.stack([tokens.float() for tokens in taps.tokens], dim=1)

        return tokens


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else value


def joined(prompts: Sequence["adapters._Prompt"]) -> list:
    """One CONDITIONING, with an item for each of several prompts of one shape."""
    first = prompts[0]
    options = {
        name: torch.cat([prompt.options[name] for prompt in prompts])
        if isinstance(value, Tensor) and value.ndim
        else value
        for name, value in first.options.items()
    }
    return [[torch.cat([prompt.embeds for prompt in prompts]), options]]
