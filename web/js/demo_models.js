// Whoever is past the demo need not meet its files among their own. nodes/folders.py reads the answer at the start.
import { app } from "../../../scripts/app.js";

app.registerExtension({
    name: "DRM.DemoModels",
    settings: [
        {
            id: "DRM.HideDemoModels",
            category: ["DRM", "Demo", "HideDemoModels"],
            name: "Hide the demo's checkpoint and text encoder in the loaders (after a restart)",
            type: "boolean",
            defaultValue: false,
        },
    ],
});
