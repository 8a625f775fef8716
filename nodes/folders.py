"""Where the pack's files are found: models/drm of ComfyUI and of this pack, and the shipped demo models; and
models/drm_scorers, with one folder for each scorer of DRM Score Image.

`extra_model_paths.yaml` may add more under the keys `drm` and `drm_scorers`, as for any other kind of model.
"""

import json
import os
from pathlib import Path

import folder_paths

PACK_MODELS = Path(__file__).resolve().parent.parent / "models"
SCORERS = "drm_scorers"
HIDE_DEMO = "DRM.HideDemoModels"


def register() -> None:
    """Adds the folders; the shipped checkpoint and text encoder then show up in ComfyUI's own loaders too,
    unless the user has set otherwise.
    """
    for kind in ("drm", SCORERS):
        folder_paths.add_model_folder_path(kind, os.path.join(folder_paths.models_dir, kind))
    for kind in ("drm",) if demo_is_hidden() else ("drm", "checkpoints", "text_encoders"):
        folder_paths.add_model_folder_path(kind, str(PACK_MODELS / kind))


def demo_is_hidden() -> bool:
    """Whether the page's setting of this name is on; web/js/demo_models.js has it."""
    path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        return json.loads(path.read_text("utf-8")).get(HIDE_DEMO) is True
    except (OSError, ValueError, AttributeError):
        return False


def safetensors_files(kind: str) -> list[str]:
    """Names of the .safetensors files of a kind; other files there are of no use to this pack."""
    return [name for name in folder_paths.get_filename_list(kind) if name.lower().endswith(".safetensors")]


def file_fingerprint(kind: str, name: str) -> str:
    """Changes when the file changes, and is found without opening it."""
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        return "missing"
    status = os.stat(path)
    return f"{path}:{status.st_mtime_ns}:{status.st_size}"


def check_file(kind: str, name: str) -> None:
    """Raises FileNotFoundError for a file that is not there.

    For `execute`: a name that validate_inputs refuses turns red on the page, which says nothing more.
    """
    if folder_paths.get_full_path(kind, name) is not None:
        return
    there = ", ".join(safetensors_files(kind)) or "none yet"
    raise FileNotFoundError(
        f"there is no file '{name}' in models/{kind}: put it there and press R to refresh, or choose another"
        f" (found: {there})"
    )


def scorer_folders() -> dict[str, Path]:
    """The folders of models/drm_scorers by name; of two with one name, the first."""
    places = [Path(place) for place in folder_paths.get_folder_paths(SCORERS)]
    found = [path for place in reversed(places) if place.is_dir() for path in place.iterdir()]
    folders = {path.name: path for path in found if path.is_dir() and not path.name.startswith(".")}
    return dict(sorted(folders.items()))


def scorer_folder(name: str) -> Path:
    """A folder of models/drm_scorers. Raises FileNotFoundError for one that is not there."""
    folders = scorer_folders()
    if name in folders:
        return folders[name]
    raise FileNotFoundError(
        f"there is no folder '{name}' in models/{SCORERS}: put a PickScore, ImageReward or CLIP model"
        " there, all its files in one folder (such as huggingface.co/yuvalkirstain/PickScore_v1), and press R"
        f" to refresh, or choose another (found: {', '.join(folders) or 'none yet'})"
    )
