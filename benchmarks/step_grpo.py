"""GRPO against Step-GRPO on the demo family: reward on held-out prompts against updates, passes and seconds.

    python -m benchmarks.step_grpo --out runs/grpo                     # every way, three seeds
    python -m benchmarks.step_grpo --ways step-grpo:4 --seeds 0 --rates 1e-3 3e-3   # tune one

Every update sees `batch` trajectories' worth of policy passes: Step-GRPO from `batch` prompts with k siblings
at each step, GRPO from batch / G prompts with G trajectories each. Same LoRA, optimiser, steps, CFG and
noise; the learning rate is each way's own, from the same list. It practises on captions that name a concept
and no style (or, with prompts=unseen, on 100 pairs of both that the generator never saw, or on all it knows);
50 others are held out: they are drawn with plain sampling and fixed seeds, scored by the DRM that was
optimised (clean latents) and by the independent judge, with the diversity of two seeds of a prompt. Passes
count latents that went through the policy forward and backward.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import time
from pathlib import Path

import numpy as np
import peft
import torch

from benchmarks.judging import (
    Prompt,
    choose_prompts,
    drm_scorer,
    free_prompts,
    measure,
    unseen_prompts,
)
from drm import flow, grpo, stepwise
from drm.grpo import GRPOSettings
from drm.lora import LORA_TARGETS, save_lora
from drm.ranges import Count, Seed
from training.config import LearningRate, argument
from training.data.batches import generator
from training.demo import data, text
from training.demo.export import Family, load_family
from training.demo.generator import SHIFT, guided_denoise, initial_noise
from training.demo.loop import bfloat16_autocast
from training.engine.atomic import replace_atomically

HELD_OUT_EVERY = 8
EVALUATED, SEEDS_EACH = 50, 4  # held-out prompts, pictures of each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One training."""

    way: str
    k: int
    rate: float
    seed: int
    updates: int
    batch: int = 16
    steps: int = 8
    cfg: float = 1.5
    rank: int = 16
    kl_weight: float = 0.01
    noise_level: float = 0.7
    kind: str = "sde"
    sibling: str = "random"
    end: float = 1.0
    prompts: str = "free"
    every: int = 10

    @property
    def name(self) -> str:
        parts = [f"{self.way}_{self.k}", f"lr{self.rate:g}", f"seed{self.seed}"]
        changed = [
            f"{field.name}{getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name not in ("way", "k", "rate", "seed", "updates", "every")
            and getattr(self, field.name) != field.default
        ]
        return "_".join(parts + changed)


class DemoPolicy:
    """The demo transformer with a LoRA, as grpo.py calls it: CFG inside, the unconditional branch
    detached.
    """

    def __init__(self, family: Family, rank: int, seed: int, cfg: float) -> None:
        self.family, self.cfg = family, cfg
        self.network = family.generator.transformer
        torch.manual_seed(seed)
        settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS))
        peft.inject_adapter_in_model(settings, self.network)
        self.learned = [p for name, p in self.network.named_parameters() if "lora_" in name]
        self.text = self.embed([""])

    def save(self, path: Path, facts: dict) -> None:
        """The LoRA as other tools load it, the scale folded in."""
        tensors = {}
        for name, module in self.network.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                down, up = (side["default"].weight.detach() for side in (module.lora_A, module.lora_B))
                tensors[f"transformer.{name}.lora_A.weight"] = down.clone()
                tensors[f"transformer.{name}.lora_B.weight"] = up * module.scaling["default"]
        save_lora(tensors, path, facts)

    @torch.no_grad()
    def embed(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = text.encode_ids(self.family.tokenizer, captions)
        return text.embed(self.family.generator.text_encoder, ids)

    def on(self, captions: list[str]) -> grpo.Policy:
        """velocity(x, sigma) for these captions, one a latent."""
        embeds, pooled = self.embed(captions)
        empty, empty_pooled = self.embed([""])

        def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
            count, at = len(x), torch.full((len(x),), sigma)
            with bfloat16_autocast("cpu"):
                asked = self.family.generator.velocity(x, at, embeds, pooled)
                with torch.no_grad():
                    free = self.family.generator.velocity(
                        x, at, empty.expand(count, -1, -1), empty_pooled.expand(count, -1)
                    )
            return free.float() + self.cfg * (asked.float() - free.float())

        return velocity

    @contextlib.contextmanager
    def switched_off(self):
        layers = [m for m in self.network.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter in self.learned:
                parameter.requires_grad_(True)

    def frozen_on(self, captions: list[str]) -> grpo.Policy:
        asked = self.on(captions)

        def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
            with self.switched_off():
                return asked(x, sigma)

        return velocity


def split_prompts(family: Family, which: str) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to learn from, and those kept aside. "free": concepts without a style, of which samplers draw
    this and that; "unseen": (concept, style) pairs that the generator never saw; "all": every such pair, each
    eighth concept aside.
    """
    if which == "free":
        practised, asked = free_prompts(family)
        return practised, asked[:EVALUATED]
    if which == "unseen":
        practised, rest = unseen_prompts(family)
        return practised, rest[:EVALUATED]
    prompts = choose_prompts(family, len(data.STYLES) * len(family.concepts))
    held = [prompt for prompt in prompts if prompt.concept % HELD_OUT_EVERY == 0]
    return [p for p in prompts if p.concept % HELD_OUT_EVERY], held[:EVALUATED]


def evaluate(family: Family, prompts: list[Prompt], setting: Setting) -> dict[str, float]:
    """Plain sampling of the held-out prompts, 12 steps, fixed seeds."""
    captions = [prompt.caption for prompt in prompts for _ in range(SEEDS_EACH)]
    denoise = guided_denoise(family.generator, family.tokenizer, captions, setting.cfg)
    latents, _ = stepwise.sample_stepwise(
        denoise,
        None,
        initial_noise([501 + i for i in range(len(captions))]),
        flow.schedule(12, SHIFT),
        num_branches=1,
        noise_level=0.0,
    )
    found = measure(family, latents, prompts, SEEDS_EACH)
    return {name: float(found[name].mean()) for name in ("drm", "judge", "judge_first", "diversity")}


def untrained(family: Family, held: list[Prompt], setting: Setting, out: Path) -> dict[str, float]:
    """`evaluate` of the policy before it learned, worked out once for all runs."""
    path = out / "untrained" / f"{setting.prompts}_cfg{setting.cfg:g}.json"
    if not path.exists():
        found = evaluate(family, held, setting)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_atomically(path, lambda temporary: temporary.write_text(json.dumps(found)))
    return json.loads(path.read_text())


def update(policy: DemoPolicy, prompts: list[Prompt], setting: Setting, number: int, settings: GRPOSettings):
    """Gradients of one update; its figures."""
    groups = setting.batch if setting.way == "step-grpo" else setting.batch // setting.k
    picked = torch.randint(len(prompts), (groups,), generator=generator(setting.seed, 1, number)).tolist()
    each = setting.batch // groups
    captions = [prompts[i].caption for i in picked for _ in range(each)]
    seeds = [1_000_000 * (setting.seed + 1) + setting.batch * number + i for i in range(setting.batch)]
    return grpo.roll_out(
        policy.on(captions),
        drm_scorer(policy.family, captions),
        initial_noise(seeds),
        flow.schedule(setting.steps, SHIFT),
        settings,
        seed=setting.seed * 7919 + number,
        items=list(range(setting.batch)),
        backward=lambda loss: loss.backward(),
        reference=policy.frozen_on(captions),
    )


def train(setting: Setting, out: Path) -> list[dict]:
    """One training's rows: held-out figures every few updates with what they cost; made once."""
    path = out / f"{setting.name}.json"
    if path.exists():
        return json.loads(path.read_text())
    family = load_family(Path("models"))
    learn, held = split_prompts(family, setting.prompts)
    policy = DemoPolicy(family, setting.rank, setting.seed, setting.cfg)
    settings = GRPOSettings(
        method=setting.way,
        num_branches=setting.k,
        noise_level=setting.noise_level,
        kind=setting.kind,
        kl_weight=setting.kl_weight,
        sibling=setting.sibling,
        end=setting.end,
    )
    optimizer = torch.optim.AdamW(policy.learned, lr=setting.rate, betas=(0.9, 0.999), weight_decay=1e-4)
    rows = [
        {"updates": 0, "passes": 0, "forwards": 0, "seconds": 0.0, **untrained(family, held, setting, out)}
    ]
    spent, passes, forwards, seen = 0.0, 0.0, 0.0, []
    for number in range(setting.updates):
        begun = time.perf_counter()
        figures = update(policy, learn, setting, number, settings).summary()
        torch.nn.utils.clip_grad_norm_(policy.learned, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        spent += time.perf_counter() - begun
        passes, forwards = passes + figures["passes"], forwards + figures["forwards"]
        seen.append(figures)
        if (number + 1) % setting.every == 0:
            row = {"updates": number + 1, "passes": passes, "forwards": forwards, "seconds": spent}
            row |= evaluate(family, held, setting)
            row |= {
                f"train/{name}": float(np.mean([f[name] for f in seen]))
                for name in ("rewards/mean", "spread", "kl", "gated", "ratio_error")
            }
            rows.append(row)
            seen = []
            print(
                f"{setting.name} {row['updates']:4d}  drm {row['drm']:.3f}  judge {row['judge']:.3f}"
                f"  diversity {row['diversity']:.3f}  kl {row['train/kl']:.2e}  {spent:.0f} s",
                flush=True,
            )
    policy.save(out / f"{setting.name}.safetensors", dataclasses.asdict(setting))
    replace_atomically(path, lambda temporary: temporary.write_text(json.dumps(rows)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/grpo"))
    parser.add_argument("--ways", nargs="+", default=["grpo:4", "step-grpo:2", "step-grpo:4", "step-grpo:6"])
    parser.add_argument("--rates", nargs="+", type=argument(LearningRate), default=[1e-3])
    parser.add_argument("--seeds", nargs="+", type=argument(Seed), default=[0, 1, 2])
    parser.add_argument("--updates", type=argument(Count), default=60)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Setting)}
    changes = {n: kinds[n](v) for n, v in (pair.split("=", 1) for pair in args.set)}
    for seed, rate, way in itertools.product(args.seeds, args.rates, args.ways):
        name, k = way.split(":")
        train(Setting(way=name, k=int(k), rate=rate, seed=seed, updates=args.updates, **changes), args.out)


if __name__ == "__main__":
    main()
