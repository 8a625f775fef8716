"""Configurations: what a person writes in YAML, and what they are told when it is wrong."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from tests.training.encoded import make_config, write_yaml
from training.config import ConfigError, DRMConfig, SourceConfig, read_config

CONFIGS = Path(__file__).parents[2] / "training" / "configs"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_yaml(make_config(tmp_path), tmp_path / "config.yaml")


def changed(file: Path, change) -> Path:
    tree = yaml.safe_load(file.read_text())
    change(tree)
    file.write_text(yaml.safe_dump(tree))
    return file


def test_a_file_gives_the_configuration_it_was_written_from(file: Path, tmp_path: Path):
    assert read_config(file, DRMConfig) == make_config(tmp_path)


def test_settings_on_the_command_line_go_over_the_file(file: Path):
    config = read_config(
        file, DRMConfig, ["train.steps=7", "train.learning_rate=2e-6", "data.weights={hpdv3: 2}"]
    )
    assert (config.train.steps, config.train.learning_rate) == (7, 2e-6)
    assert config.data.weights == {"hpdv3": 2.0}


def test_it_is_frozen(file: Path):
    config = read_config(file, DRMConfig)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.steps = 3


def test_the_hash_follows_the_values_not_the_order_of_keys(file: Path):
    first = read_config(file, DRMConfig).hash()
    assert read_config(changed(file, lambda t: t.update(name=t.pop("name"))), DRMConfig).hash() == first
    assert read_config(file, DRMConfig, ["train.seed=1"]).hash() != first


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("drm_*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_read(path: Path):
    config = read_config(path, DRMConfig)
    if config.encode:
        assert config.encode.out == config.data.encoded
        assert all(isinstance(source, SourceConfig) for source in config.encode.sources)


def test_the_paper_s_recipe_is_the_one_shipped():
    config = read_config(CONFIGS / "drm_sd35_medium.yaml", DRMConfig)
    assert config.model.num_kept == 21
    train = config.train
    assert (train.global_batch, train.learning_rate, train.epochs) == (128, 1e-5, 1.0)
    assert {source.format for source in config.encode.sources} == {"hpdv3", "pickapic", "imagereward"}
    assert config.encode.resolution == 512
    assert (config.encode.fit, config.encode.posterior, config.encode.t5_lengths) == (
        "square",
        "sample",
        (512,),
    )
    assert (train.noise, train.sigma_draw, train.shift, train.ema) == ("independent", "logit-normal", 3.0, 0)
    assert (config.model.head, train.weight_decay) == ("conv_gn", 1e-4)
    assert {source.min_confidence for source in config.encode.sources} == {0.95}
    large = read_config(CONFIGS / "drm_sd35_large.yaml", DRMConfig)
    assert (large.model.num_kept, large.train.shift, large.train.global_batch) == (33, 1.0, 128)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t["train"].update(learning_rte=1.0),
            "train.learning_rte .* nearest is train.learning_rate",
        ),
        (lambda t: t.update(modle={}), "modle is not a setting, the nearest is model"),
        (lambda t: t["train"].update(steps="many"), "train.steps is 'many': wanted a whole number"),
        (lambda t: t["train"].update(steps=True), "train.steps is True: wanted a whole number"),
        (lambda t: t["model"].update(coarse=0), "model.coarse is 0: wanted at least 1"),
        (
            lambda t: t["model"].update(coarse=2, train="lora"),
            "model.coarse is 2: wanted 1 unless model.train is full",
        ),
        (lambda t: t["train"].update(sigma=[0.5]), "train.sigma is"),
        (lambda t: t["train"].update(sigma=[0.5, 0.2]), r"train.sigma is \(0.5, 0.2\): wanted two growing"),
        (lambda t: t["train"].update(global_batch=0), "train.global_batch is 0: wanted at least 1"),
        (lambda t: t["model"].update(train="some"), "model.train is 'some': wanted one of full, lora, head"),
        (lambda t: t["model"].pop("base"), "model.base is missing"),
        (lambda t: t.update(version=2), "version is 2, this code reads 1"),
        (lambda t: t.update(train=3), "train is 3: wanted a section with out"),
    ],
)
def test_what_is_wrong_is_named(file: Path, change, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        read_config(changed(file, change), DRMConfig)


def test_files_that_are_no_configuration(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read_config(tmp_path / "none.yaml", DRMConfig)
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="holds list: wanted sections such as version, model"):
        read_config(tmp_path / "list.yaml", DRMConfig)
    (tmp_path / "broken.yaml").write_text("a: [1,\nb: 2")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_config(tmp_path / "broken.yaml", DRMConfig)
    with pytest.raises(ConfigError, match="is no setting"):
        read_config(CONFIGS / "drm_demo.yaml", DRMConfig, ["train.steps"])


def test_a_byte_order_mark_and_other_encodings(file: Path, tmp_path: Path):
    text = file.read_text()
    file.write_text(text, encoding="utf-8-sig")
    assert read_config(file, DRMConfig) == make_config(tmp_path)
    file.write_text(text + "name: Käse\n", encoding="cp1252")
    with pytest.raises(ConfigError, match=rf"line {text.count(chr(10)) + 1} is not UTF-8"):
        read_config(file, DRMConfig)
