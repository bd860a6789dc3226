"""A question about other classes changes nothing: not what is saved, not what another question or thread gets."""

import copy
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import CLASS_NAMES, METHODS, ImageProcessor, make_classifier, pixels
from peft import PeftModel
from PIL import Image

from hf_tgpt.data import ImageTransform
from hf_tgpt.encoders import encoder_of
from hf_tgpt.evaluation.accuracy import for_classes
from hf_tgpt.inference.classifier import Classifier
from hf_tgpt.inference.demo import Demonstration
from hf_tgpt.inference.explain import image_attention
from hf_tgpt.inference.onnx import export_onnx
from hf_tgpt.methods.zero_shot import zero_shot_beside
from hf_tgpt.texts.sentences import load_tokenizer, tokenize

OTHERS = ["zigzag texture", "forest", "cat tree"]
OPEN = [name for name, method in METHODS.items() if method.open]
PROCESSOR = ImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
PICTURES = [Image.effect_noise((40, 40), 60 + 20 * i).convert("RGB") for i in range(4)]


def classifier_of(model):
    return Classifier(model, ImageTransform.from_processor(PROCESSOR, train=False))


@pytest.fixture(params=[*OPEN, "lora", "zero_shot"])
def model(request, adapt, load_clip):
    if request.param in OPEN:
        return adapt(METHODS[request.param])
    torch.manual_seed(0)
    return make_classifier(request.param, load_clip(), CLASS_NAMES).eval()


def saved(model, folder):
    """The files of a saved adapter, by name."""
    model.save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_asking_about_other_classes_changes_nothing_that_is_saved(model, tmp_path):
    before, names = saved(model, tmp_path / "before"), model.class_names
    own = model(pixels(model.get_base_model())).logits
    classifier = classifier_of(model)
    classifier(PICTURES[0], class_names=OTHERS)
    list(classifier.stream(PICTURES, class_names=OTHERS[:2]))
    for_classes(model, OTHERS)(pixels(model.get_base_model()))
    zero_shot_beside(model, OTHERS)(pixels(model.get_base_model()))
    assert saved(model, tmp_path / "after") == before
    assert model.class_names == names == classifier.class_names
    assert torch.equal(model(pixels(model.get_base_model())).logits, own)


def test_class_names_that_are_handed_out_are_a_copy(model, tmp_path):
    before, classifier = saved(model, tmp_path / "before"), classifier_of(model)
    for handed_out in (model.class_names, classifier.class_names):
        handed_out.append("one more")
        handed_out[0] = "another"
    assert saved(model, tmp_path / "after") == before
    assert [guess["label"] for guess in classifier(PICTURES[0], None)] != ["another"]
    assert model.class_names == classifier.class_names == CLASS_NAMES


def test_other_classes_are_answered_as_if_they_were_the_models_own(model):
    pictures = pixels(model.get_base_model())
    with torch.no_grad():
        found = for_classes(model, OTHERS)(pictures).logits
        retargeted = copy.deepcopy(model)
        retargeted.set_class_names(OTHERS)
        torch.testing.assert_close(found, retargeted(pictures).logits, atol=1e-5, rtol=1e-5)


def test_set_class_names_makes_them_the_adapters_own_and_saves_them(adapt, load_clip, tmp_path):
    model = adapt(METHODS["maple"])
    model.set_class_names(OTHERS)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["class_names"] == OTHERS
    assert list(model.config.id2label.values()) == OTHERS
    reloaded = PeftModel.from_pretrained(load_clip(), tmp_path)
    assert torch.equal(reloaded(pixels(model)).logits, model(pixels(model)).logits)


def test_bad_names_are_refused_before_anything_changes(model):
    own, names = model(pixels(model.get_base_model())).logits, model.class_names
    for bad in ([], ["cat", " cat "], "cat", ["cat", ""]):
        with pytest.raises(ValueError, match="class_names"):
            model.set_class_names(bad)
        with pytest.raises(ValueError, match="class_names"):
            model.texts_for(bad)
    assert model.class_names == names
    assert torch.equal(model(pixels(model.get_base_model())).logits, own)


def test_a_method_with_fixed_classes_refuses_other_texts(adapt, load_clip):
    texts = adapt(METHODS["coop"]).texts_for(OTHERS)
    model = adapt(METHODS["tgpt"])
    with pytest.raises(ValueError, match="4 classes baked into"):
        model(pixels(model), class_texts=texts)
    open_model = adapt(METHODS["maple"])
    with pytest.raises(ValueError, match=r"`class_texts` belong to model\(pixel_values"):
        open_model(input_ids=torch.ones(1, 4, dtype=torch.long), pixel_values=pixels(model), class_texts=texts)


def test_cutting_sentences_leaves_the_tokenizer_that_all_share_as_it_is(load_clip):
    encoder = encoder_of(load_clip())
    tokenizer = load_tokenizer(encoder)
    ids, ends = tokenize(tokenizer, ["cat " * 100, "a cat"], encoder, truncate=True)
    context = encoder.shape()["context_length"]
    assert ids.shape == (2, context)
    assert ends.tolist() == [context - 1, 3]
    assert tokenizer.backend_tokenizer.truncation is None


def test_a_classifier_may_be_copied_and_sent_to_another_process(model):
    classifier = classifier_of(model)
    expected = {guess["label"]: pytest.approx(guess["score"], abs=1e-5) for guess in classifier(PICTURES[0], None)}
    for copied in (copy.deepcopy(classifier), pickle.loads(pickle.dumps(classifier))):
        assert {guess["label"]: guess["score"] for guess in copied(PICTURES[0], None)} == expected


def test_zero_shot_beside_a_model_in_training_leaves_it_in_training(adapt):
    model = adapt(METHODS["tgpt"]).train()
    zero_shot_beside(model, CLASS_NAMES)
    assert all(module.training for module in model.modules())


def test_a_classifier_asks_the_adapter_that_is_active(adapt):
    model = adapt(METHODS["maple"])
    classifier = classifier_of(model)
    first = classifier(PICTURES[0], None, class_names=OTHERS)
    model.add_adapter("second", METHODS["maple"].config(prompt_length=4))
    model.set_adapter("second")
    model.eval()
    assert classifier(PICTURES[0], None, class_names=OTHERS) != first
    model.set_adapter("default")
    assert classifier(PICTURES[0], None, class_names=OTHERS) == first
    own = classifier(PICTURES[0], None)
    model.set_class_names(OTHERS)
    assert classifier(PICTURES[0], None) == own  # of the classes that it came with
    assert classifier(PICTURES[0], None, class_names=OTHERS) == first


# Threads --------------------------------------------------------------------------------------------------------------


def in_threads(*tasks, rounds=8):
    """Runs the tasks `rounds` times each, all at once; what each gave, in order."""
    start = threading.Barrier(len(tasks))

    def work(task):
        start.wait()
        return [task() for _ in range(rounds)]

    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(work, task) for task in tasks]]


def close(a, b):
    return [g["label"] for g in a] == [g["label"] for g in b] and all(
        abs(x["score"] - y["score"]) < 1e-5 for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", ["maple", "coop", "mutual_prompt", "lora", "zero_shot"])
def test_threads_with_class_lists_of_their_own_get_their_own_answers(name, adapt, load_clip):
    model = adapt(METHODS[name]) if name in METHODS else make_classifier(name, load_clip(), CLASS_NAMES).eval()
    classifier = classifier_of(model)
    lists = [None, OTHERS, ["cat", "red circle"], ["forest", "cat", "blue striped square", "red circle", "cat tree"]]
    expected = [classifier_of(copy.deepcopy(model))(PICTURES[0], None, class_names=names) for names in lists]
    demonstration = Demonstration(classifier)
    beside = demonstration.compare(PICTURES[1], CLASS_NAMES)
    attention = image_attention(classifier, PICTURES[2])

    def ask(names):
        return lambda: classifier(PICTURES[0], None, class_names=names)

    answers = in_threads(
        *map(ask, lists),
        lambda: demonstration.compare(PICTURES[1], CLASS_NAMES),
        lambda: image_attention(classifier, PICTURES[2]),
        rounds=5,
    )
    for row, right in zip(answers, expected, strict=False):
        assert all(close(answer, right) for answer in row)
    for scores in answers[len(lists)]:
        assert [score.label for score in scores] == [score.label for score in beside]
        assert all(abs(a.zero_shot - b.zero_shot) < 1e-5 for a, b in zip(scores, beside, strict=True))
    assert all(torch.allclose(found, attention, atol=1e-5) for found in answers[len(lists) + 1])


def test_an_export_leaves_the_classifier_as_it_is(adapt, tmp_path):
    model = adapt(METHODS["maple"])
    classifier, before = classifier_of(model), saved(model, tmp_path / "before")
    exporting = threading.Thread(target=export_onnx, args=(classifier, tmp_path / "model.onnx", OTHERS))
    expected = classifier(PICTURES[0], None)
    exporting.start()
    while exporting.is_alive():
        assert close(classifier(PICTURES[0], None), expected)
    exporting.join()
    assert json.loads((tmp_path / "model.json").read_text())["labels"] == OTHERS
    assert saved(model, tmp_path / "after") == before
    assert model.config._attn_implementation == "sdpa"
