"""ComfyUI-DRM: diffusion reward models, and Step-wise Sampling steered by them, as ComfyUI nodes.

ComfyUI calls `comfy_entrypoint`. Everything else is imported from there, so that this file imports anywhere.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The extension ComfyUI asks for when it loads this pack."""
    from .nodes import DRMExtension

    return DRMExtension()
