"""The fast text side gives the plain path's numbers: every class by itself, in its whole context, all held at once."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASS_NAMES, METHODS, many_names, pixels, pooled, shake, token_ids
from peft import get_peft_model

from hf_tgpt import CoCoOpConfig, CoOpConfig, IVLPConfig, MaPLeConfig, MutualPromptConfig
from hf_tgpt.adapters import image_conditioned
from hf_tgpt.encoders import encoder_of, walk
from hf_tgpt.encoders.chunks import chunks
from hf_tgpt.encoders.packing import common_length, pack
from hf_tgpt.methods import coop, ivlp, maple

COLOURS, FORMS = ("red", "blue", "dark green"), ("circle", "square", "cat", "zigzag texture")
NAMES = {
    "one class": ["cat"],
    # The second starts like the first; the others are shorter and longer.
    "unequal lengths": ["cat", "cat tree", "blue striped square", "forest", "moon"],
    "many rows": [f"{colour} {form}" for colour in COLOURS for form in FORMS],
}
VARIANTS = {
    "maple": (MaPLeConfig, {"prompt_depth": 2}),
    "ivlp": (IVLPConfig, {"text_prompt_depth": 2, "vision_prompt_depth": 2}),
    "vpt": (IVLPConfig, {"text_prompt_length": 0, "vision_prompt_depth": 2}),
    "coop": (CoOpConfig, {"prompt_length": 3}),
    "coop front": (CoOpConfig, {"prompt_length": 3, "class_position": "front", "initial_text": "a photo of a"}),
    "coop middle": (CoOpConfig, {"prompt_length": 3, "class_position": "middle"}),
    "coop class-specific": (CoOpConfig, {"prompt_length": 3, "class_specific": True}),
    "coop class-specific middle": (
        CoOpConfig,
        {"prompt_length": 4, "class_specific": True, "class_position": "middle"},
    ),
    "cocoop": (CoCoOpConfig, {"reduction": 2}),
    "mutual": (MutualPromptConfig, {"top_k": 2, "reduction": 2}),
    "mutual shortlist": (MutualPromptConfig, {"top_k": 2, "reduction": 2, "shortlist": 2}),
    "mutual plain texts": (MutualPromptConfig, {"top_k": 2, "reduction": 2, "conditioned_texts": False}),
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


@pytest.fixture
def plainly(monkeypatch):
    """plainly(function) -> its answer with sentences in rows of their own, as long as the context."""
    original = walk.encode_text

    def plain(encoder, embeddings, ends, prompts=None, packing=None):
        room = encoder.shape()["context_length"] - embeddings.shape[1]
        return original(encoder, F.pad(embeddings, (0, 0, 0, room)), ends, prompts)

    def run(function):
        with monkeypatch.context() as patch:
            for module in (walk, image_conditioned, coop, ivlp, maple):
                patch.setattr(module, "encode_text", plain)
            return function()

    return run


def make(load_clip, variant, names, shape="plain", **fields):
    config_class, kind = variant
    torch.manual_seed(3)
    model = get_peft_model(load_clip(shape), config_class(class_names=names, **(kind | fields)))
    shake(model)
    return model.train()


def outcome(model):
    """Logits, loss and the gradient of every adapter weight."""
    pictures = pixels(model).to(model.dtype)
    output = model(pictures, torch.arange(3) % len(model.learner.config.class_names))
    output.loss.backward()
    return [output.logits, output.loss, *(p.grad for p in model.parameters() if p.requires_grad)]


def check(found, expected, tolerance):
    assert len(found) == len(expected)
    # Relative to the largest number in a tensor; gradients of zero, such as those of one class, to 1.
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(b.abs().max(), 1)


@pytest.mark.parametrize(("names", "chunk"), [*((names, None) for names in NAMES), ("many rows", 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_logits_loss_and_gradients_are_those_of_the_plain_path(
    variant, names, chunk, dtype, tolerance, load_clip, plainly
):
    fast = make(load_clip, variant, NAMES[names], text_chunk_size=chunk).to(dtype)
    plain = make(load_clip, variant, NAMES[names], text_chunk_size=1000).to(dtype)
    check(outcome(fast), plainly(lambda: outcome(plain)), tolerance)


@pytest.mark.parametrize("shape", ["narrow_projection", "legacy_eos"])
def test_other_shapes_of_clip_too(variant, shape, load_clip, plainly):
    fast, plain = (make(load_clip, variant, NAMES["many rows"], shape).double() for _ in range(2))
    check(outcome(fast), plainly(lambda: outcome(plain)), 1e-10)


def test_eager_attention_too(variant, load_clip, plainly):
    def eager(shape):
        return load_clip(shape, attn_implementation="eager")

    fast, plain = (make(eager, variant, NAMES["many rows"]).double() for _ in range(2))
    assert fast.config.text_config._attn_implementation == "eager"
    # transformers' eager attention has its softmax in float32 whatever the model's dtype.
    check(outcome(fast), plainly(lambda: outcome(plain)), 1e-5)


def test_attention_that_takes_no_masks_gets_the_plain_path(load_clip, monkeypatch):
    model = make(load_clip, VARIANTS["maple"], NAMES["many rows"]).double()
    expected = model.learner.class_features(encoder_of(model.get_base_model()))
    attention = "another"
    transformers_attention = pytest.importorskip("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    masks = []

    def causal(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return transformers_attention["sdpa"](module, query, key, value, None, **kwargs)

    monkeypatch.setitem(transformers_attention._global_mapping, attention, causal)
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", attention)
    found = model.learner.class_features(encoder_of(model.get_base_model()))
    assert masks == [None] * 2
    check([found], [expected], 1e-10)


def test_bfloat16_autocast_runs_and_is_near(variant, load_clip, plainly):
    fast = make(load_clip, variant, NAMES["many rows"], text_chunk_size=5)
    plain = make(load_clip, variant, NAMES["many rows"])
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = outcome(fast), plainly(lambda: outcome(plain))
    assert all(part.isfinite().all() for part in found)
    assert (found[0] - expected[0]).abs().max() <= 0.05 * expected[0].abs().max()


@pytest.mark.parametrize(
    "texts",
    [
        ["a photo of a cat."],
        ["a photo of a cat.", "a photo of a cat tree.", "a photo of the forest."],  # other words after the prompts
        ["one red circle and one", "red circles in a forest", "blue blue red circle"],  # and in their place
    ],
)
def test_texts_of_the_users_own_too(texts, method, adapt, plainly):
    if not method.open:
        pytest.skip("takes no texts")
    model = adapt(method).double()
    ids, pictures = token_ids(model, texts), pixels(model).double()

    def logits():
        return model(input_ids=ids, pixel_values=pictures).logits_per_image

    check([logits()], [plainly(logits)], 1e-10)


def test_texts_that_do_not_begin_alike_are_not_made_to(adapt, plainly):
    model = adapt(METHODS["maple"]).double()
    ids = token_ids(model, [f"a photo of a {name}." for name in CLASS_NAMES])
    ids[:2, 0] = ids[0, 1]  # a word in place of CLIP's BOS

    def features():
        return pooled(model.get_text_features(ids))

    check([features()], [plainly(features)], 1e-10)


def test_plain_clips_text_features_are_clips(load_clip):
    clip = load_clip().double()
    ids = token_ids(clip, NAMES["many rows"] + NAMES["unequal lengths"])
    encoder = encoder_of(clip)
    for chunk in (None, 4):
        check(
            [walk.encode_words(encoder, ids, encoder.ends(ids), chunk)],
            [pooled(clip.get_text_features(ids))],
            1e-10,
        )


def test_a_class_costs_its_own_tokens(load_clip):
    """200 names of 2 to 4 tokens: 5 common tokens a row and hardly any padding, in place of 77 tokens a class."""
    eos = torch.tensor([5 + 1 + i % 3 for i in range(200)])
    packing = pack(eos, shared=5, context=77)
    own, places = int((eos - 4).sum()), packing.position.numel()
    assert packing.position.shape[1] <= 77
    assert places - 5 * len(packing.position) <= 1.1 * own
    assert places <= 1.15 * own


def test_the_common_beginning_ends_before_the_first_eos():
    ids = torch.tensor([[7, 1, 2, 9, 9, 9], [7, 1, 2, 9, 9, 9]])
    assert common_length(ids, torch.tensor([3, 3])) == 3
    ids = torch.tensor([[7, 1, 2, 3, 9], [7, 1, 4, 3, 9]])
    assert common_length(ids, torch.tensor([4, 4])) == 2


@pytest.mark.parametrize("context", [12, 20, 77])
def test_tokens_see_their_own_sentence_and_its_beginning_alone(context):
    eos, groups = torch.tensor([5, 4, 11, 3, 3, 7, 6]), torch.tensor([0, 0, 0, 2, 2, 1, 1])
    packing = pack(eos, 3, context, groups)
    for sentence, (row, end) in enumerate(zip(packing.row, packing.place, strict=True)):
        seen = packing.mask[row, 0, end].nonzero().flatten()
        assert packing.position[row, seen].tolist() == list(range(eos[sentence] + 1))
        owners = packing.sentence[row, seen]
        assert (owners[3:] == sentence).all()
        assert groups[owners].unique().tolist() == [int(groups[sentence])]
        for place in seen:  # and no token sees what comes later
            assert (packing.position[row, packing.mask[row, 0, place]] <= packing.position[row, place]).all()
    assert packing.mask.any(-1).all()  # padding included: a token that sees nothing would be NaN


def test_chunks_are_of_equal_tokens_and_the_last_is_full():
    eos = torch.full((600,), 8)
    parts = chunks(eos, 5)
    assert [part.stop - part.start for part in parts] == [88, 256, 256]  # 4 tokens of their own each
    assert [part.stop - part.start for part in chunks(eos, 5, 250)] == [100, 250, 250]
    assert torch.equal(torch.cat([torch.arange(600)[part] for part in parts]), torch.arange(600))


def test_a_gpu_with_room_holds_larger_chunks(load_clip, monkeypatch):
    clip = load_clip()
    assert walk.chunk_tokens(encoder_of(clip)) == 1024
    monkeypatch.setattr(type(clip), "device", torch.device("cuda"))
    for memory, tokens in ((1e6, 1024), (80e9, 80e9 // 8 // (18 * 32 * 2 * 4))):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, m=memory: SimpleNamespace(total_memory=m))
        assert walk.chunk_tokens(encoder_of(clip)) == tokens


@pytest.mark.parametrize("name", ["maple", "coop class-specific", "cocoop", "mutual"])
def test_the_activations_held_do_not_grow_with_the_classes(name, load_clip):
    held = {}
    for count in (20, 80):
        names = many_names(count)
        model = make(load_clip, VARIANTS[name], names, text_chunk_size=10)
        weights, sizes = {parameter.data_ptr() for parameter in model.parameters()}, []

        def keep(tensor, weights=weights, sizes=sizes):
            sizes.append(0 if tensor.data_ptr() in weights else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(pixels(model))
        held[count] = sum(sizes)
    # Features of every class remain, (32,) each for 3 images at most; a class's activations are 14 times its tokens.
    print(held)
    assert (held[80] - held[20]) / 60 < 20 * 32
