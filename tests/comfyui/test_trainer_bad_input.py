"""What Step-GRPO LoRA Trainer refuses, each in one clear sentence and before any training."""

import pytest
import torch

from tests.comfyui.inside import write_lora
from tests.comfyui.test_bad_input import foreign_drm
from tests.comfyui.test_trainer import clean, output  # noqa: F401
from tests.comfyui.training_graphs import files, train


@pytest.fixture(autouse=True)
def untouched(clean, output):  # noqa: F811
    """The MODEL as before, and no file."""
    yield output
    assert files(output) == []


@pytest.fixture
def folder(tmp_path):
    """ComfyUI's input folder in this process."""
    import folder_paths

    before = folder_paths.get_input_directory()
    path = tmp_path / "input"
    path.mkdir()
    folder_paths.set_input_directory(str(path))
    yield path
    folder_paths.set_input_directory(before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": " \n\n "}, "there are no prompts: write one a line"),
        ({"prompts": "nowhere.txt"}, "there is no file 'nowhere.txt' in ComfyUI's input folder"),
        ({"prompts": "../secret.txt"}, "'../secret.txt' lies outside ComfyUI's input folder"),
        ({"prompts": "/etc/secret.txt"}, "lies outside ComfyUI's input folder"),
        ({"num_branches": 1}, "num_branches is 1: wanted at least 2"),
        ({"iterations": 0}, "iterations is 0: wanted at least 1"),
        ({"steps": 1}, "steps is 1: wanted at least 2"),
        ({"width": 100}, "width is 100: wanted a multiple of 16"),
        ({"width": 4096}, "the MODEL draws at most"),
        ({"learning_rate": float("nan")}, "learning_rate is nan: wanted above 0"),
        ({"noise_level": 0.0}, "noise_level is 0.0: wanted above 0"),
        ({"rank": 0}, "rank is 0: wanted at least 1"),
        ({"method": "ppo"}, "method is 'ppo': choose one of step-grpo, grpo"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0: wanted from 0"),
        ({"name": "  "}, "name is '  ': wanted a name"),
        ({"name": "../../elsewhere"}, "it leaves loras/ of ComfyUI's output folder"),
        ({"name": "../elsewhere"}, "it leaves loras/ of ComfyUI's output folder"),
        ({"noise_level": 1.9}, "times the ODE's std, wanted 0.7 to 1.5"),
    ],
)
def test_sentence(inside, folder, changes, words):
    (folder.parent / "secret.txt").write_text("red heart")
    with pytest.raises(ValueError, match=r"\w") as error:
        train(inside, **changes)
    assert words in str(error.value)


def test_prompts_of_a_file(pack, folder):
    read = pack.module("nodes.grpo.inputs").read_prompts
    (folder / "mine.txt").write_bytes("\ufeffred heart\r\n\r\n  blue car \nred heart\n".encode())
    assert read("mine.txt\n") == ["red heart", "blue car"]
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt, line 1 is not UTF-8 text .*save the file as UTF-8"):
        read("latin.txt")


def test_a_prompt_file_that_changed_is_another_input(pack, folder):
    fingerprint = pack.module("nodes.trainer").StepGRPOLoRATrainer.fingerprint_inputs

    def now(text, lora_name="none"):
        return fingerprint(prompts=text, lora_name=lora_name, seed=0)

    (folder / "mine.txt").write_text("red heart")
    before = now(" mine.txt\n")
    assert now("mine.txt") == before
    (folder / "mine.txt").write_text("blue car!!")
    assert now("mine.txt") != before
    assert now("red heart") == now("red heart") != now("blue car")


def test_more_prompts_than_memory(inside, monkeypatch):
    import comfy.model_management as mm

    monkeypatch.setattr(mm, "get_free_memory", lambda *_: 1 << 20)
    prompts = "\n".join(f"prompt {number}" for number in range(100))
    with pytest.raises(ValueError, match=r"100 prompts take 0\.0 GB .* give fewer prompts"):
        train(inside, prompts=prompts)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"in_channels": 4}, "the DRM scores latents of 4 channels"),
        ({"joint_attention_dim": 128, "pooled_projection_dim": 64}, "the DRM reads prompts of width 128"),
    ],
)
@pytest.mark.parametrize("which", ["drm", "held_out_drm"])
def test_drm_of_another_family(inside, pack, tmp_path, shape, words, which):
    import folder_paths

    folder_paths.add_model_folder_path("drm", str(tmp_path))
    name = f"{which}_{next(iter(shape))}.safetensors"
    foreign_drm(tmp_path / name, **shape)
    load = pack.module("nodes.adapters").load_drm_patcher
    with pytest.raises(ValueError, match=words):
        train(inside, **{which: load("drm", name, "float32")})


def test_rewards_that_do_not_differ(inside, monkeypatch):
    score = inside.drm.model.score_prepared
    monkeypatch.setattr(inside.drm.model, "score_prepared", lambda *a: 0 * score(*a) + 3.0, raising=False)
    with pytest.raises(ValueError, match=r"rewards of siblings differ by 0 \(std\).* raise noise_level"):
        train(inside)


def test_nan_reward_at_once(inside, monkeypatch):
    score = inside.drm.model.score_prepared
    monkeypatch.setattr(inside.drm.model, "score_prepared", lambda *a: score(*a) * float("nan"))
    with pytest.raises(ValueError, match="the scorer returned nan for batch item 0 at sigma"):
        train(inside)


def test_model_that_differs_with_gradients(inside):
    model = inside.model.clone()

    def wrapper(apply, args):
        drift = 1.001 if torch.is_grad_enabled() else 1.0
        return drift * apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(wrapper)
    with pytest.raises(ValueError, match="the same step walked twice differs"):
        train(inside, model=model)


@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
def test_caches_of_the_network_s_output(inside, name):
    from comfy_extras import nodes_easycache

    node = getattr(nodes_easycache, f"{name}Node")
    (model,) = node.execute(inside.model, 0.2, 0.0, 1.0, verbose=False).result
    for patched in (model, model.clone()):
        with pytest.raises(ValueError, match=f"^{name} on the MODEL .*: take patches and accelerators off"):
            train(inside, model=patched)


def test_layers_no_gradient_reaches(inside):
    model = inside.model.clone()
    model.set_model_unet_function_wrapper(
        lambda apply, args: apply(args["input"], args["timestep"], **args["c"]).detach().requires_grad_()
    )
    with pytest.raises(ValueError, match="the gradient that reaches the LoRA is 0"):
        train(inside, model=model)


def test_lora_of_others(inside, tmp_path):
    import folder_paths

    folder_paths.add_model_folder_path("loras", str(tmp_path))
    write_lora(tmp_path / "theirs.safetensors", 128)
    with pytest.raises(ValueError, match="was not made by Step-GRPO"):
        train(inside, lora_name="theirs.safetensors")


def test_output_folder_that_cannot_be_written(inside):
    import folder_paths

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory("/proc/drm_output")
    try:
        with pytest.raises(ValueError, match="cannot be written to"):
            train(inside)
    finally:
        folder_paths.set_output_directory(before)


def test_vae_of_another_family(inside):
    class FourChannels:
        latent_channels = 4

    with pytest.raises(ValueError, match="the VAE decodes latents of 4 channels"):
        train(inside, vae=FourChannels())


def test_model_without_sd3s_attention(inside, pack):
    with pytest.raises(ValueError, match="has no attention of SD3's kind"):
        pack.module("drm.lora").comfy_targets(torch.nn.Linear(2, 2))
