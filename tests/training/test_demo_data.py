"""The demo's pictures and captions, on icon packages of the published format made here."""

import io
import json
import re
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch

from training.demo import data, text
from training.demo.drawings import free_captions, free_icons


def write_package(folder, package, names, colour):
    icons = {
        name: {"body": f'<circle cx="8" cy="8" r="{3 + i % 5}" fill="{colour}"/>'}
        for i, name in enumerate(names)
    }
    body = json.dumps({"prefix": package, "width": 16, "height": 16, "icons": icons}).encode()
    with tarfile.open(folder / f"iconify-json-{package}-1.0.0.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("package/icons.json")
        member.size = len(body)
        archive.addfile(member, io.BytesIO(body))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    names = [name for name, _ in data.read_concepts()] + ["unlisted-icon"]
    for (style, package), colour in zip(data.SETS.items(), ("red", "#00f", "lime", "#000"), strict=True):
        write_package(folder, package, names if style != "noto" else [*names, "only-noto"], colour)
    data.build(folder / "out", folder)
    return data.load(folder / "out")


def test_at_least_300_concepts_with_distinct_names():
    concepts = data.read_concepts()
    assert len(concepts) >= 300
    assert max(Counter(name for name, _ in concepts).values()) == 1


def test_pictures_are_128_px_on_white_in_four_styles(demo):
    count = len(demo.names)
    assert demo.images.shape == (4 * (count + 1), 128, 128, 3)
    assert demo.images.dtype == np.uint8
    assert Counter(demo.style.tolist()) == dict.fromkeys(range(4), count + 1)
    red = demo.images[int(np.flatnonzero((demo.style == 0) & (demo.concept >= 0))[0])]
    assert red[0, 0].tolist() == [255, 255, 255]
    assert red[64, 64].tolist() == [255, 0, 0]


def test_held_out_is_200_pairs_of_200_concepts_seen_in_other_styles(demo):
    held_out = demo.icons(held_out=True)
    assert len(held_out) == 200
    assert len(set(demo.concept[held_out])) == 200
    seen = Counter(demo.concept[demo.icons(held_out=False)].tolist())
    assert all(seen[concept] == 3 for concept in demo.concept[held_out])


def test_the_split_never_moves(demo):
    assert demo.held_out.nonzero()[0].tolist() == data.split(
        list(zip(demo.concept.tolist(), demo.style.tolist(), strict=True)), len(demo.names)
    )


def test_what_is_kept_aside_is_half_unseen_and_never_practised(demo):
    aside = data.kept_aside(len(demo.names))
    icons = np.flatnonzero(demo.concept >= 0)
    held_out = set(zip(demo.concept[demo.held_out].tolist(), demo.style[demo.held_out].tolist(), strict=True))
    assert len(aside) == len(set(aside)) == 200
    assert all(pair in held_out for pair in aside[::2])
    known = aside[1::2]
    assert not set(known) & held_out
    assert {concept for concept, _ in known} <= set(data.held_out_concepts(len(demo.names)))
    assert not set(aside) & set(data.practice(list(held_out)))
    roles = data.roles(demo, icons)
    counts = [mask.sum().item() for mask in (roles.held_out, roles.practice, roles.aside, roles.foreign)]
    assert counts == [200, 100, 200, 4 * data.HELD_OUT_CONCEPTS]
    assert not (roles.practice & (roles.aside | ~roles.held_out)).any()


def test_captions_without_a_style_are_of_concepts_that_the_benchmarks_do_not_ask_for(demo):
    concept = torch.from_numpy(demo.concept[demo.concept >= 0])
    free, asked = free_icons(concept), data.asked_freely(len(demo.names))
    assert len(set(asked)) == data.ASKED_FREELY
    assert {int(concept[icon]) for icon in free} == set(range(len(demo.names))) - set(asked)
    assert len(free) == len(demo.names) - len(asked)
    number = int(concept[free[0]])
    captions = free_captions(demo, [number] * 200, 3)
    assert captions == free_captions(demo, [number] * 200, 3)
    allowed = {template.format(word=word) for word in demo.words[number] for template in text.UNSTYLED}
    assert set(captions) == allowed


def test_missing_data_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"training\.demo\.data"):
        data.load(tmp_path)


def test_every_caption_word_is_one_token_and_all_captions_fit(demo):
    tokenizer = text.train_tokenizer(demo)
    for words in demo.words:
        for word in words:
            tokens = tokenizer.encode(f"{word}, noto style").tokens
            tokens = tokens[: tokens.index(text.EOS)]
            pieces = re.findall(r"\d+|[^\W\d]+|[^\w\s]", word)
            assert len(tokens) == 1 + len(pieces) + 3, (word, tokens)
    longest = text.TEMPLATES[4].format(
        word=max((w for ws in demo.words for w in ws), key=len), style="twemoji"
    )
    assert text.EOS in tokenizer.encode(longest).tokens
    assert text.encode_ids(tokenizer, ["heart", "xylophone \u00e9\u4e16!" * 9]).shape == (2, text.LENGTH)


def test_random_captions_name_word_and_style_as_often_as_asked():
    generator = torch.Generator().manual_seed(0)
    captions = [text.random_caption(["cat face", "cat"], 2, generator) for _ in range(2000)]
    assert 140 < captions.count("") < 260
    assert 1500 < sum("noto" in caption for caption in captions) < 1700
    assert {"cat face, noto style", "cat, noto style"} <= set(captions)
    assert all("cat" in caption for caption in captions if caption)
