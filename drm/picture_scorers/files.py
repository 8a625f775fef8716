"""What all scorers ask of the folder they are read from."""

import json
from pathlib import Path

from ..text_files import read_text

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def file_names(folder: Path) -> set[str]:
    """Names of what lies in the folder; none where there is no folder."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def folder_facts(folder: str | Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of the folder's files: changes when they do, and opens none."""
    files = sorted(path for path in Path(folder).glob("*") if path.is_file())
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def json_field(path: Path, name: str) -> object:
    """A field of a JSON file, None where it has none. Raises ValueError for what is no JSON."""
    try:
        return json.loads(read_text(path)).get(name)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
