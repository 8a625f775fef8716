"""Traces in the metadata of saved pictures: a PNG's `drm_trace` holds {node id: trace} as JSON.

ComfyUI's saving nodes write every entry of a prompt's `extra_pnginfo` into the picture. Two things stand in
the way: a prompt sent through the API may come without that dictionary, and a sampler whose result is cached
does not run, so it could not add to it. Hence a hook that sees each prompt before it is queued: it makes sure
the dictionary is there and fills in the traces known for nodes whose whole upstream graph is the same as when
they last ran. A node that does run replaces its entry.
"""

import hashlib
import json
import uuid
from collections import OrderedDict
from weakref import WeakValueDictionary

import comfy_execution.utils
from server import PromptServer

ENTRY = "drm_trace"
SAMPLER_NODES = {"StepwiseKSampler", "StepwiseSampler"}
REMEMBERED = 64


class PictureInfo(dict):
    """A prompt's extra_pnginfo, with the graph it belongs to."""

    graph: dict


_waiting: WeakValueDictionary[str, PictureInfo] = WeakValueDictionary()
_known: OrderedDict[str, dict] = OrderedDict()


def register() -> None:
    PromptServer.instance.add_on_prompt_handler(on_prompt)


def on_prompt(request: dict) -> dict:
    """Prepares the metadata of a prompt that holds one of our samplers; others are left as they are."""
    graph = request.get("prompt")
    if not isinstance(graph, dict) or not any(_class_type(graph, node) in SAMPLER_NODES for node in graph):
        return request
    extra_data = request.setdefault("extra_data", {})
    info = PictureInfo(extra_data.get("extra_pnginfo") or {})
    info.graph = graph
    signatures: dict[str, str] = {}
    for node in graph:
        upstream_signature(graph, node, signatures)
    info[ENTRY] = {node: _known[signature] for node, signature in signatures.items() if signature in _known}
    extra_data["extra_pnginfo"] = info
    _waiting[str(request.setdefault("prompt_id", str(uuid.uuid4())))] = info
    return request


def record(trace: dict) -> None:
    """Adds the trace of the node that is being executed to the pictures its prompt will save."""
    context = comfy_execution.utils.get_executing_context()
    info = _waiting.get(context.prompt_id) if context else None
    if info is None or context.node_id not in info.graph:
        return
    # Replaced, not updated: another thread may be reading the old one.
    info[ENTRY] = {**info[ENTRY], context.node_id: trace}
    signature = upstream_signature(info.graph, context.node_id)
    _known[signature] = trace
    _known.move_to_end(signature)
    while len(_known) > REMEMBERED:
        _known.popitem(last=False)


def upstream_signature(graph: dict, node: str, known: dict[str, str] | None = None) -> str:
    """A digest of what a node's result depends on: its class, its inputs and the nodes its links come
    from.
    """
    known = {} if known is None else known
    if node not in known:
        inputs = {}
        for name, value in sorted(graph[node].get("inputs", {}).items()):
            is_link = isinstance(value, list) and len(value) == 2 and str(value[0]) in graph
            inputs[name] = [upstream_signature(graph, str(value[0]), known), value[1]] if is_link else value
        content = json.dumps([_class_type(graph, node), inputs], default=str)
        known[node] = hashlib.sha256(content.encode()).hexdigest()
    return known[node]


def _class_type(graph: dict, node: str) -> str | None:
    entry = graph[node]
    return entry.get("class_type") if isinstance(entry, dict) else None
