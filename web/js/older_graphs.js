// Graphs saved before the samplers had a preset were drawn with the widgets alone. New nodes start with another
// preset, so those graphs are opened with "custom": the same graph then draws the same picture.
import { app } from "../../../scripts/app.js";

// How many widget values each node saved then; preset and seconds come after them.
const WIDGETS_THEN = { StepwiseKSampler: 11, StepwiseSampler: 7 };

function keepMeaning(nodes) {
    for (const node of nodes ?? []) {
        const values = node.widgets_values;
        if (Array.isArray(values) && values.length === WIDGETS_THEN[node.type]) {
            values.push("custom", 0);
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
