"""DRM Head Trainer: picks become a reward model of a few megabytes that reads the tokens of the MODEL."""

import hashlib
import os
import re
from pathlib import Path

import comfy.model_patcher
import folder_paths
import torch
from comfy_api.latest import io, ui

from . import adapters, picked_tokens, trunk
from .head_run import HeadRun, as_patcher, check_not_another, head_report, identity_of
from .loader import KIND, DRMModel
from .pictures import to_image
from .sampler import MAX_SEED
from .schema import found_by
from .score import show_on_node

PICKS = "drm_picks"


def picks_root() -> Path:
    """Where the folders of picks lie."""
    return Path(folder_paths.get_output_directory()) / PICKS


class DRMHeadTrainer(io.ComfyNode):
    """Trains a shared head on picks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DRMHeadTrainer",
            display_name="DRM Head Trainer (your taste)",
            category="DRM",
            **found_by("reward", "preference", "taste", "train"),
            description="Teaches a reward model your taste: a head of a few megabytes that reads the tokens"
            " of the model you already have, learned from the picks of DRM Pick. Cancel keeps the best yet.",
            inputs=trainer_inputs(),
            outputs=[
                DRMModel.Output("drm", display_name="DRM", tooltip="The head, for this MODEL."),
                io.String.Output("file", display_name="file", tooltip="Its name in DRM Loader."),
                io.String.Output(
                    "report", display_name="report", tooltip="How good it is on prompts it did not see."
                ),
                io.Image.Output(
                    "plot", display_name="plot", tooltip="Loss and accuracy on held-out pairs, by step."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, picks: str, **others: object) -> str:
        """New picks are a new training."""
        files = sorted((picks_root() / picks).glob("*.safetensors")) if picks.strip() else []
        listed = [(file.name, os.stat(file).st_mtime_ns) for file in files]
        return hashlib.sha256(repr(listed).encode()).hexdigest()

    @classmethod
    def execute(
        cls,
        model: comfy.model_patcher.ModelPatcher,
        clip: object,
        picks: str,
        blocks: str,
        steps: int,
        rate: float,
        seed: int,
        name: str,
        better: dict | None = None,
        worse: dict | None = None,
        prompt: str = "",
    ) -> io.NodeOutput:
        with torch.inference_mode(False), torch.enable_grad():
            run, notes = prepare(
                model, clip, picks, blocks, name, better, worse, prompt, steps=steps, rate=rate, seed=seed
            )
            found = run.train()
            drm = as_patcher(run.path)
        text, curve = head_report(run, notes, found), to_image(run.curve())
        show_on_node(text)
        shown = {**ui.PreviewImage(curve, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(drm, run.path.name, text, curve, ui=shown)


def trainer_inputs() -> list[io.Input]:
    """What is connected, and how it is learned."""
    return [
        io.Model.Input(
            "model", tooltip="The model the pictures come from, with the LoRAs you use. It stays as it is."
        ),
        io.Clip.Input("clip", tooltip="Its text encoder."),
        io.String.Input(
            "picks",
            default="my_taste",
            tooltip="Name of the picks, as in DRM Pick. Not read with better and worse.",
        ),
        io.String.Input(
            "blocks",
            default="",
            tooltip="Blocks whose tokens are read, such as 4, 8, 12; 1 is the first. Empty: three, up to half"
            " of the model. Later ones cost more at every score.",
        ),
        io.Int.Input("steps", default=300, min=1, max=100000, tooltip="Steps of 16 pairs each."),
        io.Float.Input(
            "rate",
            default=0.0003,
            min=0.000001,
            max=1.0,
            step=0.0001,
            round=False,
            tooltip="Learning rate of AdamW.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=MAX_SEED,
            control_after_generate=False,
            tooltip="Seed of everything: weights, noise, order, and which prompts are held out.",
        ),
        io.String.Input(
            "name", default="my_taste", tooltip="The head is saved as models/drm/NAME.safetensors."
        ),
        io.Latent.Input(
            "better", optional=True, tooltip="Instead of picks: latents, each better than that in worse."
        ),
        io.Latent.Input("worse", optional=True, tooltip="As many latents, each worse than that in better."),
        io.String.Input(
            "prompt",
            default="",
            multiline=True,
            optional=True,
            tooltip="The prompt of better and worse, or one a line for each pair.",
        ),
    ]


def prepare(
    model: comfy.model_patcher.ModelPatcher,
    clip: object,
    picks: str,
    blocks: str,
    name: str,
    better: dict | None,
    worse: dict | None,
    prompt: str,
    **settings: float,
) -> tuple[HeadRun, list[str]]:
    """The run, and what is to be said of its picks. ValueError says what does not fit. settings: steps, rate
    and seed.
    """
    from ..drm.head_training import HeadTrainer, split_by_prompt

    check_settings(**settings)
    path = head_path(name)
    check_not_another(path)
    facts = trunk.trunk_facts(model, chosen_blocks(blocks, model))
    compared, notes, source = read_picks(model, facts.to_dict(), picks, better, worse, prompt)
    prompts = picked_tokens.Prompts(clip, model)
    check_model(model, prompts, compared)
    learned, held_out = split_by_prompt(compared, settings["seed"])
    trainer = HeadTrainer(facts, learned, held_out, device=model.load_device, **settings)
    about = {
        "name": path.stem,
        "text": type(getattr(clip, "cond_stage_model", clip)).__name__,
        "picks": {
            "from": source[0],
            "batches": len(compared),
            "pairs": sum(len(batch.pairs) for batch in compared),
            "prompts": len({batch.prompt for batch in compared}),
        },
        "settings": settings,
    }
    about_batches = [[batch.prompt, batch.picks, batch.count] for batch in compared]
    identity = identity_of(facts.to_dict(), settings, about_batches, source)
    return HeadRun(trainer, model, prompts, path, about, identity), notes


def read_picks(
    model: comfy.model_patcher.ModelPatcher,
    own: dict,
    picks: str,
    better: dict | None,
    worse: dict | None,
    prompt: str,
) -> tuple[list, list[str], list]:
    """Batches, notes on them, and where they come from (a name, then what tells them from others)."""
    from ..drm.picks import folder_of

    if (better is None) != (worse is None):
        missing = "worse" if worse is None else "better"
        raise ValueError(f"{missing} is not connected: connect both batches, or neither to learn from picks")
    if better is not None:
        compared = picked_tokens.compared_latents(better, worse, prompt, model)
        digest = hashlib.sha256(b"".join(batch.latents([0, 1]).numpy().tobytes() for batch in compared))
        return compared, [], ["better and worse", digest.hexdigest()]
    records, notes = picked_tokens.read_folder(folder_of(picks_root(), picks.strip()), own)
    names = [record.path.name for record in records]
    return picked_tokens.compared_records(records, model), notes, [picks.strip(), names]


def check_settings(steps: int, rate: float, seed: int) -> None:
    """Raises ValueError for settings that linked values can bring past the widgets' limits."""
    if not 1 <= steps <= 100000:
        raise ValueError(f"steps is {steps}: give a number from 1 to 100000 (300 is usual)")
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}: give a number above 0 and at most 1 (0.0003 is usual)")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed is {seed}: give a number from 0 to {MAX_SEED}")


def check_model(
    model: comfy.model_patcher.ModelPatcher, prompts: picked_tokens.Prompts, compared: list
) -> None:
    """Raises ValueError when the MODEL cannot be sampled with these prompts and sizes."""
    first = compared[0]
    prompts.need([first.prompt])
    for shape in {batch.shape for batch in compared}:
        adapters.check_policy(model, prompts.known[first.prompt], torch.zeros(1, *shape))


def chosen_blocks(blocks: str, model: comfy.model_patcher.ModelPatcher) -> tuple[int, ...]:
    """Numbers in the text; without any, three up to where half of the blocks' weights lie."""
    numbers = re.split(r"[\s,;]+", blocks.strip())
    if all(re.fullmatch(r"\d{1,4}", number) for number in numbers):
        return tuple(sorted({int(number) for number in numbers}))
    if numbers != [""]:
        raise ValueError(f"blocks is '{blocks}': give numbers such as 4, 8, 12, or leave it empty")
    count = len(trunk.blocks_of(model.model))
    half = next(n for n in range(1, count + 1) if trunk.share_of_pass(model.model, n) >= 0.5)
    return tuple(sorted({max(1, round(half * part / 3)) for part in (1, 2, 3)}))


def head_path(name: str) -> Path:
    """models/drm/NAME.safetensors; ValueError for a name that is none."""
    from ..drm.picks import folder_of

    stem = name.strip().removesuffix(".safetensors")
    return folder_of(Path(folder_paths.models_dir) / KIND, stem).with_name(f"{stem}.safetensors")
