"""`make demo`: the bundled graph, then plain sampling beside Step-wise Sampling at k = 1, 2, 4, 6, in a real
ComfyUI.

Starts the server, sends workflows/Reward-guided text to image.json to it with comfy-cli as a user would, then
samples a handful of prompts with the same seeds in every way, and leaves
    output/demo/comparison.png   one row a prompt, one column a way of sampling, with the scores of the
    picture shown output/demo/report.json      {"rows": [{"k", "time_ratio", "drm", "judge"}, ...], ...} over
    all pictures; "plain" is the stock KSampler output/demo/graph/           what the bundled graph saved
Times are those of the sampling node alone, as the server reports them, over plain sampling's in the same run.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from tools.comfy_server import ROOT, ComfyServer
from training.demo.data import read_concepts
from training.demo.export import JUDGE
from training.demo.judge import judge_pictures, load_judge

OUT = ROOT / "output" / "demo"
PROMPTS = ("pumpkin", "cat", "slice of pizza", "rocket", "strawberry", "owl", "guitar", "crown")
BRANCHES = (1, 2, 4, 6)
SEEDS_EACH = 3
SEED, STEPS, CFG = 7, 20, 1.5
WINDOW = 0.1, 0.9  # where the preset `balanced` branches
CELL, LABEL, LEFT = 150, 36, 150


def graph(prompt: str, k: int) -> dict:
    """API graph: one batch of a prompt, stock KSampler (k = 0) or Step-wise KSampler, scored and saved."""
    common = {
        "model": ["model", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "latent_image": ["latent", 0],
        "seed": SEED,
        "steps": STEPS,
        "cfg": CFG,
        "scheduler": "simple",
        "denoise": 1.0,
    }
    plain = {"class_type": "KSampler", "inputs": {**common, "sampler_name": "euler"}}
    branching = {
        "drm": ["drm", 0],
        "num_branches": k,
        "noise_level": 0.7,
        "kind": "sde",
        "branch_start": WINDOW[0],
        "branch_end": WINDOW[1],
    }
    stepwise = {"class_type": "StepwiseKSampler", "inputs": {**common, **branching}}
    score = {"sigma": 0.0, "latent_is": "finished picture", "noise_draws": 1, "seed": 0}
    return {
        "model": {
            "class_type": "CheckpointLoaderSimple",
            "inputs": {"ckpt_name": "drm_demo_emoji_sd3.safetensors"},
        },
        "clip": {
            "class_type": "DRMDemoCLIPLoader",
            "inputs": {"clip_name": "drm_demo_emoji_clip.safetensors"},
        },
        "drm": {
            "class_type": "DRMLoader",
            "inputs": {"drm_name": "drm_demo_emoji.safetensors", "dtype": "auto"},
        },
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": prompt}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": ""}},
        "latent": {
            "class_type": "EmptySD3LatentImage",
            "inputs": {"width": 128, "height": 128, "batch_size": SEEDS_EACH},
        },
        "sample": stepwise if k else plain,
        "score": {
            "class_type": "DRMScoreLatent",
            "inputs": {"drm": ["drm", 0], "latent": ["sample", 0], "positive": ["positive", 0], **score},
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["model", 2]}},
        "save": {
            "class_type": "SaveImage",
            "inputs": {"images": ["decode", 0], "filename_prefix": f"demo/k{k}"},
        },
    }


def sample(server: ComfyServer, events, prompt: str, k: int) -> tuple[list[Image.Image], list[float], float]:
    """Pictures, DRM scores and seconds of sampling of one prompt."""
    prompt_id = server.queue(graph(prompt, k), client_id=events.client_id)
    result = server.wait(prompt_id)
    if result.error:
        raise SystemExit(f"ComfyUI could not sample '{prompt}' with k = {k}: {result.error}")
    time.sleep(0.1)  # the websocket's last message may still be on its way
    lines = re.findall(r"picture (\d+): ([+-][\d.]+)", "".join(result.outputs["score"]["text"]))
    scores = [score for _, score in sorted((int(index), float(score)) for index, score in lines)]
    pictures = [Image.open(io.BytesIO(server.view(image))).convert("RGB") for image in result.images("save")]
    return pictures, scores, events.seconds_in("sample", prompt_id)


def run_bundled_graph(server: ComfyServer) -> None:
    """Send the bundled workflow with comfy-cli, as a user at a terminal would, and keep its pictures."""
    comfy = Path(sys.executable).with_name("comfy")
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "HOME": home}
        subprocess.run(
            [comfy, "--skip-prompt", "tracking", "disable"], env=environment, check=True, capture_output=True
        )
        command = [
            comfy,
            "--skip-prompt",
            "run",
            "--workflow",
            ROOT / "workflows" / "Reward-guided text to image.json",
            "--wait",
        ]
        command += ["--host", "127.0.0.1", "--port", str(server.port), "--timeout", "600"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the bundled graph failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    made = sorted((server.base_dir / "output").rglob("*.png"))
    shutil.rmtree(OUT / "graph", ignore_errors=True)
    (OUT / "graph").mkdir(parents=True)
    for path in made:
        shutil.copy(path, OUT / "graph" / path.name)
    print(
        f"workflows/Reward-guided text to image.json ran and saved {len(made)} pictures -> {OUT / 'graph'}",
        flush=True,
    )


def asked_concept(prompt: str, concepts: list[str]) -> int:
    """The judge's number for what a demo prompt asks for."""
    return next(concepts.index(name) for name, words in read_concepts() if prompt in words)


def comparison(
    cells: dict[tuple[int, str], tuple[Image.Image, float, float]], rows: dict[int, dict]
) -> Image.Image:
    """The picture people look at: one row a prompt, one column a way of sampling."""
    ways = [0, *BRANCHES]
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    top = 64
    page = Image.new("RGB", (LEFT + CELL * len(ways), top + (CELL + LABEL - 10) * len(PROMPTS)), "white")
    draw = ImageDraw.Draw(page)
    draw.text((10, 10), f"same seeds\n{STEPS} steps\nCFG {CFG}", fill="#555", font=small)
    for column, k in enumerate(ways):
        x, row = LEFT + column * CELL, rows[k]
        draw.text((x + 8, 6), "plain" if k == 0 else f"step-wise, k = {k}", fill="black", font=font)
        draw.text((x + 8, 26), f"time x{row['time_ratio']:.2f}", fill="#555", font=small)
        draw.text((x + 8, 42), f"DRM {row['drm']:+.2f}  judge {row['judge']:.0%}", fill="#555", font=small)
    for line, prompt in enumerate(PROMPTS):
        y = top + line * (CELL + LABEL - 10)
        draw.text((10, y + 40), prompt, fill="black", font=font)
        best = max(ways, key=lambda k: cells[k, prompt][1])
        for column, k in enumerate(ways):
            picture, score, probability = cells[k, prompt]
            x = LEFT + column * CELL
            page.paste(picture.resize((128, 128)), (x + 8, y))
            draw.rectangle(
                (x + 7, y - 1, x + 136, y + 128),
                outline="#2a9d4a" if k == best else "#ddd",
                width=2 if k == best else 1,
            )
            draw.text((x + 8, y + 131), f"DRM {score:+.2f}  judge {probability:.0%}", fill="#555", font=small)
    return page


def main() -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    begun = time.monotonic()
    OUT.mkdir(parents=True, exist_ok=True)
    judge, concepts = load_judge(ROOT / "models" / JUDGE)
    ways = [0, *BRANCHES]
    cells, totals = {}, {k: {"seconds": 0.0, "drm": [], "judge": []} for k in ways}
    with (
        tempfile.TemporaryDirectory(prefix="drm-demo-") as base,
        ComfyServer(Path(base)) as server,
        server.events() as events,
    ):
        print(f"ComfyUI is up after {time.monotonic() - begun:.0f} s", flush=True)
        run_bundled_graph(server)
        for k in ways:  # load and warm up every path before its time is taken
            sample(server, events, "warm-up", k)
        for prompt in PROMPTS:
            asked = torch.full((SEEDS_EACH,), asked_concept(prompt, concepts))
            for k in ways:
                pictures, scores, seconds = sample(server, events, prompt, k)
                probability, _ = judge_pictures(judge, np.stack([np.asarray(p) for p in pictures]), asked)
                cells[k, prompt] = pictures[0], scores[0], probability[0].item()
                totals[k]["seconds"] += seconds
                totals[k]["drm"] += scores
                totals[k]["judge"] += probability.tolist()
            print(
                f"{prompt}: "
                + "  ".join(f"{'plain' if k == 0 else f'k={k}'} {cells[k, prompt][1]:+.2f}" for k in ways),
                flush=True,
            )
    rows = {k: summary(k, total, totals[0]["seconds"]) for k, total in totals.items()}
    comparison(cells, rows).save(OUT / "comparison.png")
    report = {
        "rows": [rows[k] for k in BRANCHES],
        "plain": rows[0],
        "prompts": list(PROMPTS),
        "pictures_each": SEEDS_EACH,
        "settings": {
            "steps": STEPS,
            "cfg": CFG,
            "seed": SEED,
            "noise_level": 0.7,
            "kind": "sde",
            "branch_start": WINDOW[0],
            "branch_end": WINDOW[1],
            "scheduler": "simple",
        },
        "seconds": round(time.monotonic() - begun, 1),
    }
    (OUT / "report.json").write_text(json.dumps(report, indent=1))
    print(f"\n{len(PROMPTS)} prompts x {SEEDS_EACH} pictures      time   DRM score   judge: P(asked)")
    for k in ways:
        name = "plain KSampler" if k == 0 else f"step-wise, k = {k}"
        print(f"  {name:20s} {rows[k]['time_ratio']:8.2f} {rows[k]['drm']:+11.3f} {rows[k]['judge']:10.1%}")
    print("So few pictures show the idea, not its size: the README's table has the figures with intervals.")
    print(
        f"\npicture -> {OUT / 'comparison.png'}\nfigures -> {OUT / 'report.json'}"
        f"\n{report['seconds']:.0f} s in all"
    )


def summary(k: int, total: dict, plain_seconds: float) -> dict:
    """One row of the report: means over all pictures of a way of sampling."""
    mean = {name: sum(total[name]) / len(total[name]) for name in ("drm", "judge")}
    return {"k": k, "time_ratio": total["seconds"] / plain_seconds, **mean, "seconds": total["seconds"]}


if __name__ == "__main__":
    main()
