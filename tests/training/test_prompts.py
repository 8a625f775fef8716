"""Prompt files, and the folder of their embeddings."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from tests.training.fine_tuning import embed
from tests.training.processes import CONTEXT
from tests.training.sd3_folder import build_pipeline
from training.data.encoders import SD3Encoders
from training.data.prompt_cache import PromptError, find_set, open_or_make, read_prompts, write_prompts
from training.grpo.step_grpo_config import PromptsConfig
from training.prompts import main

MADE_WITH = {"encoders": "random"}


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


def assert_embeds(cache, asked: list[str]):
    for found, wanted in zip(cache.embeds(asked), embed(asked), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted.half().float())


def test_every_prompt_gets_its_own_embeddings_back(tmp_path: Path):
    asked = [f"prompt {i}" for i in range(39)]
    for rank in (1, 0):
        cache = write_prompts(tmp_path, asked, embed, MADE_WITH, rank=rank, world=2)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 40
    assert not list(tmp_path.rglob("*.tmp"))
    assert cache.missing(["prompt 3", "", "another"]) == ["another"]
    assert_embeds(find_set(tmp_path, 256), ["prompt 7", "", "prompt 0", "prompt 38", "prompt 7"])


def test_what_is_there_is_not_made_again(tmp_path: Path):
    write_prompts(tmp_path, ["a", "b"], embed, MADE_WITH)
    asked = []
    write_prompts(tmp_path, ["c", "a"], lambda part: asked.extend(part) or embed(part), MADE_WITH)
    assert asked == ["c"]


def write_others(folder: Path):
    for start in range(0, 60, 20):
        write_prompts(folder, [f"other {i}" for i in range(start, start + 20)], embed, MADE_WITH)
    write_prompts(folder, ["prompt 0"], lambda part: embed(["wrong"] * len(part)), {"encoders": "others"})


def test_a_reader_keeps_its_rows_while_another_process_writes(tmp_path: Path):
    asked = [f"prompt {i}" for i in range(5)]
    cache = write_prompts(tmp_path, asked, embed, MADE_WITH)
    process = CONTEXT.Process(target=write_others, args=(tmp_path,))
    process.start()
    while process.is_alive():
        assert_embeds(cache, asked)
    process.join()
    assert process.exitcode == 0
    assert_embeds(cache, [*asked, *(f"other {i}" for i in range(60))])


def test_sets_made_in_other_ways_are_not_mixed_up(tmp_path: Path):
    write_prompts(tmp_path, ["a"], embed, {**MADE_WITH, "t5_length": 77})
    with pytest.raises(PromptError, match=r"made with t5_length 77, wanted 256: set data\.t5_length"):
        find_set(tmp_path, 256)
    assert_embeds(find_set(tmp_path, 77), ["a"])
    write_prompts(tmp_path, ["a"], embed, {"encoders": "others", "t5_length": 77})
    with pytest.raises(PromptError, match=r"made in 2 ways .*: name data.encoders, or delete"):
        find_set(tmp_path, 77)


def test_folders_that_are_none_and_damaged_files(tmp_path: Path):
    with pytest.raises(PromptError, match="holds no prompt embeddings"):
        find_set(tmp_path, 256)
    cache = write_prompts(tmp_path, ["a", "b"], embed, MADE_WITH)
    cache.path("a").write_bytes(cache.path("a").read_bytes()[:100])
    with pytest.raises(PromptError, match=r"the embeddings of 'a', cannot be read .*: delete it"):
        cache.embeds(["a"])
    shutil.copy(cache.path("b"), cache.path("a"))
    with pytest.raises(PromptError, match="is of 'b', wanted 'a'"):
        cache.embeds(["a"])
    made_with = cache.folder / "made_with.json"
    made_with.write_text(made_with.read_text().replace('"version": 2', '"version": 9'))
    with pytest.raises(PromptError, match="drm-prompts 9, wanted drm-prompts 2: make it again"):
        find_set(tmp_path, 256)
    made_with.write_text("[")
    with pytest.raises(PromptError, match="is damaged"):
        find_set(tmp_path, 256)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3")
    build_pipeline(folder).save_pretrained(folder / "sd3")
    return folder / "sd3"


def test_sd3_s_own_encoders(tmp_path: Path, sd3: Path):
    (tmp_path / "p.txt").write_text("a cat\na red house\n")
    arguments = ["--encoders", str(sd3), "--t5-length", "12", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "out"), str(tmp_path / "p.txt")]) == 0
    found = find_set(tmp_path / "out", 12).embeds(["a red house", ""])
    wanted = SD3Encoders.from_folder(sd3).encode_prompts(["a red house", ""], 12)
    for one, two in zip(found, wanted, strict=True):
        assert torch.allclose(one, two, atol=2e-3, rtol=2e-3)


def test_another_length_and_other_encoders_make_their_own(tmp_path: Path, sd3: Path):
    other = shutil.copytree(sd3, tmp_path / "other")
    path = next((other / "text_encoder").glob("*.safetensors"))
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    accelerator, encoded = Accelerator(cpu=True), str(tmp_path / "encoded")
    for encoders in (sd3, other):
        for length in (12, 20, None, 12):
            config = PromptsConfig(prompts="", encoded=encoded, encoders=str(encoders), t5_length=length)
            found = open_or_make(config, ["a cat"], accelerator).embeds(["a cat"])
            wanted = SD3Encoders.from_folder(encoders).encode_prompts(["a cat"], length)
            for one, two in zip(found, wanted, strict=True):
                assert torch.allclose(one, two, atol=2e-3, rtol=2e-3)
    assert len(list(Path(encoded).iterdir())) == 6
    with pytest.raises(PromptError, match="made in 2 ways"):
        open_or_make(PromptsConfig(prompts="", encoded=encoded, t5_length=12), ["a cat"], accelerator)


def test_encoders_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "p.txt").write_text("a cat\n")
    assert main(["--encoders", str(tmp_path), "--out", str(tmp_path / "out"), str(tmp_path / "p.txt")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
