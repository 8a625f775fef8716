"""Pairs of two pictures that the raters of training.demo.raters rated, and which of them they prefer.

    preferred  two drawings of one caption by samplers as people set them: what a reward model is asked in a
               sampler and in fine-tuning
    mixed      two drawings of captions mixed with this one
    augmented  the real icon, augmented in two ways
    loose      two drawings without guidance, which differ more
    free       two drawings of the concept's caption without a style, by one sampler each kind

P(the raters' favourite is the better) = sigmoid(SHARPNESS * difference in utility); captions and pairs on
which they have an opinion come more often. `crossed` sets two pictures against two captions.
"""

from __future__ import annotations

import dataclasses

import torch

from training.demo import data
from training.demo.drawings import ALIKE, FREE_WAYS, Drawings

# the judge of the benchmarks agreed with 73 % of the raters' choices, and with 89 % where utilities differed
# by more than 1
SHARPNESS = 2.0
# how often pairs come on which the raters have no opinion: as often as if utilities differed by this
INDIFFERENT = 0.1
# kind: the family both pictures are of; drawings of captions without a style, a family for each sampler
FREE = tuple(f"free_{number}" for number in range(len(FREE_WAYS)))
TWO_OF = {"preferred": "alike", **{name: name for name in ("mixed", "augmented", "loose", *FREE)}}
# families of crossed pictures and how often each; of so many pictures the most confusing one is taken
CROSSED = {"augmented": 0.5, "drawn": 0.15, "mixed": 0.15, "loose": 0.2}
CROSSED_AMONG = (8, 32, 128, 512)


@dataclasses.dataclass(frozen=True)
class RatedPictures:
    """Latents (M, ...), the raters' utility of every concept (M, concepts), and owner (M,), the icon whose
    caption each shows. families: where each family's pictures are (F,); own: a table of each icon's pictures
    of a family (N, most), -1 beyond the last.
    """

    latents: torch.Tensor
    utility: torch.Tensor
    owner: torch.Tensor
    families: dict[str, torch.Tensor]
    own: dict[str, torch.Tensor]

    @classmethod
    def of(cls, drawings: Drawings, icons: int) -> RatedPictures:
        """Drawings of `icons` icons by the families of their parts."""
        families = {}
        for family in ("drawn", *dict.fromkeys(TWO_OF.values())):
            member = [family in families_of(part) for part in drawings.part]
            families[family] = data.indices(torch.tensor(member))
        own = {family: places_of(drawings.icon, places, icons) for family, places in families.items()}
        return cls(drawings.latents, drawings.utility, drawings.icon, families, own)

    def own_utility(self, concept: torch.Tensor, icons: torch.Tensor, family: str) -> torch.Tensor:
        """What the raters think of each icon's pictures (B, most), NaN where it has no more; concept (N,)."""
        places = self.own[family][icons]
        found = self.utility[places.clamp_min(0), concept[icons][:, None]]
        return found.masked_fill(places < 0, torch.nan)


def families_of(part: str) -> tuple[str, ...]:
    """The families a part of training.demo.drawings belongs to."""
    name = part.split("_")[0]
    if name in ("mixed", "augmented", "loose"):
        return (name,)
    if part in FREE:
        return (part,)
    return ("drawn", "alike") if part in ALIKE else ("drawn",)


def places_of(owner: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
    """Owners (M,) below `count`, some of their places (F,) -> (count, most): the places of each owner's
    entries, -1 beyond the last.
    """
    owned = owner[places]
    order = places[owned.argsort(stable=True)]
    rows = order.split(torch.bincount(owned, minlength=count).tolist())
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def askable(
    rated: RatedPictures,
    concept: torch.Tensor,
    kind: str,
    allowed: torch.Tensor,
    count: int,
    rng: torch.Generator,
) -> torch.Tensor:
    """Icons (count,) of `allowed` (N,) to ask a kind of pair of; those whose pictures differ most in utility
    most often.
    """
    family = TWO_OF[kind]
    candidates = data.indices(allowed & ((rated.own[family] >= 0).sum(1) >= 2))
    found = rated.own_utility(concept, candidates, family)
    differ = found.nan_to_num(-torch.inf).amax(1) - found.nan_to_num(torch.inf).amin(1)
    return candidates[torch.multinomial(differ + INDIFFERENT, count, replacement=True, generator=rng)]


def rated_pairs(
    rated: RatedPictures, concept: torch.Tensor, icons: torch.Tensor, kind: str, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each icon's caption two pictures, the raters' favourite first, and their probability that it is the
    better (B,).
    """
    utility, own = rated.own_utility(concept, icons, TWO_OF[kind]), rated.own[TWO_OF[kind]][icons]
    there = (~utility.isnan()).float()
    first = torch.multinomial(there, 1, generator=rng)
    mine = utility.gather(1, first)
    weight = (utility - mine).abs().nan_to_num(0) + INDIFFERENT
    second = torch.multinomial((weight * there).scatter(1, first, 0.0), 1, generator=rng)
    place, other = own.gather(1, first)[:, 0], own.gather(1, second)[:, 0]
    gap = (mine - utility.gather(1, second))[:, 0]
    better, worse = torch.where(gap >= 0, place, other), torch.where(gap >= 0, other, place)
    return rated.latents[better].float(), rated.latents[worse].float(), (SHARPNESS * gap.abs()).sigmoid()


def crossed(
    rated: RatedPictures,
    concept: torch.Tensor,
    style: torch.Tensor,
    count: int,
    allowed: torch.Tensor,
    rng: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures of two concepts in one style that the raters take for one another, each with both captions:
    places (count, 2), the icons whose captions they show (count, 2), and the utility of picture i under
    caption j (count, 2, 2). concept, style and allowed are of the icons (N,).
    """
    chosen, shares = [], torch.tensor(list(CROSSED.values()))
    members = {
        family: rated.families[family][allowed[rated.owner[rated.families[family]]]] for family in CROSSED
    }
    for family in torch.multinomial(shares, count, replacement=True, generator=rng).tolist():
        places = members[list(CROSSED)[family]]
        mine = places[torch.randint(len(places), (1,), generator=rng)]
        icon = rated.owner[mine]
        like = places[
            (style[rated.owner[places]] == style[icon]) & (concept[rated.owner[places]] != concept[icon])
        ]
        among = CROSSED_AMONG[int(torch.randint(len(CROSSED_AMONG), (1,), generator=rng))]
        others = like[torch.randint(len(like), (among,), generator=rng)]
        chosen.append(torch.cat([mine, others[rated.utility[others, concept[icon]].argmax()][None]]))
    places = torch.stack(chosen)
    icons = rated.owner[places]
    return places, icons, rated.utility[places].gather(2, concept[icons][:, None].expand(count, 2, 2))
