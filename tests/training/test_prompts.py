"""Prompt files, and the folder of their embeddings."""

import json
from pathlib import Path

import pytest
import torch

from tests.training.fine_tuning import embed
from tests.training.sd3_folder import build_pipeline
from training import prompts
from training.prompts import PromptCache, PromptError, finish, main, read_prompts, write_prompts


def test_a_prompt_a_line(tmp_path: Path):
    (tmp_path / "p.txt").write_text("# a comment\n\n  a cat \na dog\na cat\n#a\nkäse #1\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "a dog", "käse #1"]


def test_a_comment_after_a_byte_order_mark_is_no_prompt(tmp_path: Path):
    (tmp_path / "p.txt").write_text("# a comment\na cat\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path / "p.txt") == ["a cat"]


@pytest.mark.parametrize("content", [b"", b"\n# only this\n", b"\xff\xfe\x00", None])
def test_files_that_are_none(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(PromptError, match=r"p\.txt"):
        read_prompts(tmp_path / "p.txt")


def test_every_prompt_gets_its_own_embeddings_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prompts, "ROWS_EACH", 4)  # so that ten prompts make three files
    asked = [f"prompt {i}" for i in range(9)]
    for rank in (1, 0):
        write_prompts(tmp_path, asked, embed, rank=rank, world=2)
    with pytest.raises(PromptError, match="no finished prompt embeddings"):
        PromptCache(tmp_path)
    finish(tmp_path, asked, {"encoders": {"folder": "random"}})
    assert len(list(tmp_path.glob("embeddings-*.safetensors"))) == 3
    cache = PromptCache(tmp_path)
    assert cache.missing(["prompt 3", "", "another"]) == ["another"]
    order = ["prompt 7", "", "prompt 0", "prompt 7"]
    for found, wanted in zip(cache.embeds(order), embed(order), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted.half().float())


def test_a_folder_of_another_kind_or_with_a_damaged_file(tmp_path: Path):
    write_prompts(tmp_path, ["a"], embed)
    finish(tmp_path, ["a"], {})
    path = tmp_path / "embeddings-00000.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PromptError, match="embeddings-00000"):
        PromptCache(tmp_path).embeds(["a"])
    (tmp_path / "meta.json").write_text(json.dumps({"format": "drm-prompts", "version": 9}))
    with pytest.raises(PromptError, match="version 1: make it again"):
        PromptCache(tmp_path)


def test_sd3_s_own_encoders(tmp_path: Path):
    from training.encoders import SD3Encoders

    build_pipeline(tmp_path).save_pretrained(tmp_path / "sd3")
    (tmp_path / "p.txt").write_text("a cat\na red house\n")
    arguments = ["--encoders", str(tmp_path / "sd3"), "--t5-length", "12", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "out"), str(tmp_path / "p.txt")]) == 0
    found = PromptCache(tmp_path / "out").embeds(["a red house", ""])
    wanted = SD3Encoders.from_folder(tmp_path / "sd3").encode_prompts(["a red house", ""], 12)
    for one, two in zip(found, wanted, strict=True):
        assert torch.allclose(one, two, atol=2e-3, rtol=2e-3)
    assert PromptCache(tmp_path / "out").meta["t5_length"] == 12


def test_encoders_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "p.txt").write_text("a cat\n")
    assert main(["--encoders", str(tmp_path), "--out", str(tmp_path / "out"), str(tmp_path / "p.txt")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
