"""A run that waits for somebody to pick, and whether a page is there to pick on.

A page that is there answers the message `drm_pick` by saying that it has seen it. A client with a web socket
and without this pack's page, such as a script, does not, so a run that it queued goes on after a few seconds.
"""

import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import comfy.model_management as mm
from server import PromptServer

# Seconds until a page has to have seen the pictures; and until one that was closed has to be back.
TO_BE_SEEN, TO_COME_BACK = 5.0, 30.0
_TICK = 0.05


@dataclass(frozen=True)
class Shown:
    """What a page is told of a batch: the picks' name, the record, how many pictures, of what, for which node
    (None for one of the backlog).
    """

    name: str
    record: str
    count: int
    prompt: str
    node: str | None = None

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass
class Waiting:
    """seen_by: the client whose page shows the pictures. picks: once picked; later: put off instead."""

    shown: Shown
    seen_by: str | None = None
    picks: tuple[int, ...] | None = None
    later: bool = False
    answered: threading.Event = field(default_factory=threading.Event)


# record -> the run that waits for it
WAITING: dict[str, Waiting] = {}


def wait_for_picks(shown: Shown) -> Waiting:
    """Returns when somebody picked or put it off, or nobody is there: no picks then. Cancel raises."""
    waiting = WAITING[shown.record] = Waiting(shown)
    server = PromptServer.instance
    try:
        if server.client_id is not None:
            server.send_sync("drm_pick", shown.to_dict(), server.client_id)
            _wait(waiting, server)
        return waiting
    finally:
        del WAITING[shown.record]
        server.send_sync("drm_pick_done", {"record": shown.record}, None)


def _wait(waiting: Waiting, server: Any) -> None:
    there, patience = time.monotonic(), TO_BE_SEEN
    while not waiting.answered.wait(_TICK):
        mm.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        if is_open(server, waiting.seen_by):
            there, patience = now, TO_COME_BACK
        if now - there > patience:
            return


def is_open(server: Any, client: str | None) -> bool:
    """Whether this client's page is connected."""
    socket = server.sockets.get(client)
    return socket is not None and not socket.closed
