"""Blocks read by hooks: the copies are right, the pass ends there, and nothing stays behind."""

import pytest
import torch
from torch import nn

from drm.tap import tap


class Network(nn.Module):
    """Blocks whose outputs are changed in place on the way, as FLUX and ControlNets do."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.passed = 0

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            self.passed += 1
            x += 1
        return x


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network().eval().requires_grad_(False)


def ordinary(network, x):
    seen = {}
    for number, block in enumerate(network.blocks, start=1):
        x = block(x)
        seen[number] = x.clone()
        x = x + 1
    return seen


def test_copies_of_what_left_the_blocks(network):
    x = torch.randn(3, 4)
    found = tap(network.blocks, (2, 4), lambda: network(x))
    assert list(found) == [2, 4]
    for number, output in found.items():
        assert torch.equal(output, ordinary(network, x)[number])
    assert network.passed == 3


def test_nothing_stays_behind(network):
    x = torch.randn(3, 4)
    before = network(x)
    tap(network.blocks, (1,), lambda: network(x))
    assert not any(block._forward_hooks for block in network.blocks)
    assert torch.equal(network(x), before)


def test_an_error_of_the_network_comes_through_and_the_hooks_go(network):
    with pytest.raises(RuntimeError, match="mat1"):
        tap(network.blocks, (3,), lambda: network(torch.randn(3, 5)))
    assert not any(block._forward_hooks for block in network.blocks)


def test_ends_a_pass_that_swallows_exceptions(network):
    def swallow():
        try:
            return network(torch.randn(1, 4))
        except Exception:
            return None

    assert list(tap(network.blocks, (3,), swallow)) == [3]


def test_a_pass_that_does_not_come_by_is_an_error(network):
    with pytest.raises(RuntimeError, match="without passing its block 3: a patch or cache"):
        tap(network.blocks, (3,), lambda: None)


@pytest.mark.parametrize("numbers", [(), (0,), (6,), (2, 6)])
def test_numbers_that_are_not_among_the_blocks(network, numbers):
    with pytest.raises(ValueError, match="wanted some of 1 to 5"):
        tap(network.blocks, numbers, lambda: None)
