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
    "Teach your taste": {"drm/picked"},
}
# These open with files that nobody has from the start; the page offers them, but not a reward model.
FOR_OWN_MODELS = {
    "Reward-guided SD3.5 Medium": {"drm_name"},
    "Your own model": set(),
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
            wanted = {"num_branches": 4, "noise_level": 0.7, "kind": "sde", "branch_start": 0.1}
            wanted |= {"branch_end": 0.9, "preset": "balanced", "seconds": 0, "film_strip": 4}
            assert {name: entry["inputs"][name] for name in wanted} == wanted


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


FIRST_LOOK = """async ([workflow, name]) => {
    await window.app.loadGraphData(workflow, true, true, name);
    await new Promise(resolve => setTimeout(resolve, 1000));
    const { scale, offset } = window.app.canvas.ds;
    const boxes = [
        ...window.app.graph.groups.map(({ pos, size }) => [...pos, ...size]),
        ...window.app.graph.nodes.map(({ pos, size }) => [pos[0], pos[1] - 30, size[0], size[1] + 30]),
    ];
    return { scale, boxes: boxes.map(([x, y, width, height]) => [
        (x + offset[0]) * scale, (y + offset[1]) * scale,
        (x + width + offset[0]) * scale, (y + height + offset[1]) * scale,
    ]) };
}"""


@pytest.mark.parametrize("name", [*GRAPHS, *FOR_OWN_MODELS])
def test_all_of_it_is_seen_on_the_first_look(page, name):
    """Beside the sidebar, under the tabs and the title, on a screen of 1920 x 1080, in readable letters."""
    page.close_dialogs()
    seen = page.page.evaluate(FIRST_LOOK, [json.loads(workflow(name).read_text()), name])
    page.close_dialogs()
    assert seen["scale"] >= 0.7
    left, top = (min(box[side] for box in seen["boxes"]) for side in (0, 1))
    right, bottom = (max(box[side] for box in seen["boxes"]) for side in (2, 3))
    assert left >= 64
    assert top >= 90
    assert right <= 1900
    assert bottom <= 1060


@pytest.mark.parametrize("name", FOR_OWN_MODELS)
def test_what_is_missing_can_be_had(page, name):
    graph = json.loads(workflow(name).read_text())
    models = [model for node in graph["nodes"] for model in node["properties"].get("models", [])]
    offered = {model["name"]: model["url"] for model in models}
    report = page.open_workflow(workflow(name))
    page.close_dialogs()
    assert report.missing_types == []
    (dialog,) = report.dialogs
    assert all(file in dialog for file in offered)
    assert all(url.endswith(f"/{file}") for file, url in offered.items())
    missing = {
        widget["name"]: widget["value"]
        for node in report.nodes
        for widget in node["widgets"]
        if widget["choices"] is not None and widget["value"] not in widget["choices"]
    }
    assert {widget for widget, file in missing.items() if file not in offered} == FOR_OWN_MODELS[name]


def test_a_note_says_where_the_files_are():
    nodes = json.loads(workflow("Reward-guided SD3.5 Medium").read_text())["nodes"]
    (note,) = [node for node in nodes if node["type"] == "MarkdownNote"]
    for word in (
        "huggingface.co",
        "diffusion-rm",
        "arxiv.org",
        "import_dina",
        "Load Checkpoint",
        "DRM Loader",
    ):
        assert word in note["widgets_values"][0]


BLUEPRINT = """async () => {
    const graph = window.app.graph, node = graph.nodes.find(({ title }) => title.startsWith("Reward-guided"));
    const add = (type, values = []) => {
        const made = LiteGraph.createNode(type);
        graph.add(made);
        values.forEach((value, place) => (made.widgets[place].value = value));
        return made;
    };
    const place = (slots, name) => slots.findIndex((slot) => slot.name === name);
    const join = (from, output, to, input) =>
        from.connect(place(from.outputs, output), to, place(to.inputs, input));
    const model = add("CheckpointLoaderSimple", ["drm_demo_emoji_sd3.safetensors"]);
    join(model, "MODEL", node, "model");
    join(model, "VAE", node, "vae");
    join(add("DRMDemoCLIPLoader", ["drm_demo_emoji_clip.safetensors"]), "CLIP", node, "clip");
    join(add("DRMLoader", ["drm_demo_emoji.safetensors"]), "DRM", node, "drm");
    join(node, "IMAGE", add("PreviewImage"), "images");
    const set = (name, value) => (node.widgets.find((widget) => widget.name.endsWith(name)).value = value);
    set("text", "pumpkin"), set("width", 128), set("height", 128), set("steps", 4);
    return (await window.app.graphToPrompt()).output;
}"""


def test_the_blueprint_is_one_node_that_draws(page, server):
    """Found by double-click, dropped with Enter, and run."""
    page = page.another()  # a visitor without a graph: newer pages bring back what was open
    page.page.wait_for_timeout(2000)
    page.close_dialogs()
    page.page.evaluate("() => window.app.graph.clear()")
    page.page.mouse.dblclick(900, 500)
    page.page.wait_for_timeout(2000)
    page.page.keyboard.type("reward-guided text")
    page.page.wait_for_timeout(3000)
    page.page.keyboard.press("Enter")
    page.page.wait_for_timeout(2000)
    prompt = page.page.evaluate(BLUEPRINT)
    page.page.context.close()
    samplers = [entry["inputs"] for entry in prompt.values() if entry["class_type"] == "StepwiseKSampler"]
    assert [(inputs["preset"], inputs["steps"]) for inputs in samplers] == [("balanced", 4)]
    result = server.run(prompt)
    assert result.status == "success", result.error
    assert len(result.images()) == 1


@pytest.mark.parametrize("name", [*GRAPHS, *FOR_OWN_MODELS])
def test_it_has_a_square_picture(name):
    with Image.open(workflow(name).with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG"
        assert picture.size == (800, 800)
