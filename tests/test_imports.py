"""The import rule: nodes -> drm and training -> drm, nothing else; and what the pack may load at start-up.

ComfyUI imports the pack under its directory's path, so in what it loads (`__init__.py`, nodes/, drm/) our own
packages are imported relatively. There an absolute `import nodes` means ComfyUI's nodes.py.
"""

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.comfy_server import COMFYUI, ROOT

OURS = {"drm", "nodes", "training", "tests", "tools", "benchmarks"}
COMFY = {path.stem for path in COMFYUI.glob("*.py")} | {
    path.name for path in COMFYUI.iterdir() if path.is_dir()
}
# package -> what of ours it may use; "" is the root's __init__.py
MAY_USE = {"": {"nodes"}, "drm": {"drm"}, "nodes": {"nodes", "drm"}, "training": {"training", "drm"}}
LOADED_BY_COMFYUI = {"", "drm", "nodes"}
# Reading a LATENT into model space, a CONDITIONING's pooled output, a network's parts, a DRM file.
ADAPTERS_ONLY = {"process_in", "process_latent_in", "pooled_output", "diffusion_model", "load_drm"}


def source_files(package: str) -> list[Path]:
    return [ROOT / "__init__.py"] if package == "" else sorted((ROOT / package).rglob("*.py"))


def imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, bool, str]]:
    """(line, relative, first name under the root) of every import, at whatever depth of the code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, False, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, False, node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - (node.level - 1)]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.lineno, True, ".".join((*above, name)).split(".")[0]) for name in names)


def violations(source: str, package: tuple[str, ...], where: str = "") -> list[str]:
    """Sentences about the imports that break the rule; `package` is the file's, () for the root."""
    top = package[0] if package else ""
    found = []
    for line, relative, name in imports(ast.parse(source), package):
        if relative:
            if name not in MAY_USE[top]:
                found.append(f"{where}:{line}: {top or 'the root'} may not import {name}")
        elif top in LOADED_BY_COMFYUI and name in OURS and not (top == "nodes" and name == "nodes"):
            found.append(f"{where}:{line}: ComfyUI loads this file, import {name} relatively")
        elif name in OURS and name not in MAY_USE[top]:
            found.append(f"{where}:{line}: {top} may not import {name}")
        elif top in {"drm", "training", ""} and name in COMFY and name not in OURS:
            found.append(f"{where}:{line}: only nodes/ may import ComfyUI's {name}")
    return found


@pytest.mark.parametrize("package", MAY_USE)
def test_dependencies_point_one_way(package: str):
    files = source_files(package)
    assert files
    found = []
    for path in files:
        relative = path.relative_to(ROOT)
        found += violations(path.read_text(), relative.parent.parts, str(relative))
    assert found == []


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ((), "from training import loop"),
        ((), "from .training import loop"),
        (("nodes",), "import drm.flow"),
        (("nodes",), "def f():\n    from drm import DRM"),
        (("nodes",), "from ..training import loop"),
        (("nodes",), "from .. import training"),
        (("drm",), "import comfy.utils"),
        (("drm",), "import folder_paths"),
        (("drm",), "from nodes import common_ksampler"),
        (("drm",), "from ..nodes import adapters"),
        (("drm",), "from drm import flow"),
        (("training", "demo"), "from nodes import adapters"),
        (("training", "demo"), "from ...nodes import adapters"),
        (("training",), "import comfy.sd"),
    ],
)
def test_rule_sees_a_breach(package: tuple[str, ...], source: str):
    assert len(violations(source, package)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ((), "from .nodes import DRMExtension"),
        (
            ("nodes",),
            "import comfy.utils\nimport nodes\nfrom ..drm.flow import add_noise\nfrom . import adapters",
        ),
        (("drm",), "import torch\nfrom .flow import add_noise\nfrom . import flow"),
        (
            ("training", "demo"),
            "from drm import flow\nfrom training.demo.loop import train\nfrom ..loop import train",
        ),
    ],
)
def test_rule_lets_the_rest_pass(package: tuple[str, ...], source: str):
    assert violations(source, package) == []


# Rooms of training/, each with those it may use besides itself; commands at the top use all of them.
ROOMS = {
    "engine": set(),
    "data": {"engine"},
    "reward": {"engine", "data"},
    "evaluation": {"engine", "data"},
    "grpo": {"engine", "data", "evaluation"},
}


def test_rooms_of_training_have_no_way_back():
    found = []
    for room, others in ROOMS.items():
        for path in source_files(f"training/{room}"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "training":
                    used = (node.module.split(".") + [alias.name for alias in node.names])[1]
                    if used not in others | {room, "config"}:
                        found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {room} may not use {used}")
    assert found == []
    assert {path.name for path in (ROOT / "training").iterdir() if (path / "__init__.py").exists()} == {
        *ROOMS,
        "demo",
    }


def words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, word) of names, attributes, imported names and whole string constants, docstrings aside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias):
            yield node.lineno, node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_only_adapters_turn_comfyui_objects_into_drm_tensors():
    used = {
        str(path.relative_to(ROOT / "nodes")): [
            f"{line}: {word}" for line, word in words(ast.parse(path.read_text())) if word in ADAPTERS_ONLY
        ]
        for path in source_files("nodes")
    }
    assert used.pop("adapters.py"), (
        "adapters.py uses none of these names: has the list in this test gone stale?"
    )
    assert {name: found for name, found in used.items() if found} == {}


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter, run outside the repository."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=COMFYUI,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_drm_brings_in_torch_at_most():
    loaded = run_python(f"""
        import sys
        sys.path.append({str(ROOT)!r})
        import drm, drm.flow, drm.sde, drm.branching, drm.stepwise, drm.preference, drm.head, drm.model
        import drm.backbone, drm.checkpoint, drm.sd3.comfy_layout
        print(*sorted({{name.split(".")[0] for name in sys.modules}}))
    """).split()
    assert "torch" in loaded
    assert not {"diffusers", "transformers", "accelerate", "peft", "torchvision", "comfy"} & set(loaded)


def test_loading_the_pack_needs_neither_diffusers_nor_transformers():
    # ComfyUI itself imports transformers. Once it is up, both are hidden: the pack must load all the same.
    out = run_python(f"""
        import asyncio, sys
        sys.argv = ["main.py", "--cpu"]
        sys.path.insert(0, {str(COMFYUI)!r})
        import comfy.options
        comfy.options.enable_args_parsing()
        import utils.extra_config  # first, as in main.py: later `utils` is comfy/utils.py
        import nodes, server

        HEAVY = ("diffusers", "transformers", "accelerate", "peft")
        for name in [name for name in sys.modules if name.split(".")[0] in HEAVY]:
            del sys.modules[name]

        class Forbidden:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in HEAVY:
                    raise AssertionError(f"loading the pack imports {{name}}")

        async def load():
            server.PromptServer(asyncio.get_running_loop())  # nodes may add themselves to it
            sys.meta_path.insert(0, Forbidden())
            return await nodes.load_custom_node({str(ROOT)!r})

        assert asyncio.run(load())
        print(*(name for name, node in nodes.NODE_CLASS_MAPPINGS.items() if hasattr(node, "GET_SCHEMA")))
    """)
    assert "StepwiseKSampler" in out.split()


def test_the_core_s_maths_is_tested_with_torch_alone():
    """What `make test-core` runs can be collected where none of our other packages is installed."""
    core = re.search(r"^CORE := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
    files = [str(ROOT / "tests" / "drm" / f"test_{name}.py") for name in core]
    out = run_python(f"""
        import sys
        for name in ("diffusers", "transformers", "safetensors", "peft", "PIL", "yaml"):
            sys.modules[name] = None
        import pytest
        sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "--rootdir", {str(ROOT)!r},
                              "-c", {str(ROOT / "pyproject.toml")!r}, *{files!r}]))
    """)
    assert "test_recorded_runs.py" in out
