"""ComfyUI's own network and the truncated backbone make the same image tokens of one checkpoint."""

import pytest
import torch
from safetensors.torch import load_file

from drm.sd3.base_model import load_backbone
from tests.comfyui.features import comfy_image_tokens, comfy_network
from tests.tiny import build_demo_family


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return build_demo_family(tmp_path_factory.mktemp("family"), seed=3, hidden=256, depth=4).checkpoint


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20)])
@pytest.mark.parametrize("num_kept", [1, 3, 4])
def test_tokens_agree_with_comfyui(pack, checkpoint, num_kept, height, width):
    network = comfy_network(load_file(checkpoint))
    backbone = load_backbone(checkpoint, num_kept)
    torch.manual_seed(0)
    latents, sigma = torch.randn(2, 16, height, width), 0.7
    prompt_embeds, pooled = torch.randn(2, 20, 256), torch.randn(2, 256)
    theirs = comfy_image_tokens(network, latents, sigma, prompt_embeds, pooled, num_kept)
    with torch.no_grad():
        ours = backbone(latents, torch.full((2,), 1000 * sigma), prompt_embeds, pooled)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
