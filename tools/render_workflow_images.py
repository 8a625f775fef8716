"""Run every graph of workflows/ in a real ComfyUI and photograph it into the .jpg beside it.

    python -m tools.render_workflow_images [NAME ...]

ComfyUI's template browser shows these pictures. Uses the demo models of this repository (models/), a
temporary ComfyUI folder and headless Chromium.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

from PIL import Image

from tests.comfyui.page import ComfyPage, open_page
from tools.comfy_server import ROOT, ComfyServer

WIDTH = 1600
MARGIN = 24
VIEWPORT = {"width": 2600, "height": 1700}
# Where the graph lies on the screen, once it fills the canvas.
FRAME = """async () => {
    await window.app.extensionManager.command.execute("Comfy.Canvas.FitView");
    await new Promise(resolve => setTimeout(resolve, 1000));
    const { scale, offset } = window.app.canvas.ds;
    const boxes = [
        ...window.app.graph.groups.map(({ pos, size }) => [...pos, ...size]),
        ...window.app.graph.nodes.map(({ pos, size }) => [pos[0], pos[1] - 30, size[0], size[1] + 30]),
    ];
    const left = Math.min(...boxes.map(box => box[0])), top = Math.min(...boxes.map(box => box[1]));
    const right = Math.max(...boxes.map(box => box[0] + box[2]));
    const bottom = Math.max(...boxes.map(box => box[1] + box[3]));
    const canvas = window.app.canvas.canvas.getBoundingClientRect();
    return {
        x: canvas.x + (left + offset[0]) * scale, y: canvas.y + (top + offset[1]) * scale,
        width: (right - left) * scale, height: (bottom - top) * scale,
    };
}"""


def queue_and_wait(page: ComfyPage, server: ComfyServer) -> None:
    """Press Run and wait for the prompt; RuntimeError with the server's words when it fails."""
    done = set(server.get("/history"))
    page.page.evaluate("() => window.app.queuePrompt(0)")
    while not (new := set(server.get("/history")) - done):
        time.sleep(0.2)
    result = server.wait(new.pop())
    if result.status != "success":
        raise RuntimeError(f"the graph failed: {result.error}")
    page.page.wait_for_timeout(3000)


def photograph(page: ComfyPage) -> Image.Image:
    """The graph alone, cut out of the page."""
    frame = page.page.evaluate(FRAME)
    clip = {
        "x": max(frame["x"] - MARGIN, 0),
        "y": max(frame["y"] - MARGIN, 0),
        "width": frame["width"] + 2 * MARGIN,
        "height": frame["height"] + 2 * MARGIN,
    }
    with Image.open(io.BytesIO(page.page.screenshot(clip=clip))) as picture:
        height = round(WIDTH * picture.height / picture.width)
        return picture.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="graphs without .json; all of them by default")
    names = parser.parse_args().names or sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder)) as server:
        for name in names:
            with open_page(server.url) as page:
                page.page.set_viewport_size(VIEWPORT)
                report = page.open_workflow(ROOT / "workflows" / f"{name}.json")
                if report.red_nodes or report.bad_choices:
                    raise RuntimeError(
                        f"{name}: {report.red_nodes + report.bad_choices}: are the models in models/?"
                    )
                queue_and_wait(page, server)
                target = ROOT / "workflows" / f"{name}.jpg"
                photograph(page).save(target, quality=88)
                print(f"{target.relative_to(ROOT)} ({target.stat().st_size / 1024:.0f} KB)")


if __name__ == "__main__":
    main()
