// Graphs keep their widgets' values in a row, so a row saved when a node had other widgets is put in today's
// order by their names. Graphs from before the samplers had a preset were drawn with the widgets alone: they open
// with "custom", and so draw the same picture. What a node had and has no more falls away.
import { app } from "../../../scripts/app.js";

const START = ["seed", "control", "steps", "cfg", "scheduler", "denoise"];
const BRANCHES = ["num_branches", "noise_level", "kind", "branch_start", "branch_end"];
const NEW_BRANCHES = ["preset", "num_branches", "branch_start", "branch_end", "noise_level", "kind", "seconds", "film_strip"];
const MISSING = { preset: "custom", seconds: 0, film_strip: 0, picture: 1 };

// Of each node the names of its widgets today, and in earlier versions.
const ROWS = {
    StepwiseKSampler: {
        now: [...START, ...NEW_BRANCHES],
        then: [
            [...START, ...BRANCHES],
            [...START, ...BRANCHES, "preset", "seconds"],
        ],
    },
    StepwiseSampler: {
        now: ["seed", "control", ...NEW_BRANCHES],
        then: [
            [...BRANCHES, "seed", "control"],
            [...BRANCHES, "seed", "control", "preset", "seconds"],
        ],
    },
    DRMSearch: {
        now: ["choice", "temperature", "stride"],
        then: [["choice", "temperature", "", "", "stride", "", "", "", "", "", ""]],
    },
    DRMTracePlot: {
        now: ["scores", "width", "height", "picture"],
        then: [["item", "scores", "width", "height"]],
    },
};

function keepMeaning(nodes) {
    for (const node of nodes ?? []) {
        const values = node.widgets_values, rows = ROWS[node.type];
        // Trace plots have as many widgets as before, but another first one.
        const isOld = node.type === "DRMTracePlot" ? typeof values?.[0] === "number" : values?.length !== rows?.now.length;
        const names = rows && Array.isArray(values) && isOld && rows.then.find(({ length }) => length === values.length);
        if (!names) continue;
        const given = { ...MISSING, ...Object.fromEntries(names.map((name, place) => [name, values[place]])) };
        // It was counted from 0.
        if ("item" in given) given.picture = given.item + 1;
        node.widgets_values = rows.now.map((name) => given[name]);
        const known = new Set([...rows.now, ...names.filter((name) => name !== "item")]);
        node.inputs = node.inputs?.filter((input) => !input.widget || known.has(input.name));
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
