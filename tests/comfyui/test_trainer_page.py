"""What the page shows of Step-GRPO LoRA Trainer while it works, and after Cancel."""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

from tests.comfyui.test_trainer_in_server import wait_for
from tools.comfy_server import ROOT

# The text the server sends for a node stands in a widget of the page's own.
SHOWN = """() => {
    const node = window.app.graph.nodes.find(node => node.type === "StepGRPOLoRATrainer");
    return {
        texts: (node.widgets ?? []).map(widget => String(widget.value)),
        pictures: (node.imgs ?? []).map(picture => [picture.naturalWidth, picture.naturalHeight]),
        progress: node.progress ?? null,
        size: [...node.size],
    };
}"""
ITERATIONS = 421  # in no other test, so that the log can be asked
NUMBER = r"[+-]?[\d.e-]+"
LINE = rf"iteration \d+ of {ITERATIONS}, reward {NUMBER}, KL {NUMBER}, held-out {NUMBER}, \d+ min \d\d s left"


def long_training():
    graph = json.loads((ROOT / "workflows" / "Fine-tune with Step-GRPO.json").read_text())
    (trainer,) = [node for node in graph["nodes"] if node["type"] == "StepGRPOLoRATrainer"]
    values = trainer["widgets_values"]
    values[1:4], values[8] = [64, 64, 3], ITERATIONS
    values[15], values[16] = 5, 2
    return graph


def test_the_page_shows_how_it_goes_and_where_cancel_left_it(page, server):
    page.open_workflow(long_training(), "trainer_running")
    page.page.evaluate("() => window.app.queuePrompt(0)")
    wait_for(server, lambda: f"iteration 5 of {ITERATIONS}" in server.log_text())
    page.page.wait_for_timeout(1000)
    shown = page.page.evaluate(SHOWN)
    screenshot = page.screenshot("trainer_running")
    (line,) = [text for text in shown["texts"] if text.startswith("iteration")]
    assert re.fullmatch(LINE, line)
    assert 0 < shown["progress"] < 0.2
    ((width, height),) = shown["pictures"]  # the curve and, below it, pictures
    assert (width, height > 300) == (560, True)
    with Image.open(screenshot) as picture:
        # Half of the curve's panel is white, and nothing else on this dark page is.
        assert (np.asarray(picture.convert("RGB")) == 255).all(axis=-1).sum() > 5000
    server.interrupt()
    wait_for(server, lambda: server.queue_state() == {"running": 0, "pending": 0})
    page.page.wait_for_timeout(1000)
    shown = page.page.evaluate(SHOWN)
    (line,) = [text for text in shown["texts"] if text.startswith("Stopped")]
    path = re.search(r"iterations? is in (.*\.safetensors); queued again, it goes on there$", line).group(1)
    assert Path(path).is_file()
    assert shown["progress"] is None
