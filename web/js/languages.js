// Pages of ComfyUI 0.3.75 and its neighbours load their own texts of a language after those that packs bring in
// locales/, and drop these (Comfy-Org/ComfyUI_frontend#7214 mends it). So they are put in again, each time.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

const WAIT = 5000; // ms; a language that is still not there by then stays English in what is drawn first

function pageTexts() {
    const provided = document.getElementById("vue-app")?.__vue_app__?._context?.provides ?? {};
    const found = Object.getOwnPropertySymbols(provided).map((key) => provided[key]?.global);
    return found.find((texts) => texts?.mergeLocaleMessage && texts.setLocaleMessage);
}

app.registerExtension({
    name: "DRM.Languages",
    // The page asks for the nodes' titles right after this.
    async init() {
        const texts = pageTexts();
        if (!texts) return;
        const answer = await api.fetchApi("/i18n");
        if (!answer.ok) return;
        const ours = await answer.json();
        const { setLocaleMessage } = texts;
        texts.setLocaleMessage = (language, messages) => {
            setLocaleMessage(language, messages);
            if (ours[language]) texts.mergeLocaleMessage(language, ours[language]);
        };
        const language = app.extensionManager.setting.get("Comfy.Locale");
        if (!ours[language]) return;
        const loaded = () => "g" in texts.getLocaleMessage(language);
        for (const end = Date.now() + WAIT; !loaded() && Date.now() < end; ) {
            await new Promise((resolve) => setTimeout(resolve, 20));
        }
        texts.mergeLocaleMessage(language, ours[language]);
    },
});
