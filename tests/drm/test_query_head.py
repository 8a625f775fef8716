"""The query head and the taps it reads: values worked out by hand, what counts, files, refusals."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from drm import DRM, load_drm, save_drm
from drm.backbone import BackboneConfig, Features, TruncatedSD3, backbone_from_transformer
from drm.checkpoint import DRMFileError, read_header
from drm.head import ConvHead, QueryHead
from tests.tiny import randomise


def with_query_head(transformer, num_kept=2, image_taps=(0, 2), text_taps=(1, 2), metadata=None, **head):
    backbone = backbone_from_transformer(transformer, num_kept, image_taps, text_taps)
    head = QueryHead(128, len(image_taps), len(text_taps), **head)
    return DRM(backbone, randomise(head, 3, gain=1.5), metadata).eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 16, 6, 8), (4, 7, 48), (4, 256)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_taps_are_the_whole_models_tokens(transformer, inputs, checkpointing):
    """Image and text after each block of the untouched model, caught on their way forward."""
    caught = [[], []]

    def catch(module, args, output):
        caught[0].append(output[1])
        caught[1].append(output[0])

    handles = [block.register_forward_hook(catch) for block in transformer.transformer_blocks]
    with torch.no_grad():
        transformer(inputs[0], inputs[1], inputs[2], torch.full((4,), 300.0))
    for handle in handles:
        handle.remove()
    backbone = backbone_from_transformer(transformer, 2, image_taps=(1, 2), text_taps=(1, 2))
    backbone.gradient_checkpointing = checkpointing
    features = backbone.features(inputs[0], torch.full((4,), 300.0), *inputs[1:])
    torch.testing.assert_close(features.image, caught[0][:2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.text, caught[1][:2], atol=1e-5, rtol=1e-5)
    assert features.tokens is features.image[-1]
    torch.testing.assert_close(features.temb, transformer.time_text_embed(torch.full((4,), 300.0), inputs[2]))


def test_tap_zero_is_what_enters_the_first_block(transformer, inputs):
    backbone = backbone_from_transformer(transformer, 1, image_taps=(0,), text_taps=(0,))
    features = backbone.features(inputs[0], torch.full((4,), 300.0), *inputs[1:])
    torch.testing.assert_close(features.image, [transformer.pos_embed(inputs[0])])
    torch.testing.assert_close(features.text, [transformer.context_embedder(inputs[1])])


def test_the_last_block_keeps_its_text_output_only_when_it_is_tapped(transformer):
    cut = backbone_from_transformer(transformer, 2, image_taps=(1, 2), text_taps=(0, 1))
    whole = backbone_from_transformer(transformer, 2, image_taps=(2,), text_taps=(2,))
    assert cut.transformer_blocks[-1].ff_context is None
    assert whole.transformer_blocks[-1].norm1_context.linear.weight.shape == (6 * 128, 128)
    assert cut.state_dict().keys() == backbone_from_transformer(transformer, 2).state_dict().keys()


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ({"image_taps": (2, 1)}, r"image_taps are \(2, 1\): wanted ascending numbers from 0 to 2"),
        ({"image_taps": (1, 1)}, "wanted ascending"),
        ({"text_taps": (3,)}, r"text_taps are \(3,\): wanted ascending numbers from 0 to 2"),
        ({"text_taps": (-1,)}, "wanted ascending"),
        ({"num_kept": 3, "text_taps": (3,)}, "block 3 is the model's last, it has no text output"),
    ],
)
def test_taps_that_cannot_be(transformer, taps, message):
    with pytest.raises(ValueError, match=message):
        backbone_from_transformer(transformer, **{"num_kept": 2, **taps})


def test_by_hand():
    """Two tokens, width 4, every weight chosen so that the score can be worked out on paper.

    temb 0 leaves gamma = beta = 0, so an image token becomes the mean of its values (proj of quarters) in all
    four places, which the norm makes (1, 1, 1, 1). Keys are 0, so attention is the mean; the gate is
    sigmoid(0) = 1/2. The query starts at 0: after attn1 it is 1/2 everywhere, after attn2 3/2; the
    feed-forward is 0; the head adds the four places, 6, and its bias, 1/4.
    """
    head = QueryHead(4, 1, 0, num_queries=1, num_heads=2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        adapter = head.layer_adapters_visual[0]
        adapter.proj.weight.fill_(0.25)
        head.agg_visual.weight.fill_(1.0)
        for attention in (head.attn1, head.attn2):
            attention.norm_v.weight.fill_(1.0)
            attention.to_v_vis.weight.copy_(torch.eye(4))
            attention.to_out[0].weight.copy_(torch.eye(4))
        head.head.weight.fill_(1.0)
        head.head.bias.fill_(0.25)
    tokens = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [5.0, 0.0, 0.0, 0.0]]])
    score = head(Features(tokens, [tokens], [], torch.zeros(1, 4)))
    assert score.item() == pytest.approx(6.25, abs=1e-5)
    with torch.no_grad():
        # gamma = -2: tokens change sign, and so does all that follows but the bias.
        adapter.cond_mlp[2].bias[:4] = -2.0
    score = head(Features(tokens, [tokens], [], torch.zeros(1, 4)))
    assert score.item() == pytest.approx(-5.75, abs=1e-5)
    with torch.no_grad():
        # beta and the layer's embedding add 20 to what is at most 5, so it is positive again.
        adapter.cond_mlp[2].bias[4:] = 10.0
        adapter.layer_embed.fill_(10.0)
    score = head(Features(tokens, [tokens], [], torch.zeros(1, 4)))
    assert score.item() == pytest.approx(6.25, abs=1e-5)


@pytest.mark.parametrize("what", ["latents", "sigma", "prompt", "pooled"])
def test_every_input_counts(transformer, inputs, what):
    drm = with_query_head(transformer)
    latents, prompt_embeds, pooled = inputs
    before = drm.score(latents, 0.3, prompt_embeds, pooled)
    after = drm.score(
        latents.flip(3) if what == "latents" else latents,
        0.6 if what == "sigma" else 0.3,
        prompt_embeds.flip(2) if what == "prompt" else prompt_embeds,
        pooled.flip(1) if what == "pooled" else pooled,
    )
    assert ((before - after).abs() > 1e-4).all()


def test_scores_are_independent_of_their_batch(transformer, inputs):
    drm = with_query_head(transformer)
    together = drm.score(inputs[0], 0.3, *inputs[1:])
    assert together.std() > 0.01
    for row in range(4):
        alone = drm.score(inputs[0][row : row + 1], 0.3, *(t[row : row + 1] for t in inputs[1:]))
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-5, rtol=0)


def test_gradients_reach_every_weight_that_counts_with_checkpointing_too(transformer, inputs):
    gradients = []
    for checkpointing in (False, True):
        drm = with_query_head(transformer)
        drm.backbone.gradient_checkpointing = checkpointing
        drm(inputs[0], 0.5, *inputs[1:]).sum().backward()
        without = [name for name, p in drm.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert without == []
        gradients.append([p.grad for p in drm.parameters()])
    torch.testing.assert_close(*gradients)


def test_stays_float32_in_half_precision_and_under_autocast(transformer, inputs):
    drm = with_query_head(transformer)
    exact = drm.score(inputs[0], 0.5, *inputs[1:])
    seen = []
    drm.head.head.register_forward_hook(lambda module, args, output: seen.append(args[0].dtype))
    drm.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        rough = drm.score(inputs[0], 0.5, *inputs[1:])
    assert {p.dtype for p in drm.head.parameters()} == {torch.float32}
    assert (seen, rough.dtype) == ([torch.float32], torch.float32)
    torch.testing.assert_close(rough, exact, atol=0.15, rtol=0)


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"width": 66, "num_heads": 6, "num_queries": 3},
        {"use_proj_in": True},
        {"logistic": (0.25, -1.5)},
    ],
)
def test_files(transformer, inputs, tmp_path, head):
    drm = with_query_head(transformer, metadata={"shown": {"scale": 0.1, "offset": 1.0}}, **head)
    save_drm(drm, tmp_path / "model.safetensors")
    loaded = load_drm(tmp_path / "model.safetensors")
    assert loaded.head.to_dict() == drm.head.to_dict()
    assert loaded.backbone.config == drm.backbone.config
    with torch.no_grad():
        raw = loaded(inputs[0], 0.4, *inputs[1:])
        assert torch.equal(raw, drm(inputs[0], 0.4, *inputs[1:]))
    torch.testing.assert_close(loaded.score(inputs[0], 0.4, *inputs[1:]), (raw + 10) / 10)
    if "logistic" in head:
        assert -2 < raw.min() < raw.max() < 2
    again = tmp_path / "again.safetensors"
    save_drm(loaded, again)
    assert read_header(again) == read_header(tmp_path / "model.safetensors")


def test_image_only(transformer, inputs):
    drm = with_query_head(transformer, text_taps=())
    assert not any("text" in name or "norm_t" in name for name in drm.head.state_dict())
    assert drm.score(inputs[0], 0.4, *inputs[1:]).std() > 0.01


def rewrite(path, change):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata["header"])
    change(header)
    save_file(load_file(path), path, metadata={**metadata, "header": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda h: h["architecture"]["head"].update(kind="tree"),
            "kind 'tree', known are 'conv', 'conv_gn' and 'query'",
        ),
        (lambda h: h["architecture"]["head"].update(kind="conv"), "cannot build"),
        (lambda h: h["architecture"]["head"].update(num_heads=5), "128 wide: wanted a multiple of its 5"),
        (lambda h: h["architecture"]["head"].update(image_taps=3), "reads 3 image and 2 text taps"),
        (lambda h: h["architecture"]["backbone"].update(text_taps=[1, 3]), "text_taps are"),
        (lambda h: h.update(shown={"scale": 0, "offset": 1}), "wanted a scale above 0"),
        (lambda h: h.update(shown={"scale": 1}), "wanted a scale above 0 and an offset"),
        (lambda h: h.update(shown="tenths"), "shows its score as tenths"),
    ],
)
def test_headers_that_are_not_understood(transformer, tmp_path, change, message):
    path = tmp_path / "model.safetensors"
    save_drm(with_query_head(transformer), path)
    rewrite(path, change)
    with pytest.raises(DRMFileError, match=message):
        load_drm(path)


def test_files_from_before_there_were_kinds(drm, inputs, tmp_path):
    path = tmp_path / "old.safetensors"
    save_drm(drm, path)

    def as_before(header):
        del header["architecture"]["head"]["kind"], header["shown"]
        for name in ("image_taps", "text_taps"):
            del header["architecture"]["backbone"][name]

    rewrite(path, as_before)
    loaded = load_drm(path)
    assert isinstance(loaded.head, ConvHead)
    embeds, pooled = inputs[1], inputs[2][:, :32]
    assert torch.equal(
        loaded.score(inputs[0], 0.4, embeds, pooled), drm.score(inputs[0], 0.4, embeds, pooled)
    )


def test_head_and_backbone_must_fit(transformer):
    backbone = backbone_from_transformer(transformer, 2, image_taps=(1,))
    with pytest.raises(ValueError, match="reads 2 image and 0 text taps, the backbone has 1 and 0"):
        DRM(backbone, QueryHead(128, 2, 0))
    with pytest.raises(ValueError, match="width 64, the backbone's are 128"):
        DRM(backbone, QueryHead(64, 1, 0))
    with pytest.raises(ValueError, match="at least one image tap"):
        QueryHead(128, 0, 1)
    tokens = torch.zeros(1, 4, 128)
    with pytest.raises(ValueError, match="2 image and 0 text taps: wanted 1 and 0"):
        QueryHead(128, 1, 0)(Features(tokens, [tokens, tokens], [], torch.zeros(1, 128)))


def test_dina_on_sd35_medium_on_the_meta_device():
    """12 blocks of SD3.5-Medium, three taps of both streams, the head as wide as a token."""
    config = BackboneConfig(
        num_kept=12,
        num_layers=24,
        num_attention_heads=24,
        dual_attention_layers=tuple(range(13)),
        image_taps=(4, 8, 12),
        text_taps=(4, 8, 12),
    )
    with torch.device("meta"):
        drm = DRM(TruncatedSD3(config), QueryHead(1536, 3, 3))
        features = drm.backbone.features(
            torch.empty(2, 16, 64, 64), torch.empty(2), torch.empty(2, 333, 4096), torch.empty(2, 2048)
        )
    assert [tensor.shape for tensor in features.image] == 3 * [(2, 1024, 1536)]
    assert [tensor.shape for tensor in features.text] == 3 * [(2, 333, 1536)]
    assert drm.backbone.transformer_blocks[-1].ff_context is not None
    millions = [round(sum(p.numel() for p in part.parameters()) / 1e6) for part in (drm.backbone, drm.head)]
    assert millions == [1233, 139]
