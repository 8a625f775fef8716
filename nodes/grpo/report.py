"""What a Step-GRPO run says and shows: on the node while it works, and at its end."""

import logging

import torch
from PIL import Image
from torch import Tensor

from ..pictures import to_image
from ..score import show_on_node
from . import picture
from .learner import Pictures
from .run import Run
from .watch import counted


def show(run: Run, line: str, vae: object | None) -> None:
    """The line, the curve and the latest pictures, on the node while it works."""
    show_on_node(line)
    if run.latest is None:
        return
    pictures = pictures_of(run, run.latest, vae)[:4]
    curve = picture.draw_curve(run.state.progress.rewards, run.held_out, run.training.iterations)
    sheet = picture.stacked(curve, picture.grid([(line.split(",")[0], pictures)]))
    run.show_picture(("JPEG", sheet, None))


def pictures_of(run: Run, pictures: Pictures, vae: object | None) -> list[Image.Image]:
    latent_format = run.models.model.get_model_object("latent_format")
    return picture.to_pictures(torch.cat(pictures.latents), latent_format, vae)


def before_and_after(run: Run, vae: object | None) -> Tensor:
    """The grid as an IMAGE (1, H, W, 3): the prompts kept aside, from equal noise."""
    before, after = (pictures_of(run, found, vae) for found in (run.before, run.best))
    return to_image(picture.grid([("before", before), ("after", after)]))


def loss_map(rewards: list[float]) -> dict[str, list[float]]:
    """The curve as the stock trainer's, never constant or of one point: the stock graph divides by its
    range.
    """
    curve = list(rewards) if len(rewards) > 1 else [*rewards, *rewards]
    if max(curve) == min(curve):
        curve[-1] += max(1e-6, abs(curve[-1]) * 1e-6)
    return {"loss": curve}


def report(run: Run) -> str:
    """What was checked, what was learned, and what to be wary of."""
    progress, training = run.state.progress, run.training
    watch, best = progress.watch, progress.watch.best
    few = max(1, len(progress.rewards) // 5)
    first, last = (sum(part) / few for part in (progress.rewards[:few], progress.rewards[-few:]))
    aside = "kept aside" if set(training.held_out).isdisjoint(training.learned) else "from other seeds"
    lines = [
        f"{training.method}, {counted(progress.iteration, 'iteration')},"
        f" {counted(len(training.learned), 'prompt')}",
        *run.notes,
        f"reward {first:+.3f} at first, {last:+.3f} at last (means of {few})",
        f"held-out score ({len(training.held_out)} prompts {aside}) {watch.start:+.3f} before,"
        f" {best.held_out:+.3f} after iteration {best.iteration}, which is the one kept",
        f"diversity {best.diversity:.2f} of what it was" + f", KL {best.kl:.2g}" * (training.kl_weight > 0),
        *warnings(run),
        f"LoRA: {run.path}",
    ]
    return "\n".join(lines)


def warnings(run: Run) -> list[str]:
    watch, best = run.state.progress.watch, run.state.progress.watch.best
    found = [
        (run.state.progress.cheated, "stopped early: the reward rose while the held-out score fell"),
        (
            best.held_out <= watch.start,
            "the held-out score never rose above its start: do not trust this LoRA",
        ),
        (best.diversity < 0.9, "pictures of one prompt became more alike: raise kl_weight or train shorter"),
    ]
    for is_so, sentence in found:
        if is_so:
            logging.warning("Step-GRPO: %s", sentence)
    return [f"WARNING: {sentence}" for is_so, sentence in found if is_so]
