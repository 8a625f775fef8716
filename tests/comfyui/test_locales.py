"""locales/ and the Chinese help pages: complete, in step with the nodes, and what the page shows."""

import json
import re

import pytest

from tools import locales
from tools.comfy_server import ROOT

DOCS = ROOT / "web" / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))
LETTERS = {"zh": "[\u4e00-\u9fff]", "ja": "[\u3040-\u30ff]"}  # Han; kana, which Chinese has none of
FOUR = ("DRM Loader", "DRM Score Latent", "Step-wise KSampler", "Step-GRPO LoRA Trainer")
NUMBER = r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.]*\w)"
FILE = r"[\w.-]*\w(?:[/_][\w.-]*\w)+|\.[a-z]{3,}\b"
NAME = r"\b[\w.-]*[a-z0-9A-Z][A-Z][\w.-]*\w\b|\b[A-Z][a-z]+[A-Z]\w+"  # LATENT, SD3.5, KSampler, PickScore
ROW = re.compile(r"^\| *(.+?) *\| (.+) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def object_info(server):
    return server.object_info()


@pytest.fixture(scope="module", params=locales.TRANSLATED)
def language(request):
    return request.param


def repeated(text: str) -> set[str]:
    """What a translation says too: numbers, files, identifiers, names with capitals inside."""
    names = {re.sub(r"(s|-[a-z]+)$", "", name) for name in re.findall(NAME, text)}
    return {*re.findall(NUMBER, text), *re.findall(FILE, text), *names}


def prose(texts: locales.Texts) -> locales.Texts:
    return {key: text for key, text in texts.items() if key.endswith((".tooltip", ".description"))}


def test_english_is_what_the_nodes_say(object_info):
    assert locales.read("en") == locales.english(object_info), "run python -m tools.locales"


def test_nothing_is_missing_or_left_over(language):
    texts, translated = locales.read("en"), locales.read(language)
    assert sorted(texts.keys() - translated.keys()) == [], f"not in {language}: translate them"
    assert sorted(translated.keys() - texts.keys()) == [], "no node has these: run python -m tools.locales"
    assert [key for key, text in translated.items() if not text.strip()] == []


def test_settings_are_in_every_language():
    """What web/js/demo_models.js calls them is the English text."""
    found = {
        known: json.loads(locales.path(known).with_name("settings.json").read_text("utf-8"))
        for known in ("en", *locales.TRANSLATED)
    }
    script = (ROOT / "web" / "js" / "demo_models.js").read_text()
    for known, texts in found.items():
        assert list(texts) == list(found["en"])
        for key, text in texts.items():
            assert f'"{key.replace("_", ".", 1)}"' in script
            assert (text["name"] in script) is (known == "en")


def test_what_the_tool_writes_is_what_is_there(language):
    assert list(locales.read(language)) == list(locales.read("en"))
    assert json.loads(locales.path(language).read_text("utf-8")) == locales.nested(locales.read(language))


def test_the_page_reads_no_text_as_a_template():
    """vue-i18n, which the page uses, takes { } @ | for its own."""
    for known in ("en", *locales.TRANSLATED):
        assert [key for key, text in locales.read(known).items() if re.search(r"[{}@|]", text)] == []


def test_sentences_are_in_the_language(language):
    texts = prose(locales.read(language))
    assert [key for key, text in texts.items() if not re.search(LETTERS[language], text)] == []
    if language == "zh":
        assert [key for key, text in texts.items() if re.search(LETTERS["ja"], text)] == []


def test_numbers_files_and_names_are_in_every_language(language):
    texts, translated = prose(locales.read("en")), locales.read(language)
    lost = {key: repeated(text) - repeated_in(translated[key], text) for key, text in texts.items()}
    assert {key: words for key, words in lost.items() if words} == {}


def repeated_in(translation: str, text: str) -> set[str]:
    return {word for word in repeated(text) if word in translation}


def test_choices_are_named_as_the_page_shows_them(object_info, language):
    texts, translated = locales.read("en"), locales.read(language)
    lost = [
        (key, choice)
        for key, values in locales.choices(object_info).items()
        for choice in values
        if f"{choice}: " in texts.get(f"{key}.tooltip", "")
        and not re.search(rf"{re.escape(choice)}(（[^）]+）)?：", translated[f"{key}.tooltip"])
    ]
    assert lost == []


def test_nodes_keep_their_names_with_a_hint(language):
    texts, translated = locales.read("en"), locales.read(language)
    titles = [text for key, text in translated.items() if key.endswith(".display_name")]
    assert all(any(title.startswith(name) for title in titles) for name in FOUR)
    for key, title in texts.items():
        if key.endswith(".display_name"):
            name, hint, _ = re.fullmatch(r"([^（]+)(（(.+)）)", translated[key]).groups()
            assert name == title.partition(" (")[0]
            assert re.search("[\u3040-\u30ff\u4e00-\u9fff]", hint)


@pytest.mark.parametrize("node_id", PAGES)
def test_chinese_help_has_the_rows_of_the_english(node_id):
    pages = [(DOCS / name).read_text("utf-8") for name in (f"{node_id}.md", f"{node_id}/zh.md")]
    rows, rows_zh = ([first for first, _ in ROW.findall(page)] for page in pages)
    assert [
        re.sub("（[^）]+）", "", first) for first in rows_zh if first not in ("输入", "输出", "按钮", "模型")
    ] == [first for first in rows if first not in ("Input", "Output", "Button", "Model")]
    assert pages[1].startswith(pages[0].partition("\n")[0].partition(" (")[0])
    structure = [re.findall(r"^(#+ |\| ?|- |\*\*|\n)", page, re.MULTILINE) for page in pages]
    assert structure[1] == structure[0]
    assert {word for word in repeated(pages[0]) if word not in pages[1]} - {"CLIP", "VAE"} == set()
    code = [set(re.findall(r"`([^`]+)`|\]\(([^)]+)\)", page)) for page in pages]
    assert code[0] <= code[1]


@pytest.mark.parametrize("node_id", PAGES)
def test_chinese_help_calls_inputs_as_the_node_does(node_id):
    translated = locales.read("zh")
    names = {text for key, text in translated.items() if key.startswith(f"{node_id}.")}
    tables = (DOCS / node_id / "zh.md").read_text("utf-8").split("| 按钮 |")[0]
    said = [word for first, _ in ROW.findall(tables) for word in re.findall("（([^）]+)）", first)]
    assert [word for word in said if word not in names] == []


def test_every_node_has_a_chinese_page(object_info):
    assert (
        sorted(locales.ours(object_info))
        == PAGES
        == sorted(path.parent.name for path in DOCS.glob("*/zh.md"))
    )


def test_the_server_hands_them_out(server):
    answer = server.get("/i18n")
    for known in ("en", *locales.TRANSLATED):
        served = locales.flat(answer[known]["nodeDefs"])
        assert locales.read(known).items() <= served.items()
    for node_id in PAGES:
        page = server.request(f"/extensions/ComfyUI-DRM/docs/{node_id}/zh.md", None, "", 10)
        assert page == (DOCS / node_id / "zh.md").read_bytes()


def test_the_tool_says_what_to_translate():
    before, now = {"a": "old", "b": "same", "c": "old"}, {"a": "new", "b": "same", "c": "new", "d": "added"}
    translated_before, translated = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "2", "c": "4"}
    assert locales.to_translate(now, translated, before, translated_before) == ["a", "d"]
    assert locales.flat(locales.nested({"N.inputs.x.name": "x", "N.display_name": "n"})) == {
        "N.inputs.x.name": "x",
        "N.display_name": "n",
    }


ADD = """() => {
    const graph = window.app.graph;
    graph.clear();
    window.app.canvas.ds.reset();
    return ["StepwiseKSampler", "DRMPick"].map((type, column) => {
        const node = LiteGraph.createNode(type);
        node.pos = [140 + 480 * column, 120];
        graph.add(node);
        return {
            title: node.getTitle(),
            widgets: Object.fromEntries(node.widgets.map((widget) => [widget.name, widget.label])),
            inputs: Object.fromEntries(node.inputs.map((input) => [input.name, input.localized_name])),
            outputs: node.outputs.map((output) => output.localized_name),
        };
    });
}"""
SWITCH = """async (language) => {
    await window.app.extensionManager.setting.set("Comfy.Locale", language);
    await new Promise((resolve) => setTimeout(resolve, 3000));
}"""


@pytest.fixture
def chinese_page(server, page):
    """The page, opened in Chinese."""
    for language in ("zh", "en"):
        server.request("/settings/Comfy.Locale", json.dumps(language).encode(), "application/json", 20)
        page.reload()
        if language == "zh":
            page.console_errors.clear()
            yield page


def test_the_page_shows_them(chinese_page):
    sampler, pick = chinese_page.page.evaluate(ADD)
    chinese_page.page.wait_for_timeout(500)
    chinese_page.screenshot("locale_zh")
    texts = locales.read("zh")
    assert sampler["title"] == texts["StepwiseKSampler.display_name"]
    assert sampler["widgets"]["num_branches"] == texts["StepwiseKSampler.inputs.num_branches.name"]
    assert sampler["inputs"]["latent_image"] == texts["StepwiseKSampler.inputs.latent_image.name"]
    assert sampler["outputs"][1] == texts["StepwiseKSampler.outputs.1.name"]
    assert pick["widgets"]["without_a_page"] == texts["DRMPick.inputs.without_a_page.name"]
    chinese_page.page.evaluate(SWITCH, "ja")
    sampler, _ = chinese_page.page.evaluate(ADD)
    chinese_page.page.wait_for_timeout(500)
    chinese_page.screenshot("locale_ja")
    # Titles wait for a reload, those of ComfyUI's own nodes too.
    assert sampler["inputs"]["seed"] == locales.read("ja")["StepwiseKSampler.inputs.seed.name"]
    assert chinese_page.console_errors == []
