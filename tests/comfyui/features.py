"""Image tokens of ComfyUI's own MMDiT after a block, to hold the backbone's against.

Needs a ComfyUI on sys.path; nothing here imports the rest of the project.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def comfy_network(state_dict: Mapping[str, Tensor]) -> nn.Module:
    """ComfyUI's float32 network for keys under `model.diffusion_model.`, built by its own detection."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
    from comfy.model_detection import detect_unet_config

    prefix = "model.diffusion_model."
    config = detect_unet_config(dict(state_dict), prefix)
    # The loader's own bookkeeping, not an argument of the network.
    config.pop("image_model", None)
    network = OpenAISignatureMMDITWrapper(
        **config, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
    )
    weights = {k.removeprefix(prefix): v.float() for k, v in state_dict.items() if k.startswith(prefix)}
    network.load_state_dict(weights)
    return network.eval()


@torch.no_grad()
def comfy_image_tokens(
    network: nn.Module,
    latents: Tensor,
    sigma: float,
    prompt_embeds: Tensor,
    pooled_prompt_embeds: Tensor,
    num_kept: int,
) -> Tensor:
    """Image tokens (B, L, width) after the first num_kept blocks of `comfy_network`, caught by a hook."""
    caught = []

    def catch(module: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        caught.append(output[1].clone())

    handle = network.joint_blocks[num_kept - 1].register_forward_hook(catch)
    try:
        timestep = torch.full((len(latents),), 1000.0 * sigma)
        network(latents, timestep, context=prompt_embeds, y=pooled_prompt_embeds)
    finally:
        handle.remove()
    return caught[0]
