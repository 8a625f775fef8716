"""Widgets on the real page: a preset hides what it replaces, a search brings custom, sockets have colours."""

import pytest

ADD = """async (type) => {
    window.app.graph.clear();
    const node = LiteGraph.createNode(type);
    window.app.graph.add(node);
    await new Promise(resolve => setTimeout(resolve, 200));
}"""
SET = """async ([name, value]) => {
    const [node] = window.app.graph.nodes, widget = node.widgets.find((one) => one.name === name);
    widget.value = value;
    widget.callback?.(value);
    await new Promise(resolve => setTimeout(resolve, 200));
}"""
HIDDEN = "() => window.app.graph.nodes[0].widgets.filter(({ hidden }) => hidden).map(({ name }) => name)"
HEIGHT = "() => window.app.graph.nodes[0].size[1]"
REPLACED = ["num_branches", "branch_start", "branch_end"]


@pytest.mark.parametrize("node", ["StepwiseKSampler", "StepwiseSampler"])
def test_a_preset_hides_what_it_replaces(page, node):
    page.page.evaluate(ADD, node)
    assert page.page.evaluate(HIDDEN) == REPLACED
    low = page.page.evaluate(HEIGHT)
    page.page.evaluate(SET, ["preset", "custom"])
    assert page.page.evaluate(HIDDEN) == []
    # Three rows of 20 pixels and a margin of 4.
    assert page.page.evaluate(HEIGHT) >= low + 3 * 24
    page.page.evaluate(SET, ["num_branches", 6])
    page.page.evaluate(SET, ["preset", "fast"])
    assert page.page.evaluate(HIDDEN) == REPLACED
    page.page.evaluate(SET, ["preset", "custom"])
    widgets = page.page.evaluate(
        "() => Object.fromEntries(graph.nodes[0].widgets.map(w => [w.name, w.value]))"
    )
    assert widgets["num_branches"] == 6


def test_a_search_that_is_connected_sets_custom(page):
    page.page.evaluate(ADD, "StepwiseKSampler")
    page.page.evaluate("""async () => {
        const [sampler] = window.app.graph.nodes, search = LiteGraph.createNode("DRMSearch");
        window.app.graph.add(search);
        search.connect(0, sampler, sampler.inputs.findIndex(({ name }) => name === "search"));
        await new Promise(resolve => setTimeout(resolve, 200));
    }""")
    preset = "() => window.app.graph.nodes[0].widgets.find(({ name }) => name === 'preset').value"
    assert page.page.evaluate(preset) == "custom"
    assert page.page.evaluate(HIDDEN) == []


def test_temperature_is_there_for_softmax_alone(page):
    page.page.evaluate(ADD, "DRMSearch")
    assert page.page.evaluate(HIDDEN) == ["temperature"]
    page.page.evaluate(SET, ["choice", "softmax"])
    assert page.page.evaluate(HIDDEN) == []


def test_sockets_have_colours_whatever_the_theme(page):
    """In the old renderer's tables and in the new one's styles, also after another theme was loaded."""
    for theme in ("light", "dark"):
        page.page.evaluate(
            "theme => window.app.extensionManager.setting.set('Comfy.ColorPalette', theme)", theme
        )
        page.page.wait_for_timeout(1000)
        colours = page.page.evaluate("""() => ["DRM_MODEL", "DRM_TRACE", "DRM_SEARCH"].map((type) => [
            window.app.canvas.constructor.link_type_colors[type],
            window.app.canvas.default_connection_color_byType[type],
            getComputedStyle(document.body).getPropertyValue(`--color-datatype-${type}`).trim(),
        ])""")
        assert [len(set(shades)) for shades in colours] == [1, 1, 1]
        assert all(shades[0].startswith("#") for shades in colours)
