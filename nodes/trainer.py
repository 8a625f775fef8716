"""Step-GRPO LoRA Trainer: a MODEL learns what a DRM likes, and leaves a LoRA that everything loads."""

from collections.abc import Sequence

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..drm.lora import load_lora
from . import adapters, folders
from .grpo import report
from .grpo.inputs import METHODS, Training, prompts_fingerprint, read_prompts, usual_side
from .grpo.learner import Models
from .grpo.preflight import check_caches
from .grpo.run import Run, say
from .grpo.watch import counted
from .loader import DRMModel
from .sampler import MAX_SEED
from .schema import found_by
from .score import show_on_node
from .step_loop import check

NO_LORA = "none"
PROMPTS = "a red heart, flat style\na smiling face\na green tree\na slice of pizza"


class StepGRPOLoRATrainer(io.ComfyNode):
    """Trains a LoRA on the MODEL with Step-GRPO."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepGRPOLoRATrainer",
            display_name="Step-GRPO LoRA Trainer (reward fine-tuning)",
            category="DRM",
            **found_by("reward", "grpo", "reinforcement", "fine-tune", "LoRA", "train", "NFT", "AWM"),
            description="Trains a LoRA that makes the model's pictures score higher with the DRM."
            " Cancel keeps what was learned; queued again, the same node goes on from there.",
            inputs=training_inputs(),
            outputs=training_outputs(),
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, lora_name: str) -> bool:
        return True

    @classmethod
    def fingerprint_inputs(cls, prompts: str, lora_name: str, **others: object) -> str:
        """ComfyUI keeps a result as long as this stays: files may change under the same name."""
        return f"{prompts_fingerprint(prompts)}:{folders.file_fingerprint('loras', lora_name)}"

    @classmethod
    def execute(
        cls,
        model: comfy.model_patcher.ModelPatcher,
        drm: comfy.model_patcher.ModelPatcher,
        clip: object,
        prompts: str,
        lora_name: str,
        vae: object | None = None,
        held_out_drm: comfy.model_patcher.ModelPatcher | None = None,
        **settings: object,
    ) -> io.NodeOutput:
        settings |= {side: settings[side] or usual_side(drm.model) for side in ("width", "height")}
        training = Training(prompts=tuple(read_prompts(prompts)), **settings)
        say(f"Reading {counted(len(training.prompts), 'prompt')}")
        with torch.inference_mode(False), torch.enable_grad():
            run = prepare(training, model, drm, held_out_drm or drm, clip, lora_name, vae)
            tensors = run.train()
            image = report.before_and_after(run, vae)
        text = report.report(run)
        show_on_node(text)
        trained, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
        rewards = run.state.progress.rewards
        shown = {**ui.PreviewImage(image, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(trained, tensors, report.loss_map(rewards), len(rewards), image, text, ui=shown)


def training_inputs() -> list[io.Input]:
    """What is connected, what is asked for, and how it is learned."""
    return [
        io.Model.Input(
            "model",
            tooltip="The model to train on: SD3.5, FLUX, Krea 2, Qwen-Image, Z-Image or their kind. It"
            " stays as it is.",
        ),
        DRMModel.Input("drm", display_name="DRM", tooltip="The reward model, from DRM Loader."),
        io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
        io.String.Input(
            "prompts",
            multiline=True,
            default=PROMPTS,
            tooltip="One a line, or the name of a text file (.txt) in ComfyUI's input folder. Of four and"
            " more, every fourth is kept aside: it is not trained on but looked at.",
        ),
        io.Int.Input(
            "width",
            default=0,
            min=0,
            max=4096,
            step=16,
            tooltip="Width of the pictures. 0: what the DRM was made for, at most 512.",
        ),
        io.Int.Input(
            "height", default=0, min=0, max=4096, step=16, tooltip="Height of the pictures, as width."
        ),
        io.Int.Input(
            "steps",
            default=10,
            min=2,
            max=200,
            tooltip="Denoising steps in training; 10 are usual, fewer than in drawing.",
        ),
        io.Float.Input(
            "cfg", default=4.5, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Classifier-free guidance."
        ),
        io.Combo.Input(
            "method",
            options=METHODS,
            default=METHODS[0],
            tooltip="step-grpo: rivals branch off at every step and are scored there. grpo: rivals are whole"
            " trajectories, scored at the end. nft, awm: rivals are finished pictures, noised anew to learn"
            " from; step-nft, step-awm: the DRM scores them noised. The last four are at home at cfg 1.",
        ),
        io.Int.Input(
            "num_branches",
            default=6,
            min=2,
            max=64,
            tooltip="Rivals in a group. In step-grpo each costs a pass of the DRM, in the others a whole"
            " picture.",
        ),
        io.Int.Input(
            "prompts_per_iteration", default=4, min=1, max=256, tooltip="Prompts an update learns from."
        ),
        io.Int.Input("iterations", default=100, min=1, max=100000, tooltip="Updates of the LoRA."),
        io.Float.Input(
            "learning_rate",
            default=1e-4,
            min=1e-7,
            max=1.0,
            step=1e-7,
            tooltip="1e-4 is the paper's; small models take 1e-3.",
        ),
        io.Int.Input("rank", default=32, min=1, max=512, tooltip="Rank of the LoRA."),
        io.Float.Input(
            "alpha",
            default=64.0,
            min=0.01,
            max=4096.0,
            step=0.01,
            tooltip="The LoRA's strength is alpha / rank.",
        ),
        io.Float.Input(
            "kl_weight",
            default=0.01,
            min=0.0,
            max=100.0,
            step=0.001,
            tooltip="How strongly the model is held to what it was. 0 saves one pass a step. 0.01 is what"
            " the authors of each method take.",
        ),
        io.Float.Input(
            "noise_level",
            default=0.7,
            min=0.01,
            max=2.0,
            step=0.01,
            tooltip="How far rivals differ in step-grpo and grpo.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=MAX_SEED,
            control_after_generate=False,
            tooltip="Seed of everything.",
        ),
        io.Int.Input(
            "save_every",
            default=10,
            min=1,
            max=100000,
            tooltip="The LoRA is saved after this many iterations, and once a minute.",
        ),
        io.Int.Input(
            "preview_every",
            default=10,
            min=1,
            max=100000,
            tooltip="After this many iterations the prompts kept aside are drawn, scored and shown. The best"
            " by that score is kept, and the training stops when it falls while the reward rises.",
        ),
        io.Float.Input(
            "ema_decay",
            default=0.0,
            min=0.0,
            max=0.9999,
            step=0.0001,
            tooltip="Above 0 the LoRA is a running mean over iterations, 0.9 over about ten of them.",
        ),
        io.String.Input(
            "name",
            default="step_grpo",
            tooltip="The LoRA is saved as loras/NAME_....safetensors in the output folder.",
        ),
        io.Combo.Input(
            "lora_name",
            options=[NO_LORA, *folders.safetensors_files("loras")],
            default=NO_LORA,
            tooltip="A LoRA of this node or of training.train_step_grpo to go on from, of the same rank.",
        ),
        io.Vae.Input("vae", optional=True, tooltip="For pictures in full; without it they are rough."),
        DRMModel.Input(
            "held_out_drm",
            display_name="held-out DRM",
            optional=True,
            tooltip="Scores the pictures kept aside. One that is not trained on notices best when the reward"
            " is being cheated.",
        ),
    ]


def training_outputs() -> list[io.Output]:
    """What a run leaves."""
    return [
        io.Model.Output("trained", display_name="MODEL", tooltip="The model with the LoRA."),
        io.LoraModel.Output("lora", display_name="LORA_MODEL", tooltip="For the stock Save LoRA Weights."),
        io.LossMap.Output(
            "rewards", display_name="LOSS_MAP", tooltip="The reward curve, for Plot Loss Graph."
        ),
        io.Int.Output("steps_done", display_name="steps", tooltip="Iterations done."),
        io.Image.Output("image", display_name="IMAGE", tooltip="Before and after, with the same seeds."),
        io.String.Output("report", display_name="report", tooltip="What was checked and what came of it."),
    ]


def encode(clip: object, texts: Sequence[str]) -> list[list]:
    """CONDITIONINGs of the prompts; ValueError when half of the memory that is free does not hold them."""
    found, cpu = [], torch.device("cpu")
    for text in texts:
        mm.throw_exception_if_processing_interrupted()
        found.append(adapters.encode_prompt(clip, text))
        needed = len(texts) * sum(embeds.nbytes for embeds, _ in found[0])
        if len(found) == 1 and needed > mm.get_free_memory(cpu) / 2:
            raise ValueError(
                f"{len(texts)} prompts take {needed / 2**30:.1f} GB as embeddings and"
                f" {mm.get_free_memory(cpu) / 2**30:.1f} GB are free: give fewer prompts"
            )
    return found


def prepare(
    training: Training,
    model: comfy.model_patcher.ModelPatcher,
    drm: comfy.model_patcher.ModelPatcher,
    judge: comfy.model_patcher.ModelPatcher,
    clip: object,
    lora_name: str,
    vae: object | None,
) -> Run:
    """Checks that everything belongs together; ValueError says what does not."""
    check_caches(model)
    lora = None
    if lora_name != NO_LORA:
        folders.check_file("loras", lora_name)
        lora, _ = load_lora(folder_paths.get_full_path("loras", lora_name))
    prompts = encode(clip, training.prompts)
    sampling = model.get_model_object("model_sampling")
    empty = adapters.empty_latent(model, training.width, training.height)
    for condition in prompts:
        scored = adapters.ScoringPrompts(condition, sampling.percent_to_sigma)
        for one in (drm, judge):
            check(model, one, scored, empty)
    if getattr(sampling, "noise_scale", 1.0) != 1.0:
        raise ValueError(
            f"the MODEL's noise scale is {sampling.noise_scale}, wanted 1: take that patch off it"
        )
    if vae is not None and vae.latent_channels != empty.shape[1]:
        raise ValueError(
            f"the VAE decodes latents of {vae.latent_channels} channels and the MODEL draws {empty.shape[1]}:"
            " connect the VAE that belongs to the model"
        )
    models = Models(
        model=model,
        drm=drm,
        judge=judge,
        prompts=prompts,
        negative=adapters.encode_prompt(clip, ""),
        lora=lora,
    )
    return Run(training, models, lambda run, line: report.show(run, line, vae))
