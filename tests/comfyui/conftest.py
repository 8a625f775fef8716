"""One real ComfyUI server and one real browser page for the whole session.

def test_something(server):  ... server.run(prompt) ...                    # tools/comfy_server.py
def test_page(page):         ... page.open_workflow("workflows/x.json") ...   # tests/comfyui/page.py
def test_inside(pack):       ... pack.module("nodes.adapters") ...          # ComfyUI in this process
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.comfyui.inside import Inside
from tests.comfyui.page import ComfyPage, open_page
from tests.tiny import DemoFiles, build_demo_family
from tools.comfy_server import COMFYUI, ROOT, ComfyServer

FAMILY = ("checkpoints", "text_encoders", "drm")


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's base directory; its models/ takes the files a test wants the server to find."""
    folder = tmp_path_factory.mktemp("comfyui")
    for name in FAMILY:
        (folder / "models" / name).mkdir(parents=True)
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "breaking").symlink_to(Path(__file__).parent / "breaking")
    return folder


@pytest.fixture(scope="session")
def family(base_dir: Path) -> DemoFiles:
    """The demo family with random weights, in the server's models folder."""
    return build_demo_family(base_dir / "models")


@pytest.fixture(scope="session")
def server(base_dir: Path, family: DemoFiles) -> Iterator[ComfyServer]:
    """The session's server, with this pack loaded and the random demo family in its folders."""
    with ComfyServer(base_dir) as server:
        yield server


@pytest.fixture(scope="session")
def page(server: ComfyServer) -> Iterator[ComfyPage]:
    """The session's page of that server."""
    with open_page(server.url) as page:
        yield page


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


@pytest.fixture(scope="session")
def pack() -> Pack:
    """ComfyUI on this process's sys.path, on the CPU, and the pack loaded into it; no server."""
    sys.path.insert(0, str(COMFYUI))
    arguments, sys.argv = sys.argv, ["main.py", "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # reads sys.argv

        importlib.import_module("utils.extra_config")  # first, as in main.py: later `utils` is comfy/utils.py
    finally:
        sys.argv = arguments
    return Pack()


@pytest.fixture(scope="session")
def inside(pack: Pack, family: DemoFiles) -> Inside:
    """The random demo family, loaded by the ComfyUI of this process."""
    return Inside(pack, family)
