"""The words on the nodes, in every language: locales/<language>/nodeDefs.json, which ComfyUI's page reads.

    python -m tools.locales        # after a text of a node has changed, before the commit

English comes from the nodes themselves, through a real server. The other languages are written by hand; they
get English's order, lose what no node has any more, and what a translator has to look at is printed: texts
that are missing, and texts whose English is not that of the last commit while their translation still is.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tools.comfy_server import PACK, ROOT, ComfyServer

TRANSLATED = ("zh", "ja")
LOCALES = ROOT / "locales"
Texts = dict[str, str]  # "DRMLoader.inputs.dtype.tooltip" -> the text


def ours(object_info: dict[str, Any]) -> dict[str, Any]:
    """This pack's part of /object_info."""
    return {key: node for key, node in object_info.items() if node["python_module"] == f"custom_nodes.{PACK}"}


def inputs(node: dict[str, Any]) -> list[tuple[str, tuple[Any, dict[str, Any]]]]:
    """(name, (type or choices, options)) of every input."""
    known = node["input"].get("required", {}) | node["input"].get("optional", {})
    return [(name, (kind, rest[0] if rest else {})) for name, (kind, *rest) in known.items()]


def english(object_info: dict[str, Any]) -> Texts:
    """Every text of this pack's nodes."""
    return {
        f"{node_id}.{key}": text
        for node_id, node in ours(object_info).items()
        for key, text in node_texts(node).items()
    }


def node_texts(node: dict[str, Any]) -> Texts:
    """Display name, description, and a name and tooltip for each input and output of one node."""
    texts = {"display_name": node["display_name"], "description": node["description"]}
    for name, (_, options) in inputs(node):
        key = f"inputs.{name.replace('.', '_')}"  # as the page's normalizeI18nKey does
        texts[f"{key}.name"] = options.get("display_name") or name
        texts[f"{key}.tooltip"] = options.get("tooltip")
    outputs = zip(node["output"], node["output_name"], node["output_tooltips"], strict=True)
    for row, (kind, name, tooltip) in enumerate(outputs):
        if name != kind:  # the page calls an output like its type by the type's own translation
            texts[f"outputs.{row}.name"] = name
        texts[f"outputs.{row}.tooltip"] = tooltip
    return {key: text for key, text in texts.items() if text}


def choices(object_info: dict[str, Any]) -> dict[str, list[str]]:
    """{"DRMSearch.inputs.choice": ["greedy", "softmax"], ...}; the page does not translate them."""
    found = {}
    for node_id, node in ours(object_info).items():
        for name, (kind, options) in inputs(node):
            values = kind if isinstance(kind, list) else options.get("options", [])
            found[f"{node_id}.inputs.{name}"] = [value for value in values if isinstance(value, str)]
    return found


def path(language: str) -> Path:
    return LOCALES / language / "nodeDefs.json"


def flat(tree: dict[str, Any], prefix: str = "") -> Texts:
    """The file's nested tables as one."""
    texts: Texts = {}
    for key, value in tree.items():
        texts |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return texts


def nested(texts: Texts) -> dict[str, Any]:
    """flat() backwards."""
    tree: dict[str, Any] = {}
    for key, text in texts.items():
        *folders, last = key.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = text
    return tree


def read(language: str) -> Texts:
    return flat(json.loads(path(language).read_text(encoding="utf-8"))) if path(language).exists() else {}


def write(language: str, texts: Texts) -> None:
    path(language).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(nested(texts), indent=2, ensure_ascii=False) + "\n"
    path(language).write_text(text, encoding="utf-8")


def committed(language: str) -> Texts:
    """The texts of the last commit."""
    name = path(language).relative_to(ROOT).as_posix()
    shown = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, check=False)
    return flat(json.loads(shown.stdout)) if shown.returncode == 0 else {}


def to_translate(texts: Texts, translated: Texts, texts_before: Texts, translated_before: Texts) -> list[str]:
    """Keys without a translation, and keys of which only the English has changed since the last commit."""
    return [
        key
        for key, text in texts.items()
        if key not in translated
        or (texts_before.get(key, text) != text and translated_before.get(key) == translated[key])
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, ComfyServer(folder) as server:
        texts = english(server.object_info())
    write("en", texts)
    before = committed("en")
    for language in TRANSLATED:
        translated = read(language)
        write(language, {key: translated[key] for key in texts if key in translated})
        for key in translated.keys() - texts.keys():
            print(f"{language}: {key} removed, no node has it: {translated[key]}")
        for key in to_translate(texts, translated, before, committed(language)):
            print(f"{language}: {key}\n    now: {texts[key]}")
            if key in translated:
                print(f"    was: {before[key]}\n    translated as: {translated[key]}")


if __name__ == "__main__":
    main()
