"""What the page asks of DRM Pick: /drm/picks/... Everything that comes in is checked; errors are sentences.

GET  waiting                         POST  seen    {record, client}
GET  backlog?name=&after=            POST  answer  {name, record, picks: [rows]} or {..., later: true}
GET  picture?name=&record=&row=      POST  undo    {name}
"""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web
from server import PromptServer

from .head_trainer import picks_root
from .pick_wait import WAITING, Shown, is_open

LARGEST_BODY = 1 << 16
Handler = Callable[[web.Request], Awaitable[web.Response]]


def register() -> None:
    """Adds the routes to ComfyUI's server, where there is one, once."""
    server = getattr(PromptServer, "instance", None)
    if server is None or getattr(server, "drm_picks", False):
        return
    server.drm_picks = True
    for path, handler in (("waiting", waiting), ("backlog", next_of_backlog), ("picture", picture)):
        server.routes.get(f"/drm/picks/{path}")(_checked(handler))
    for path, handler in (("seen", seen), ("answer", answer), ("undo", undo_last)):
        server.routes.post(f"/drm/picks/{path}")(_checked(handler))


def _checked(handler: Handler) -> Handler:
    async def checked(request: web.Request) -> web.Response:
        try:
            return await handler(request)
        except (ValueError, OSError) as error:
            return web.json_response({"error": str(error)}, status=400)

    return checked


async def _body(request: web.Request) -> dict:
    text = await request.content.read(LARGEST_BODY + 1)
    try:
        body = json.loads(text) if len(text) <= LARGEST_BODY else None
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ValueError(
            f"the request has {len(text)} bytes that are no JSON object: send one of up to 64 kB"
        )
    return body


def _folder(name: object) -> Path:
    from ..drm.picks import folder_of

    return folder_of(picks_root(), name)


async def waiting(request: web.Request) -> web.Response:
    """The batches that runs wait for."""
    return web.json_response([found.shown.to_dict() for found in list(WAITING.values())])


async def seen(request: web.Request) -> web.Response:
    """A page shows a batch."""
    body = await _body(request)
    found, client = WAITING.get(str(body.get("record"))), body.get("client")
    known = isinstance(client, str) and is_open(PromptServer.instance, client)
    if found is not None and known:
        found.seen_by = client
    return web.json_response({"seen": found is not None and known})


async def answer(request: web.Request) -> web.Response:
    """Picks for a batch, whether a run waits for it or it is of the backlog; or put off."""
    from ..drm.picks import check_picks, read_waiting, settle

    body = await _body(request)
    folder, record = _folder(body.get("name")), body.get("record")
    run = WAITING.get(record) if isinstance(record, str) else None

    def write() -> None:
        picks = check_picks(body.get("picks"), read_waiting(folder, record).shape[0])
        settle(folder, record, picks)
        if run is not None:
            run.picks = picks

    if body.get("later") is True:
        if run is not None:
            run.later = True
    else:
        await asyncio.to_thread(write)
    if run is not None:
        run.answered.set()
    return web.json_response(await asyncio.to_thread(_backlog, body.get("name"), ""))


async def next_of_backlog(request: web.Request) -> web.Response:
    """How many batches wait to be picked from, and the first of them after the one given."""
    name, after = (request.query.get(key, "") for key in ("name", "after"))
    return web.json_response(await asyncio.to_thread(_backlog, name, after))


def _backlog(name: str, after: str) -> dict:
    from ..drm.picks import PicksError, backlog, read_waiting

    folder = _folder(name)
    records = [record for record in backlog(folder) if record not in WAITING]
    # Round and round: behind the last comes the first.
    for record in [r for r in records if r > after] + [r for r in records if r <= after]:
        try:
            found = read_waiting(folder, record)
        except PicksError:
            continue
        shown = Shown(name, record, found.shape[0], found.batch.prompt)
        return {"count": len(records), "batch": shown.to_dict()}
    return {"count": 0, "batch": None}


async def undo_last(request: web.Request) -> web.Response:
    """Puts the last picked batch back into the backlog."""
    from ..drm.picks import undo

    name = (await _body(request)).get("name")
    record = await asyncio.to_thread(undo, _folder(name))
    found = await asyncio.to_thread(_backlog, name, "")
    return web.json_response({**found, "undone": record})


async def picture(request: web.Request) -> web.Response:
    """One picture of a batch."""
    from ..drm.picks import read_picture

    name, record, row = (request.query.get(key, "") for key in ("name", "record", "row"))
    if not row.isdigit():
        raise ValueError(f"row is {row[:20]!r}: give the number of a picture")
    data = await asyncio.to_thread(read_picture, _folder(name), record, int(row))
    return web.Response(body=data, content_type="image/jpeg", headers={"Cache-Control": "max-age=86400"})
