"""What the trainer node works out from its inputs before anything is loaded."""

from types import SimpleNamespace

import pytest

from tests.comfyui.training_graphs import SMALL


def test_prompts_kept_aside_are_worked_out_once(pack):
    """However many prompts there are: for each of them anew it would be quadratic."""
    inputs, asked = pack.module("nodes.grpo.inputs"), []

    class Counting(inputs.Training):
        @property
        def held_out(self):
            asked.append(self)
            return list(range(0, len(self.prompts), 4))

    prompts = tuple(f"prompt {number}" for number in range(1000))
    settings = {key: value for key, value in SMALL.items() if key not in ("prompts", "lora_name")}
    training = Counting(prompts=prompts, **settings)
    assert training.learned is training.learned
    assert training.learned == [number for number in range(1000) if number % 4]
    assert len(asked) == 1


@pytest.mark.parametrize(("sample_size", "side"), [(16, 128), (64, 512), (128, 512)])
def test_the_usual_size_is_the_drm_s_own_up_to_512(pack, sample_size, side):
    drm = SimpleNamespace(backbone=SimpleNamespace(config=SimpleNamespace(sample_size=sample_size)))
    assert pack.module("nodes.grpo.inputs").usual_side(drm) == side


def test_a_head_on_the_model_s_own_tokens_has_no_size_of_its_own(pack):
    assert pack.module("nodes.grpo.inputs").usual_side(SimpleNamespace(trunk=None)) == 512


@pytest.mark.parametrize(
    ("said", "side"), [(128, 128), (1024, 512), (100, 256), (-16, 256), ("128", 256), (None, 256)]
)
def test_what_a_drm_learned_from_goes_before_what_its_network_was_made_for(pack, said, side):
    """A checkpoint of one file does not say its size, so what is trained on it would be taken for SD3.5's."""
    made_for = SimpleNamespace(config=SimpleNamespace(sample_size=32))
    drm = SimpleNamespace(backbone=made_for, metadata={"resolution": said})
    assert pack.module("nodes.grpo.inputs").usual_side(drm) == side
