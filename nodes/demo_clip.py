"""DRM Demo CLIP Loader: the demo model's own small text encoder as a ComfyUI CLIP.

File: a transformers CLIPTextModel in safetensors. Header: format = "drm-demo-clip", version = "1", config =
JSON of CLIPTextConfig's arguments, tokenizer = the JSON of a `tokenizers` tokenizer. A text becomes BOS +
tokens + EOS, padded to the model's length without a mask; prompt_embeds is the last hidden state, pooled its
row at the first EOS.
"""

import json
import logging
from pathlib import Path

import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from . import folders
from .score import show_on_node

FORMAT, VERSION = "drm-demo-clip", "1"
KIND = "text_encoders"
# Letters after these are of another script.
LAST_LATIN = 0x24F
ENGLISH = "The demo model reads English alone: this prompt has letters that it never saw."


class DemoTokenizer:
    """Text to one row of (token, weight), in the interface comfy.sd1_clip.SD1Tokenizer expects."""

    def __init__(self, embedding_directory: object = None, tokenizer_data: dict | None = None) -> None:
        from tokenizers import Tokenizer

        config = tokenizer_data["drm_demo_config"]
        self.tokenizer = Tokenizer.from_str(tokenizer_data["drm_demo_tokenizer"])
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.length = config["max_position_embeddings"]
        self.bos, self.eos, self.pad = (config[f"{name}_token_id"] for name in ("bos", "eos", "pad"))

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, **options: object
    ) -> list[list[tuple]]:
        escaped = comfy.sd1_clip.escape_important(text)
        unweighted = options.get("disable_weights", False)
        parts = [(escaped, 1.0)] if unweighted else comfy.sd1_clip.token_weights(escaped, 1.0)
        tokens = []
        for word, (part, weight) in enumerate(parts, start=1):
            ids = self.tokenizer.encode(comfy.sd1_clip.unescape_important(part), add_special_tokens=False).ids
            tokens += [(token, weight, word) for token in ids]
        if len(tokens) > self.length - 2:
            logging.warning(
                f"The demo text encoder reads {self.length - 2} tokens, the prompt has {len(tokens)}: its"
                " end is cut off."
            )
        if any(letter.isalpha() and ord(letter) > LAST_LATIN for letter in text):
            logging.warning(ENGLISH)
            show_on_node(ENGLISH)
        row = [(self.bos, 1.0, 0), *tokens[: self.length - 2], (self.eos, 1.0, 0)]
        row += [(self.pad, 1.0, 0)] * (self.length - len(row))
        return [row if return_word_ids else [entry[:2] for entry in row]]

    def untokenize(self, pairs: list[tuple]) -> list[tuple]:
        return [(pair, self.tokenizer.id_to_token(pair[0])) for pair in pairs]

    def state_dict(self) -> dict:
        return {}


class DemoTextModel(torch.nn.Module, comfy.sd1_clip.ClipTokenWeightEncoder):
    """The encoder under SD1ClipModel; weights sit below `transformer.text_model`, where LoRA files look for
    them.
    """

    def __init__(
        self, device: object = "cpu", dtype: torch.dtype | None = None, model_options: dict | None = None
    ) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel

        config = CLIPTextConfig(**model_options["drm_demo_config"])
        model = CLIPTextModel(config)
        # transformers 5 has no inner model of its own.
        text_model = getattr(model, "text_model", model).to(device, dtype).eval().requires_grad_(False)
        self.transformer = torch.nn.ModuleDict({"text_model": text_model})
        self.special_tokens = {
            "start": config.bos_token_id,
            "end": config.eos_token_id,
            "pad": config.pad_token_id,
        }

    def encode(self, tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
        """last_hidden_state (n, T, D) and pooled (n, D), float32."""
        text_model = self.transformer["text_model"]
        output = text_model(input_ids=torch.tensor(tokens, device=next(text_model.parameters()).device))
        return output.last_hidden_state.float(), output.pooler_output.float()

    def load_sd(self, state_dict: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        return self.transformer.load_state_dict(state_dict, strict=False)

    def set_clip_options(self, options: dict) -> None:
        """CLIP Set Last Layer and the like: the demo model was trained on the last layer and offers no
        other.
        """

    def reset_clip_options(self) -> None:
        """See set_clip_options."""


class DemoTokenizers(comfy.sd1_clip.SD1Tokenizer):
    """{"l": rows}, the form in which ComfyUI passes tokens around."""

    def __init__(self, embedding_directory: object = None, tokenizer_data: dict | None = None) -> None:
        super().__init__(embedding_directory, tokenizer_data or {}, tokenizer=DemoTokenizer)

    def state_dict(self) -> dict:
        """CLIP Save and Save Checkpoint ask for it. ValueError: no loader reads what they would write."""
        raise ValueError(
            "The demo's text encoder cannot be saved by ComfyUI: no node would load the file. Keep using"
            " drm_demo_emoji_clip.safetensors with DRM Demo CLIP Loader, and save a changed MODEL alone with"
            " ModelSave."
        )


class DemoEncoder(comfy.sd1_clip.SD1ClipModel):
    """The model ComfyUI's CLIP object holds."""

    def __init__(
        self, device: object = "cpu", dtype: torch.dtype | None = None, model_options: dict | None = None
    ) -> None:
        super().__init__(device=device, dtype=dtype, model_options=model_options, clip_model=DemoTextModel)


def read_file(path: str) -> tuple[dict, str, dict[str, Tensor]]:
    """CLIPTextConfig arguments, tokenizer JSON and weights. Raises ValueError when the file is not a demo
    encoder.
    """
    from safetensors import SafetensorError, safe_open

    name = Path(path).name
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            found = header.get("format"), header.get("version")
            if found != (FORMAT, VERSION):
                raise ValueError(
                    f"'{name}' is not a text encoder of the demo family (format {found[0]!r}, version"
                    f" {found[1]!r}; wanted {FORMAT!r}, {VERSION!r}): choose drm_demo_emoji_clip.safetensors,"
                    " or load it with ComfyUI's own CLIP loaders"
                )
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return json.loads(header["config"]), header["tokenizer"], weights
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"'{name}' cannot be read ({error}): it is damaged or cut off, get the file again"
        ) from error


def load_demo_clip(path: str) -> comfy.sd.CLIP:
    """The file as a CLIP, in float32: it is small, and a CPU is slow in anything else."""
    config, tokenizer, weights = read_file(path)
    target = comfy.supported_models_base.ClipTarget(DemoTokenizers, DemoEncoder)
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=None,
        tokenizer_data={"drm_demo_config": config, "drm_demo_tokenizer": tokenizer},
        parameters=sum(tensor.numel() for tensor in weights.values()),
        model_options={"dtype": torch.float32, "drm_demo_config": config},
    )
    missing, unexpected = clip.load_sd(weights)
    if missing or unexpected:
        raise ValueError(
            f"'{Path(path).name}' does not hold the weights its header describes (missing: {missing[:3]},"
            f" unknown: {unexpected[:3]}): get the file again"
        )
    return clip


class DRMDemoCLIPLoader(io.ComfyNode):
    """Loads the demo model's text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DRMDemoCLIPLoader",
            display_name="DRM Demo CLIP Loader",
            category="DRM",
            description="Loads the text encoder of the demo model that ships with this pack. For SD3.5-Medium"
            " use ComfyUI's own loaders.",
            inputs=[
                io.Combo.Input(
                    "clip_name",
                    options=folders.safetensors_files(KIND),
                    default="drm_demo_emoji_clip.safetensors",
                    tooltip="A text encoder of the demo family, in models/text_encoders.",
                )
            ],
            outputs=[
                io.Clip.Output("clip", display_name="CLIP", tooltip="For CLIP Text Encode and Load LoRA.")
            ],
        )

    @classmethod
    def validate_inputs(cls, clip_name: str) -> bool:
        return True

    @classmethod
    def fingerprint_inputs(cls, clip_name: str) -> str:
        return folders.file_fingerprint(KIND, clip_name)

    @classmethod
    def execute(cls, clip_name: str) -> io.NodeOutput:
        folders.check_file(KIND, clip_name)
        return io.NodeOutput(load_demo_clip(folder_paths.get_full_path_or_raise(KIND, clip_name)))
