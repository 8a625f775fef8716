"""What the tests of `training.evaluate` share: six test sets, a configuration over them, a reward model."""

import json

from drm import save_drm
from tests.tiny import tiny_drm
from tests.training.preference_fixtures import make_fixtures
from tests.training.sd3_folder import CLIP_WIDTHS, T5_WIDTH
from training.evaluate import main
from training.evaluation.test_sets import FORMATS


def write_test_sets(folder):
    """The fixtures, with the first training file of Pick-a-Pic under the name of a test file."""
    folder = make_fixtures(folder)
    parquet = folder / "pickapic" / "data"
    first = parquet / "train-00000-of-00002-0a1b2c3d4e5f6071.parquet"
    first.rename(parquet / "test-00000-of-00001-0a1b2c3d4e5f6071.parquet")
    return folder


def write_config(path, data, **changes):
    """A configuration over all six test sets; JSON is YAML."""
    places = {name: {"path": str(data / "pickapic")} for name in FORMATS if name.startswith("pickapic")}
    for name in ("imagereward", "hpdv2", "hpdv3"):
        places[name] = {"path": str(data / name / "test.json")}
    places["pairs"] = {"path": str(data / "hpdv3" / "test.json")}
    tree = {
        "version": 1,
        "benchmarks": places,
        "out": str(path / "out"),
        "bad_rows": 0.5,
        "workers": 2,
        "batch": 5,
    }
    (path / "evaluate.yaml").write_text(json.dumps(tree | changes))
    return str(path / "evaluate.yaml")


def write_drm(path, seed=0, **changes):
    """A random reward model that reads 77 CLIP tokens and 5 of T5."""
    sizes = {"joint_attention_dim": T5_WIDTH, "pooled_projection_dim": sum(CLIP_WIDTHS)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_drm(tiny_drm(seed=seed, **sizes | changes), path, metadata={"text_length": 82})
    return str(path)


def fails(arguments, capsys, *pieces):
    """The command ends with 1 and one line on stderr that has all the pieces."""
    assert main(arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    for piece in pieces:
        assert piece in line, line
