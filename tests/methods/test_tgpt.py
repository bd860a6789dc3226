"""What is particular to TGP-T; its equations are pinned by the parity tests."""

import warnings

import pytest
import torch
from conftest import METHODS, pixels, token_ids
from peft import get_peft_model
from transformers import CLIPModel

from hf_tgpt.encoders import encoder_of
from hf_tgpt.encoders.walk import unit
from hf_tgpt.methods import sentence_loss, tgpt
from hf_tgpt.texts.sentences import load_tokenizer
from hf_tgpt.texts.zero_shot_head import zero_shot_head

TGPT = METHODS["tgpt"]
LABELS = torch.tensor([0, 3, 1])
CAPTIONS = ["a photo of a cat.", "the forest", "a red circle with a blue square"]


@pytest.fixture
def model(adapt):
    return adapt(TGPT)


def test_training_starts_from_the_zero_shot_head_of_the_templates(load_clip):
    templates = ["a photo of a {}.", "{} texture."]
    model = get_peft_model(load_clip(), TGPT.config(templates=templates))
    learner = model.learner
    assert torch.equal(learner.head, learner.zero_shot_head)
    one = get_peft_model(load_clip(), TGPT.config(templates=templates[:1])).learner.zero_shot_head
    encoder = encoder_of(load_clip())
    expected = zero_shot_head(encoder, TGPT.config().class_names, templates[:1], load_tokenizer(encoder))
    torch.testing.assert_close(one, unit(torch.cat([expected, expected], dim=-1)))
    assert not torch.equal(learner.zero_shot_head, one)


def test_wise_ft_mixes_the_heads_without_a_second_forward(model):
    plain = model(pixels(model))
    for share in (0.0, 0.3, 1.0):
        model.learner.config.wise_ft = share
        mixed_head = (1 - share) * model.learner.head + share * model.learner.zero_shot_head
        kept, model.learner.head = model.learner.head, torch.nn.Parameter(mixed_head)
        model.learner.config.wise_ft = 0.0
        expected = model(pixels(model)).logits
        model.learner.head, model.learner.config.wise_ft = kept, share
        torch.testing.assert_close(model(pixels(model)).logits, expected, atol=1e-4, rtol=1e-5)
        mixed = (1 - share) * plain.logits + share * plain.zero_shot_logits
        torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-5)


def test_wise_ft_is_ignored_in_training(model):
    model.train()
    plain = model(pixels(model)).logits
    model.learner.config.wise_ft = 1.0
    assert torch.equal(model(pixels(model)).logits, plain)


def test_missing_descriptions_fall_back_to_the_template_and_say_so_once(model):
    model.train()
    with pytest.warns(UserWarning, match="trained without descriptions .* 'a photo of a {}.'"):
        fallback = model(pixels(model), LABELS)
    names = model.learner.config.class_names
    captions = token_ids(model, [f"a photo of a {names[label]}." for label in LABELS])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(pixels(model), LABELS)  # not again
        told = model(pixels(model), LABELS, caption_ids=captions)
    torch.testing.assert_close(fallback.loss, told.loss)


def test_evaluation_loss_is_the_classification_loss_unless_there_are_descriptions(model):
    output = model(pixels(model), LABELS)
    assert torch.equal(output.loss, output.loss_classification)
    assert output.loss_content is None
    told = model(pixels(model), LABELS, caption_ids=token_ids(model, CAPTIONS))
    torch.testing.assert_close(told.loss, told.loss_classification + told.loss_category + told.loss_content)


@pytest.mark.parametrize("supervision", tgpt.SUPERVISION)
def test_the_chosen_sentences_supervise_and_no_others(load_clip, supervision):
    model = get_peft_model(load_clip(), TGPT.config(supervision=supervision)).train()
    captions = {"caption_ids": token_ids(model, CAPTIONS)} if model.uses_captions else {}
    assert bool(captions) == (supervision in ("content", "both"))
    output = model(pixels(model), LABELS, **captions)
    parts = {"category": output.loss_category, "content": output.loss_content}
    told = {name: loss for name, loss in parts.items() if loss is not None}
    assert tuple(told) == tgpt.SUPERVISION[supervision]
    torch.testing.assert_close(output.loss, output.loss_classification + sum(told.values()))


def test_an_unknown_supervision_is_refused():
    with pytest.raises(ValueError, match=r"`supervision`='captions'.* none, category, content, both"):
        TGPT.config(supervision="captions")


def test_padding_of_descriptions_is_no_target(model):
    captions = token_ids(model, CAPTIONS)
    expected = model(pixels(model), LABELS, caption_ids=captions).loss
    eos = model.config.text_config.eos_token_id
    for padding in (0, eos):  # CLIP's own tokenizer pads with EOS
        padded = torch.nn.functional.pad(captions, (0, 4), value=padding)
        torch.testing.assert_close(model(pixels(model), LABELS, caption_ids=padded).loss, expected)
    changed = captions.clone()
    changed[0, 2] = captions[1, 1]
    assert not torch.isclose(model(pixels(model), LABELS, caption_ids=changed).loss, expected)


def test_a_description_without_end_is_refused(model):
    with pytest.raises(ValueError, match="`caption_ids` has a sentence without EOS"):
        model(pixels(model), LABELS, caption_ids=token_ids(model, CAPTIONS)[:, :3])


def test_the_text_tower_sees_two_short_sentences_per_picture(model, monkeypatch):
    shapes = []
    original = tgpt.encode_text
    monkeypatch.setattr(
        tgpt, "encode_text", lambda encoder, e, ends: shapes.append(tuple(e.shape)) or original(encoder, e, ends)
    )
    model(pixels(model))
    assert shapes == [(3, 6 + 3, 32), (3, 8 + 3, 32)]  # BOS, prompt, full stop, EOS


def test_queries_attend_to_each_other_once_per_step_and_not_per_picture(model, monkeypatch):
    batches = []
    original = tgpt.Bonder.self_attention
    monkeypatch.setattr(tgpt.Bonder, "self_attention", lambda self, q: batches.append(len(q)) or original(self, q))
    model(pixels(model))
    assert batches == [1, 1]


def test_the_vocabulary_is_scored_only_where_there_is_a_target(model, monkeypatch):
    scored = []
    original = sentence_loss.word_loss
    monkeypatch.setattr(sentence_loss, "word_loss", lambda p, *args: scored.append(len(p)) or original(p, *args))
    captions = token_ids(model, CAPTIONS)
    model(pixels(model), LABELS, caption_ids=captions)
    eos = model.config.text_config.eos_token_id
    assert scored[1] == sum(min(8, int((row == eos).int().argmax())) for row in captions)


def test_a_projection_of_another_width_gets_a_map_that_starts_as_clips_own(load_clip):
    """The stated answer: X comes to the text width by a trained linear map, at first the projection's transpose."""
    model = get_peft_model(load_clip("narrow_projection"), TGPT.config())
    clip: CLIPModel = model.get_base_model()
    assert torch.equal(model.learner.image_to_text.weight, clip.text_projection.weight.T)
    assert model.learner.head.shape == (4, 2 * clip.config.projection_dim)
    names = [name for name, _ in get_peft_model(load_clip("plain"), TGPT.config()).learner.named_parameters()]
    assert not any("image_to_text" in name for name in names)


def test_category_queries_start_as_the_initial_text(load_clip):
    model = get_peft_model(load_clip(), TGPT.config())
    ids = token_ids(model, ["a photo of a"])[0, 1:-1]
    words = model.get_base_model().text_model.embeddings.token_embedding(ids)
    assert torch.equal(model.learner.category_queries[0, :4], words)
