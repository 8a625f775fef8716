"""Run every graph of workflows/ in a real ComfyUI and put what came of it into the square .jpg beside it.

    python -m tools.render_workflow_images [NAME ...]

ComfyUI's template browser shows these pictures: what was saved on top, the film strip or sheet below. A graph
that needs files or clicks of its own is photographed. Uses the demo models of this repository (models/), a
temporary ComfyUI folder and headless Chromium.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tests.comfyui.page import ComfyPage, PageReport, open_page
from tools.comfy_results import Result
from tools.comfy_server import ROOT, ComfyServer

SIDE, EDGE, CAPTION = 800, 12, 34
PAPER, INK = "#ffffff", "#333333"
MARGIN = 24
ASLEEP = 2  # the page's number for a muted node
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


def run(page: ComfyPage, server: ComfyServer) -> Result:
    """Press Run and wait for the prompt; RuntimeError with the server's words when it fails."""
    done = set(server.get("/history"))
    page.page.evaluate("() => window.app.queuePrompt(0)")
    while not (new := set(server.get("/history")) - done):
        time.sleep(0.2)
    result = server.wait(new.pop())
    if result.status != "success":
        raise RuntimeError(f"the graph failed: {result.error}")
    return result


def fitted(picture: Image.Image, width: float, height: float) -> Image.Image:
    """The picture as large as it may be; small ones grow without blur."""
    scale = min(width / picture.width, height / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def results_square(report: PageReport, result: Result, server: ComfyServer) -> Image.Image:
    """What the graph saved, with the titles of the nodes, above its film strip or sheet."""

    def pictures_of(kind: str) -> list[tuple[str, Image.Image]]:
        nodes = [node for node in report.nodes if node["type"] == kind]
        return [
            (node["title"], Image.open(io.BytesIO(server.view(image))).convert("RGB"))
            for node in nodes
            for image in result.images(str(node["id"]))
        ]

    saved = pictures_of("SaveImage")
    below = [picture for kind in ("DRMFilmStrip", "DRMScoreLatent") for _, picture in pictures_of(kind)]
    square = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw, font = ImageDraw.Draw(square), ImageFont.load_default(size=24)
    room = (SIDE - EDGE) / len(saved)
    high = SIDE * 0.36 if below else SIDE - CAPTION - 2 * EDGE
    for place, (title, picture) in enumerate(saved):
        small, middle = fitted(picture, room - EDGE, high), EDGE / 2 + (place + 0.5) * room
        square.paste(small, (round(middle - small.width / 2), CAPTION + EDGE))
        draw.text((middle, EDGE), title, INK, font=font, anchor="mt")
    if below:
        top = round(high + CAPTION + 2 * EDGE)
        small = fitted(below[0], SIDE - 2 * EDGE, SIDE - top - EDGE)
        square.paste(small, ((SIDE - small.width) // 2, top))
    return square


def photograph(page: ComfyPage) -> Image.Image:
    """The graph alone, cut out of the page, in a square."""
    frame = page.page.evaluate(FRAME)
    clip = {
        "x": max(frame["x"] - MARGIN, 0),
        "y": max(frame["y"] - MARGIN, 0),
        "width": frame["width"] + 2 * MARGIN,
        "height": frame["height"] + 2 * MARGIN,
    }
    with Image.open(io.BytesIO(page.page.screenshot(clip=clip))) as picture:
        small = fitted(picture.convert("RGB"), SIDE, SIDE)
    square = Image.new("RGB", (SIDE, SIDE), "#202020")
    square.paste(small, ((SIDE - small.width) // 2, (SIDE - small.height) // 2))
    return square


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="graphs without .json; all of them by default")
    names = parser.parse_args().names or sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder)) as server:
        for name in names:
            with open_page(server.url) as page:
                page.page.set_viewport_size(VIEWPORT)
                report = page.open_workflow(ROOT / "workflows" / f"{name}.json")
                if report.missing_types:
                    raise RuntimeError(f"{name}: unknown nodes {report.missing_types}")
                target = ROOT / "workflows" / f"{name}.jpg"
                if report.bad_choices or any(node["mode"] == ASLEEP for node in report.nodes):
                    page.close_dialogs()
                    picture = photograph(page)
                else:
                    picture = results_square(report, run(page, server), server)
                picture.save(target, quality=88)
                print(f"{target.relative_to(ROOT)} ({target.stat().st_size / 1024:.0f} KB)")


if __name__ == "__main__":
    main()
