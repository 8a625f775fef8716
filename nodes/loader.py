"""DRM Loader: a file of models/drm becomes a DRM that ComfyUI's memory manager moves and offloads."""

from comfy_api.latest import io

from . import adapters, folders
from .schema import found_by

DRMModel = io.Custom("DRM_MODEL")
KIND = "drm"


class DRMLoader(io.ComfyNode):
    """Loads a diffusion reward model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DRMLoader",
            display_name="DRM Loader (reward model)",
            category="DRM",
            **found_by("reward", "score", "aesthetic", "preference"),
            description="Loads a diffusion reward model (DRM), which scores noisy latents against a prompt.",
            inputs=[
                io.Combo.Input(
                    "drm_name",
                    options=folders.safetensors_files(KIND),
                    tooltip="A .safetensors file of models/drm. It must be made for the model you sample"
                    " with: same latent channels, same text encoders.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", *adapters.DTYPES],
                    default="auto",
                    tooltip="Number format of the weights. auto: bfloat16 where the GPU or CPU computes it, "
                    "else float16 on a GPU and float32 on a CPU.",
                ),
            ],
            outputs=[DRMModel.Output("drm", display_name="DRM", tooltip="The reward model.")],
        )

    @classmethod
    def validate_inputs(cls, drm_name: str) -> bool:
        return True

    @classmethod
    def fingerprint_inputs(cls, drm_name: str, dtype: str) -> str:
        return folders.file_fingerprint(KIND, drm_name)

    @classmethod
    def execute(cls, drm_name: str, dtype: str) -> io.NodeOutput:
        folders.check_file(KIND, drm_name)
        return io.NodeOutput(adapters.load_drm_patcher(KIND, drm_name, dtype))
