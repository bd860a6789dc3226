"""Every method on every family of encoders; what is particular to one family."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import transformers
from conftest import CLASS_NAMES, METHODS, ImageProcessor, make_classifier, pixels, shake, token_ids
from peft import AutoPeftModel, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, pipeline

import hf_tgpt
from hf_tgpt.data import ImageTransform
from hf_tgpt.encoders import FAMILIES, encoder_of
from hf_tgpt.inference.classifier import Classifier
from hf_tgpt.inference.explain import image_attention
from hf_tgpt.inference.onnx import export_onnx
from hf_tgpt.inference.plain_transformers import export_transformers

# A tiny model of each family beside CLIP, whose own matrix is test_promises.py.
SHAPE_OF = {"metaclip_2": "metaclip_2"}
PICTURE = Image.effect_noise((40, 40), 80).convert("RGB")
LABELS = torch.tensor([0, 3, 1])


@pytest.fixture(params=SHAPE_OF)
def family(request):
    return request.param


@pytest.fixture(params=[*METHODS, "zero_shot", "lora"])
def model(request, family, adapt, load_clip):
    """Each method on the family's tiny model, in evaluation mode, with weights that are not the start's."""
    if request.param in METHODS:
        return adapt(METHODS[request.param], SHAPE_OF[family])
    torch.manual_seed(0)
    made = make_classifier(request.param, load_clip(SHAPE_OF[family]), CLASS_NAMES).eval()
    shake(made)
    return made


def classifier_of(model, folder):
    processor = ImageProcessor.from_pretrained(folder)
    return Classifier(model, ImageTransform.from_processor(processor, train=False))


def test_every_family_has_a_tiny_model_here():
    assert {"clip", *SHAPE_OF} == set(FAMILIES)


@pytest.mark.filterwarnings("ignore:TGP-T is trained without descriptions")
def test_every_method_classifies_and_learns(model):
    base = model.get_base_model()
    output = model.train()(pixels(base), LABELS)
    assert output.logits.shape == (3, len(CLASS_NAMES))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trained:
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in trained)


def test_a_saved_adapter_comes_back(model, family, load_clip, tmp_path):
    model.save_pretrained(tmp_path)
    torch.manual_seed(9)
    again = hf_tgpt.load_trained(load_clip(SHAPE_OF[family]), tmp_path)
    assert torch.equal(again(pixels(model.get_base_model())).logits, model(pixels(model.get_base_model())).logits)
    if (tmp_path / "adapter_config.json").is_file() and isinstance(model.learner.config.method, str):
        mapping = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]
        if mapping:
            assert mapping["base_model_class"] == FAMILIES[family].model_class
            found = AutoPeftModel.from_pretrained(tmp_path)
            assert isinstance(found.get_base_model(), getattr(transformers, FAMILIES[family].model_class))


def test_the_base_model_is_itself_without_the_adapter(family, method, adapt, load_clip):
    model, plain = adapt(method, SHAPE_OF[family]), load_clip(SHAPE_OF[family])
    ids = token_ids(plain, ["a photo of a cat.", "a forest"])
    expected = plain(input_ids=ids, pixel_values=pixels(plain))
    with model.disable_adapter():
        found = model(input_ids=ids, pixel_values=pixels(plain))
    assert torch.equal(found.logits_per_image, expected.logits_per_image)
    assert type(found) is type(expected)
    assert type(model.unload()) is type(plain)


def test_an_open_method_answers_the_models_own_call_with_its_own_output(family, method, adapt):
    model = adapt(method, SHAPE_OF[family])
    ids = token_ids(model, [f"a photo of a {name}." for name in CLASS_NAMES])
    if not method.open:
        with pytest.raises(ValueError, match="baked into"):
            model(input_ids=ids, pixel_values=pixels(model))
        return
    pictures = pixels(model, len(CLASS_NAMES))
    found = model(input_ids=ids, pixel_values=pictures, return_loss=True)
    assert type(found) is encoder_of(model.get_base_model()).output_class()
    torch.testing.assert_close(found.logits_per_image, model(pictures).logits, atol=1e-4, rtol=1e-4)


def test_models_can_be_copied_and_pickled(family, method, adapt):
    model = adapt(method, SHAPE_OF[family])
    expected = model(pixels(model)).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(pixels(model)).logits, expected)
        assert type(twin.get_base_model()) is type(model.get_base_model())


def test_prediction_and_explanation(model, family, clip_folders):
    base = model.get_base_model()
    classifier = classifier_of(model, clip_folders[SHAPE_OF[family]])
    answer = classifier(PICTURE, None)
    assert {guess["label"] for guess in answer} == set(CLASS_NAMES)
    assert image_attention(classifier, PICTURE).shape[0] == base.config.vision_config.num_attention_heads


# One of each way to export; the other methods share it, and test_export.py has them all.
@pytest.mark.parametrize("model", ["coop", "mutual_prompt", "linear_probe", "tgpt"], indirect=True)
def test_export(model, family, clip_folders, tmp_path):
    import onnxruntime

    base = model.get_base_model()
    classifier = classifier_of(model, clip_folders[SHAPE_OF[family]])
    export_onnx(classifier, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": pixels(base).numpy()})
    np.testing.assert_allclose(logits, model(pixels(base)).logits.detach().numpy(), atol=2e-4)
    if model.learner.vision_is_frozen and model.learner.linear_head(encoder_of(base)) is not None:
        snippet = export_transformers(classifier, tmp_path / "plain")
        assert FAMILIES[family].vision_class in snippet


def test_transformers_pipelines(family, method, adapt, clip_folders):
    model, folder = adapt(method, SHAPE_OF[family]), clip_folders[SHAPE_OF[family]]
    processor = AutoImageProcessor.from_pretrained(folder)
    answers = pipeline("image-classification", model=model, image_processor=processor)(PICTURE, top_k=4)
    expected = {g["label"]: pytest.approx(g["score"], abs=1e-3) for g in classifier_of(model, folder)(PICTURE)}
    assert {answer["label"]: answer["score"] for answer in answers} == expected
    if method.open:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        task = "zero-shot-image-classification"
        classify = pipeline(task, model=model, image_processor=processor, tokenizer=tokenizer)
        answers = classify(PICTURE, candidate_labels=CLASS_NAMES, hypothesis_template="a photo of a {}.")
        assert {answer["label"]: answer["score"] for answer in answers} == expected


def test_an_adapter_of_another_family_is_refused(adapt, load_clip, tmp_path):
    adapt(METHODS["coop"], "metaclip_2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The adapter was made for another CLIP"):
        PeftModel.from_pretrained(load_clip(), tmp_path)


def test_metaclip_2_reads_at_its_own_end_of_sentence_number_2(load_clip):
    model = load_clip("metaclip_2")
    encoder, ids = encoder_of(model), token_ids(model, ["a photo of a cat.", "forest"])
    assert model.config.text_config.eos_token_id == 2
    assert encoder.ends(ids).tolist() == [7, 2]  # CLIP's rule for a 2, the highest id, would read at a word
    clip = load_clip("legacy_eos")
    assert clip.config.text_config.eos_token_id == 2
    ids = token_ids(clip, ["a photo of a cat.", "forest"])
    assert encoder_of(clip).ends(ids).tolist() == [7, 2]


def test_a_subclass_of_a_known_model_keeps_its_class(load_clip):
    class Mine(transformers.CLIPModel):
        pass

    model = load_clip()
    model.__class__ = Mine
    adapted = get_peft_model(model, METHODS["maple"].config())
    assert isinstance(adapted.get_base_model(), Mine)
    assert type(adapted.unload()) is Mine
