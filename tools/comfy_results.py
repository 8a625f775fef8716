"""What a ComfyUI server says about a prompt: its result, live events, or why it was refused."""

import itertools
import json
import struct
import time
from dataclasses import dataclass, field
from typing import Any

import websocket

PREVIEW_EVENT = 1  # of a binary websocket message; the picture follows after eight bytes


class PromptRejectedError(ValueError):
    """The server refused a graph before running it; the text holds its reasons, node by node."""


@dataclass(frozen=True)
class Result:
    """What became of one prompt: the server's history entry, taken apart."""

    prompt_id: str
    status: str  # "success" or "error"
    error: str  # "NodeType (node 3): message"; "" on success
    interrupted: bool
    outputs: dict[
        str, dict[str, Any]
    ]  # node id -> what the node showed, e.g. {"images": [...], "text": [...]}
    messages: list[tuple[str, dict[str, Any]]]  # ("execution_start", {...}), ...

    def images(self, node_id: str | None = None) -> list[dict[str, str]]:
        """Pictures {"filename", "subfolder", "type"} of one node, or of all of them."""
        nodes = self.outputs.values() if node_id is None else [self.outputs.get(str(node_id), {})]
        return [image for node in nodes for image in node.get("images", [])]

    @property
    def executed(self) -> list[str]:
        """Ids of the nodes that showed something and were not taken from the cache."""
        cached = {
            node for event, data in self.messages if event == "execution_cached" for node in data["nodes"]
        }
        return [node for node in self.outputs if node not in cached]


@dataclass
class Events:
    """What the page of one client would receive over its websocket."""

    client_id: str
    # {"type": "progress", "data": {...}, "received": seconds on the monotonic clock}, in order
    messages: list[dict[str, Any]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)  # encoded pictures, in order

    def of(self, kind: str, prompt_id: str | None = None) -> list[dict[str, Any]]:
        """Data of all messages of a kind: "progress", "executed", "execution_cached", ..."""
        data = [message["data"] for message in self.messages if message["type"] == kind]
        return [entry for entry in data if prompt_id is None or entry.get("prompt_id") == prompt_id]

    def settle(self, seconds: float = 10) -> None:
        """Return once the prompts that started have had their last message: it follows the history entry.

        Args:
            seconds: how long to wait for it. A client that went away meanwhile gets none.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended = [data["prompt_id"] for data in self.of("executing") if data["node"] is None]
            if all(data["prompt_id"] in ended for data in self.of("execution_start")):
                return
            time.sleep(0.02)

    def seconds_in(self, node_id: str, prompt_id: str) -> float:
        """How long the server was busy with one node of a prompt, start to start of what came next."""
        marks = [
            m for m in self.messages if m["type"] == "executing" and m["data"].get("prompt_id") == prompt_id
        ]
        for mark, following in itertools.pairwise(marks):
            if mark["data"]["node"] == node_id:
                return following["received"] - mark["received"]
        raise KeyError(
            f"node {node_id} did not run in prompt {prompt_id}: it was cached, or is not in the graph"
        )


def record(connection: Any, events: Events) -> None:
    """Read a websocket until it closes."""
    while True:
        try:
            kind, data = connection.recv_data()
        except (OSError, websocket.WebSocketException):
            return
        if kind == websocket.ABNF.OPCODE_TEXT:
            events.messages.append({**json.loads(data), "received": time.monotonic()})
        elif kind == websocket.ABNF.OPCODE_BINARY and struct.unpack_from(">I", data)[0] == PREVIEW_EVENT:
            events.previews.append(data[8:])
        elif kind == websocket.ABNF.OPCODE_CLOSE:
            return


def rejection_text(answer: str) -> str:
    """Readable text of the server's 400 answer to a prompt."""
    try:
        data = json.loads(answer)
    except json.JSONDecodeError:
        return answer
    error = data.get("error", {})
    lines = [f"{error.get('message', error)} {error.get('details', '')}".strip()]
    for node_id, node in data.get("node_errors", {}).items():
        for problem in node["errors"]:
            lines.append(f"{node['class_type']} (node {node_id}): {problem['message']}: {problem['details']}")
    return "\n".join(lines)


def result_from_history(prompt_id: str, entry: dict[str, Any]) -> Result:
    """Take one entry of the server's history apart."""
    messages = [(event, data) for event, data in entry["status"]["messages"]]
    problems = [
        f"{data['node_type']} (node {data['node_id']}): {data['exception_message'].strip()}"
        for event, data in messages
        if event == "execution_error"
    ]
    interrupted = any(event == "execution_interrupted" for event, _ in messages)
    return Result(
        prompt_id=prompt_id,
        status=entry["status"]["status_str"],
        error="\n".join(problems) or ("interrupted" if interrupted else ""),
        interrupted=interrupted,
        outputs=entry["outputs"],
        messages=messages,
    )
