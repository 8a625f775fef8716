"""ComfyUI in this process, with this pack loaded the way ComfyUI loads it; no server.

pack = load_pack(); pack.module("nodes.adapters")
"""

import importlib
import importlib.util
import sys
from types import ModuleType

from tools.comfy_server import COMFYUI, ROOT


class Pack:
    """This pack, imported in this process the way ComfyUI imports it."""

    def __init__(self) -> None:
        self.name = str(ROOT).replace(".", "_x_")
        spec = importlib.util.spec_from_file_location(self.name, ROOT / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[self.name] = module
        spec.loader.exec_module(module)

    def module(self, name: str) -> ModuleType:
        """A module of the pack: "nodes.adapters", "drm.model" (not the same objects as `import drm`)."""
        return importlib.import_module(f"{self.name}.{name}")


def load_pack(cpu: bool = True) -> Pack:
    """Puts ComfyUI on sys.path and loads the pack into it; on the CPU, or on whatever ComfyUI chooses."""
    sys.path.insert(0, str(COMFYUI))
    arguments, sys.argv = sys.argv, ["main.py", *(["--cpu"] if cpu else [])]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # reads sys.argv

        importlib.import_module("utils.extra_config")  # first, as in main.py: later `utils` is comfy/utils.py
    finally:
        sys.argv = arguments
    return Pack()
