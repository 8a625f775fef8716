"""Graphs in API format around the demo family, for tests that ask the real server."""

from typing import Any

CHECKPOINT = "drm_demo_emoji_sd3.safetensors"
TEXT_ENCODER = "drm_demo_emoji_clip.safetensors"
DRM = "drm_demo_emoji.safetensors"

Graph = dict[str, dict[str, Any]]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def models(prompt: str = "red heart, flat style", size: int = 64, batch: int = 1) -> Graph:
    """model 1, clip 2, drm 3, positive 4, negative 5, empty latent 6."""
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "2": node("DRMDemoCLIPLoader", clip_name=TEXT_ENCODER),
        "3": node("DRMLoader", drm_name=DRM, dtype="float32"),
        "4": node("CLIPTextEncode", text=prompt, clip=["2", 0]),
        "5": node("CLIPTextEncode", text="", clip=["2", 0]),
        "6": node("EmptySD3LatentImage", width=size, height=size, batch_size=batch),
    }


def stepwise_node(**changes: Any) -> dict[str, Any]:
    inputs = {
        "model": ["1", 0],
        "drm": ["3", 0],
        "seed": 5,
        "steps": 3,
        "cfg": 2.0,
        "scheduler": "simple",
        "positive": ["4", 0],
        "negative": ["5", 0],
        "latent_image": ["6", 0],
        "denoise": 1.0,
        "num_branches": 2,
        "noise_level": 0.7,
        "kind": "sde",
        "branch_start": 0.0,
        "branch_end": 1.0,
    }
    return node("StepwiseKSampler", **inputs | changes)


def stepwise_graph(prefix: str = "test", **changes: Any) -> Graph:
    """models(), then Step-wise KSampler 7, VAE Decode 8, Save Image 9."""
    return models() | {
        "7": stepwise_node(**changes),
        "8": node("VAEDecode", samples=["7", 0], vae=["1", 2]),
        "9": node("SaveImage", images=["8", 0], filename_prefix=prefix),
    }


def score_graph(**changes: Any) -> Graph:
    """models() with a batch of 3 drawn by stock KSampler 7, DRM Score Latent 8."""
    inputs = {
        "drm": ["3", 0],
        "latent": ["7", 0],
        "positive": ["4", 0],
        "sigma": 0.0,
        "latent_is": "finished picture",
        "noise_draws": 1,
        "seed": 0,
    }
    return models(batch=3) | {
        "7": node(
            "KSampler",
            model=["1", 0],
            seed=5,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            positive=["4", 0],
            negative=["5", 0],
            latent_image=["6", 0],
            denoise=1.0,
        ),
        "8": node("DRMScoreLatent", **inputs | changes),
    }


def custom_graph(prefix: str = "custom", noise_seed: int = 5, steps: int = 3, **changes: Any) -> Graph:
    """models(), StepwiseSampler 7, SamplerCustomAdvanced 11, VAE Decode 12, Save Image 13, Trace Plot 14."""
    inputs = {
        "drm": ["3", 0],
        "positive": ["4", 0],
        "num_branches": 2,
        "noise_level": 0.7,
        "kind": "sde",
        "branch_start": 0.0,
        "branch_end": 1.0,
        "seed": 5,
    }
    return models() | {
        "7": node("StepwiseSampler", **inputs | changes),
        "8": node("RandomNoise", noise_seed=noise_seed),
        "9": node("CFGGuider", model=["1", 0], positive=["4", 0], negative=["5", 0], cfg=2.0),
        "10": node("BasicScheduler", model=["1", 0], scheduler="simple", steps=steps, denoise=1.0),
        "11": node(
            "SamplerCustomAdvanced",
            noise=["8", 0],
            guider=["9", 0],
            sampler=["7", 0],
            sigmas=["10", 0],
            latent_image=["6", 0],
        ),
        "12": node("VAEDecode", samples=["11", 0], vae=["1", 2]),
        "13": node("SaveImage", images=["12", 0], filename_prefix=prefix),
        "14": node(
            "DRMTracePlot",
            trace=["7", 1],
            latent=["11", 0],
            picture=1,
            scores="as given",
            width=320,
            height=200,
        ),
    }
