"""DRM Pick on the real page, in both renderers: pictures appear, two are clicked, the run ends with these."""

import io

import numpy as np
import pytest
from PIL import Image

from drm.picks import read_records

PICTURES = 5
SETTING = "/settings/Comfy.VueNodes.Enabled"


def page_node(number, kind, widgets, at, inputs=(), outputs=()):
    return {
        "id": number,
        "type": kind,
        "pos": at,
        "size": [400, 640] if kind == "DRMPick" else [300, 200],
        "flags": {},
        "order": number,
        "mode": 0,
        "properties": {},
        "inputs": [{"name": name, "type": type_, "link": link} for name, type_, link in inputs],
        "outputs": [{"name": type_, "type": type_, "links": links} for type_, links in outputs],
        "widgets_values": widgets,
    }


def workflow(name):
    """Pictures of different colours, made by stock nodes; their latents are empty."""
    nodes = [
        page_node(1, "EmptySD3LatentImage", [64, 64, PICTURES], [40, 60], outputs=[("LATENT", [1])]),
        page_node(2, "LoadImage", ["picked_from.webp"], [40, 320], outputs=[("IMAGE", [2])]),
        page_node(
            3,
            "DRMPick",
            ["a heart", name, "stop"],
            [400, 60],
            inputs=[("images", "IMAGE", 2), ("latent", "LATENT", 1)],
            outputs=[("IMAGE", [3])],
        ),
        page_node(4, "SaveImage", [name], [860, 60], inputs=[("images", "IMAGE", 3)]),
    ]
    links = [[1, 1, 0, 3, 1, "LATENT"], [2, 2, 0, 3, 0, "IMAGE"], [3, 3, 0, 4, 0, "IMAGE"]]
    return {"version": 0.4, "last_node_id": 4, "last_link_id": 3, "nodes": nodes, "links": links}


@pytest.fixture
def renderer(server, page, request):
    """The page, drawn by one of the two renderers."""
    server.request(SETTING, b"true" if request.param else b"false", "application/json", 20)
    page.reload()
    yield page
    server.request(SETTING, b"false", "application/json", 20)
    page.reload()


def write_pictures(base_dir):
    """An input picture of PICTURES frames, which Load Image makes a batch of."""
    frames = [Image.new("RGB", (64, 64), (50 * i, 200 - 40 * i, 90)) for i in range(PICTURES)]
    path = base_dir / "input" / "picked_from.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)


@pytest.mark.parametrize("renderer", [False, True], indirect=True, ids=["classic", "nodes 2.0"])
def test_two_are_clicked_and_go_on(server, base_dir, renderer, request):
    write_pictures(base_dir)
    renderer.reload()  # newer pages look whether a picture is there
    name = f"page_{request.node.callspec.id.replace(' ', '_')}"
    report = renderer.open_workflow(workflow(name), name)
    assert (report.red_nodes, report.console_errors) == ([], [])
    page = renderer.page
    page.evaluate("() => window.app.queuePrompt(0)")
    pictures = page.locator(".drm-pick .grid button")
    pictures.nth(PICTURES - 1).wait_for(timeout=60_000)
    assert pictures.count() == PICTURES
    page.wait_for_function(
        "() => [...document.querySelectorAll('.drm-pick img')].every(i => i.naturalWidth === 64)"
    )
    for row in (3, 0, 1, 0):
        pictures.nth(row).click()  # the second click on 0 takes it back
    assert page.locator(".drm-pick .grid span").all_inner_texts() == ["2", "1"]
    renderer.screenshot(f"{name}_clicked")
    page.get_by_role("button", name="Continue").click()
    page.wait_for_function("() => fetch('/queue').then(q => q.json()).then(q => !q.queue_running.length)")
    assert pictures.count() == 0
    ((found,), _) = read_records(base_dir / "output" / "drm_picks" / name)
    assert found.batch.picks == (3, 1)
    saved = sorted((base_dir / "output").glob(f"{name}_*.png"))
    colours = [np.asarray(Image.open(io.BytesIO(path.read_bytes())))[9, 9].tolist() for path in saved]
    assert colours == [[150, 80, 90], [50, 160, 90]]
    assert renderer.console_errors == []
