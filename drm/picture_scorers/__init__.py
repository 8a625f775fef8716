"""Other people's scorers of finished pictures, from a local folder; nothing is downloaded, or run from it.

scorer = load_picture_scorer(folder)         CLIP, PickScore or ImageReward, by what lies in the folder
scorer(prompt, pictures)                     (n,) float32, higher is better
"""

from pathlib import Path

from torch import nn

from .clip import load_clip_scorer
from .files import file_names, folder_facts
from .image_reward import load_image_reward, weights_of

__all__ = ["folder_facts", "load_picture_scorer"]


def load_picture_scorer(folder: str | Path) -> nn.Module:
    """The scorer that lies in a folder, on the CPU. Raises ValueError for a folder without a usable one."""
    folder = Path(folder)
    return (load_image_reward if weights_of(file_names(folder)) else load_clip_scorer)(folder)
