"""A smooth network and small scorers, each item on its own, for tests of searches."""

import torch

from drm.flow import schedule

SHAPE = (4, 6, 4)
SIGMAS = schedule(8)


def noise(batch=2, seed=0):
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(seed))


def denoise(x, sigma):
    return 0.6 * torch.tanh(x.roll(1, dims=-1)) * (1 - 0.5 * sigma) + 0.2


class Brightness:
    """Scores the mean of the first channels, more of them with depth: 1, 2, then all 4.

    Notes every call as (sigma, item_index, candidates), and every candidate's last depth.
    """

    depths = (1, 2, 3)

    def __init__(self, lead=0.05):
        self.lead, self.calls = lead, []
        self.calibration = {"sigma": [0.5], "mean": [0.2], "std": [0.1]}

    def at_depth(self, candidates, depth):
        return candidates.double()[:, : (1, 2, 4)[depth - 1]].mean(dim=(1, 2, 3))

    def __call__(self, candidates, sigma, item_index):
        self.calls.append((sigma, item_index.tolist(), candidates.clone()))
        return self.at_depth(candidates, 3)

    def decisive(self, depth, sigma):
        return self.lead

    def staged(self, candidates, sigma, item_index, go_on):
        self.calls.append((sigma, item_index.tolist(), candidates.clone()))
        scores = torch.zeros(len(candidates))
        depth = torch.zeros(len(candidates), dtype=torch.long)
        alive = torch.ones(len(candidates), dtype=torch.bool)
        for blocks in self.depths:
            scores[alive] = self.at_depth(candidates[alive], blocks).float()
            depth[alive] = blocks
            if blocks < self.depths[-1]:
                alive = go_on(blocks, scores)
        return scores, depth


class Plain(Brightness):
    """The same without depths."""

    staged = property()
