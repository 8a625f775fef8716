"""How good a policy is on prompts it never learned from, drawn plainly with noises of their own.

    held_out   mean over prompts, seeds and sigmas of the DRM's score of the finished latent, noised to sigma
    diversity  rms difference of two seeds' latents of one prompt, over the square root of two: 1 for
               unrelated latents of unit variance, 0 where every seed gives the same
    others     more reward models in the same way; baselines by their own scores of the decoded pictures

Everything random is a function of evaluate.seed and the prompt's number: each evaluation of each run sees the
same noises, so scores compare between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from drm import DRM, flow
from training.data.batches import generator
from training.data.decoders import Decode
from training.data.prompt_cache import PromptCache
from training.evaluation.baselines import Score
from training.grpo.diffusers_policy import DiffusersPolicy
from training.grpo.step_grpo_config import HeldOutConfig, RolloutConfig

START, SCORING = 21, 22  # streams of generator()


@torch.no_grad()
def draw(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, sigmas: Tensor) -> Tensor:
    """Euler steps from noise (B, C, H, W) at sigmas[0] to the clean latents."""
    x = noise
    for sigma, sigma_next in itertools.pairwise(sigmas.tolist()):
        x = x + velocity(x, sigma) * (sigma_next - sigma)
    return x


def diversity(latents: Tensor) -> Tensor:
    """(B, S, C, H, W) -> (B,); 0 for one seed."""
    pairs = list(itertools.combinations(range(latents.shape[1]), 2))
    if not pairs:
        return torch.zeros(len(latents), device=latents.device)
    apart = [(latents[:, i] - latents[:, j]).square().mean(dim=(1, 2, 3)).sqrt() for i, j in pairs]
    return torch.stack(apart).mean(0) / 2**0.5


class HeldOut:
    """The held-out prompts and everything that scores them."""

    def __init__(
        self,
        config: HeldOutConfig,
        rollout: RolloutConfig,
        prompts: Sequence[str],
        cache: PromptCache,
        *,
        drm: DRM,
        others: dict[str, DRM],
        baselines: dict[str, Score],
        decode: Decode | None,
        device: torch.device,
    ) -> None:
        self.config, self.rollout, self.cache = config, rollout, cache
        self.prompts = list(prompts)[: config.prompts]
        self.drms, self.baselines, self.decode = {"held_out": drm, **others}, baselines, decode
        self.device = device
        self.names = [*self.drms, *self.baselines, "diversity"]

    def latents(self, policy: DiffusersPolicy, numbers: Sequence[int]) -> Tensor:
        """Finished latents of these prompts and all seeds, (len(numbers), seeds, C, H, W)."""
        side, seeds = self.rollout.resolution // 8, self.config.seeds
        shape = (policy.transformer.config.in_channels, side, side)
        noise = torch.stack(
            [
                torch.randn(shape, generator=generator(self.config.seed, START, number, seed))
                for number in numbers
                for seed in range(seeds)
            ]
        ).to(self.device)
        prompt, empty = self._embeds([self.prompts[n] for n in numbers], seeds), self._embeds([""], 1)
        sigmas = flow.schedule(self.config.steps, self.rollout.shift)
        parts = []
        for part in torch.arange(len(noise)).split(self.config.batch):
            mine = tuple(one[part.to(self.device)] for one in prompt)

            def velocity(x: Tensor, sigma: float, mine: tuple[Tensor, Tensor] = mine) -> Tensor:
                return policy.guided(x, sigma, mine, empty, self.rollout.cfg)

            parts.append(draw(velocity, noise[part.to(self.device)], sigmas))
        return torch.cat(parts).unflatten(0, (len(numbers), seeds))

    def _embeds(self, prompts: Sequence[str], times: int) -> tuple[Tensor, Tensor]:
        return tuple(part.to(self.device).repeat_interleave(times, 0) for part in self.cache.embeds(prompts))

    def table(self, policy: DiffusersPolicy, numbers: Sequence[int]) -> Tensor:
        """(len(numbers), len(names)) float64: what each scorer says of each prompt, mean over its seeds."""
        latents = self.latents(policy, numbers)
        rows = []
        for number, of_prompt in zip(numbers, latents, strict=True):
            row = [self._ensemble(drm, number, of_prompt) for drm in self.drms.values()]
            if self.baselines:
                pictures = self.decode(of_prompt)
                row += [_mean(score(self.prompts[number], pictures)) for score in self.baselines.values()]
            rows.append(row)
        scores = torch.tensor(rows, dtype=torch.float64, device=self.device).reshape(len(latents), -1)
        return torch.cat([scores, diversity(latents).double()[:, None]], dim=1)

    def _ensemble(self, drm: DRM, number: int, latents: Tensor) -> float:
        prompt = self._embeds([self.prompts[number]], 1)
        found = []
        for index, sigma in enumerate(self.config.sigmas):
            rng = generator(self.config.seed, SCORING, number, index)
            noise = torch.randn(latents.shape, generator=rng).to(latents.device)
            found.append(drm.score(flow.add_noise(latents, noise, sigma), sigma, *prompt))
        return torch.stack(found).double().mean().item()

    def pictures(self, policy: DiffusersPolicy, numbers: Sequence[int]) -> list[list[Image.Image]]:
        """A row of pictures for each of these prompts, a column for each seed."""
        return [self.decode(row) for row in self.latents(policy, numbers)]


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values))


def grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Pictures of one size, row by row, in one."""
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width, y * height))
    return sheet
