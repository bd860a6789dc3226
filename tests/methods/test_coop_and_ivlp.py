"""What is particular to CoOp and to independent prompts (IVLP, and with one tower off VPT and deep CoOp)."""

import pytest
import torch
from conftest import CLASS_NAMES, METHODS, pixels, pooled, token_ids
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import CLIPModel

from hf_tgpt import CoOpConfig, IVLPConfig, convert_original_state_dict
from hf_tgpt.encoders import encoder_of
from hf_tgpt.encoders.walk import unit

COOP, IVLP = METHODS["coop"], METHODS["ivlp"]
LABELS = torch.tensor([0, 3, 1])
TEXT_ONLY = [dict(vision_prompt_length=0), dict(vision_prompt_depth=0)]
VISION_ONLY = [dict(text_prompt_length=0), dict(text_prompt_depth=0)]
SENTENCES = [f"a photo of a {name}." for name in CLASS_NAMES]


def text_tower(clip, embeddings):
    """The text tower's own modules on one sentence (t, d_t) that ends with EOS -> (d,)."""
    text, length = clip.text_model, len(embeddings)
    hidden = text.embeddings(inputs_embeds=embeddings[None])
    mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
    for layer in text.encoder.layers:
        hidden = layer(hidden, mask)
    return clip.text_projection(text.final_layer_norm(hidden[0, -1]))


def arranged(position, prompts, name):
    """The sentence's inner part, piece by piece."""
    half = len(prompts) // 2
    if position == "end":
        return [prompts, name]
    return [name, prompts] if position == "front" else [prompts[:half], name, prompts[half:]]


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("length", [1, 4, 5])
@pytest.mark.parametrize("position", ["end", "front", "middle"])
def test_class_sentences_are_arranged_as_if_built_one_by_one(adapt, position, length, class_specific):
    fields = dict(prompt_length=length, initial_text=None, class_position=position, class_specific=class_specific)
    model = adapt(COOP, **fields)
    clip, prompts = model.get_base_model(), model.learner.text_prompts
    expected = []
    for i, name in enumerate(CLASS_NAMES):
        bos, *ids, stop, eos = encoder_of(clip).words()[token_ids(model, [f"{name}."])[0]].split(1)
        inner = arranged(position, prompts[i] if class_specific else prompts, torch.cat(ids))
        expected.append(text_tower(clip, torch.cat([bos, *inner, stop, eos])))
    torch.testing.assert_close(
        model.learner.class_features(encoder_of(clip)), unit(torch.stack(expected)), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("position", ["front", "middle"])
def test_words_of_the_initial_text_that_are_not_learned_stay_with_the_name(adapt, position):
    model = adapt(COOP, prompt_length=2, class_position=position)
    clip, prompts = model.get_base_model(), model.learner.text_prompts
    bos, *ids, stop, eos = encoder_of(clip).words()[token_ids(model, ["of a red circle."])[0]].split(1)
    expected = text_tower(clip, torch.cat([bos, *arranged(position, prompts, torch.cat(ids)), stop, eos]))
    torch.testing.assert_close(model.learner.class_features(encoder_of(clip))[1], unit(expected), atol=1e-5, rtol=0)


def test_a_text_without_full_stop_is_all_name(adapt):
    model = adapt(COOP, prompt_length=4, class_position="front")
    clip, prompts = model.get_base_model(), model.learner.text_prompts
    bos, *ids, eos = encoder_of(clip).words()[token_ids(model, ["red circle"])[0]].split(1)
    expected = text_tower(clip, torch.cat([bos, *ids, prompts, eos]))
    features = pooled(model.get_text_features(token_ids(model, ["a photo of a red circle", *SENTENCES])))
    torch.testing.assert_close(features[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", ["end", "front", "middle"])
def test_a_text_of_learned_tokens_alone_has_no_name(adapt, position):
    model = adapt(COOP, prompt_length=4, class_position=position)
    clip, prompts = model.get_base_model(), model.learner.text_prompts
    bos, *_, eos = encoder_of(clip).words()[token_ids(model, ["cat"])[0]].split(1)
    expected = text_tower(clip, torch.cat([bos, prompts, eos]))
    for text in ("a photo of a", "a photo of."):
        features = pooled(model.get_text_features(token_ids(model, [text, *SENTENCES])))
        torch.testing.assert_close(features[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", ["end", "front", "middle"])
def test_positions_serve_clips_own_call_and_new_names(adapt, position):
    model = adapt(COOP, prompt_length=4, class_position=position)
    names = ["blue striped square", "zigzag texture", "cat"]
    ids = token_ids(model, [f"a photo of a {name}." for name in names])
    expected = model(input_ids=ids, pixel_values=pixels(model)).logits_per_image
    model.set_class_names(names)
    torch.testing.assert_close(model(pixels(model)).logits, expected)


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_coop_in_chunks_is_coop_at_once(adapt, class_specific, mode):
    fields = dict(prompt_length=3, class_position="middle", class_specific=class_specific)
    whole, parts = adapt(COOP, **fields), adapt(COOP, text_chunk_size=3, **fields)
    for model in (whole, parts):
        model.train(mode == "train")(pixels(model), LABELS).loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(parts(pixels(parts)).logits, whole(pixels(whole)).logits)
    torch.testing.assert_close(parts.learner.text_prompts.grad, whole.learner.text_prompts.grad)


def test_the_papers_setting_is_the_default(load_clip):
    config = CoOpConfig(class_names=CLASS_NAMES)
    assert (config.prompt_length, config.initial_text, config.class_specific) == (16, None, False)
    prompts = get_peft_model(load_clip("legacy_eos"), config).learner.text_prompts
    assert prompts.shape == (16, 64)
    assert 0.018 < prompts.std() < 0.022


def test_learned_tokens_start_from_the_words(load_clip):
    start = dict(class_names=CLASS_NAMES, initial_text="a photo of a")
    words = encoder_of(load_clip()).words()[token_ids(load_clip(), ["a photo of a"])[0, 1:-1]]
    shared = get_peft_model(load_clip(), CoOpConfig(prompt_length=4, **start)).learner.text_prompts
    assert torch.equal(shared, words)
    specific = CoOpConfig(prompt_length=4, class_specific=True, **start)
    assert torch.equal(get_peft_model(load_clip(), specific).learner.text_prompts, words.expand(4, 4, -1))
    model = get_peft_model(load_clip(), IVLPConfig(text_prompt_depth=2, vision_prompt_depth=2, **start))
    assert torch.equal(model.learner.text_prompts[0], words[:2])


def test_coop_starts_as_zero_shot_clip(load_clip):
    clip = load_clip()
    expected = clip(input_ids=token_ids(clip, SENTENCES), pixel_values=pixels(clip)).logits_per_image
    model = get_peft_model(clip, CoOpConfig(class_names=CLASS_NAMES, prompt_length=4, initial_text="a photo of a"))
    torch.testing.assert_close(model.eval()(pixels(model)).logits, expected)


def test_class_specific_prompts_start_apart(load_clip):
    config = CoOpConfig(class_names=CLASS_NAMES, prompt_length=4, class_specific=True)
    prompts = get_peft_model(load_clip(), config).learner.text_prompts
    assert prompts.shape == (4, 4, 32)
    assert not torch.equal(prompts[0], prompts[1])


def test_class_specific_prompts_know_no_other_texts(adapt):
    model = adapt(COOP, class_specific=True)
    ids, message = token_ids(model, SENTENCES), "`class_specific`=True: COOP has its 4 classes baked into"
    with pytest.raises(ValueError, match=message):
        model.set_class_names(CLASS_NAMES[::-1])
    with pytest.raises(ValueError, match=message):
        model(input_ids=ids, pixel_values=pixels(model))
    with pytest.raises(ValueError, match=message):
        model.get_text_features(ids)
    model.set_class_names(CLASS_NAMES)
    assert model(pixels(model)).logits.shape == (3, 4)


def test_a_text_too_short_for_the_prompts_is_refused(adapt):
    model = adapt(COOP, prompt_length=4)
    with pytest.raises(ValueError, match=r"a text of 1 tokens .* the first 4 are learned; .* 'a photo of a cat\.'"):
        model.get_text_features(token_ids(model, ["forest", *SENTENCES]))


def test_a_released_coop_checkpoint_has_bare_names():
    tensors = {"ctx": torch.ones(4, 32), "token_prefix": torch.zeros(4, 1, 32)}
    assert [name.split(".")[-1] for name in convert_original_state_dict(tensors, "coop")] == ["text_prompts"]


def test_coop_leaves_the_vision_tower_alone(adapt, load_clip):
    model = adapt(COOP)
    expected = pooled(load_clip().get_image_features(pixels(model)))
    assert torch.equal(pooled(model.get_image_features(pixels(model))), expected)


@pytest.mark.parametrize("off", VISION_ONLY)
def test_vision_only_leaves_the_text_tower_alone(adapt, load_clip, off):
    model, ids = adapt(IVLP, **off), token_ids(load_clip(), SENTENCES)
    expected = pooled(load_clip().get_text_features(ids))
    torch.testing.assert_close(pooled(model.get_text_features(ids)), expected)  # packed, so not to the last bit
    torch.testing.assert_close(model.learner.class_features(encoder_of(model.get_base_model())), unit(expected))
    plain = pooled(load_clip().get_image_features(pixels(model)))
    assert not torch.allclose(pooled(model.get_image_features(pixels(model))), plain, atol=1e-3)


@pytest.mark.parametrize("off", TEXT_ONLY)
def test_text_only_leaves_the_vision_tower_alone(adapt, load_clip, off):
    model, ids = adapt(IVLP, **off), token_ids(load_clip(), SENTENCES)
    expected = pooled(load_clip().get_image_features(pixels(model)))
    assert torch.equal(pooled(model.get_image_features(pixels(model))), expected)
    plain = pooled(load_clip().get_text_features(ids))
    assert not torch.allclose(pooled(model.get_text_features(ids)), plain, atol=1e-3)


def test_text_only_of_depth_one_is_coop(adapt):
    coop = adapt(COOP, prompt_length=3)
    ivlp = adapt(IVLP, text_prompt_length=3, text_prompt_depth=1, vision_prompt_length=0)
    with torch.no_grad():
        ivlp.learner.text_prompts[0].copy_(coop.learner.text_prompts)
    assert torch.equal(ivlp(pixels(ivlp)).logits, coop(pixels(coop)).logits)


@pytest.mark.parametrize(
    ("fields", "saved"),
    [
        (VISION_ONLY[0], {"vision_prompts.0", "vision_prompts.1"}),
        (TEXT_ONLY[0], {"text_prompts.0", "text_prompts.1"}),
        (
            dict(text_prompt_depth=1, vision_prompt_depth=3),
            {"text_prompts.0", *(f"vision_prompts.{i}" for i in range(3))},
        ),
    ],
)
def test_a_tower_without_prompts_has_none_in_the_file(adapt, tmp_path, fields, saved):
    model = adapt(IVLP, **fields)
    model.save_pretrained(tmp_path)
    prefix = "base_model.model.prompts.learners."
    assert {name.removeprefix(prefix) for name in load_file(tmp_path / "adapter_model.safetensors")} == saved
    model.train()(pixels(model), LABELS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert len(get_peft_model_state_dict(model)) == len(saved)


def test_lengths_and_depths_of_the_towers_are_independent(adapt):
    model = adapt(IVLP, "narrow_projection", text_prompt_length=3, vision_prompt_length=5, text_prompt_depth=3)
    assert [tuple(p.shape) for p in model.learner.text_prompts] == [(3, 40)] * 3
    assert [tuple(p.shape) for p in model.learner.vision_prompts] == [(5, 24)] * 2
    assert model(pixels(model)).logits.shape == (3, 4)


def test_without_text_prompts_the_class_sentence_is_plain(adapt):
    assert adapt(IVLP, text_prompt_length=0, initial_text=None).peft_config["default"].initial_text == "a photo of a"
    model = adapt(IVLP, text_prompt_length=0, initial_text="the")
    ids = token_ids(model, [f"the {name}." for name in CLASS_NAMES])
    expected = model(input_ids=ids, pixel_values=pixels(model)).logits_per_image
    torch.testing.assert_close(model(pixels(model)).logits, expected)


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (CoOpConfig, dict(prompt_length=0), "`prompt_length`=0: learn at least 1 token"),
        (CoOpConfig, dict(class_position="start"), "`class_position`='start': choose one of end, front, middle"),
        (IVLPConfig, dict(text_prompt_length=-1), r"`text_prompt_length`=-1: choose 0 \(no prompts in this tower\)"),
        (IVLPConfig, dict(vision_prompt_depth=-2), "`vision_prompt_depth`=-2: choose 0"),
        (
            IVLPConfig,
            dict(text_prompt_length=0, vision_prompt_depth=0),
            "`text_prompt_length`=0, .*`vision_prompt_depth`=0: nothing would be learned; give one tower a length",
        ),
    ],
)
def test_bad_fields_are_refused(config_class, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(class_names=CLASS_NAMES, **fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            CoOpConfig(class_names=CLASS_NAMES, initial_text="a photo of a"),
            "`initial_text`='a photo of a' has 4 tokens but `prompt_length`=16",
        ),
        (
            CoOpConfig(class_names=CLASS_NAMES, prompt_length=30),
            "`prompt_length`=30: the text tower's context of 30 leaves room for 26",
        ),
        (
            IVLPConfig(class_names=CLASS_NAMES, text_prompt_depth=13),
            "`text_prompt_depth`=13: the text tower has 2 layers; choose 0 to 2",
        ),
        (
            IVLPConfig(class_names=CLASS_NAMES, text_prompt_depth=1, vision_prompt_depth=4),
            "`vision_prompt_depth`=4: the vision tower has 3 layers; choose 0 to 3",
        ),
        (
            IVLPConfig(class_names=CLASS_NAMES, text_prompt_length=6, text_prompt_depth=1, vision_prompt_length=0),
            "`text_prompt_length`=6: `initial_text`='a photo of a' has 4 tokens to start from",
        ),
    ],
)
def test_what_does_not_fit_the_clip_is_refused(load_clip, config, message):
    clip = load_clip()
    with pytest.raises(ValueError, match=message):
        get_peft_model(clip, config)
    assert type(clip) is CLIPModel
