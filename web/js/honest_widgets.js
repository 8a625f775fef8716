// Widgets that would not be read are not shown: what a preset replaces, and the temperature of a choice that has
// none. A DRM Search that is connected makes the preset "custom", the only one that reads it.
import { app } from "../../../scripts/app.js";

const REPLACED = ["num_branches", "branch_start", "branch_end"];
const RULES = {
    StepwiseKSampler: { by: "preset", hidden: (preset) => (preset === "custom" ? [] : REPLACED), all: REPLACED },
    StepwiseSampler: { by: "preset", hidden: (preset) => (preset === "custom" ? [] : REPLACED), all: REPLACED },
    DRMSearch: { by: "choice", hidden: (choice) => (choice === "softmax" ? [] : ["temperature"]), all: ["temperature"] },
};

function named(node, name) {
    return node.widgets?.find((widget) => widget.name === name);
}

function isLinked(node, name) {
    return node.inputs?.some((input) => input.name === name && input.link != null);
}

function show(node, rule) {
    // What decides may come through a link; then nobody here knows it.
    const unread = isLinked(node, rule.by) ? [] : rule.hidden(named(node, rule.by)?.value);
    let changed = false;
    for (const name of rule.all) {
        const widget = named(node, name);
        const hidden = unread.includes(name) && !isLinked(node, name);
        if (!widget || Boolean(widget.hidden) === hidden) continue;
        changed = true;
        widget.hidden = hidden;
        widget.options = { ...widget.options, hidden };
        // Hidden ones would keep their row, of this height and a margin of 4.
        if (hidden) widget.computeSize = () => [0, -4];
        else delete widget.computeSize;
    }
    if (!changed) return;
    // The new renderer looks at the widgets anew when the row of them is another one.
    node.widgets = [...node.widgets];
    node.setSize([node.size[0], Math.max(node.computeSize()[1], unread.length ? 0 : node.size[1])]);
    node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
    name: "DRM.HonestWidgets",
    nodeCreated(node) {
        const rule = RULES[node.comfyClass];
        const deciding = rule && named(node, rule.by);
        if (!deciding) return;
        const { callback } = deciding;
        deciding.callback = function (...told) {
            const answer = callback?.apply(this, told);
            show(node, rule);
            return answer;
        };
        const { onConfigure, onConnectionsChange } = node;
        node.onConfigure = function (...told) {
            onConfigure?.apply(this, told);
            show(node, rule);
        };
        node.onConnectionsChange = function (...told) {
            onConnectionsChange?.apply(this, told);
            if (isLinked(node, "search") && deciding.value !== "custom" && !app.configuringGraph) {
                deciding.value = "custom";
            }
            show(node, rule);
        };
        show(node, rule);
    },
});
