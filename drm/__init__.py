"""The core of ComfyUI-DRM: diffusion reward models and the step-wise sampling they steer.

It knows neither ComfyUI nor training. Submodules are loaded on first use, so that `import drm` costs
torch at most; diffusers is imported only when a backbone is built.

    from drm import DRM, load_drm, save_drm
    drm.sde.sde_step(...), drm.stepwise.sample_stepwise(...), drm.preference.bradley_terry_loss(...)
"""

from importlib import import_module

__all__ = [
    "DRM",
    "DRMFileError",
    "SharedDRM",
    "backbone",
    "branching",
    "checkpoint",
    "choice",
    "collect",
    "compiling",
    "diffusers_trunk",
    "flow",
    "forward_rl",
    "grpo",
    "head",
    "load_drm",
    "lora",
    "model",
    "noise",
    "preference",
    "presets",
    "save_drm",
    "scoring",
    "sde",
    "shared",
    "stepwise",
    "tap",
]

_HOME = {
    "DRM": "model",
    "DRMFileError": "checkpoint",
    "SharedDRM": "shared",
    "load_drm": "checkpoint",
    "save_drm": "checkpoint",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    try:
        return import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted(__all__)
