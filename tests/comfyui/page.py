"""ComfyUI's page in headless Chromium: open a workflow, say what became of it, photograph it."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent
SCREENSHOTS = ROOT / "output" / "screenshots"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
READY = """() => window.app?.graph && window.app.extensionManager
    && Object.keys(LiteGraph.registered_node_types).length"""
# The page fills a graph in over several frames: widgets, then sizes, then the dialogs about what is missing.
LOAD = """async ([workflow, name]) => {
    await window.app.loadGraphData(workflow, true, true, name);
    await new Promise(resolve => setTimeout(resolve, 1000));
    await window.app.extensionManager.command.execute("Comfy.Canvas.FitView");
    await new Promise(resolve => setTimeout(resolve, 1000));
}"""
DESCRIBE = """async () => {
    const graph = window.app.graph;
    const nodes = graph.nodes.map(node => ({
        id: node.id,
        type: node.type,
        title: node.getTitle(),
        known: node.type in LiteGraph.registered_node_types,
        red: Boolean(node.has_errors),
        mode: node.mode,
        position: [...node.pos],
        size: [...node.size],
        inputs: (node.inputs ?? []).map(({ name, type, link }) => ({ name, type, link })),
        outputs: (node.outputs ?? []).map(({ name, type, links }) => ({ name, type, links: links ?? [] })),
        widgets: (node.widgets ?? []).map(widget => ({
            name: widget.name,
            type: widget.type,
            value: typeof widget.value === "object" ? JSON.stringify(widget.value) : widget.value,
            choices: Array.isArray(widget.options?.values) ? widget.options.values : null,
            tooltip: widget.tooltip ?? null,
        })),
    }));
    const text = selector => [...document.querySelectorAll(selector)].map(found => found.innerText.trim());
    const prompt = nodes.every(node => node.known) ? (await window.app.graphToPrompt()).output : null;
    return { nodes, dialogs: text(".p-dialog"), toasts: text(".p-toast-message"), prompt };
}"""


@dataclass(frozen=True)
class PageReport:
    """What the page made of a workflow."""

    nodes: list[dict[str, Any]]  # id, type, title, known, red, mode, position, size, inputs, outputs, widgets
    dialogs: list[str]  # what is missing, nodes or models: text of dialogs, or of newer versions' panel
    toasts: list[str]  # text of the notices in the corner
    prompt: (
        dict[str, Any] | None
    )  # the graph in API format, as the Run button would queue it; None with unknown nodes
    console_errors: list[str]
    screenshot: Path

    @property
    def missing_types(self) -> list[str]:
        """Types the page has no node for (drawn red)."""
        return sorted({node["type"] for node in self.nodes if not node["known"]})

    @property
    def red_nodes(self) -> list[str]:
        """Titles of nodes that are drawn red: unknown, or marked as in error."""
        return [node["title"] for node in self.nodes if node["red"] or not node["known"]]

    @property
    def bad_choices(self) -> list[str]:
        """Combo widgets whose value is not among their choices, such as a model file that is not there."""
        return [
            f"{node['title']}.{widget['name']} = {widget['value']!r}"
            for node in self.nodes
            for widget in node["widgets"]
            if widget["choices"] is not None and widget["value"] not in widget["choices"]
        ]

    def node(self, node_type: str) -> dict[str, Any]:
        """The only node of a type."""
        (found,) = [node for node in self.nodes if node["type"] == node_type]
        return found

    def widgets(self, node_type: str) -> dict[str, Any]:
        """Widget values of the only node of a type, by name."""
        return {widget["name"]: widget["value"] for widget in self.node(node_type)["widgets"]}


class ComfyPage:
    """The page of one server, opened once."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.console_errors: list[str] = []
        page.on("console", lambda message: self._note(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self._note(str(error)))
        page.add_init_script("localStorage.setItem('vueNodesBannerDismissed', 'true')")
        page.goto(url, timeout=120_000)
        self._wait()

    def another(self) -> "ComfyPage":
        """The page of a visitor who has never been here."""
        context = self.page.context.browser.new_context(viewport=self.page.viewport_size)
        return ComfyPage(context.new_page(), self.page.url)

    def reload(self) -> None:
        """Open the page anew, as settings want it."""
        self.page.reload()
        self._wait()

    def _wait(self) -> None:
        self.page.wait_for_function(READY, timeout=120_000)
        self.page.wait_for_selector("#graph-canvas", timeout=120_000)

    def _note(self, error: str) -> None:
        # The page asks an outside service about nodes; --disable-api-nodes makes it forbid itself to. Newer
        # ones look, when loaded again, for a graph that was open and not saved.
        if "Content Security Policy" not in error and "subgraph poofed" not in error:
            self.console_errors.append(error)

    def open_workflow(self, workflow: Path | str | dict[str, Any], name: str | None = None) -> PageReport:
        """Load a workflow (a file or its JSON), photograph the page into output/screenshots/NAME.png."""
        if not isinstance(workflow, dict):
            name = name or Path(workflow).stem
            workflow = json.loads(Path(workflow).read_text())
        name = name or "workflow"
        self.close_dialogs()
        self.console_errors.clear()
        self.page.evaluate(LOAD, [workflow, name])
        report = self.page.evaluate(DESCRIBE)
        screenshot = self.screenshot(name)
        report["dialogs"] += self._panel()
        return PageReport(**report, console_errors=list(self.console_errors), screenshot=screenshot)

    def run(self, timeout: float = 600.0) -> None:
        """Queue the open graph as the Run button does and wait until the page is idle again."""
        self.page.evaluate("() => window.app.queuePrompt(0)")
        self.page.wait_for_function(
            "async () => { const q = await (await fetch('/queue')).json();"
            " return q.queue_running.length + q.queue_pending.length === 0 }",
            timeout=timeout * 1000,
        )
        self.page.wait_for_timeout(1000)

    def _panel(self) -> list[str]:
        """What newer versions list in a panel at the side, opened and closed again."""
        more = self.page.locator("[data-testid=error-overlay-see-errors]")
        if not more.count():
            return []
        more.click()
        self.page.wait_for_timeout(500)
        texts = self.page.locator("[data-testid^=error-group]").all_inner_texts()
        self.page.get_by_label("Toggle properties panel").click()
        self.page.wait_for_timeout(500)
        return texts

    def close_dialogs(self) -> None:
        """Close dialogs and notices that a former workflow left open."""
        while self.page.locator(".p-toast-close-button").count():
            self.page.locator(".p-toast-close-button").first.click()
            self.page.wait_for_timeout(300)
        while self.page.locator(".p-dialog").count():
            self.page.keyboard.press("Escape")
            self.page.wait_for_timeout(300)

    def screenshot(self, name: str) -> Path:
        """PNG of the whole page, in output/screenshots."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)}.png"
        self.page.screenshot(path=path)
        return path


@contextmanager
def open_page(url: str) -> Iterator[ComfyPage]:
    """ComfyUI's page at `url`; skips the test without Chromium, fails it in CI."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        reason = "no Chromium on this machine; on Debian: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": 1920, "height": 1080})
        try:
            yield ComfyPage(page, url)
        finally:
            browser.close()
