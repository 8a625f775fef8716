"""Result files that grow row by row, so that a run cut short keeps what it has measured."""

import json
from collections.abc import Iterable
from pathlib import Path

from training.engine.atomic import replace_atomically


def grow(path: Path, part: str, facts: dict, **lists: Iterable[dict]) -> None:
    """Writes {part: {**facts, name: rows, ...}} again after every row; the file's other parts stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = json.loads(path.read_text()) if path.exists() else {}
    whole[part] = dict(facts)
    for name, rows in lists.items():
        kept = whole[part].setdefault(name, [])
        for row in rows:
            kept.append(row)
            text = json.dumps(whole, indent=1) + "\n"
            replace_atomically(path, lambda temporary, text=text: temporary.write_text(text))


def without_gpu(path: Path) -> None:
    """Says in the file that there was no GPU, unless it holds rows of an earlier one."""
    whole = json.loads(path.read_text())
    whole.setdefault("gpu", "not measured: no GPU was at hand")
    replace_atomically(path, lambda temporary: temporary.write_text(json.dumps(whole, indent=1) + "\n"))
