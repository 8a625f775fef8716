"""Schema keywords that only newer ComfyUI versions know; older ones refuse them with a TypeError."""

import inspect
from collections.abc import Callable

from comfy_api.latest import io


def rare(input_class: Callable) -> dict[str, bool]:
    """{"advanced": True} where inputs of the class can be marked as rarely needed."""
    return {"advanced": True} if "advanced" in inspect.signature(input_class).parameters else {}


def found_by(*words: str) -> dict[str, list[str]]:
    """{"search_aliases": words} where a schema takes the words under which a node is searched."""
    known = "search_aliases" in inspect.signature(io.Schema).parameters
    return {"search_aliases": list(words)} if known else {}
