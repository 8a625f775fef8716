// Links and sockets of the pack's own types have colours in both renderers: without, they are grey in the old and
// all but invisible in the new. A theme that knows these types has the last word.
import { app } from "../../../scripts/app.js";

const COLOURS = { DRM_MODEL: "#e0a84e", DRM_TRACE: "#d1495b", DRM_SEARCH: "#6fb3a8" };

/** Themes set the colours of all types they do not know to nothing, whenever they are loaded. */
function fallBack(colours, type, shade) {
    let themes = colours[type];
    Object.defineProperty(colours, type, {
        configurable: true,
        enumerable: true,
        get: () => themes || shade,
        set: (value) => (themes = value),
    });
}

app.registerExtension({
    name: "DRM.SocketColours",
    setup() {
        // The new renderer's themes write into the body's own style, which goes before this.
        const sheet = document.createElement("style");
        const lines = Object.entries(COLOURS).map(([type, shade]) => `--color-datatype-${type}: ${shade};`);
        sheet.textContent = `:root { ${lines.join(" ")} }`;
        document.head.append(sheet);
        for (const [type, shade] of Object.entries(COLOURS)) {
            fallBack(app.canvas.constructor.link_type_colors, type, shade);
            fallBack(app.canvas.default_connection_color_byType, type, shade);
        }
    },
});
