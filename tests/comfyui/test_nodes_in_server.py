"""What a real server says about the nodes: names, sockets, help, start-up."""

import json
import subprocess
import sys
import urllib.error

import pytest

from tools.comfy_server import COMFYUI, ROOT

NODES = {
    "DRMLoader": ("DRM Loader (reward model)", ["drm_name", "dtype"], ["DRM_MODEL"]),
    "DRMScoreLatent": (
        "DRM Score Latent (rank, best of)",
        ["drm", "latent", "positive", "sigma", "latent_is", "noise_draws", "seed", "model", "vae"],
        ["FLOAT", "STRING", "LATENT", "LATENT", "IMAGE"],
    ),
    "DRMScoreImage": (
        "DRM Score Image (aesthetic reward, rank, best of)",
        ["scorer", "images", "prompt", "keep", "threshold"],
        ["FLOAT", "STRING", "IMAGE", "IMAGE", "INT", "IMAGE"],
    ),
    "StepwiseKSampler": (
        "Step-wise KSampler (DRM reward-guided)",
        (
            "model drm seed steps cfg scheduler positive negative latent_image denoise"
            " preset num_branches branch_start branch_end noise_level kind seconds film_strip search"
        ).split(),
        ["LATENT", "DRM_TRACE"],
    ),
    "StepwiseSampler": (
        "Step-wise Sampler (DRM branches)",
        (
            "drm positive seed preset num_branches branch_start branch_end noise_level kind seconds"
            " film_strip search"
        ).split(),
        ["SAMPLER", "DRM_TRACE"],
    ),
    "DRMSearch": (
        "DRM Search",
        ["choice", "temperature", "stride"],
        ["DRM_SEARCH"],
    ),
    "DRMTracePlot": (
        "DRM Trace Plot (scores by step)",
        ["trace", "scores", "width", "height", "picture", "latent"],
        ["IMAGE"],
    ),
    "DRMFilmStrip": (
        "DRM Film Strip (see the branches)",
        ["trace", "vae", "picture", "thumbnail", "latent"],
        ["IMAGE"],
    ),
    "DRMDemoCLIPLoader": ("DRM Demo CLIP Loader", ["clip_name"], ["CLIP"]),
    "DRMPick": (
        "DRM Pick (choose by click)",
        ["images", "latent", "prompt", "name", "without_a_page", "model", "drm", "positive"],
        ["IMAGE", "LATENT"],
    ),
    "DRMHeadTrainer": (
        "DRM Head Trainer (your taste)",
        "model clip picks blocks steps rate seed name better worse prompt".split(),
        ["DRM_MODEL", "STRING", "STRING", "IMAGE"],
    ),
    "StepGRPOLoRATrainer": (
        "Step-GRPO LoRA Trainer (reward fine-tuning)",
        (
            "model drm clip prompts width height steps cfg method num_branches prompts_per_iteration"
            " iterations learning_rate rank alpha kl_weight noise_level seed save_every preview_every"
            " ema_decay name lora_name vae held_out_drm"
        ).split(),
        ["MODEL", "LORA_MODEL", "LOSS_MAP", "INT", "IMAGE", "STRING"],
    ),
}


@pytest.fixture(scope="module")
def ours(server):
    """object_info of this pack's nodes."""
    everything = server.object_info()
    return {key: info for key, info in everything.items() if info["python_module"].endswith("ComfyUI-DRM")}


def test_the_pack_has_these_nodes(ours):
    assert set(ours) == set(NODES)


@pytest.mark.parametrize("node_id", NODES)
def test_names_and_sockets(ours, node_id):
    display_name, inputs, outputs = NODES[node_id]
    info = ours[node_id]
    order = [name for kind in ("required", "optional") for name in info["input_order"].get(kind, [])]
    assert (info["display_name"], order, info["output"]) == (display_name, inputs, outputs)
    assert info["category"] == "DRM"
    assert info["description"]


@pytest.mark.parametrize("node_id", NODES)
def test_every_input_and_output_has_a_tooltip(ours, node_id):
    info = ours[node_id]
    sockets = {**info["input"]["required"], **info["input"].get("optional", {})}
    assert [name for name, (_, options) in sockets.items() if not options.get("tooltip")] == []
    assert all(info["output_tooltips"])


def test_scores_are_a_list(ours):
    assert ours["DRMScoreLatent"]["output_is_list"] == [True, False, False, False, False]
    assert ours["DRMScoreLatent"]["output_name"] == ["scores", "ranks", "best", "sorted", "sheet"]
    assert ours["DRMScoreImage"]["output_is_list"] == [True, False, False, False, True, False]
    assert ours["DRMScoreImage"]["output_name"] == [
        "scores",
        "ranks",
        "best",
        "sorted",
        "batch_index",
        "sheet",
    ]


def test_sampler_offers_what_ksampler_offers(server, ours):
    stock = server.object_info("KSampler")["input"]["required"]
    sampler = ours["StepwiseKSampler"]["input"]["required"]
    assert set(stock) - {"sampler_name"} <= set(sampler)
    assert sampler["scheduler"][1]["options"] == stock["scheduler"][0]
    assert sampler["seed"][1]["control_after_generate"] is True
    for name in ("seed", "steps", "cfg", "denoise"):
        assert {key: sampler[name][1][key] for key in ("min", "max")} == {
            key: stock[name][1][key] for key in ("min", "max")
        }


@pytest.mark.parametrize("word", "reward,best of,score,rank,aesthetic,drm,grpo,branch,step".split(","))
def test_what_people_type_finds_a_node(ours, word):
    """The page's search before 0.11 reads display names alone."""
    assert any(word in info["display_name"].lower() for info in ours.values())


def test_models_folder_lists_only_safetensors(server, base_dir):
    for name in ("old.pt", "old.ckpt", "notes.md"):
        (base_dir / "models" / "drm" / name).write_bytes(b"not a model")
    listed = server.object_info("DRMLoader")["input"]["required"]["drm_name"][1]["options"]
    assert "drm_demo_emoji.safetensors" in listed
    assert all(name.endswith(".safetensors") for name in listed)


@pytest.mark.parametrize("node_id", NODES)
def test_every_node_has_a_help_page(server, node_id):
    page = server.request(f"/extensions/ComfyUI-DRM/docs/{node_id}.md", None, "", 10).decode()
    assert page.startswith(f"# {NODES[node_id][0].partition(' (')[0]}")


def test_graphs_are_offered_as_templates(server):
    try:
        templates = server.get("/workflow_templates")
    except urllib.error.HTTPError as error:
        pytest.fail(str(error))
    graphs = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert set(templates["ComfyUI-DRM"]) == graphs
    assert graphs == {
        "Fine-tune with Step-GRPO",
        "Reward-guided SD3.5 Medium",
        "Reward-guided custom sampler",
        "Reward-guided text to image",
        "Score and rank latents",
        "Teach your taste",
        "Your own model",
    }


STARTUP = """
import asyncio, builtins, importlib.util, json, sys
comfyui, root = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, comfyui)
import comfy.options
comfy.options.enable_args_parsing()
import utils.install_util, server, comfy.sd, comfy_api.latest, latent_preview
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
server.PromptServer(loop)
before = set(sys.modules)
# ComfyUI itself imports transformers; whoever asks for it from now on fails.
for name in list(sys.modules):
    if name.partition(".")[0] in ("transformers", "diffusers", "tokenizers"):
        sys.modules[name] = None
entry = root + "/__init__.py"
spec = importlib.util.spec_from_file_location("pack", entry, submodule_search_locations=[root])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
extension = loop.run_until_complete(pack.comfy_entrypoint())
count = len(loop.run_until_complete(extension.get_node_list()))
new = sorted(name for name in set(sys.modules) - before if sys.modules[name] is not None)
print("RESULT" + json.dumps({"count": count, "new": new}))
"""


@pytest.fixture(scope="module")
def startup(tmp_path_factory):
    """What happens when ComfyUI, all of its own modules loaded, loads this pack."""
    command = [sys.executable, "-c", STARTUP, str(COMFYUI), str(ROOT)]
    done = subprocess.run(
        command, cwd=tmp_path_factory.mktemp("start"), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("RESULT")[2])


def test_start_up_imports_neither_diffusers_nor_transformers(startup):
    assert startup["count"] == len(NODES)
    foreign = {name.partition(".")[0] for name in startup["new"]} - {"pack"}
    assert not foreign & {"diffusers", "transformers", "tokenizers", "matplotlib", "peft", "accelerate"}
    # What ComfyUI has loaded anyway costs nothing; beyond that, Python's own modules at most.
    assert foreign <= set(sys.stdlib_module_names)


def test_start_up_leaves_the_core_for_later(startup):
    """Reward models, their blocks, the search and the CUDA kernels are imported when a node runs."""
    core = {name.removeprefix("pack.drm.") for name in startup["new"] if name.startswith("pack.drm.")}
    assert not core & {"model", "backbone", "prepared", "scoring", "stepwise", "search", "branching_triton"}


def test_root_imports_outside_comfyui(tmp_path):
    code = "import importlib.util as u, sys; s = u.spec_from_file_location('p', sys.argv[1]);"
    code += (
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.WEB_DIRECTORY, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(ROOT / "__init__.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["./web", "False"], done.stderr
