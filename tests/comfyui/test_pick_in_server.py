"""DRM Pick in a real server: who is asked, what is kept, and that no run hangs."""

import json
import shutil
import time
import urllib.error
from types import SimpleNamespace

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from drm.picks import backlog, read_records
from tests.comfyui.graphs import node, score_graph
from tools.comfy_results import PromptRejectedError


def pick_graph(name, seed=5, **changes):
    """A batch of three drawn by KSampler 7, decoded by 9, picked from by DRM Pick 10, saved by 11 and 12."""
    graph = score_graph()
    del graph["8"]
    graph["7"]["inputs"]["seed"] = seed
    inputs = {"images": ["9", 0], "latent": ["7", 0], "prompt": "red heart", "name": name, "model": ["1", 0]}
    return graph | {
        "9": node("VAEDecode", samples=["7", 0], vae=["1", 2]),
        "10": node("DRMPick", **inputs | {"without_a_page": "take the first"} | changes),
        "11": node("SaveImage", images=["10", 0], filename_prefix=f"{name}_picked"),
        "12": node("SaveLatent", samples=["10", 1], filename_prefix=f"{name}_picked"),
        "13": node("SaveLatent", samples=["7", 0], filename_prefix=f"{name}_all"),
    }


@pytest.fixture
def picks(base_dir, request):
    """The folder of picks of this test."""
    folder = base_dir / "output" / "drm_picks" / request.node.name
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Page:
    """What the page does, without one: shows what it is told of, and answers."""

    def __init__(self, server, events):
        self.server, self.events = server, events

    def shown(self):
        """The batch the server tells of, seen."""
        deadline = time.monotonic() + 60
        while not self.events.of("drm_pick"):
            assert time.monotonic() < deadline, self.server.log_tail()
            time.sleep(0.02)
        batch = self.events.of("drm_pick")[-1]
        self.server.post("/drm/picks/seen", {"record": batch["record"], "client": self.events.client_id})
        return batch

    def answer(self, batch, **answer):
        return self.server.post(
            "/drm/picks/answer", {"name": batch["name"], "record": batch["record"], **answer}
        )


def saved(base_dir, prefix):
    return load_file(sorted((base_dir / "output").glob(f"{prefix}_*.latent"))[-1])["latent_tensor"]


def succeeded(result):
    assert result.status == "success", result.error
    return result


def refused(server, path, body):
    with pytest.raises(urllib.error.HTTPError) as error:
        server.post(path, body)
    assert error.value.code == 400
    return json.loads(error.value.read())["error"]


def test_what_is_clicked_goes_on_and_is_kept(server, base_dir, picks):
    with server.events() as events:
        page = Page(server, events)
        prompt = server.queue(pick_graph(picks.name), client_id=events.client_id)
        batch = page.shown()
        assert (batch["node"], batch["count"], batch["prompt"]) == ("10", 3, "red heart")
        assert batch in server.get("/drm/picks/waiting")
        picture = f"/drm/picks/picture?name={picks.name}&record={batch['record']}&row=2"
        assert server.request(picture, None, "", 20)[:2] == b"\xff\xd8"
        for wrong in ([], [3], [0, 0], "all", None):
            assert "from 0 to 2" in refused(server, "/drm/picks/answer", {**batch, "picks": wrong})
        assert page.answer(batch, picks=[2, 0]) == {"count": 0, "batch": None}
        result = succeeded(server.wait(prompt))
    assert len(result.images("11")) == 2
    assert (saved(base_dir, f"{picks.name}_picked") == saved(base_dir, f"{picks.name}_all")[[2, 0]]).all()
    ((found,), broken) = read_records(picks)
    assert (found.batch.picks, found.batch.seed, broken) == ((2, 0), 5, [])
    assert found.batch.model["family"] == "sd3"
    assert backlog(picks) == []
    # The same again is not asked again.
    assert succeeded(server.run(pick_graph(picks.name))).executed == []
    assert not list(picks.rglob("*.tmp"))


def test_a_run_of_nobody_takes_the_first_and_fills_the_backlog(server, base_dir, picks):
    result = succeeded(server.run(pick_graph(picks.name)))
    assert len(result.images("11")) == 1
    assert (saved(base_dir, f"{picks.name}_picked") == saved(base_dir, f"{picks.name}_all")[[0]]).all()
    assert len(backlog(picks)) == 1
    result = server.run(pick_graph(picks.name, without_a_page="stop"))
    assert "DRMPick (node 10): no page showed the pictures: they wait in the backlog" in result.error
    assert len(backlog(picks)) == 2


def test_a_script_with_a_web_socket_is_no_page(server, picks):
    with server.events() as events:
        succeeded(server.wait(server.queue(pick_graph(picks.name), client_id=events.client_id)))
    assert len(backlog(picks)) == 1


def test_the_drm_s_best_stands_in_for_a_page(server, base_dir, picks):
    graph = pick_graph(picks.name, without_a_page="take the DRM's best", drm=["3", 0], positive=["4", 0])
    graph["8"] = score_graph()["8"]
    graph["14"] = node("SaveLatent", samples=["8", 2], filename_prefix=f"{picks.name}_best")
    succeeded(server.run(graph))
    assert (saved(base_dir, f"{picks.name}_picked") == saved(base_dir, f"{picks.name}_best")).all()
    graph["10"]["inputs"].pop("drm")
    error = server.run(graph).error
    assert "without_a_page is 'take the DRM's best' and DRM not connected: connect it, or choose" in error


def test_cancel_ends_the_wait_at_once(server, picks):
    with server.events() as events:
        page = Page(server, events)
        prompt = server.queue(pick_graph(picks.name), client_id=events.client_id)
        page.shown()
        server.interrupt()
        assert server.wait(prompt).interrupted
        assert server.get("/drm/picks/waiting") == []
    assert len(events.of("drm_pick_done")) == 1
    assert backlog(picks) == []


def test_later_ends_the_run_and_is_picked_from_the_backlog(server, picks):
    with server.events() as events:
        page = Page(server, events)
        prompt = server.queue(pick_graph(picks.name), client_id=events.client_id)
        first = page.shown()
        left = page.answer(first, later=True)
        result = succeeded(server.wait(prompt))
    assert (result.images("11"), len(backlog(picks))) == ([], 1)
    query = f"/drm/picks/backlog?name={picks.name}&after="
    assert server.get(query) == {"count": 1, "batch": {**first, "node": None}}
    assert left["count"] <= 1
    page.answer(first, picks=[1])
    assert server.get(query) == {"count": 0, "batch": None}
    assert [found.batch.picks for found in read_records(picks)[0]] == [(1,)]
    undone = server.post("/drm/picks/undo", {"name": picks.name})
    assert (undone["undone"], undone["count"]) == (first["record"], 1)
    assert list(picks.glob("*.safetensors")) == []
    page.answer(first, picks=[0])
    # Put off once, it is asked again when queued again.
    succeeded(server.run(pick_graph(picks.name)))
    assert len(backlog(picks)) == 1


def test_the_routes_take_no_paths_and_no_nonsense(server, picks):
    assert "not a path" in refused(server, "/drm/picks/undo", {"name": "../.."})
    assert "JSON object" in refused(server, "/drm/picks/undo", [])
    record = "20260101_000000_00000000"
    missing = refused(server, "/drm/picks/answer", {"name": picks.name, "record": record, "picks": [0]})
    assert f"{record}.safetensors is not in" in missing
    assert "a name that this node gave" in refused(
        server, "/drm/picks/answer", {"name": picks.name, "record": "../../x", "picks": [0]}
    )
    for query in ("name=..%2F..&record=a&row=0", f"name={picks.name}&record={record}&row=-1"):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            server.request(f"/drm/picks/picture?{query}", None, "", 20)
    assert server.post("/drm/picks/seen", {"record": record, "client": "nobody"}) == {"seen": False}


class Hours:
    """A clock that each look moves on by a second, and a server whose page is there between two of them."""

    client_id = "page"

    def __init__(self, module, shows, closes):
        self.module, self.shows, self.closes = module, shows, closes
        self.now, self.sent = 0, []

    def monotonic(self):
        self.now += 1
        if self.now == self.shows:
            self.module.WAITING["r"].seen_by = "page"
        return self.now

    @property
    def sockets(self):
        return {"page": SimpleNamespace(closed=self.now >= self.closes)}

    def send_sync(self, event, data, client):
        self.sent.append(event)


@pytest.mark.parametrize(
    ("shows", "closes", "ends"), [(None, 1000, "seen"), (3, 50, "back"), (3, 4, "back"), (3, 3, "seen")]
)
def test_a_page_that_was_closed_is_waited_for_a_while(pack, monkeypatch, shows, closes, ends):
    """TO_BE_SEEN after the start where no page shows it, TO_COME_BACK after the last look at one that did."""
    module = pack.module("nodes.pick_wait")
    hours = Hours(module, shows, closes)
    monkeypatch.setattr(module.PromptServer, "instance", hours, raising=False)
    monkeypatch.setattr(module, "time", hours)
    monkeypatch.setattr(module, "_TICK", 0.001)
    found = module.wait_for_picks(module.Shown("a", "r", 2, "", "1"))
    last, patience = (1, module.TO_BE_SEEN) if ends == "seen" else (closes - 1, module.TO_COME_BACK)
    assert hours.now == last + patience + 1
    assert (found.picks, found.later, module.WAITING) == (None, False, {})
    assert hours.sent == ["drm_pick", "drm_pick_done"]


def test_the_record_is_opened_by_any_reader_of_safetensors(server, picks):
    succeeded(server.run(pick_graph(picks.name)))
    (path,) = (picks / "later").glob("*.safetensors")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["header"])
        assert sorted(file.keys()) == ["latents", "picture.0", "picture.1", "picture.2"]
    assert (header["prompt"], header["picks"], header["seed"]) == ("red heart", [], 5)


def test_what_was_picked_is_trained_on(server, base_dir, picks):
    for seed in (1, 2):
        succeeded(server.run(pick_graph(picks.name, seed=seed)))
    while (left := server.get(f"/drm/picks/backlog?name={picks.name}&after="))["batch"]:
        assert left["batch"]["count"] == 3
        server.post("/drm/picks/answer", {**left["batch"], "picks": [1]})
    settings = {"blocks": "2", "steps": 2, "rate": 0.001, "seed": 0, "name": picks.name}
    trainer = node("DRMHeadTrainer", model=["1", 0], clip=["2", 0], picks=picks.name, **settings)
    graph = pick_graph(picks.name)
    graph = {key: graph[key] for key in "124567"} | {"20": trainer}
    graph["21"] = score_graph()["8"]
    graph["21"]["inputs"] |= {"drm": ["20", 0], "model": ["1", 0]}
    result = succeeded(server.run(graph))
    (report,) = result.outputs["20"]["text"]
    assert "4 pairs in 2 batches of 1 prompts" in report
    assert len(result.outputs["21"]["text"][0].splitlines()) == 3
    path = base_dir / "models" / "drm" / f"{picks.name}.safetensors"
    assert path.is_file()
    names = server.object_info("DRMLoader")["input"]["required"]["drm_name"][1]["options"]
    assert path.name in names
    path.unlink()
    del trainer["inputs"]["model"]
    with pytest.raises(PromptRejectedError, match=r"DRMHeadTrainer \(node 20\): .*model"):
        server.run({"2": graph["2"], "20": trainer})
