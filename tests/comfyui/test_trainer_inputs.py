"""What the trainer node works out from its inputs before anything is loaded."""

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
