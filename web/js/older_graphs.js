// Graphs saved before the samplers had a preset were drawn with the widgets alone. New nodes start with another
// preset, so those graphs are opened with "custom": the same graph then draws the same picture. DRM Search had
// eleven widgets, of which the choice, the temperature and the stride are left.
import { app } from "../../../scripts/app.js";

// How many widget values each node saved then; preset and seconds come after them.
const WIDGETS_THEN = { StepwiseKSampler: 11, StepwiseSampler: 7 };
const SEARCH_WIDGETS_THEN = 11;
const SEARCH_WIDGETS_LEFT = [0, 1, 4];

function keepMeaning(nodes) {
    for (const node of nodes ?? []) {
        const values = node.widgets_values;
        if (Array.isArray(values) && values.length === WIDGETS_THEN[node.type]) {
            values.push("custom", 0);
        }
        if (Array.isArray(values) && node.type === "DRMSearch" && values.length === SEARCH_WIDGETS_THEN) {
            node.widgets_values = SEARCH_WIDGETS_LEFT.map((place) => values[place]);
            node.inputs = node.inputs?.filter((input) => ["choice", "temperature", "stride"].includes(input.name));
        }
    }
}

app.registerExtension({
    name: "DRM.OlderGraphs",
    beforeConfigureGraph(graph) {
        keepMeaning(graph.nodes);
        for (const subgraph of graph.definitions?.subgraphs ?? []) {
            keepMeaning(subgraph.nodes);
        }
    },
});
