"""Pairs the demo reward model learns from: what is spoiled, what is another caption's, what is never seen."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from training.demo import comparisons, noisy_rater, reward
from training.demo.data import STYLES
from training.demo.drawings import Drawings
from training.demo.pairs import (
    DEGRADATIONS,
    DRAWINGS,
    Pool,
    ask,
    degrade,
    other_icon,
    pairs,
    without_concepts,
)
from training.demo.rated import FREE, INDIFFERENT, TWO_OF, RatedPictures, crossed, families_of, places_of


def make_pool(concepts=12, styles=4):
    """Latents that say which icon and variant they are: value = icon, + 0.1 * (1 + variant) for spoiled,
    + 100 for drawn, + 1000 for each way of the rated: three that are alike, three of half-trained weights,
    three mixed, three augmented, three loose and three of each free part, whose utility for the concept grows
    with the way and which look a little like the next concept.
    """
    count = concepts * styles
    index = torch.arange(count)
    shape = (count, 1, 1, 1)
    real = index.float().reshape(shape)
    degraded = real[:, None] + 0.1 * torch.arange(1, 1 + len(DEGRADATIONS)).reshape(1, -1, 1, 1, 1)
    drawn = real[:, None] + 100 * torch.arange(1, 1 + len(DRAWINGS)).reshape(1, -1, 1, 1, 1)
    concept, style = index // styles, index % styles
    parts = [name for name in ("0", "6", "mixed_0", "augmented_0", "loose", *FREE) for _ in range(3)]
    owner, way = index.repeat(len(parts)), torch.arange(1, 1 + len(parts)).repeat_interleave(count)
    utility = torch.full((len(owner), concepts), -9.0)
    rows = torch.arange(len(owner))
    utility[rows, concept[owner]] = way.float().log()
    utility[rows, (concept[owner] + 1) % concepts] = -2.0
    latents = (owner + 1000 * way).float().reshape(-1, 1, 1, 1)
    drawings = Drawings(latents, owner, utility, [name for name in parts for _ in range(count)])
    return Pool(
        real=real,
        degraded=degraded,
        drawn=drawn,
        rated=RatedPictures.of(drawings, count),
        concept=concept,
        style=style,
        trained=(concept < 8) & (style > 0),
        prompted=concept < 8,
        tested=concept >= 8,
    )


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_degradations_change_pictures_and_repeat_with_their_seed(kind):
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    spoiled = degrade(pictures, kind, torch.Generator().manual_seed(5))
    assert spoiled.shape == pictures.shape
    assert torch.isfinite(spoiled).all()
    assert ((spoiled - pictures).abs().mean((1, 2, 3)) > 0.02).all()
    torch.testing.assert_close(spoiled, degrade(pictures, kind, torch.Generator().manual_seed(5)))


def test_another_icon_is_never_the_same_and_stays_inside_what_is_allowed():
    pool = make_pool()
    icons = torch.argwhere(pool.trained).flatten().repeat(20)
    picked = other_icon(pool, icons, pool.trained, torch.Generator().manual_seed(0), 0.25)
    assert pool.trained[picked].all()
    assert (picked != icons).all()
    same_concept = pool.concept[picked] == pool.concept[icons]
    assert 0.15 < same_concept.float().mean() < 0.35
    elsewhere = other_icon(pool, icons, pool.trained, torch.Generator().manual_seed(0), 0.0)
    assert (pool.concept[elsewhere] != pool.concept[icons]).all()
    restyled = other_icon(pool, icons, pool.trained, torch.Generator().manual_seed(0), 1.0)
    assert (pool.concept[restyled] == pool.concept[icons]).all()
    assert (pool.style[restyled] != pool.style[icons]).all()


def test_pairs_hold_what_they_are_named_for():
    pool = make_pool()
    icons = torch.argwhere(pool.tested).flatten()
    chosen, rejected, label = pairs(pool, icons, "degraded", pool.tested, torch.Generator().manual_seed(0))
    torch.testing.assert_close(chosen.flatten(), icons.float())
    assert ((rejected - chosen) > 0.05).all()
    assert (label == 1).all()
    assert ((rejected - chosen) < 0.55).all()
    _, rejected, _ = pairs(pool, icons, "wrong", pool.tested, torch.Generator().manual_seed(0))
    assert pool.tested[rejected.flatten().long()].all()
    _, rejected, _ = pairs(pool, icons, "generated", pool.tested, torch.Generator().manual_seed(0))
    assert (rejected.flatten() % 100 == icons).all()
    for kind, variants in (("generated early", {1, 2}), ("generated final", {3, 4, 5})):
        _, rejected, _ = pairs(pool, icons.repeat(9), kind, pool.tested, torch.Generator().manual_seed(0))
        assert set((rejected.flatten() // 100).int().tolist()) == variants
    chosen, rejected, _ = pairs(pool, icons, "drawn", pool.tested, torch.Generator().manual_seed(0))
    torch.testing.assert_close(chosen.flatten(), icons + 100.0 * len(DRAWINGS))
    assert (rejected != chosen).all()


@pytest.mark.parametrize(
    ("kind", "ways"),
    [
        ("preferred", {1, 2, 3}),
        ("mixed", {7, 8, 9}),
        ("augmented", {10, 11, 12}),
        ("loose", {13, 14, 15}),
        ("free_0", {16, 17, 18}),
        ("free_3", {25, 26, 27}),
    ],
)
def test_of_two_pictures_the_raters_say_which_and_how_surely(kind, ways):
    pool = make_pool()
    icons = torch.argwhere(pool.trained).flatten().repeat(5)
    chosen, rejected, label = pairs(pool, icons, kind, pool.trained, torch.Generator().manual_seed(0))
    better, worse = (side.flatten() // 1000 for side in (chosen, rejected))
    assert (chosen.flatten() % 1000 == icons).all()
    assert (better > worse).all()
    assert set(better.int().tolist()) == ways - {min(ways)}
    assert set(worse.int().tolist()) == ways - {max(ways)}
    # utility is the logarithm of the way, so at a sharpness of 2 the odds are better^2 : worse^2
    torch.testing.assert_close(label, better**2 / (better**2 + worse**2))


def crossed_pool(count=200):
    pool = make_pool()
    rng = torch.Generator().manual_seed(0)
    return pool, *crossed(pool.rated, pool.concept, pool.style, count, pool.prompted, rng)


def test_crossed_pictures_are_of_two_concepts_in_one_style_that_look_alike():
    pool, places, icons, _ = crossed_pool()
    assert torch.equal(pool.rated.owner[places], icons)
    assert pool.prompted[icons].all()
    assert (pool.style[icons[:, 0]] == pool.style[icons[:, 1]]).all()
    assert (pool.concept[icons[:, 0]] != pool.concept[icons[:, 1]]).all()
    # what looks a little like the first one's concept is the concept before it
    alike = pool.concept[icons[:, 1]] == pool.concept[icons[:, 0]] - 1
    assert alike[pool.concept[icons[:, 0]] > 0].float().mean() > 0.7
    assert {*families_seen(pool, places)} == {"drawn", "mixed", "augmented", "loose"}


def families_seen(pool, places):
    return [
        family
        for family, members in pool.rated.families.items()
        if torch.isin(places, members).any() and family != "alike"
    ]


def test_utilities_of_crossed_pictures_are_by_picture_and_caption():
    pool, places, icons, utility = crossed_pool(20)
    for n in range(20):
        for picture in range(2):
            for caption in range(2):
                wanted = pool.rated.utility[places[n, picture], pool.concept[icons[n, caption]]]
                assert utility[n, picture, caption] == wanted


def test_captions_in_dispute_come_more_often():
    pool = make_pool()
    pool.rated.utility[pool.rated.own["alike"][5], pool.concept[5]] *= 20
    icons, allowed = ask(pool, "preferred", 4000, torch.Generator().manual_seed(0))
    assert pool.prompted[icons].all()
    assert allowed is pool.prompted
    share = (icons == 5).float().mean().item()
    calm, loud = math.log(3) + INDIFFERENT, 20 * math.log(3) + INDIFFERENT
    assert share == pytest.approx(loud / (loud + 31 * calm), rel=0.1)


def test_nobody_is_asked_about_pictures_that_are_not_there():
    pool = make_pool()
    pool.rated.own["augmented"][8:, 1:] = -1
    pool.rated.own["augmented"][16:] = -1
    icons, _ = ask(pool, "augmented", 200, torch.Generator().manual_seed(0))
    assert set(icons.tolist()) == set(range(8))


def test_places_of_owners_with_unequal_numbers():
    owner = torch.tensor([1, 0, 1, 3, 1])
    places = places_of(owner, torch.arange(5), 4)
    assert places.tolist() == [[1, -1, -1], [0, 2, 4], [-1, -1, -1], [3, -1, -1]]
    assert places_of(owner, torch.tensor([3, 4]), 4).tolist() == [[-1], [4], [-1], [3]]


def test_parts_and_their_families():
    assert families_of("0") == families_of("hard") == families_of("again") == ("drawn", "alike")
    assert families_of("6") == families_of("step-grpo_4_lr0.001_seed0") == ("drawn",)
    assert families_of("mixed_2") == ("mixed",)
    assert families_of("augmented_3") == ("augmented",)
    assert families_of("loose") == ("loose",)
    assert families_of("free_2") == ("free_2",)


def test_a_caption_without_a_style_may_be_asked_of_any_icon_of_a_concept_that_is_learned():
    pool = make_pool()
    pool.prompted[4:6] = False  # two styles of concept 1 are kept aside
    icons, allowed = ask(pool, "free_1", 2000, torch.Generator().manual_seed(0))
    assert {4, 5} <= set(icons.tolist())
    assert pool.concept[icons].max() < 8
    assert torch.equal(allowed, pool.concept < 8)


def test_a_study_may_keep_whole_concepts_from_training():
    pool = without_concepts(make_pool(), [2, 9])
    held = torch.isin(pool.concept, torch.tensor([2, 9]))
    assert torch.equal(pool.tested, held)
    assert not (pool.trained & held).any()
    assert not (pool.prompted & held).any()
    assert pool.trained[pool.concept == 3].any()


# what is asked of the demo's data: a word for each concept
WORDS = SimpleNamespace(words=[[f"thing{number}"] for number in range(12)])


def test_a_batch_holds_every_kind_in_its_share():
    pool = make_pool()
    batch = comparisons.draw_pairs(WORDS, pool, 22, torch.Generator().manual_seed(1))
    assert batch.latents.shape == (44, 1, 1, 1)
    assert batch.captions[:22] == batch.captions[22:]
    assert batch.ahead.tolist() == [*range(22)]
    assert batch.behind.tolist() == [*range(22, 44)]
    assert torch.equal(batch.sigma[:22], batch.sigma[22:])
    kinds = [kind for kind, share in comparisons.MIX.items() for _ in range(share)]
    rows = zip(kinds, batch.latents.flatten()[:22], batch.label, batch.captions[:22], strict=True)
    for kind, value, label, caption in rows:
        assert (value >= 1000) == (kind in TWO_OF)
        assert (label < 1) == (kind in TWO_OF)
        assert any(style in caption for style in STYLES) == (kind not in FREE)
    known = torch.tensor([kind not in TWO_OF for kind in kinds])
    assert torch.equal(batch.known, known.repeat(2))
    assert torch.equal(batch.noise[:22] == batch.noise[22:], known)
    assert batch.concept.tolist() == [concept_named(caption) for caption in batch.captions]


def concept_named(caption):
    return int("".join(filter(str.isdigit, caption)))


def test_a_crossed_batch_compares_pictures_under_a_caption_and_captions_of_a_picture():
    pool = make_pool()
    batch = comparisons.draw_crossed(WORDS, pool, 5, torch.Generator().manual_seed(1))
    assert len(batch.captions) == len(batch.latents) == 20
    assert batch.sigma.tolist() == [n for n in range(5) for _ in range(4)]
    assert batch.noise.tolist() == [n for n in range(10) for _ in range(2)]
    owner = (batch.latents.flatten() % 1000).long()
    assert batch.concept.tolist() == [concept_named(caption) for caption in batch.captions]
    shown, asked = pool.concept[owner], batch.concept
    assert (shown[batch.ahead] == asked[batch.ahead]).all()
    assert (shown[batch.behind] != asked[batch.behind]).all()
    same_caption = asked[batch.ahead] == asked[batch.behind]
    same_picture = owner[batch.ahead] == owner[batch.behind]
    assert (same_caption != same_picture).all()
    assert same_caption.sum() == same_picture.sum() == 10
    assert torch.equal(batch.sigma[batch.ahead], batch.sigma[batch.behind])
    assert (batch.label > 0.5).all()
    assert not batch.known.any()


def both_kinds():
    pool, rng = make_pool(), torch.Generator().manual_seed(1)
    one = comparisons.draw_pairs(WORDS, pool, 22, rng)
    other = comparisons.draw_crossed(WORDS, pool, 3, rng)
    return one, other, comparisons.together(one, other)


def test_two_batches_together_keep_their_comparisons_and_their_noise():
    one, other, both = both_kinds()
    rows = len(one.captions)
    assert both.captions[rows:] == other.captions
    assert not {*both.noise[:rows].tolist()} & {*both.noise[rows:].tolist()}
    torch.testing.assert_close(both.latents[both.ahead[22:]], other.latents[other.ahead])
    torch.testing.assert_close(both.latents[both.behind[24:]], other.latents[other.behind][2:])
    torch.testing.assert_close(both.label, torch.cat([one.label, other.label]))
    noisy, sigma = comparisons.noised(both, torch.Generator().manual_seed(2))
    assert torch.equal(sigma[both.ahead], sigma[both.behind])
    assert sigma.unique().numel() == 22 + 3
    noise = (noisy.flatten() - (1 - sigma) * both.latents.flatten()) / sigma
    for number in both.noise.unique():
        mine = noise[both.noise == number]
        torch.testing.assert_close(mine, mine[:1].expand_as(mine), atol=0.05, rtol=0)
    assert noise.round(decimals=1).unique().numel() > 15


def test_the_noisy_rater_labels_what_is_not_known():
    _, _, both = both_kinds()
    rows = len(both.captions)
    logits = torch.randn(rows, 12, generator=torch.Generator().manual_seed(4))
    seen = {}

    def rater(noisy, sigma):
        seen.update(noisy=noisy, sigma=sigma)
        return logits

    noisy, sigma = torch.rand(rows, 1, 1, 1), torch.rand(rows)
    labelled, opinion = comparisons.rated_under_noise(both, noisy, sigma, rater)
    assert seen["noisy"] is noisy
    assert seen["sigma"] is sigma
    torch.testing.assert_close(opinion, logits.log_softmax(-1).clamp_min(-7.0))
    known = both.known[both.ahead]
    assert known.sum() == 7
    assert (labelled.label[known] == 1).all()
    for place in (~known).nonzero().flatten().tolist():
        ahead, behind = both.ahead[place], both.behind[place]
        gap = opinion[ahead, both.concept[ahead]] - opinion[behind, both.concept[behind]]
        assert labelled.label[place].item() == pytest.approx(1 / (1 + math.exp(-2 * gap.item())), rel=1e-5)


def test_a_noisy_rater_learns_from_no_picture_that_is_kept_aside():
    pool = make_pool()
    latents, utility = noisy_rater.draw_batch(pool, torch.Generator().manual_seed(0))
    assert len(latents) == len(utility) == sum(noisy_rater.BATCH.values())
    icons = (latents.flatten() % 1000).long()
    free = sum(noisy_rater.BATCH[family] for family in FREE)
    assert pool.prompted[icons[:-free]].all()
    assert (latents.flatten()[-free:] >= 16000).all()


def test_what_a_noisy_rater_thinks_depends_on_the_noise_it_is_told(tmp_path):
    torch.manual_seed(0)
    rater = noisy_rater.NoisyRater(12).eval()
    save_file(rater.state_dict(), tmp_path / noisy_rater.FILE)
    loaded = noisy_rater.load_noisy_rater(tmp_path)
    latents = torch.randn(2, 16, 16, 16)
    low, high = (noisy_rater.opinions(loaded, latents, torch.full((2,), level)) for level in (0.1, 0.9))
    assert low.shape == (2, 12)
    assert (low - high).abs().max() > 1e-3
    assert low.exp().sum(1) == pytest.approx([1, 1], rel=1e-3)


def test_both_sides_of_a_pair_meet_one_noise_at_one_sigma():
    seen = {}

    def drm(latents, sigma, prompt_embeds, pooled):
        seen.update(latents=latents, sigma=sigma)
        return latents.mean((1, 2, 3))

    chosen, rejected = torch.ones(2, 16, 4, 4), torch.zeros(2, 16, 4, 4)
    sigma = torch.tensor([0.25, 0.75])
    reward.score_pair(
        drm,
        chosen,
        rejected,
        sigma,
        torch.zeros(2, 20, 8),
        torch.zeros(2, 8),
        torch.Generator().manual_seed(3),
    )
    torch.testing.assert_close(seen["sigma"], torch.tensor([0.25, 0.75, 0.25, 0.75]))
    difference = seen["latents"][:2] - seen["latents"][2:]
    expected = (1 - sigma).reshape(2, 1, 1, 1) * torch.ones(2, 16, 4, 4)
    torch.testing.assert_close(difference, expected, atol=1e-6, rtol=0)
