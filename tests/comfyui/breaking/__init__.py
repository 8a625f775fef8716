"""Custom nodes for tests on a real server: a MODEL that runs out of memory, a reward that turns into NaN.

The session's server finds this folder in its custom_nodes. Each node is run anew in every prompt.
"""

import copy

import torch

LARGE = 1 << 30


class Fresh:
    """Run anew in every prompt."""

    CATEGORY, FUNCTION = "tests", "execute"

    @classmethod
    def IS_CHANGED(cls, **_):  # noqa: N802 - ComfyUI's name
        return float("nan")


class SameModel(Fresh):
    """The MODEL itself: what comes behind it is run again although nothing changed."""

    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - ComfyUI's name
        return {"required": {"model": ("MODEL",)}}

    def execute(self, model):
        return (model,)


class MemoryFor(Fresh):
    """A MODEL that has memory for so many pictures at once with gradients, and for so many calls in all."""

    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - ComfyUI's name
        number = ("INT", {"default": LARGE, "max": LARGE})
        return {"required": {"model": ("MODEL",), "pictures": number, "calls": number}}

    def execute(self, model, pictures, calls):
        left = [calls]

        def wrapper(apply, args):
            left[0] -= 1
            if left[0] < 0 or (torch.is_grad_enabled() and len(args["input"]) > pictures):
                raise torch.OutOfMemoryError("nothing left")
            return apply(args["input"], args["timestep"], **args["c"])

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


class NaNAfter(Fresh):
    """A DRM of the same weights that scores NaN after so many calls."""

    RETURN_TYPES = ("DRM_MODEL",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - ComfyUI's name
        return {"required": {"drm": ("DRM_MODEL",), "calls": ("INT", {"default": 0, "max": LARGE})}}

    def execute(self, drm, calls):
        module, left = copy.deepcopy(drm.model), [calls]

        def broken(head, inputs, output):
            left[0] -= 1
            return output * (float("nan") if left[0] < 0 else 1)

        module.head.register_forward_hook(broken)
        return (type(drm)(module, load_device=drm.load_device, offload_device=drm.offload_device),)


NODE_CLASS_MAPPINGS = {f"Test{cls.__name__}": cls for cls in (SameModel, MemoryFor, NaNAfter)}
