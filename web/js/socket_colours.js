// Links and sockets of the pack's own types have colours, in both renderers: a type without one is grey in the old
// and all but invisible in the new.
import { app } from "../../../scripts/app.js";

const COLOURS = { DRM_MODEL: "#e0a84e", DRM_TRACE: "#d1495b", DRM_SEARCH: "#6fb3a8" };

function colour() {
    const style = document.body.style;
    for (const [type, shade] of Object.entries(COLOURS)) {
        if (!style.getPropertyValue(`--color-datatype-${type}`)) {
            style.setProperty(`--color-datatype-${type}`, shade);
        }
        const links = app.canvas?.constructor.link_type_colors ?? {};
        const sockets = app.canvas?.default_connection_color_byType ?? {};
        links[type] ||= shade;
        sockets[type] ||= shade;
    }
}

app.registerExtension({
    name: "DRM.SocketColours",
    setup() {
        colour();
        // A change of theme clears the colours of types it does not know.
        app.ui?.settings?.addEventListener?.("Comfy.ColorPalette.change", () => setTimeout(colour, 100));
    },
});
