"""One real ComfyUI server and one real browser page for the whole session.

def test_something(server):  ... server.run(prompt) ...                    # tools/comfy_server.py
def test_page(page):         ... page.open_workflow("workflows/x.json") ...   # tests/comfyui/page.py
def test_inside(pack):       ... pack.module("nodes.adapters") ...          # ComfyUI in this process
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.comfyui.inside import Inside
from tests.tiny import DemoFiles, build_demo_family
from tools.comfy_inside import Pack, load_pack
from tools.comfy_server import ComfyServer

if TYPE_CHECKING:
    from tests.comfyui.page import ComfyPage

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
def page(server: ComfyServer) -> "Iterator[ComfyPage]":
    """The session's page of that server."""
    # Here, so that tests without a page can be collected where no browser is.
    from tests.comfyui.page import open_page

    with open_page(server.url) as page:
        yield page


@pytest.fixture(scope="session")
def pack() -> Pack:
    """ComfyUI on this process's sys.path, on the CPU, and the pack loaded into it; no server."""
    return load_pack()


@pytest.fixture(scope="session")
def inside(pack: Pack, family: DemoFiles) -> Inside:
    """The random demo family, loaded by the ComfyUI of this process."""
    return Inside(pack, family)
