"""ComfyUI's IMAGE tensors and Pillow's pictures, one into the other."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def pictures_of(images: Tensor) -> list[Image.Image]:
    """The RGB pictures, 8 bits a channel, of an IMAGE (B, H, W, 3 or 4), or of (B, 1, H, W, 3) as VAEs of
    models with videos decode; transparency is left out.
    """
    pixels = images.reshape(-1, *images.shape[-3:])[..., :3].float().nan_to_num().clamp(0, 1)
    return [Image.fromarray(picture) for picture in (255 * pixels).round().byte().cpu().numpy()]


def to_image(picture: Image.Image) -> Tensor:
    """A picture as an IMAGE (1, H, W, 3)."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255).unsqueeze(0)
