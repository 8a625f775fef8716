"""`import drm` is cheap and works from anywhere: as a top-level package and inside another one."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HEAVY = "heavy = {m.split('.')[0] for m in sys.modules} & {'diffusers', 'transformers', 'training', 'nodes'}"


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_imports_neither_diffusers_nor_transformers():
    code = f"""
import sys
import drm
for name in drm.__all__:
    getattr(drm, name)
{HEAVY}
print(sorted(heavy))
"""
    assert run(code) == "[]"


@pytest.mark.parametrize("name", ["drm.model", "drm.stepwise"])
def test_works_inside_another_package(tmp_path, name):
    """As in custom_nodes, where the folder is a package of another name and the root is not on sys.path."""
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").touch()
    (tmp_path / "pack" / "drm").symlink_to(ROOT / "drm")
    code = f"""
import importlib, sys
sys.path[:] = [{str(tmp_path)!r}] + [p for p in sys.path if p not in ("", {str(ROOT)!r})]
module = importlib.import_module("pack.{name}")
assert "drm" not in sys.modules
print(module.__name__)
"""
    assert run(code) == f"pack.{name}"
