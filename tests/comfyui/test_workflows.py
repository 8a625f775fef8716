"""The bundled graphs: comfy-cli runs them in a real server, the real page opens them."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tools.comfy_server import ROOT

GRAPHS = {
    "Reward-guided text to image": {"drm/plain", "drm/stepwise"},
    "Score and rank latents": {"drm/best"},
    "Reward-guided custom sampler": {"drm/custom"},
    "Fine-tune with Step-GRPO": {"drm/before_lora", "drm/after_lora"},
}
# A training takes minutes: here it is cut short, and it is run in full for its picture.
SHORT = {"steps": 3, "iterations": 2}
TITLE_HEIGHT = 30


def workflow(name):
    return ROOT / "workflows" / f"{name}.json"


def cut_short(name, folder):
    """The graph, or a copy whose training is short."""
    graph = json.loads(workflow(name).read_text())
    trainers = [node for node in graph["nodes"] if node["type"] == "StepGRPOLoRATrainer"]
    if not trainers:
        return workflow(name)
    (trainer,) = trainers
    trainer["widgets_values"][3], trainer["widgets_values"][8] = SHORT["steps"], SHORT["iterations"]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(graph))
    return path


@pytest.fixture(scope="module")
def comfy(tmp_path_factory, server):
    """Runs comfy-cli with arguments; its settings live in a folder of the test."""
    home = tmp_path_factory.mktemp("home")
    executable = Path(sys.executable).parent / "comfy"

    def run(*arguments):
        done = subprocess.run(
            [str(executable), "--skip-prompt", *arguments],
            cwd=home,
            env=os.environ | {"HOME": str(home)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run("tracking", "disable")
    return run


@pytest.mark.parametrize("name", GRAPHS)
def test_comfy_cli_runs_it_and_it_leaves_pictures(comfy, server, base_dir, name, tmp_path):
    output = base_dir / "output"
    before = set(output.rglob("*.png"))
    path = str(cut_short(name, tmp_path))
    comfy("run", "--workflow", path, "--wait", "--host", "127.0.0.1", "--port", str(server.port))
    new = sorted(set(output.rglob("*.png")) - before)
    assert {str(path.relative_to(output)).rpartition("_0")[0] for path in new} == GRAPHS[name]
    for path in new:
        with Image.open(path) as picture:
            assert picture.size == (128, 128)
            assert len(picture.convert("RGB").getcolors(1 << 16)) > 10


@pytest.fixture(scope="module", params=GRAPHS)
def opened(request, page):
    """A graph in the page, and its name; the screenshot is kept in output/screenshots."""
    return request.param, page.open_workflow(workflow(request.param))


def test_page_opens_it_without_a_red_node(opened):
    _, report = opened
    assert (report.missing_types, report.red_nodes, report.bad_choices) == ([], [], [])
    assert (report.dialogs, report.toasts) == ([], [])
    assert report.screenshot.stat().st_size > 50_000


def test_page_queues_what_the_file_says(opened, server):
    name, report = opened
    for entry in report.prompt.values():
        if entry["class_type"] == "StepGRPOLoRATrainer":
            assert SHORT.keys() <= entry["inputs"].keys()
            entry["inputs"] |= SHORT
    result = server.run(report.prompt)
    assert result.status == "success", result.error
    saved = {image["filename"].rpartition("_0")[0] for image in result.images() if image["type"] == "output"}
    assert {f"drm/{prefix}" for prefix in saved} <= GRAPHS[name]
    for entry in report.prompt.values():
        if entry["class_type"] in ("StepwiseKSampler", "StepwiseSampler"):
            inputs = {key: entry["inputs"][key] for key in ("num_branches", "noise_level", "kind")}
            assert inputs == {"num_branches": 4, "noise_level": 0.7, "kind": "sde"}
            assert (entry["inputs"]["branch_start"], entry["inputs"]["branch_end"]) == (0.1, 0.9)
            assert (entry["inputs"]["preset"], entry["inputs"]["seconds"]) == ("balanced", 0)


def test_nodes_do_not_overlap(opened):
    _, report = opened
    boxes = [
        (node["title"], x, y - TITLE_HEIGHT, x + node["size"][0], y + node["size"][1])
        for node in report.nodes
        for x, y in [node["position"]]
    ]
    overlapping = [
        (a[0], b[0])
        for a, b in itertools.combinations(boxes, 2)
        if a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4]
    ]
    assert overlapping == []


def test_both_samplers_share_their_settings(page):
    report = page.open_workflow(workflow("Reward-guided text to image"))
    samplers = {entry["class_type"]: entry["inputs"] for entry in report.prompt.values()}
    plain, stepwise = samplers["KSampler"], samplers["StepwiseKSampler"]
    assert plain["sampler_name"] == "euler"
    assert {key: stepwise[key] for key in plain if key != "sampler_name"} == {
        key: value for key, value in plain.items() if key != "sampler_name"
    }


@pytest.mark.parametrize(
    "name", ["Reward-guided text to image", "Score and rank latents", "Fine-tune with Step-GRPO"]
)
def test_a_note_says_how_to_use_sd35_medium(name):
    nodes = json.loads(workflow(name).read_text())["nodes"]
    (note,) = [node for node in nodes if node["type"] == "MarkdownNote"]
    for word in ("SD3.5-Medium", "Load Checkpoint", "TripleCLIPLoader", "DRM Loader"):
        assert word in note["widgets_values"][0]


@pytest.mark.parametrize("name", GRAPHS)
def test_it_has_a_picture(name):
    with Image.open(workflow(name).with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG"
        assert picture.width >= 800
