// DRM Pick on the page: the pictures of a batch on the node, clicked in the order they are preferred.
// A run that waits sends "drm_pick"; the page answers that it has seen it, which tells it from a script.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const NODE = "DRMPick";
const STYLE = `
.drm-pick { display: flex; flex-direction: column; gap: 6px; box-sizing: border-box; width: 100%; height: 100%;
    min-height: 280px; font: 12px sans-serif; color: var(--input-text, #ddd); }
.drm-pick .line { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; min-height: 1.3em; }
.drm-pick .grid { flex: 1 1 auto; min-height: 0; overflow-y: auto; display: grid; gap: 4px; align-content: start; }
.drm-pick .grid button { position: relative; padding: 0; border: 2px solid transparent; background: none;
    cursor: pointer; }
.drm-pick .grid button.picked { border-color: #4caf50; }
.drm-pick .grid img { display: block; width: 100%; }
.drm-pick .grid span { position: absolute; top: 2px; left: 2px; min-width: 1.4em; border-radius: 0.7em;
    padding: 1px 2px; text-align: center; font-weight: bold; background: #4caf50; color: #fff; }
.drm-pick .bar { display: flex; flex-wrap: wrap; gap: 4px; }
.drm-pick .bar button { flex: 1 1 auto; padding: 4px 8px; border: 1px solid var(--border-color, #555);
    border-radius: 4px; background: var(--comfy-input-bg, #222); color: inherit; cursor: pointer; }
.drm-pick .bar button:disabled { opacity: 0.4; cursor: default; }`;

const element = (tag, className, parent, text = "") => {
    const made = document.createElement(tag);
    made.className = className;
    made.textContent = text;
    parent?.append(made);
    return made;
};

async function ask(path, body) {
    const options = body && {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
    };
    const response = await api.fetchApi(`/drm/picks/${path}`, options);
    const answer = await response.json();
    if (!response.ok) {
        throw new Error(answer.error ?? response.statusText);
    }
    return answer;
}

class Panel {
    // batch: {name, record, count, prompt, node}; node is null for one of the backlog.
    constructor(node) {
        this.node = node;
        this.batch = null;
        this.picks = [];
        this.root = element("div", "drm-pick");
        this.line = element("div", "line", this.root);
        const bar = element("div", "bar", this.root);
        this.grid = element("div", "grid", this.root);
        const button = (text, work) => {
            const made = element("button", "", bar, text);
            made.type = "button";
            made.addEventListener("click", () => work().catch((error) => this.say(error.message)));
            return made;
        };
        this.go = button("Continue", () => this.answer());
        this.later = button("Later", () => this.putOff());
        this.back = button("Backlog", () => this.openBacklog(""));
        this.undo = button("Undo last", () => this.undoLast());
        // The page would drag the node, or zoom the graph.
        for (const event of ["pointerdown", "wheel"]) {
            this.root.addEventListener(event, (moved) => moved.stopPropagation());
        }
        this.show(null);
    }

    get name() {
        return this.node.widgets?.find((widget) => widget.name === "name")?.value ?? "";
    }

    say(text) {
        this.line.textContent = text;
        this.line.title = text;
    }

    show(batch) {
        this.batch = batch;
        this.picks = [];
        this.grid.replaceChildren();
        this.grid.style.gridTemplateColumns = `repeat(${Math.min(8, Math.ceil(Math.sqrt(batch?.count ?? 1)))}, 1fr)`;
        for (let row = 0; row < (batch?.count ?? 0); row++) {
            const button = element("button", "", this.grid);
            button.type = "button";
            button.setAttribute("aria-label", `picture ${row + 1}`);
            const query = new URLSearchParams({ name: batch.name, record: batch.record, row });
            element("img", "", button).src = api.apiURL(`/drm/picks/picture?${query}`);
            button.addEventListener("click", () => this.toggle(row));
        }
        this.say(batch ? `Click in order of preference: ${batch.prompt}` : "No pictures to pick from.");
        this.mark();
    }

    toggle(row) {
        this.picks = this.picks.includes(row) ? this.picks.filter((other) => other !== row) : [...this.picks, row];
        this.mark();
    }

    mark() {
        [...this.grid.children].forEach((button, row) => {
            const place = this.picks.indexOf(row);
            button.classList.toggle("picked", place >= 0);
            button.querySelector("span")?.remove();
            if (place >= 0) {
                element("span", "", button, String(place + 1));
            }
        });
        const waits = Boolean(this.batch?.node);
        this.go.textContent = waits || !this.batch ? "Continue" : "Save";
        this.go.disabled = !this.picks.length;
        this.later.disabled = !this.batch;
        this.back.disabled = waits;
        this.undo.disabled = waits;
    }

    count(backlog) {
        this.back.textContent = backlog.count ? `Backlog (${backlog.count})` : "Backlog";
        return backlog;
    }

    async answer() {
        const { name, record, node } = this.batch;
        const left = this.count(await ask("answer", { name, record, picks: this.picks }));
        this.show(node ? null : left.batch);
    }

    // A run's batch goes to the backlog and the run goes on without it; one of the backlog makes room for the next.
    async putOff() {
        const { name, record, node } = this.batch;
        if (!node) {
            return this.openBacklog(record);
        }
        this.count(await ask("answer", { name, record, later: true }));
        this.show(null);
    }

    async openBacklog(after) {
        const query = new URLSearchParams({ name: this.name, after });
        const found = this.count(await ask(`backlog?${query}`));
        this.show(found.batch);
        if (!found.batch) {
            this.say(`The backlog of ${this.name} is empty.`);
        }
    }

    async undoLast() {
        const found = this.count(await ask("undo", { name: this.name }));
        this.say(found.undone ? `The last picks are undone: ${found.undone} is in the backlog.` : "Nothing to undo.");
    }
}

// Ids within subgraphs are "12:5": node 5 of the graph in node 12.
function panelOf(id) {
    let graph = app.graph;
    let node = null;
    for (const part of String(id).split(":")) {
        node = graph?.getNodeById?.(Number(part)) ?? null;
        graph = node?.subgraph;
    }
    return node?.drmPick ?? null;
}

async function show(batch) {
    const { seen } = await ask("seen", { record: batch.record, client: api.clientId });
    if (!seen) {
        // A page that was just opened is not connected yet; a run that ended is no longer among the waiting.
        setTimeout(showWaiting, 500);
    }
    const panel = panelOf(batch.node);
    if (panel && panel.batch?.record !== batch.record) {
        panel.show(batch);
    }
}

// What runs wait for, also after the page was reloaded or another graph was looked at.
async function showWaiting() {
    for (const batch of await ask("waiting")) {
        await show(batch);
    }
}

function everyPanel(graph = app.graph) {
    const nodes = graph?.nodes ?? [];
    return nodes.flatMap((node) => [node.drmPick, ...(node.subgraph ? everyPanel(node.subgraph) : [])]).filter(Boolean);
}

app.registerExtension({
    name: "DRM.Pick",
    setup() {
        element("style", "", document.head, STYLE);
        api.addEventListener("drm_pick", ({ detail }) => show(detail));
        api.addEventListener("drm_pick_done", ({ detail }) => {
            const panel = everyPanel().find((panel) => panel.batch?.node && panel.batch.record === detail.record);
            panel?.show(null);
        });
        api.addEventListener("reconnected", showWaiting);
    },
    nodeCreated(node) {
        if (node.comfyClass !== NODE) {
            return;
        }
        node.drmPick = new Panel(node);
        const widget = node.addDOMWidget("pictures", "drm_pick", node.drmPick.root, {
            serialize: false,
            hideOnZoom: false,
            getMinHeight: () => 300,
        });
        widget.serialize = false;
        node.setSize([Math.max(node.size[0], 400), Math.max(node.size[1], 620)]);
    },
    afterConfigureGraph() {
        showWaiting();
    },
});
