"""What a trained reward model knows of itself: held-out accuracy, and the facts of its file's header."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from drm import preference
from training.config import DRMConfig
from training.shards import EncodedPairs

SIGMA_PARTS = 4


def as_rows(win: Tensor, lose: Tensor, sigma: Tensor, weight: Tensor) -> Tensor:
    """A held-out batch to gather, (2 D + 2, B), of scores (B, D) of chosen and rejected at every depth."""
    return torch.cat([win.T, lose.T, sigma[None], weight[None]])


def in_order(gathered: Tensor, depths: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (n, D) of chosen and rejected and sigma (n,) of all held-out views, as HeldOutBatches numbers
    them.

    gathered: (processes * (2 D + 2), batches, B), batches of `as_rows`; padding has weight 0.
    """
    rows = gathered.unflatten(0, (-1, 2 * depths + 2)).permute(1, 2, 0, 3).flatten(1).cpu()
    *scores, sigma, _ = rows[:, rows[-1] > 0]
    scores = torch.stack(scores, dim=1)
    return scores[:, :depths], scores[:, depths:], sigma


def held_out_table(
    win: Tensor, lose: Tensor, sigma: Tensor, sources: list[str], depths: tuple[int, ...]
) -> dict:
    """Accuracy over everything, by quarter of sigma from low to high, and by source (of views in order);
    where there are early heads, win and lose (n, D) have more than one column, by depth too.
    """
    of = [source for source in sources for _ in range(SIGMA_PARTS)]
    by_depth = {
        str(depth): {
            "accuracy": preference.preference_accuracy(win[:, place], lose[:, place]),
            "by_sigma": preference.accuracy_by_sigma(win[:, place], lose[:, place], sigma, SIGMA_PARTS),
        }
        for place, depth in enumerate(depths)
    }
    win, lose, by_source = win[:, -1], lose[:, -1], {}
    for source in sorted(set(of)):
        mask = torch.tensor([name == source for name in of])
        by_source[source] = preference.preference_accuracy(win[mask], lose[mask])
    return {
        "pairs": len(sources),
        **by_depth[str(depths[-1])],
        "by_source": by_source,
        **({"by_depth": by_depth} if len(depths) > 1 else {}),
    }


def calibrated(win: Tensor, lose: Tensor, sigma: Tensor, depths: tuple[int, ...], bins: int) -> dict:
    """What a sampler needs to know of the scores: mean and std by sigma, and the lead that decides at each
    early depth. The two sides of a pair stand for siblings, which differ less; so the leads are on the safe
    side.
    """
    last = torch.cat([win[:, -1], lose[:, -1]])
    found = {"calibration": preference.calibration(last, sigma.repeat(2), num_bins=bins)}
    groups = torch.stack([win, lose], dim=1)
    leads = {
        str(depth): preference.decisive_lead(groups[..., place], groups[..., -1], sigma, num_bins=bins)
        for place, depth in enumerate(depths[:-1])
    }
    return found | ({"decisive": leads} if leads else {})


def export_facts(config: DRMConfig, pairs: EncodedPairs, steps: int, table: dict) -> dict:
    """The header's facts: name, text length, base, data and counts, accuracy, licence,
    what a sampler needs."""
    for_sampling = {key: table[key] for key in ("calibration", "decisive") if key in table}
    lengths = pairs.t5_lengths
    tokens = pairs.prompts([0], max(lengths) if lengths else None)[0].shape[1]
    facts = {
        "name": config.name,
        "text_length": pairs.meta.get("text_length") or tokens,
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
