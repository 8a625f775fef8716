"""The archive `comfy node pack` makes for the registry: all the nodes need, nothing that hides a version."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.comfy_server import ROOT

FORBIDDEN = {"subprocess", "exec", "eval", "pip"}


def run(*command: str, cwd: Path, **environment: str) -> None:
    subprocess.run(
        command, cwd=cwd, env=os.environ | environment, check=True, capture_output=True, timeout=120
    )


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
