"""The encode pass on real files: what it writes, that stopping it changes nothing, and how it fails."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.training.preference_fixtures import make_fixtures, tile
from tests.training.sd3_folder import build_pipeline
from training.config import DRMConfig, EncodeConfig, SourceConfig, read_config
from training.data import shards
from training.data.encode_cost import summary
from training.data.encode_plan import PlanError
from training.data.encoders import SD3Encoders, prepare_picture
from training.data.readers import ReaderError, Report, read_pairs
from training.encode import EncodeError, encode, main

# A server that has imported the encoders once makes each process cheap.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.sd3_folder", "training.encode"])
# every fixture, with the rows that can be used once the pictures are opened
MIXTURE = (
    ("hpdv3", "hpdv3/train.json", None),
    ("pickapic", "pickapic", "train"),
    ("imagereward", "imagereward/metadata-train.parquet", None),
    ("imagereward", "imagereward/pairs", None),
    ("hpdv2", "hpdv2/test.json", None),
    ("jsonl", "own/pairs.jsonl", None),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    build_pipeline(folder / "sd3")
    make_fixtures(folder / "sets")
    return folder


def configuration(made, out, **changes):
    sources = tuple(
        SourceConfig(format=format, path=str(made / "sets" / path), split=split)
        for format, path, split in MIXTURE
    )
    settings = {
        "encoders": str(made / "sd3"),
        "sources": sources,
        "out": str(out),
        "resolution": 64,
        "t5_lengths": (8, 16),
        "batch_images": 4,
        "batch_prompts": 2,
        "shard_size": 8,
        "workers": 0,
        "held_out": 0.3,
        "bad_rows": 0.7,
    }
    return EncodeConfig(**{**settings, **changes})


def one_source(made, format, path, **changes):
    return (SourceConfig(format=format, path=str(made / "sets" / path), **changes),)


def write_yaml(config, path):
    encode = json.loads(json.dumps(dataclasses.asdict(config)))
    tree = {"version": 1, "model": {"base": "none"}, "data": {"encoded": "none"}, "train": {"out": "none"}}
    path.write_text(yaml.safe_dump({**tree, "encode": encode}))
    return path


def _command(arguments, output, environment):
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as the command has it, not the server's own way
    sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115 - open until the process ends
    main(arguments)


def start(config, folder, name="output.txt", **environment):
    """`python -m training.encode` in a process of its own, which writes to folder/name."""
    path = write_yaml(config, folder / "config.yaml")
    process = CONTEXT.Process(target=_command, args=(["--config", str(path)], folder / name, environment))
    process.start()
    return process


def contents(folder):
    """sha256 of every file in the folder but the plan's, whose rows name paths, and the lock's."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(folder).iterdir()
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes these runs are compared with: more threads round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def encoded(made):
    out = made / "encoded"
    return out, encode(configuration(made, out))


def test_pairs_name_their_own_latents_and_prompts(made, encoded):
    out, _ = encoded
    data, encoders = shards.EncodedPairs(out), SD3Encoders.from_folder(made / "sd3")
    report, wanted = Report(), {}
    for format, path, split in MIXTURE:
        source = SourceConfig(format=format, path=str(made / "sets" / path), split=split)
        wanted |= {(p.row, p.chosen.key, p.rejected.key): p for p in read_pairs(source, report)}
    pairs = list(wanted.values())
    columns = data.columns
    assert len(data) == len(pairs) - 4  # one cut JPEG of HPDv3, three of Pick-a-Pic
    rows = columns["row"]
    for row in ("train.json:0", "pairs.jsonl:7", rows[40]):
        index = rows.index(row)
        pair = next(p for p in pairs if p.row == row)
        images = [prepare_picture(picture.open(), 64) for picture in (pair.chosen, pair.rejected)]
        latents = encoders.encode_pixels(torch.from_numpy(np.stack(images)))
        stored = data.latents([columns["chosen"][index], columns["rejected"][index]])
        torch.testing.assert_close(stored, latents, rtol=2e-3, atol=2e-3)
        for length in (8, 16, None):
            embeds, pooled = encoders.encode_prompts([pair.prompt], length)
            stored, stored_pooled = data.prompts([columns["prompt"][index]], length, width=embeds.shape[-1])
            torch.testing.assert_close(stored.float(), embeds, rtol=2e-3, atol=5e-3)
            torch.testing.assert_close(stored_pooled.float(), pooled, rtol=2e-3, atol=5e-3)


def test_counts_weights_and_report(encoded):
    out, cost = encoded
    data = shards.EncodedPairs(out)
    sources = json.loads((out / "report.json").read_text())["sources"]
    assert {name: (c["read"], c["used"], sum(c["bad"].values())) for name, c in sources.items()} == {
        "hpdv3": (16, 8, 6),
        "pickapic": (17, 8, 6),
        "imagereward": (21, 17, 3),
        "hpdv2": (4, 3, 1),
        "jsonl": (13, 6, 6),
    }
    counted = {name: data.columns["source"].count(name) for name in sorted(set(data.columns["source"]))}
    assert counted == {
        "hpdv2": 106,
        "hpdv3": 8,
        "imagereward": 16,
        "imagereward-2": 6,
        "jsonl": 6,
        "pickapic": 8,
    }
    assert (cost.pairs, cost.pictures, cost.prompts) == (150, len(data._images), len(data._prompts))
    pickapic = [
        w
        for w, s in zip(data.columns["weight"].tolist(), data.columns["source"], strict=True)
        if s == "pickapic"
    ]
    assert pickapic == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1, 1 / 2, 1, 1, 1])
    reasons = [r["reason"] for r in json.loads((out / "report.json").read_text())["bad_rows"]]
    assert sum("broken picture: " in r and "cut.jpg" in r for r in reasons) == 1
    assert sum(r.startswith("empty picture: ") for r in reasons) == 1


def test_a_picture_named_by_many_pairs_is_stored_once(encoded):
    columns = shards.EncodedPairs(encoded[0]).columns
    from_pickapic = [i for i, source in enumerate(columns["source"]) if source == "pickapic"][:3]
    assert len({int(columns["chosen"][i]) for i in from_pickapic}) == 1
    assert len({int(columns["rejected"][i]) for i in from_pickapic}) == 3
    assert max(columns["chosen"].max(), columns["rejected"].max()) < 100  # of 300 sides


def test_held_out_prompts_are_those_of_their_hash(made, encoded):
    columns = shards.EncodedPairs(encoded[0]).columns
    by_prompt = {}
    for prompt, held in zip(columns["prompt"].tolist(), columns["held_out"].tolist(), strict=True):
        by_prompt.setdefault(prompt, set()).add(held)
    assert all(len(held) == 1 for held in by_prompt.values())
    assert 0 < sum(held == {True} for held in by_prompt.values()) < len(by_prompt)


def test_killed_and_started_again_gives_the_same_files(made, encoded, tmp_path):
    config = configuration(made, tmp_path / "killed", workers=1)
    process = start(config, tmp_path)
    first = tmp_path / "killed" / "images-00001.safetensors"
    while not first.exists():
        assert process.is_alive(), (tmp_path / "output.txt").read_text()
        time.sleep(0.001)
    process.kill()
    process.join()
    left = sorted(path.name for path in (tmp_path / "killed").glob("*.safetensors"))
    assert "meta.json" not in contents(tmp_path / "killed")
    assert len(left) < len([name for name in contents(encoded[0]) if name.endswith(".safetensors")])
    (tmp_path / "killed" / "images-00003.safetensors.1.tmp").write_bytes(b"half a shard")
    encode(config)
    assert contents(tmp_path / "killed") == contents(encoded[0])


def test_two_processes_write_what_one_does(made, encoded, tmp_path):
    config = configuration(made, tmp_path / "two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [start(config, tmp_path, rank, RANK=rank, LOCAL_RANK=rank, **shared) for rank in ("0", "1")]
    for process in processes:
        process.join(120)
    outputs = [(tmp_path / rank).read_text() for rank in ("0", "1")]
    assert [process.exitcode for process in processes] == [0, 0], outputs
    assert "150 pairs" in outputs[0]
    assert outputs[1] == ""
    assert contents(tmp_path / "two") == contents(encoded[0])


def test_a_dead_worker_ends_the_pass_in_one_line(made, tmp_path):
    config = configuration(made, tmp_path / "out", workers=2, resolution=512, shard_size=4)
    process = start(config, tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = []
    while len(workers) < 2 or not (tmp_path / "out" / "images-00000.safetensors").exists():
        assert process.is_alive(), (tmp_path / "output.txt").read_text()
        workers = children.read_text().split()
        time.sleep(0.001)
    os.kill(int(workers[0]), signal.SIGKILL)
    process.join(60)
    assert process.exitcode == 1
    printed = (tmp_path / "output.txt").read_text()
    assert "Traceback" not in printed
    assert printed.splitlines()[-1].startswith("error: a decoding worker died")
    whole = list((tmp_path / "out").glob("images-*"))
    assert all(load_file(path)["latents"].shape[1:] == (16, 64, 64) for path in whole)
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_full_disk_keeps_the_finished_shards(made, encoded, tmp_path):
    config = configuration(made, tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # image shards and the plan fit
    try:
        with pytest.raises(EncodeError, match=r"cannot write .*prompts-00000.* make room\): start again"):
            encode(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = contents(tmp_path / "out")
    assert {name for name in left if name.endswith(".tmp")} == set()
    assert sum(name.startswith("images-") for name in left) == 12
    with pytest.raises(shards.ShardError, match=r"run training.encode first"):
        shards.EncodedPairs(tmp_path / "out")
    encode(config)
    assert contents(tmp_path / "out") == contents(encoded[0])


def test_too_little_space_stops_before_anything_is_encoded(made, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(EncodeError, match=r"still to be written and 0.0 GB are free for .*: give another"):
        encode(configuration(made, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_damaged_shard_is_made_again(made, encoded, tmp_path):
    out = shutil.copytree(encoded[0], tmp_path / "out")
    damaged = out / "images-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    cost = encode(configuration(made, out))
    assert contents(out) == contents(encoded[0])
    assert cost.prompts_per_second is None  # prompts were all there


def test_other_settings_do_not_mix_into_a_folder(made, encoded, tmp_path):
    out = shutil.copytree(encoded[0], tmp_path / "out")
    with pytest.raises(PlanError, match=r"was begun with resolution 64, it is 128 now"):
        encode(configuration(made, out, resolution=128))
    encode(configuration(made, out, held_out=1.0, batch_images=3, batch_prompts=1))
    assert shards.EncodedPairs(out).columns["held_out"].all()


def test_too_many_bad_rows_stop_and_are_listed(made, tmp_path):
    sources = one_source(made, "hpdv3", "hpdv3/train.json")
    config = configuration(made, tmp_path / "a", sources=sources, bad_rows=0.02)
    with pytest.raises(ReaderError, match=r"5 of 16 rows .* raise bad_rows; all are listed in .*report.json"):
        encode(config)
    report = json.loads((tmp_path / "a/plan/report.json").read_text())
    assert len(report["bad_rows"]) == 5
    config = configuration(made, tmp_path / "b", sources=sources, bad_rows=5.5 / 16)
    with pytest.raises(ReaderError, match="6 of 16 rows"):  # the sixth is a picture cut short
        encode(config)
    reasons = [row["reason"] for row in json.loads((tmp_path / "b/report.json").read_text())["bad_rows"]]
    assert "broken picture: " in reasons[-1]


def test_latents_that_are_not_finite_are_bad_rows_by_name(made, tmp_path):
    folder = shutil.copytree(made / "sd3", tmp_path / "sd3")
    config = json.loads((folder / "vae/config.json").read_text())
    # A scale that float16 holds for the faint picture only.
    (folder / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 1e5, "shift_factor": 0.0}))
    encoders = SD3Encoders.from_folder(folder)
    pictures = [tile(k, 0) for k in range(4)]
    peaks = encoders.encode_pictures(pictures, 64).abs().flatten(1).max(1).values
    order = peaks.argsort().tolist()
    scale = 1e5 * 65504 / float(peaks[order[-2:]].mean())  # between the two largest
    (folder / "vae/config.json").write_text(
        json.dumps(config | {"scaling_factor": scale, "shift_factor": 0.0})
    )
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    rows = [(order[0], order[1]), (order[2], order[0]), (order[1], order[3])]
    lines = [json.dumps({"prompt": "a", "chosen": f"{a}.png", "rejected": f"{b}.png"}) for a, b in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    sources = (SourceConfig(format="jsonl", path=str(tmp_path / "pairs.jsonl")),)
    cost = encode(configuration(made, tmp_path / "out", sources=sources, encoders=str(folder)))
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert cost.pairs == 2
    assert report["bad_rows"][0]["row"] == "pairs.jsonl:3"
    assert report["bad_rows"][0]["reason"] == f"latents are not finite: {tmp_path}/{order[3]}.png"
    assert shards.EncodedPairs(tmp_path / "out").latents([0, 1, 2]).isfinite().all()


def test_a_folder_without_t5_encodes_clip_alone(made, tmp_path):
    folder = shutil.copytree(made / "sd3", tmp_path / "sd3")
    shutil.rmtree(folder / "text_encoder_3")
    sources = one_source(made, "hpdv3", "hpdv3/test.json")
    config = configuration(made, tmp_path / "out", sources=sources, encoders=str(folder), t5_lengths=())
    encode(config)
    data = shards.EncodedPairs(tmp_path / "out")
    assert data.t5_lengths == ()
    assert data.prompts([0], None)[0].shape == (1, 77, 96)


def test_the_command_ends_with_a_summary(made, encoded, tmp_path, capsys):
    out = shutil.copytree(encoded[0], tmp_path / "out")
    path = write_yaml(configuration(made, out), tmp_path / "config.yaml")
    assert read_config(path, DRMConfig).encode == configuration(made, out)
    main(["--config", str(path)])
    printed = capsys.readouterr().out
    assert "150 pairs, 22 rows could not be used" in printed
    assert "all there before" in printed
    fresh = "".join(summary(encoded[1], out))
    assert fresh.count("a second") == 2
    assert "waiting for decoding" in fresh
    assert 0 < encoded[1].waiting < 1


def test_a_wrong_folder_ends_the_command_in_one_line(made, tmp_path):
    process = start(configuration(made, tmp_path / "out", encoders=str(tmp_path / "none")), tmp_path)
    process.join(60)
    assert process.exitcode == 1
    printed = (tmp_path / "output.txt").read_text()
    assert (
        printed
        == f"error: {tmp_path}/none has no vae: wanted a diffusers folder of SD3 or SD3.5 with vae, "
        + ("text encoders and tokenizers\n")
    )
    assert not (tmp_path / "out").exists()
