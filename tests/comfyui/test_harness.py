"""The harness itself: the server answers and runs graphs, the page opens and is not blank."""

import io
import re
import subprocess
import sys

import pytest
from PIL import Image

from tools.comfy_server import COMFYUI, DEMO_CHECKPOINT, ROOT, ComfyServer, PromptRejectedError, demo_previews

GRAPH = {
    "1": {
        "class_type": "EmptyImage",
        "inputs": {"width": 64, "height": 32, "batch_size": 2, "color": 0xFF0000},
    },
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "harness"}},
}


def page_node(node_id: int, node_type: str, **entries) -> dict:
    node = {"id": node_id, "type": node_type, "pos": [400 * node_id, 100], "size": [300, 200], "flags": {}}
    return node | {"order": node_id, "mode": 0, "properties": {}, "inputs": [], "outputs": []} | entries


WORKFLOW = {
    "version": 0.4,
    "last_node_id": 2,
    "last_link_id": 1,
    "links": [[1, 1, 0, 2, 0, "IMAGE"]],
    "nodes": [
        page_node(
            1,
            "EmptyImage",
            outputs=[{"name": "IMAGE", "type": "IMAGE", "links": [1]}],
            widgets_values=[64, 32, 1, 255],
        ),
        page_node(
            2,
            "SaveImage",
            inputs=[{"name": "images", "type": "IMAGE", "link": 1}],
            widgets_values=["harness"],
        ),
    ],
}


def test_server_is_comfyui_on_the_cpu(server):
    stats = server.get("/system_stats")
    assert f'"{stats["system"]["comfyui_version"]}"' in (COMFYUI / "comfyui_version.py").read_text()
    assert [device["type"] for device in stats["devices"]] == ["cpu"]


def test_the_device_is_a_choice(tmp_path):
    assert "--cpu" in ComfyServer(tmp_path, port=1)._flags()
    assert "--cpu" not in ComfyServer(tmp_path, port=1, cpu=False)._flags()


def test_gpu_tests_are_collected_where_no_browser_is():
    """A machine with a GPU seldom has playwright."""
    code = "import sys, pytest; sys.modules['playwright'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    found = subprocess.run(
        [sys.executable, "-c", code, "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-2000:]
    assert "test_branching_triton" in found.stdout


def test_server_loads_this_pack(server):
    assert not re.search(r"IMPORT FAILED\).*ComfyUI-DRM", server.log_text())
    assert server.object_info("StepwiseKSampler")["python_module"] == "custom_nodes.ComfyUI-DRM"


def test_server_runs_a_graph(server):
    result = server.run(GRAPH)
    assert (result.status, result.error, len(result.images("2"))) == ("success", "", 2)
    with Image.open(io.BytesIO(server.view(result.images("2")[1]))) as picture:
        assert (picture.size, picture.getpixel((5, 5))) == ((64, 32), (255, 0, 0))


def test_server_says_why_it_refuses(server):
    wrong = GRAPH | {"1": {"class_type": "EmptyImage", "inputs": GRAPH["1"]["inputs"] | {"width": "wide"}}}
    with pytest.raises(PromptRejectedError, match=r"EmptyImage \(node 1\): .*wide"):
        server.run(wrong)


def test_error_inside_a_graph_is_in_the_result(server):
    outside = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "../outside"}}
    result = server.run(GRAPH | {"2": outside})
    assert result.status == "error"
    assert "SaveImage (node 2): " in result.error
    assert "outside the output folder" in result.error
    assert server.run(GRAPH).status == "success"


def test_events_are_recorded(server):
    graph = GRAPH | {"1": {"class_type": "EmptyImage", "inputs": GRAPH["1"]["inputs"] | {"color": 0x00FF00}}}
    with server.events() as events:
        result = server.wait(server.queue(graph, client_id=events.client_id))
    assert [entry["node"] for entry in events.of("executed", result.prompt_id)] == ["2"]
    assert len(events.of("execution_success", result.prompt_id)) == 1


def test_page_opens_a_workflow(page):
    report = page.open_workflow(WORKFLOW, name="harness")
    assert (report.missing_types, report.red_nodes, report.bad_choices) == ([], [], [])
    assert (report.dialogs, report.toasts, report.console_errors) == ([], [], [])
    assert report.widgets("EmptyImage") == {"width": 64, "height": 32, "batch_size": 1, "color": 255}
    assert report.prompt["2"]["inputs"]["images"] == ["1", 0]
    with Image.open(report.screenshot) as picture:
        assert picture.size == (1920, 1080)
        assert len(picture.convert("RGB").getcolors(maxcolors=1920 * 1080)) > 50


def test_page_names_unknown_nodes(page):
    nodes = [*WORKFLOW["nodes"], page_node(3, "NoSuchNode")]
    report = page.open_workflow(WORKFLOW | {"nodes": nodes}, name="harness_unknown_node")
    assert report.missing_types == ["NoSuchNode"]
    # newer versions count what they know no pack of, and name it when unfolded
    assert any("NoSuchNode" in text or "Missing Node Packs (1)" in text for text in report.dialogs)


def test_pack_imports_in_this_process(pack):
    extension = pack.module("nodes").DRMExtension
    assert extension.__module__.startswith(pack.name)
    assert pack.module("drm.flow").__name__ == f"{pack.name}.drm.flow"


def test_previews_are_what_the_demo_model_decodes(inside, tmp_path):
    """ComfyUI's previewer, given the file, shows the demo's latents as its VAE does."""
    import comfy.sd
    import comfy.utils
    import torch
    from comfy.taesd.taesd import TAESD

    demo_previews(tmp_path)
    (file,) = (tmp_path / "models" / "vae_approx").iterdir()
    previewer = TAESD(None, str(file), latent_channels=16)
    weights = comfy.utils.load_torch_file(str(DEMO_CHECKPOINT))
    whole = comfy.utils.state_dict_prefix_replace(weights, {"first_stage_model.": ""}, filter_keys=True)
    vae = comfy.sd.VAE(sd=whole)
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        seen = previewer.decode(inside.model.model.process_latent_in(latent)).movedim(1, -1)
        expected = vae.decode(latent)
    # The demo's latents are scaled a little otherwise than SD3's, which a previewer cannot know.
    shown, expected = ((seen + 1) / 2).clamp(0, 1).flatten(), expected.float().cpu().flatten()
    assert float((shown - expected).abs().mean()) < 0.05
    assert float(torch.corrcoef(torch.stack([shown, expected]))[0, 1]) > 0.98


@pytest.mark.parametrize(
    ("settings", "hidden"),
    [
        (None, False),
        ('{"DRM.HideDemoModels": true}', True),
        ('{"DRM.HideDemoModels": false}', False),
        ('{"DRM.HideDemoModels": "no"}', False),
        ("[]", False),
        ("{half", False),
    ],
)
def test_the_demo_s_files_can_be_hidden(inside, pack, monkeypatch, tmp_path, settings, hidden):
    import folder_paths

    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    if settings is not None:
        (tmp_path / "default").mkdir()
        (tmp_path / "default" / "comfy.settings.json").write_text(settings)
    folders = pack.module("nodes.folders")
    folders.register()
    listed = folder_paths.folder_names_and_paths.items()
    own = {kind for kind, (paths, _) in listed if str(folders.PACK_MODELS / kind) in map(str, paths)}
    assert own == ({"drm"} if hidden else {"drm", "checkpoints", "text_encoders"})


def test_the_page_has_the_setting(page):
    found = page.page.evaluate("() => window.app.extensionManager.setting.get('DRM.HideDemoModels')")
    assert found is False
