"""Parity with the released research code: its parameters give its logits, losses and gradients."""

import pytest
import torch
from conftest import GOLDEN
from peft import get_peft_model_state_dict
from releases import CASES, TOLERANCE, Case
from transformers import CLIPModel

from hf_tgpt import convert_original_state_dict, convert_to_original_state_dict
from hf_tgpt.encoders import encoder_of
from hf_tgpt.encoders.walk import encode_image, unit
from hf_tgpt.methods.promptsrc import epoch_weights
from hf_tgpt.texts.sentences import load_tokenizer
from hf_tgpt.texts.zero_shot_head import zero_shot_head


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_logits_and_loss_are_the_releases(case, mode):
    output = case.model().train(mode == "train")(**case.inputs())
    torch.testing.assert_close(output.logits, case["logits"], **TOLERANCE)
    torch.testing.assert_close(output.loss, case["loss"], **TOLERANCE)


def test_every_gradient_is_the_releases(case):
    model = case.model()
    model(**case.inputs()).loss.backward()
    ours = {n.replace(".default.", "."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    theirs = convert_original_state_dict(case.group("grad."), case.method)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_released_tensors_survive_the_way_to_our_names_and_back(case):
    ours = get_peft_model_state_dict(case.model())
    back = convert_to_original_state_dict(ours, case.method)
    unused = set(case.metadata.get("no_grad_params", []))
    assert back.keys() == case.group("param.").keys() - unused
    assert all(torch.equal(value, case[f"param.{name}"]) for name, value in back.items())


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("tgpt")])
def test_tgpt_losses_heads_and_features_are_the_releases(name):
    case = Case(name)
    model = case.model()
    torch.testing.assert_close(model.learner.zero_shot_head, case["zero_shot_head"], **TOLERANCE)
    output = model(**case.inputs())
    for part in ("loss_classification", "loss_category", "loss_content"):
        torch.testing.assert_close(output[part], case[part], **TOLERANCE)
    features = encode_image(encoder_of(model.get_base_model()), case["pixel_values"])
    # The golden image features carry no scale; compare directions.
    torch.testing.assert_close(unit(features), unit(case["image_features"]), **TOLERANCE)
    model.eval()
    model.learner.config.wise_ft = 0.5
    torch.testing.assert_close(model(case["pixel_values"]).logits, case["logits_wiseft"], **TOLERANCE)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("promptsrc")])
def test_promptsrcs_terms_and_teacher_are_the_releases(name):
    case = Case(name)
    model = case.model()
    output = model(**case.inputs())
    for part in ("loss_classification", "loss_text", "loss_image", "loss_logits"):
        torch.testing.assert_close(output[part], case[part], **TOLERANCE)
    learner, encoder = model.learner, encoder_of(model.get_base_model())
    texts = learner.frozen_class_features(encoder, learner.config.teacher_templates, normalize_each=False)
    torch.testing.assert_close(texts, case["teacher_text_features"], **TOLERANCE)
    images = learner.frozen_image_features(encoder, case["pixel_values"])
    torch.testing.assert_close(images, unit(case["teacher_image_features"]), **TOLERANCE)
    torch.testing.assert_close(encoder.scale(images @ texts.T), case["teacher_logits"], **TOLERANCE)
    shares = epoch_weights(*(int(case.metadata[name]) for name in ("epochs", "gpa_mean", "gpa_std")))
    torch.testing.assert_close(torch.tensor(shares, dtype=torch.float64), case["epoch_weights"])


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("mmrl")])
def test_mmrls_branches_are_the_releases(name):
    case = Case(name)
    model = case.model().eval()
    logits = model(case["pixel_values"]).logits
    others = [f"{name} " for name in model.class_names]  # the same sentences by names that it was not trained on
    texts = model.texts_for(others)
    texts.ids, texts.ends = model.learner.class_texts.ids, model.learner.class_texts.ends
    alone = model(case["pixel_values"], class_texts=texts).logits
    torch.testing.assert_close(alone, case["logits_class"], **TOLERANCE)
    alpha = model.learner.config.alpha
    by_tokens = (logits - alpha * alone) / (1 - alpha)
    torch.testing.assert_close(by_tokens, case["logits_representation"], atol=2e-4, rtol=0)


def test_zero_shot_logits_are_clips():
    case = Case("zeroshot")
    clip = CLIPModel.from_pretrained(GOLDEN / "clip").eval()
    plain = clip(input_ids=case["input_ids"], pixel_values=case["pixel_values"]).logits_per_image
    torch.testing.assert_close(plain, case["logits"], **TOLERANCE)
    encoder = encoder_of(clip)
    head = zero_shot_head(encoder, case.metadata["class_names"], [case.metadata["template"]], load_tokenizer(encoder))
    ours = encoder.scale(unit(encode_image(encoder, case["pixel_values"])) @ head.T)
    torch.testing.assert_close(ours, case["logits"], **TOLERANCE)


def test_class_dependent_buffers_of_a_release_are_left_out():
    case = Case("maple_ctx2_depth1")
    checkpoint = case.group("param.") | {"prompt_learner.token_prefix": torch.zeros(5, 1, 64)}
    assert len(convert_original_state_dict(checkpoint, "maple")) == 3


def test_a_checkpoint_of_another_method_is_refused():
    with pytest.raises(ValueError, match="has no tensor of a released tgpt checkpoint"):
        convert_original_state_dict({"something.weight": torch.zeros(1)}, "tgpt")
    with pytest.raises(ValueError, match=r"`method`='mapel' is unknown; choose one of .*maple.*tgpt"):
        convert_original_state_dict({}, "mapel")
