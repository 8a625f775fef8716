"""What the benchmark of picks asks for, and what its synthetic people like."""

import numpy as np

from benchmarks.picks import TEST, asked, redness


def test_things_of_the_test_are_never_picked_from():
    names = asked(1080)
    assert len(set(names[:TEST])) == TEST
    assert not set(names[:TEST]) & set(names[TEST:])
    assert asked(100) == names[:100]


def test_red_pictures_are_liked_by_their_ink():
    pictures = np.full((3, 4, 4, 3), 255, dtype=np.uint8)
    pictures[0, 0] = (200, 0, 0)
    pictures[1, :] = (200, 0, 0)
    pictures[2, :] = (0, 0, 200)
    assert redness(pictures).tolist() == [200.0, 200.0, -100.0]
