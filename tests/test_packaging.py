"""The archive `comfy node pack` makes for the registry: all the nodes need, nothing that hides a version."""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.comfy_server import COMFYUI, ROOT

FORBIDDEN = {"subprocess", "exec", "eval", "pip"}


OURS = {folder.name for folder in ROOT.iterdir() if folder.is_dir()}
# In the folder of the archive. ComfyUI's own modules come first, since it has a `nodes` too.
START = """
import asyncio, importlib, importlib.util, json, pathlib, runpy, sys
sys.argv, root = ["main.py", "--cpu"], pathlib.Path.cwd()
sys.path.remove("")
import comfy.options
comfy.options.enable_args_parsing()
importlib.import_module("utils.extra_config")
import nodes as stock
sys.path.insert(0, str(root))
spec = importlib.util.spec_from_file_location("pack", root / "__init__.py")
sys.modules["pack"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
"""
IMPORT_ALL = """
for path in sorted(root.rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    if parts:
        module = importlib.import_module(".".join(("pack", *parts) if parts[0] == "nodes" else parts))
        assert pathlib.Path(module.__file__) == path, (module.__file__, path)
import server
server.PromptServer(asyncio.new_event_loop())  # which main.py makes before it asks packs for their nodes
ours = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
asyncio.run(stock.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
known = [node.define_schema().node_id for node in ours], list(stock.NODE_CLASS_MAPPINGS)
print(json.dumps(known))
"""
HELP = """
for path in sorted(root.rglob("*.py")):
    if "__main__" in path.read_text():
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        sys.argv = [name, "--help"]
        try:
            runpy.run_module(name, run_name="__main__")
        except SystemExit as end:
            print(name, end.code)
"""


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The archive of the last commit; comfy-cli packs what git tracks and .comfyignore leaves in."""
    folder = tmp_path_factory.mktemp("pack")
    run("git", "clone", "--quiet", "--depth", "1", ROOT.as_uri(), "clone", cwd=folder)
    comfy = [str(Path(sys.executable).with_name("comfy")), "--skip-prompt"]
    run(*comfy, "tracking", "disable", cwd=folder, HOME=str(folder))
    run(*comfy, "node", "pack", cwd=folder / "clone", HOME=str(folder))
    with zipfile.ZipFile(folder / "clone" / "node.zip") as archive:
        yield archive


def test_archive_holds_the_pack_and_not_the_house(archive: zipfile.ZipFile):
    names = set(archive.namelist())
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE"} <= names
    assert {"locales/zh/nodeDefs.json", "locales/ja/nodeDefs.json", "web/docs/DRMPick/zh.md"} <= names
    assert {"nodes/adapters.py", "nodes/sampler.py", "drm/stepwise.py", "drm/model.py"} <= names
    assert not [
        name for name in names if name.startswith(("tests/", "tools/", "benchmarks/", "training/demo/"))
    ]


def test_archive_starts_no_process_and_runs_no_text(archive: zipfile.ZipFile):
    found = []
    for name in archive.namelist():
        if name.endswith(".py"):
            for node in ast.walk(ast.parse(archive.read(name))):
                used = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                used += [node.module] if isinstance(node, ast.ImportFrom) else []
                used += (
                    [node.func.id] if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else []
                )
                found += [f"{name}:{node.lineno}: {word}" for word in used if word in FORBIDDEN]
    assert found == []


@pytest.fixture(scope="module")
def unpacked(archive: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    archive.extractall(folder)
    return folder


def run_inside(unpacked: Path, code: str) -> str:
    return run(sys.executable, "-c", START + code, cwd=unpacked, PYTHONPATH=str(COMFYUI))


def test_every_module_imports_and_the_graphs_name_only_nodes_that_ship(unpacked: Path):
    ours, stock = map(set, json.loads(run_inside(unpacked, IMPORT_ALL).splitlines()[-1]))
    graphs = sorted(unpacked.glob("workflows/*.json"))
    assert graphs
    for graph in graphs:
        used = {node["type"] for node in json.loads(graph.read_text())["nodes"]}
        assert used & ours
        assert used <= ours | stock | {"MarkdownNote"}, graph.name  # the page's own


def test_every_command_says_how_it_is_called(unpacked: Path):
    printed = run_inside(unpacked, HELP)
    commands = re.findall(r"^(training\.[\w.]+) (\w+)$", printed, re.MULTILINE)
    assert {"training.encode", "training.train_drm", "training.train_step_grpo"} <= dict(commands).keys()
    assert {code for _, code in commands} <= {"0", "None"}


def imported(source: str) -> set[str]:
    """The modules a file imports anywhere in it, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return found


def test_nothing_that_ships_names_code_or_files_that_do_not(unpacked: Path):
    """Imports inside functions, `python -m`, settings that name a function, paths in configurations."""
    missing = []
    for path in sorted([*unpacked.rglob("*.py"), *unpacked.rglob("*.yaml")]):
        source = path.read_text(encoding="utf-8")
        modules = imported(source) if path.suffix == ".py" else set(re.findall(r"([\w.]+):\w+\"", source))
        modules |= set(re.findall(r"-m ((?:training|benchmarks|tools)[\w.]*)", source))
        names = {name.replace(".", "/") for name in modules if name.split(".")[0] in OURS}
        names |= set(re.findall(r"\btraining/[\w/]+\.\w+", source))
        for name in names:
            if not any((unpacked / f"{name}{end}").exists() for end in ("", ".py")):
                missing.append(f"{path.relative_to(unpacked)}: {name}")
    assert missing == []


def test_the_clone_lines_show_the_one_address():
    (address,) = re.findall(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    clones = re.findall(r"git clone (\S+) ComfyUI-DRM", (ROOT / "README.md").read_text())
    assert clones == [address, address]
