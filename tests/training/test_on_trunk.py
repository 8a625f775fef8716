"""A head trained on its base's blocks and saved without them."""

import re
from pathlib import Path

import pytest
import torch

from drm import SharedDRM, load_drm
from drm.checkpoint import read_header
from drm.diffusers_trunk import Prompts, trunk_facts, trunk_tokens
from drm.sd3.base_model import load_transformer
from drm.shared import unlike
from tests.training.encoded import make_config, write_base, write_encoded
from tests.training.processes import numbers, train
from training.config import ConfigError
from training.engine.launch import TrainingError
from training.reward import trainable

SHARED = {"train": "head", "backbone": "shared", "num_kept": 1}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("on_trunk")
    write_encoded(folder / "encoded")
    write_base(folder / "base.safetensors")
    return folder


@pytest.fixture(scope="module")
def trained(files: Path) -> Path:
    config = make_config(files, model=SHARED, out=str(files / "whole"), steps=6, save_every=2)
    train(config)
    return Path(config.train.out)


def arguments(count=3):
    rng = torch.Generator().manual_seed(3)
    prompts = torch.randn(count, 9, 256, generator=rng)
    return torch.randn(count, 16, 4, 6, generator=rng), prompts, prompts[:, 0].contiguous()


def test_the_file_is_a_head_alone(trained):
    drm = load_drm(trained / "reward.safetensors")
    assert isinstance(drm, SharedDRM)
    facts = read_header(trained / "reward.safetensors")["architecture"]["backbone"]
    assert (facts["family"], facts["taps"], facts["num_blocks"]) == ("sd3", [1], 2)
    assert drm.metadata["base"] == "base.safetensors"
    assert (trained / "reward.safetensors").stat().st_size < 4e6


def test_it_scores_the_base_s_own_tokens_as_in_training(files, trained):
    """Through diffusers' own walk and hooks, which share nothing with training's."""
    config = make_config(files, model=SHARED, out=str(files / "whole"))
    drm = load_drm(trained / "reward.safetensors")
    network = trainable.build(config.model, seed=0).eval()
    network.head.load_state_dict(drm.state_dict())
    latents, embeds, pooled = arguments()
    with torch.no_grad():
        wanted = network(latents, 0.4, embeds, pooled)
    transformer = load_transformer(files / "base.safetensors")
    tokens = trunk_tokens(transformer, drm.trunk.taps, Prompts(embeds, pooled))
    found = drm(tokens(latents, 0.4, torch.arange(3)), 0.4)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert (drm(tokens(latents, 0.4, torch.arange(3)), 0.9) - wanted).abs().max() > 1e-4  # told sigma


def test_it_learned(files, trained):
    fresh = trainable.build(make_config(files, model=SHARED).model, seed=0).head
    drm = load_drm(trained / "reward.safetensors")
    changed = [
        name for name, value in fresh.state_dict().items() if not torch.equal(value, drm.state_dict()[name])
    ]
    assert len(changed) == len(fresh.state_dict())


def test_stopped_and_gone_on_with_is_one_run(files, trained):
    for steps in (2, 6):
        train(make_config(files, model=SHARED, out=str(files / "parted"), steps=steps, save_every=2))
    losses = {
        out: [row["loss"] for row in numbers(files / out / "log.jsonl")][-6:] for out in ("parted", "whole")
    }
    assert losses["parted"] == losses["whole"]


def test_the_base_is_told_from_another(files, trained, tmp_path):
    mark = load_drm(trained / "reward.safetensors").trunk.fingerprint
    assert mark["layout"] == "comfyui"
    assert len(mark["values"]) == 64
    other = write_base(tmp_path / "other.safetensors", seed=1)
    found = trainable.build(make_config(files, model={**SHARED, "base": str(other)}).model, seed=0).head.trunk
    assert unlike(mark, found.fingerprint)
    again = trainable.build(make_config(files, model=SHARED).model, seed=5).head.trunk
    assert not unlike(mark, again.fingerprint)


def test_of_a_diffusers_folder_it_is_what_diffusers_says(files, tmp_path):
    transformer = load_transformer(files / "base.safetensors")
    transformer.save_pretrained(tmp_path / "transformer")
    found = trainable.build(
        make_config(files, model={**SHARED, "base": str(tmp_path)}).model, seed=0
    ).head.trunk
    assert found.fingerprint == trunk_facts(transformer, (1,)).fingerprint


@pytest.mark.parametrize(
    "change", [{"train": "full"}, {"train": "lora"}, {"head": "conv_gn"}, {"random_backbone": True}]
)
def test_what_cannot_be_shared_is_refused(files, change):
    with pytest.raises(ConfigError, match=re.escape("model.backbone is shared: wanted own, unless")):
        make_config(files, model={**SHARED, **change})


def test_a_reward_model_is_no_base_for_it(files, trained):
    own = make_config(files, out=str(files / "own"), steps=1)
    train(own)
    base = str(files / "own" / "reward.safetensors")
    with pytest.raises(TrainingError, match="wants that model's own checkpoint"):
        trainable.build(make_config(files, model={**SHARED, "base": base}).model, seed=0)


def test_older_runs_keep_their_hash(files):
    """A new setting must not end them; the figure is this configuration's before there was one."""
    config = make_config(Path("there"))
    assert config.hash() == "64ab0411ed05ee966744d9f0ab4c816a54312b4bc21e8b59048b6fe7ed09b474"
