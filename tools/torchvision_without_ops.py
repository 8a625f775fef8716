"""Let `import torchvision` succeed on a torch build its C++ operators do not load into.

torchvision's wheel from the package index is built for the CUDA torch. Beside a CPU torch its operators are
missing, and its import ends in `RuntimeError: operator torchvision::nms does not exist`, which takes ComfyUI
and diffusers with it although neither needs those operators here. tools/setup_env.py puts this module into
.venv together with a .pth file that calls `install()` when Python starts. Nothing happens until somebody
imports torchvision; during that import, fake kernels of operators that do not exist are skipped.
"""

import sys


class TorchvisionFinder:
    """Meta-path finder that wraps the loader of torchvision and knows no other name."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: load_without_missing_ops(load, module)
        return spec


def load_without_missing_ops(load, module):
    """Run `load(module)` while torch's register_fake tolerates missing torchvision operators."""
    from torch import library

    register_fake = library.register_fake

    def tolerant(op, func=None, /, **options):
        if func is not None or not str(op).startswith("torchvision::"):
            return register_fake(op, func, **options)

        def register(kernel):
            try:
                return register_fake(op, **options)(kernel)
            except RuntimeError:  # the operator does not exist
                return kernel

        return register

    library.register_fake = tolerant
    try:
        load(module)
    finally:
        library.register_fake = register_fake


def install():
    """Put the finder in front of Python's own."""
    sys.meta_path.insert(0, TorchvisionFinder())
