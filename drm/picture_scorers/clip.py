"""CLIP models as scorers of pictures, read from a local folder in the layout of transformers.

    score = exp(logit_scale) * cos(embedding of the picture, embedding of the prompt)

CLIP itself (Radford et al. 2021) and models of its form that learned what people prefer, such as PickScore
(a CLIP ViT-H/14; Kirstain et al. 2023). Nothing is downloaded, unpickled or run from the folder.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .files import PICKLES, file_names, first_line, json_field

if TYPE_CHECKING:
    from PIL.Image import Image


class CLIPScorer(nn.Module):
    """clip: a transformers CLIPModel in float32; processor: its tokenizer and what prepares its pictures."""

    def __init__(self, clip: nn.Module, processor: Callable) -> None:
        super().__init__()
        self.clip, self.processor = clip, processor

    @torch.no_grad()
    def forward(self, prompt: str, pictures: Sequence["Image"]) -> Tensor:
        """Scores (n,), float32, of n RGB pictures of any sizes, higher is better; the prompt is cut to the
        text encoder's length.
        """
        inputs = self.processor(
            text=[prompt],
            images=list(pictures),
            padding=True,
            truncation=True,
            max_length=self.clip.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        return self.clip(**inputs.to(self.clip.device)).logits_per_image[:, 0]


def load_clip_scorer(folder: str | Path) -> CLIPScorer:
    """The scorer of a folder with config.json, .safetensors, tokenizer and preprocessor_config.json, on the
    CPU. Raises ValueError for a folder that is not so, or whose weights are not complete.
    """
    from transformers import AutoProcessor, CLIPModel

    folder = Path(folder)
    _check_files(folder)
    try:
        clip, loading = CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, and all mean the folder is not usable
        raise ValueError(f"cannot load a CLIP model from {folder}: {first_line(error)}") from error
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers would go on with random weights in their place
        raise ValueError(
            f"the weights in {folder} lack {missing[0]} ({len(missing)} in all): download them again"
        )
    return CLIPScorer(clip.float().requires_grad_(False), processor).eval()


def _check_files(folder: Path) -> None:
    """Raises ValueError for a folder that lacks a file, before transformers looks for it elsewhere."""
    names = file_names(folder)
    if "config.json" not in names:
        raise ValueError(f"{folder} holds no config.json: give the folder of a downloaded CLIP model")
    kind = json_field(folder / "config.json", "model_type")
    if kind != "clip":
        raise ValueError(
            f"{folder} holds a model of type {kind!r}: wanted 'clip', the type of CLIP and PickScore"
        )
    for wanted, found in (
        ("preprocessor_config.json", names & {"preprocessor_config.json", "processor_config.json"}),
        ("tokenizer.json", "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names),
    ):
        if not found:
            raise ValueError(
                f"{folder} holds no {wanted}: put it and the other small files of the model's page beside the"
                " weights (PickScore's are those of laion/CLIP-ViT-H-14-laion2B-s32B-b79K)"
            )
    if not any(name.endswith(".safetensors") for name in names):
        other = sorted(name for name in names if name.endswith(PICKLES))
        raise ValueError(
            f"{folder} holds {other[0] if other else 'no weights'} and no .safetensors, the only format that"
            " is opened, since others can run code: download model.safetensors from the model's page"
        )
