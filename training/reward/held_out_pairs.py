"""What a trained reward model knows of itself: held-out accuracy, and the facts of its file's header."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from drm import preference
from training.config import DRMConfig
from training.data.shards import EncodedPairs

SIGMA_PARTS = 4
PIXELS = 8  # of a latent's side, for every VAE of SD3's kind


def as_rows(chosen: Tensor, rejected: Tensor, sigma: Tensor, weight: Tensor) -> Tensor:
    """A held-out batch to gather, (4, B), of scores (B,) of chosen and rejected."""
    return torch.stack([chosen, rejected, sigma, weight])


def in_order(gathered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of chosen and rejected and sigma, (n,) each, of all held-out views, as HeldOutBatches numbers
    them.

    gathered: (processes * 4, batches, B), batches of `as_rows`; padding has weight 0.
    """
    rows = gathered.unflatten(0, (-1, 4)).permute(1, 2, 0, 3).flatten(1).cpu()
    chosen, rejected, sigma, _ = rows[:, rows[-1] > 0]
    return chosen, rejected, sigma


def held_out_table(chosen: Tensor, rejected: Tensor, sigma: Tensor, sources: list[str]) -> dict:
    """Accuracy over everything, by quarter of sigma from low to high, and by source (of views in order)."""
    of = [source for source in sources for _ in range(SIGMA_PARTS)]
    by_source = {}
    for source in sorted(set(of)):
        mask = torch.tensor([name == source for name in of])
        by_source[source] = preference.preference_accuracy(chosen[mask], rejected[mask])
    return {
        "pairs": len(sources),
        "accuracy": preference.preference_accuracy(chosen, rejected),
        "by_sigma": preference.accuracy_by_sigma(chosen, rejected, sigma, SIGMA_PARTS),
        "by_source": by_source,
    }


def calibrated(chosen: Tensor, rejected: Tensor, sigma: Tensor, bins: int) -> dict:
    """Mean and std of the scores (n,) of both sides by sigma, for the file's header."""
    return {
        "calibration": preference.calibration(torch.cat([chosen, rejected]), sigma.repeat(2), num_bins=bins)
    }


def export_facts(config: DRMConfig, pairs: EncodedPairs, steps: int, table: dict) -> dict:
    """The header's facts: name, text length, pixels of a side, base, data and counts, accuracy, licence,
    what a sampler needs."""
    for_sampling = {key: table[key] for key in ("calibration",) if key in table}
    lengths = pairs.t5_lengths
    tokens = pairs.prompts([0], max(lengths) if lengths else None)[0].shape[1]
    facts = {
        "name": config.name,
        "text_length": pairs.meta.get("text_length") or tokens,
        "resolution": PIXELS * min(pairs.latent_shape[1:]),
        "base": Path(config.model.base).name,
        "trained": config.model.train,
        "data": dict(sorted(Counter(pairs.columns["source"]).items())),
        "pairs_seen": steps * config.train.global_batch,
        "steps": steps,
        "held_out": {key: value for key, value in table.items() if key not in for_sampling},
        "license": config.licence,
        "config_sha256": config.hash(),
    }
    return facts | for_sampling
