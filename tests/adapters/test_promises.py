"""The matrix of methods x promises: what every adapter of this package keeps, whatever its method."""

import copy
import json
import pickle
import warnings

import peft
import pytest
import torch
from conftest import CLASS_NAMES, METHODS, SHAPES, pixels, pooled, shake, token_ids
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import CLIPModel

from hf_tgpt.adapters.config import change_config

LABELS = torch.tensor([0, 3, 1])


def quiet_loss(model, labels=LABELS):
    """Training loss without TGP-T's word on missing descriptions, which has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TGP-T is trained without descriptions")
        return model(pixel_values=pixels(model), labels=labels).loss


@pytest.mark.parametrize("shape", SHAPES)
def test_every_method_classifies_with_any_clip_shape(method, adapt, shape):
    model = adapt(method, shape)
    output = model(pixel_values=pixels(model), labels=LABELS)
    assert output.logits.shape == (3, len(CLASS_NAMES))
    assert output.loss.isfinite()


def test_pictures_may_come_by_position(method, adapt):
    model = adapt(method)
    by_name = model(pixel_values=pixels(model), labels=LABELS)
    by_position = model(pixels(model), LABELS)
    assert torch.equal(by_name.logits, by_position.logits)
    assert torch.equal(by_name.loss, by_position.loss)


def test_a_batch_equals_its_pictures_one_by_one(method, adapt):
    model = adapt(method)
    whole = model(pixels(model)).logits
    single = torch.cat([model(picture[None]).logits for picture in pixels(model)])
    torch.testing.assert_close(whole, single, atol=1e-5, rtol=1e-5)


def test_only_the_adapter_trains(method, load_clip):
    model = get_peft_model(load_clip(), method.config())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == method.parameters
    assert all(".prompts.learners.default." in name for name in trained)


def test_one_step_moves_every_adapter_parameter_and_nothing_else(trained, load_clip):
    clip = load_clip()
    torch.manual_seed(1)
    model = get_peft_model(clip, trained.config()).train()
    shake(model)  # a last layer that starts at zero lets no gradient pass at first
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    quiet_loss(model).backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_disabled_adapter_is_the_base_model(method, adapt, load_clip):
    model = adapt(method)
    inputs = dict(
        input_ids=token_ids(model, ["a photo of a cat.", "a photo of the forest"]), pixel_values=pixels(model)
    )
    expected = load_clip()(**inputs)
    with model.disable_adapter():
        actual = model(**inputs)
        text = pooled(model.get_text_features(inputs["input_ids"]))
    assert torch.equal(actual.logits_per_image, expected.logits_per_image)
    assert torch.equal(text, pooled(load_clip().get_text_features(inputs["input_ids"])))
    if method.open:
        assert not torch.equal(model(**inputs).logits_per_image, expected.logits_per_image)


def test_disabled_adapter_asks_for_texts(method, adapt):
    model = adapt(method)
    with model.disable_adapter(), pytest.raises(ValueError, match="`input_ids` is missing"):
        model(pixels(model))


def test_saved_file_holds_the_adapter_and_nothing_else(method, adapt, tmp_path):
    model = adapt(method)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    own = {f"base_model.model.prompts.learners.{name}": value for name, value in model.learner.state_dict().items()}
    assert set(saved) == set(own)
    assert len(saved) == method.tensors
    assert all(torch.equal(saved[name], value) for name, value in own.items())
    assert {n.replace(".default.", ".") for n, p in model.named_parameters() if p.requires_grad} <= set(saved)


def test_saved_config_names_a_plain_clip_and_its_dimensions(method, adapt, tmp_path):
    model = adapt(method)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["auto_mapping"] == {
        "base_model_class": "CLIPModel",
        "parent_library": "transformers.models.clip.modeling_clip",
    }
    assert config["class_names"] == CLASS_NAMES
    assert config["base_model_dimensions"]["text_width"] == SHAPES["plain"]["text"][0]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("shape", ["plain", "narrow_projection"])
def test_saved_adapter_reloads_under_another_name_and_seed(
    method, adapt, load_clip, tmp_path, shape, low_cpu_mem_usage
):
    model = adapt(method, shape)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    options = dict(adapter_name="another", low_cpu_mem_usage=low_cpu_mem_usage)
    reloaded = PeftModel.from_pretrained(load_clip(shape), tmp_path, **options)
    before, after = get_peft_model_state_dict(model), get_peft_model_state_dict(reloaded, adapter_name="another")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    # With low_cpu_mem_usage the weights lie in the mapped file, where torch may choose another kernel.
    tolerance = dict(atol=1e-5, rtol=1e-5) if low_cpu_mem_usage else dict(atol=0, rtol=0)
    torch.testing.assert_close(reloaded(pixels(model)).logits, model(pixels(model)).logits, **tolerance)
    assert not any(parameter.requires_grad for parameter in reloaded.parameters())


def test_saved_adapter_reloads_into_a_clip_model_by_transformers_own_load_adapter(method, adapt, load_clip, tmp_path):
    model = adapt(method)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    clip = load_clip()
    clip.load_adapter(tmp_path, adapter_name="another")
    assert torch.equal(clip(pixel_values=pixels(model)).logits, model(pixels(model)).logits)


def test_saved_adapter_finds_its_base_model_by_itself(method, adapt, tmp_path):
    model = adapt(method)
    model.save_pretrained(tmp_path)
    reloaded = AutoPeftModel.from_pretrained(tmp_path)
    assert torch.equal(reloaded(pixel_values=pixels(model)).logits, model(pixels(model)).logits)


def test_a_saved_config_alone_answers_nothing_that_its_weights_would_have_to(method, adapt, load_clip, tmp_path):
    model = adapt(method)
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    untrained = get_peft_model(load_clip(), config)
    if untrained.learner.awaits_weights:
        with pytest.raises(ValueError, match=r"`inference_mode`=True in the config .* but no weights were loaded"):
            untrained(pixels(model))
        peft.set_peft_model_state_dict(untrained, get_peft_model_state_dict(model))
        assert torch.equal(untrained.eval()(pixels(model)).logits, model(pixels(model)).logits)
    else:  # it starts as it does for training
        config.inference_mode = False
        torch.manual_seed(3)
        first = get_peft_model(load_clip(), config).learner.state_dict()
        torch.manual_seed(3)
        config.inference_mode = True
        second = get_peft_model(load_clip(), config).learner.state_dict()
        assert all(torch.equal(value, first[name]) for name, value in second.items())


def test_training_goes_on_from_a_saved_adapter(trained, adapt, load_clip, tmp_path):
    adapt(trained).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load_clip(), tmp_path, is_trainable=True).train()
    quiet_loss(model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert sum(p.requires_grad for p in model.parameters()) == trained.parameters


def test_two_adapters_live_side_by_side(method, adapt, tmp_path):
    model = adapt(method)
    first = model(pixels(model)).logits
    model.add_adapter("second", method.config(class_names=["forest", "cat"]))
    assert torch.equal(model(pixels(model)).logits, first)
    model.set_adapter("second")
    shake(model)
    second = model(pixels(model)).logits
    assert second.shape == (3, 2)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "second" / "adapter_model.safetensors")) == method.tensors
    model.set_adapter("default")
    assert torch.equal(model(pixels(model)).logits, first)
    with pytest.warns(UserWarning, match="now deleted"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["second"]
    model.set_adapter("second")
    assert torch.equal(model(pixels(model)).logits, second)


def test_unload_gives_a_plain_clip_model_back(method, adapt, load_clip):
    model = adapt(method)
    clip = model.unload()
    assert type(clip) is CLIPModel
    assert clip.state_dict().keys() == load_clip().state_dict().keys()
    get_peft_model(clip, method.config())  # and it can be adapted again, without a warning


def test_merging_is_refused_with_a_reason(method, adapt):
    model = adapt(method)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged: it does not change the base model's weights"):
            merge()


def test_a_half_precision_base_keeps_a_full_precision_adapter(method, load_clip):
    torch.manual_seed(0)
    reference = get_peft_model(load_clip(), method.config()).eval()
    model = get_peft_model(load_clip(dtype=torch.bfloat16), method.config()).eval()
    peft.set_peft_model_state_dict(model, get_peft_model_state_dict(reference))
    assert not {value.dtype for value in model.learner.state_dict().values()} & {torch.bfloat16, torch.float16}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    # The scale of 100 blows bfloat16's third digit up to about one logit.
    torch.testing.assert_close(model(pixels(model)).logits, reference(pixels(model)).logits, atol=1.0, rtol=0.05)
    if method.parameters:
        quiet_loss(model.train()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_gradient_checkpointing_gives_the_same_gradients(trained, adapt):
    plain, checkpointed = adapt(trained).train(), adapt(trained).train()
    # Transformers' name for it, before 5.23 and since.
    if hasattr(checkpointed, "activation_checkpointing_enable"):
        checkpointed.activation_checkpointing_enable()
    else:
        checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    quiet_loss(plain).backward()
    quiet_loss(checkpointed).backward()
    pairs = zip(plain.parameters(), checkpointed.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in pairs if a.requires_grad)


def test_a_model_can_be_copied_and_pickled(method, adapt):
    model = adapt(method)
    expected = model(pixels(model)).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(pixels(model)).logits, expected)
        shake(twin.requires_grad_())
        assert not torch.equal(twin(pixels(model)).logits, expected)
    assert torch.equal(model(pixels(model)).logits, expected)


@pytest.mark.parametrize("name", ["maple", "tgpt", "gda"])  # prompts in both towers, of each picture, a head
def test_a_compiled_forward_gives_the_same_logits(name, adapt):
    model = adapt(METHODS[name])
    with torch.no_grad():
        expected = model(pixels(model)).logits
        compiled = torch.compile(model, backend="aot_eager")(pixel_values=pixels(model)).logits
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-5)


def test_class_names_change_after_training_only_where_the_method_is_open(method, adapt):
    model = adapt(method)
    names = ["zigzag texture", "cat"]
    if not method.open:
        with pytest.raises(ValueError, match="4 classes baked into"):
            model.set_class_names(names)
        return
    model(pixels(model))
    model.set_class_names(names)
    ids = token_ids(model, [f"a photo of a {name}." for name in names])
    expected = model(input_ids=ids, pixel_values=pixels(model)).logits_per_image
    assert torch.equal(model(pixels(model)).logits, expected) or method.fused
    assert model.peft_config["default"].class_names == names


def test_clips_own_call_works_only_where_the_method_is_open(method, adapt):
    model = adapt(method)
    ids = token_ids(model, ["a photo of a cat.", "a photo of a forest."])
    if not method.open:
        for call in (model.get_image_features, lambda p: model(input_ids=ids, pixel_values=p)):
            with pytest.raises(ValueError, match="supports only model\\(pixel_values\\)"):
                call(pixels(model))
        return
    output = model(input_ids=ids, pixel_values=pixels(model), return_loss=False)
    assert output.logits_per_image.shape == (3, 2)
    if method.conditioned:
        with pytest.raises(ValueError, match="no text features without an image"):
            model.get_text_features(ids)
        return
    text = torch.nn.functional.normalize(pooled(model.get_text_features(ids)), dim=-1)
    image = torch.nn.functional.normalize(pooled(model.get_image_features(pixels(model))), dim=-1)
    expected = model.logit_scale.exp() * image @ text.T
    torch.testing.assert_close(output.logits_per_image, expected)


def test_texts_too_short_to_hold_the_prompts_are_refused(method, adapt):
    if not method.prompts or not method.open or method.fused:  # MMRL's tokens take no word's place
        return
    model = adapt(method)
    with pytest.raises(ValueError, match=r"a text of 0 tokens beside BOS and EOS, but the first \d are learned"):
        model(input_ids=token_ids(model, [""]), pixel_values=pixels(model))


def test_padding_of_the_texts_changes_nothing(method, adapt):
    if not method.open:
        return
    model = adapt(method)
    ids = token_ids(model, ["a photo of a cat.", "a photo of a blue striped square."])
    padded = torch.nn.functional.pad(ids, (0, 5), value=model.config.text_config.pad_token_id)
    short, long = (model(input_ids=i, pixel_values=pixels(model)).logits_per_image for i in (ids, padded))
    torch.testing.assert_close(short, long)


def test_a_config_may_serve_two_models(method, load_clip):
    config = method.config()
    get_peft_model(load_clip("plain"), config)
    with pytest.warns(UserWarning, match="base_model_name_or_path` was renamed"):
        model = get_peft_model(load_clip("legacy_eos"), config)
    assert model.peft_config["default"].base_model_dimensions["text_width"] == SHAPES["legacy_eos"]["text"][0]
    assert config.base_model_dimensions is None


def test_pipelines_show_the_active_adapters_class_names(method, adapt, load_clip):
    model = adapt(method)
    before = load_clip().config.id2label
    assert list(model.config.id2label.values()) == CLASS_NAMES
    assert model.unload().config.id2label == before


@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
def test_the_whole_model_may_be_cast(method, adapt, precision):
    model = adapt(method)
    expected = model(pixels(model)).logits
    logits = model.to(precision)(pixels(model).to(precision)).logits
    tolerance = dict(atol=1e-4, rtol=1e-4) if precision == torch.float64 else dict(atol=1.0, rtol=0.1)
    torch.testing.assert_close(logits.to(expected.dtype), expected, **tolerance)


def test_arguments_that_the_method_does_not_know_are_named(method, adapt):
    model = adapt(method)
    with pytest.raises(ValueError, match="`output_attentions` is not an argument of"):
        model(pixels(model), output_attentions=True)
    model(pixels(model), output_attentions=False, output_hidden_states=None)
    with pytest.raises(ValueError, match="`pixel_values` is missing"):
        model()


def test_adapter_names_that_look_like_parts_of_the_model_are_refused(method, adapt):
    model = adapt(method)
    part = next(iter(model.learner.state_dict())).split(".")[0]
    with pytest.raises(ValueError, match=f"`adapter_name`='{part}' is also the name of a part of the model"):
        model.add_adapter(part, method.config())


def test_a_failed_adapter_leaves_the_model_as_it_was(method, load_clip):
    if not method.has("tokenizer_name_or_path"):
        pytest.skip("reads no texts")
    clip = load_clip()
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        get_peft_model(clip, method.config(tokenizer_name_or_path="./nowhere"))
    assert type(clip) is CLIPModel
    assert all(parameter.requires_grad for parameter in clip.parameters())


def test_class_sentences_in_chunks_give_the_same_logits_and_gradients(method, adapt):
    if not method.has("text_chunk_size"):
        pytest.skip("reads no texts")
    whole, parts = adapt(method).double().train(), adapt(method, text_chunk_size=3).double().train()
    pictures = pixels(whole).double()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TGP-T is trained without descriptions")
        outputs = [model(pictures, LABELS) for model in (whole, parts)]
    # TGP-T computes its head once, in the base model's float32.
    tolerance = dict(atol=1e-10, rtol=1e-10) if method.open else dict(atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, **tolerance)
    for output in outputs:
        output.loss.backward()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, **tolerance)


def test_a_refused_value_changes_nothing(method, adapt):
    model = adapt(method)
    config = model.peft_config["default"]
    before = config.to_dict()
    for name, value in (("class_names", ["cat", "cat"]), ("class_names", "cat"), ("base_model_dimensions", 3)):
        with pytest.raises(ValueError, match=f"`{name}"):
            setattr(config, name, value)
    changes = dict.fromkeys(config.changeable, "[]")
    if changes:  # the last of several is wrong: the first stays as it was
        good = {"wise_ft": "0.5", "top_k": "3"}
        first = next(name for name in good if name in config.changeable)
        last = next((name for name in config.changeable if name != first), None)
        with pytest.raises(ValueError, match="choose a value of type"):
            change_config(
                model, {first: good[first]} | ({last: "[]"} if last else {}) | ({first: "[]"} if not last else {})
            )
    with pytest.raises(ValueError, match="is not a field of"):
        change_config(model, {"nonsense": "1"})
    assert config.to_dict() == before
    assert model.class_names == CLASS_NAMES


def test_peft_tells_the_state_of_the_model_in_its_own_terms(method, adapt):
    model = adapt(method)
    status = model.get_model_status()
    assert status.peft_types == {"default": model.peft_config["default"].method}
    assert status.active_adapters == status.available_adapters == ["default"]
