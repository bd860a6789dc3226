"""Heads on frozen features: their equations, what is searched, classes that come and go, impossible pictures."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLASS_NAMES, GOLDEN, HEADS, METHODS, ROOT, ImageProcessor, pixels
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPModel

import hf_tgpt
from hf_tgpt import GDAConfig, LinearProbeConfig, MaPLeConfig, TipAdapterConfig, config_class
from hf_tgpt.adapters import fitting, head_search
from hf_tgpt.adapters.feature_head import FeatureHead
from hf_tgpt.inference.onnx import export_onnx
from hf_tgpt.inference.plain_transformers import export_transformers
from hf_tgpt.methods.proker import ProKeR
from hf_tgpt.training.config import TrainingConfig, steps_of
from hf_tgpt.training.recipes import training_of

COUNT = 3  # pictures of each class
LABELS = torch.arange(COUNT * len(CLASS_NAMES)) % len(CLASS_NAMES)
LINEAR = ["gda", "zs_lp", "clap", "lp_plus_plus", "task_res"]


@pytest.fixture(params=HEADS)
def name(request):
    return request.param


def pictures(clip, views=2, seed=0):
    """Views of pictures (v, n, 3, h, w) that look alike within a class."""
    size = clip.config.vision_config.image_size
    generator = torch.Generator().manual_seed(seed)
    of_class = torch.randn(len(CLASS_NAMES), 3, size, size, generator=torch.Generator().manual_seed(9))
    return of_class[LABELS] + 0.7 * torch.randn(views, len(LABELS), 3, size, size, generator=generator)


def make(name, clip, **fields):
    searched = {"search": True} if METHODS[name].has("search") else {}
    return get_peft_model(clip, METHODS[name].config(**(searched | fields))).eval()


def features_of(model, batch):
    """Unit features (n, d) of pictures and of the class texts (c, d), in float64."""
    learner, encoder = model.learner, model.get_base_model().untuned_encoder()
    states = learner.image_states(encoder, batch)
    return F.normalize(states.double(), dim=-1), learner.texts(encoder).double()


def scale_of(model):
    return float(model.get_base_model().logit_scale.exp())


# Parity and equations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["tip_alpha1_beta5", "tip_alpha2_beta1"])
def test_tip_adapter_is_the_release(case):
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    with safe_open(GOLDEN / f"{case}.safetensors", framework="pt") as file:
        told = file.metadata()
    fields = dict(
        class_names=json.loads(told["class_names"]),
        templates=json.loads(told["templates"]),
        alpha=float(told["alpha"]),
        beta=float(told["beta"]),
        logit_scale=float(told["logit_scale"]),
        search=False,
    )
    about = dict(atol=5e-5, rtol=0)
    clip = CLIPModel.from_pretrained(GOLDEN / "clip")
    model = get_peft_model(clip, TipAdapterConfig(**fields))
    hf_tgpt.fit(model, tensors["train_pixel_values"], tensors["train_labels"])
    output = model(tensors["pixel_values"], tensors["labels"])
    torch.testing.assert_close(model.learner.keys, tensors["cache_keys"], **about)
    torch.testing.assert_close(output.logits, tensors["logits"], **about)
    torch.testing.assert_close(output.loss, tensors["loss"], **about)

    model = get_peft_model(model.unload(), TipAdapterConfig(**fields, train_keys=True))
    checkpoint = {"cache_keys": tensors["param.weight"], "cache_labels": tensors["train_labels"]}
    set_peft_model_state_dict(model, hf_tgpt.convert_original_state_dict(checkpoint, "tip_adapter"))
    output = model(tensors["pixel_values"], tensors["labels"])
    output.loss.backward()
    torch.testing.assert_close(output.logits, tensors["logits_finetuned"], **about)
    torch.testing.assert_close(output.loss, tensors["loss_finetuned"], **about)
    torch.testing.assert_close(model.learner.keys.grad, tensors["grad.weight"], **about)


def test_gda_is_its_equation(load_clip):
    model = make("gda", load_clip(), alpha=0.7, search=False)
    views = pictures(model)
    hf_tgpt.fit(model, views, LABELS)
    every = torch.cat([features_of(model, view)[0] for view in views]).numpy()  # (N, d)
    labels, width = LABELS.repeat(2).numpy(), every.shape[1]
    means = np.stack([every[labels == label].mean(0) for label in range(len(CLASS_NAMES))])
    covariance = np.cov((every - means[labels]).T)
    precision = width * np.linalg.pinv((len(every) - 1) * covariance + np.trace(covariance) * np.eye(width))
    weight = means @ precision
    bias = -np.einsum("cd,cd->c", weight, means) / 2 - math.log(len(CLASS_NAMES))
    features, texts = features_of(model, pixels(model))
    expected = scale_of(model) * features @ texts.T + 0.7 * torch.tensor(features.numpy() @ weight.T + bias)
    torch.testing.assert_close(model(pixels(model)).logits.double(), expected, atol=1e-3, rtol=1e-5)


def test_proker_is_its_equation(load_clip):
    model = make("proker", load_clip(), beta=2.0, regularization=3.0, search=False, logit_scale=1.0)
    views = pictures(model)
    hf_tgpt.fit(model, views, LABELS)
    learner, encoder = model.learner, model.get_base_model().untuned_encoder()
    keys = F.normalize(torch.stack([learner.image_states(encoder, view) for view in views]).mean(0).double(), dim=-1)
    features, texts = features_of(model, pixels(model))
    ridge = torch.exp(-2 * (1 - keys @ keys.T)) / 3 + torch.eye(len(keys))
    coefficients = torch.linalg.solve(ridge, F.one_hot(LABELS) - keys @ texts.T)
    expected = features @ texts.T + torch.exp(-2 * (1 - features @ keys.T)) @ coefficients
    torch.testing.assert_close(model(pixels(model)).logits.double(), expected, atol=1e-4, rtol=1e-4)


def test_clap_is_zs_lp_with_a_penalty(load_clip):
    clip = load_clip()
    views, steps = pictures(clip, views=1), TrainingConfig(optimizer="sgd", learning_rate=0.05, epochs=4, batch_size=99)
    free = make("zs_lp", load_clip(), search=False)
    held = make("clap", load_clip(), search=False)
    for model in (free, held):
        hf_tgpt.fit(model, views, LABELS, training=steps)
    # By hand: full batches, momentum and half a cosine, from t.
    features, t = features_of(held, views[0])
    own = (scale_of(held) * features @ F.normalize(t, dim=-1).T).softmax(-1)[range(len(LABELS)), LABELS]
    trust = torch.stack([own[label == LABELS].mean() for label in range(len(CLASS_NAMES))])
    for model, penalised in ((free, 0.0), (held, 1.0)):
        weight = t.clone().requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=0.05, momentum=0.9, weight_decay=steps.weight_decay)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / 4))
            loss = F.cross_entropy(scale_of(model) * features @ F.normalize(weight, dim=-1).T, LABELS)
            loss = loss + penalised * (trust * (weight - t).square().sum(-1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(model.learner.weight.double(), weight.detach(), atol=1e-5, rtol=1e-4)
    distance = [(model.learner.weight.double() - t).norm() for model in (free, held)]
    assert 0 < distance[1] < distance[0]


def test_lp_plus_plus_is_gradient_descent_by_the_steps_of_the_paper(load_clip):
    model = make("lp_plus_plus", load_clip(), search=False)
    views, epochs = pictures(model), 20
    hf_tgpt.fit(model, views, LABELS, training=TrainingConfig(epochs=epochs))
    learner, encoder = model.learner, model.get_base_model().untuned_encoder()
    features = F.normalize(
        torch.stack([learner.image_states(encoder, view) for view in views]).mean(0).double(), dim=-1
    )
    _, texts = features_of(model, views[0])
    count, cosines = len(LABELS), features @ texts.T
    weight = torch.stack([features[label == LABELS].sum(0) for label in range(len(CLASS_NAMES))]).requires_grad_()
    own = torch.stack([cosines[label == LABELS, label].mean() for label in range(len(CLASS_NAMES))])
    blend = torch.full((len(CLASS_NAMES),), 250 * float(own.mean()), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(CLASS_NAMES), dtype=torch.float64, requires_grad=True)
    step = 4 * count / float(torch.linalg.eigvalsh(features.T @ features)[-1])
    optimizer = torch.optim.SGD([weight, bias], lr=step, momentum=0.9)
    for epoch in range(1, epochs + 1):
        optimizer.zero_grad()
        blend.grad = None
        F.cross_entropy(features @ weight.T + bias + blend * cosines, LABELS).backward()
        optimizer.step()
        if epoch % 10 == 0:
            blend.data -= count / (4 * float(cosines.square().sum(0).max())) * blend.grad
    for ours, expected in ((learner.weight, weight), (learner.bias, bias), (learner.blend, blend)):
        torch.testing.assert_close(ours.detach().double(), expected.detach(), atol=1e-4, rtol=1e-4)


def test_task_res_and_clip_adapter_are_their_equations(load_clip):
    model = make("task_res", load_clip(), residual_scale=2.0, search=False)
    hf_tgpt.fit(model, pictures(model), LABELS)
    features, texts = features_of(model, pixels(model))
    vectors = F.normalize(texts + 2 * model.learner.residual.detach().double(), dim=-1)
    assert model.learner.residual.abs().sum() > 0
    expected = scale_of(model) * features @ vectors.T
    torch.testing.assert_close(model(pixels(model)).logits.double(), expected, atol=1e-4, rtol=1e-4)

    model = make("clip_adapter", load_clip(), residual_ratio=0.3, search=False)
    hf_tgpt.fit(model, pictures(model), LABELS)
    learner, encoder = model.learner, model.get_base_model().untuned_encoder()
    x = learner.image_states(encoder, pixels(model))
    with torch.no_grad():
        f = F.normalize(0.3 * F.relu(learner.up(F.relu(learner.down(x)))) + 0.7 * x, dim=-1)
        torch.testing.assert_close(model(pixels(model)).logits, scale_of(model) * f @ learner.texts(encoder).T)
    names = ["zigzag texture", "cat"]  # open to other classes
    assert model(pixels(model), class_texts=model.texts_for(names)).logits.shape == (3, 2)


def test_a_head_that_is_not_fitted_answers_as_zero_shot(name, load_clip):
    if name == "clip_adapter":
        pytest.skip("starts at random, as in its paper")
    clip = load_clip()
    zero_shot = get_peft_model(load_clip(), hf_tgpt.ZeroShotConfig(class_names=CLASS_NAMES)).eval()
    logits = make(name, clip)(pixels(clip)).logits
    expected = zero_shot(pixels(clip)).logits
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_nearly_equal_pictures_are_told_apart_in_float64(load_clip):
    """Features that differ in the seventh digit are lost in float32's inverse."""
    model = make("gda", load_clip(), alpha=1.0, search=False)
    learner, encoder = model.learner, model.get_base_model().untuned_encoder()
    chance = torch.Generator().manual_seed(0)
    width, centre = 32, F.normalize(torch.randn(32, generator=chance, dtype=torch.float64), dim=-1)
    means = centre + 1e-4 * torch.randn(len(CLASS_NAMES), width, generator=chance, dtype=torch.float64)
    states = (means[LABELS] + 1e-6 * torch.randn(len(LABELS), width, generator=chance, dtype=torch.float64)).float()
    learner.fit(encoder, fitting.Features(states[None], LABELS), None, steps_of(TrainingConfig()))
    answers = learner.classify(encoder, states, learner.texts(encoder)).argmax(-1)
    assert torch.equal(answers, LABELS)


# What is searched -----------------------------------------------------------------------------------------------------


def test_what_is_searched_is_tried_on_validation_pictures_alone(name, load_clip, monkeypatch):
    clip, tried = load_clip(), []
    score = FeatureHead.score
    monkeypatch.setattr(
        FeatureHead, "score", lambda self, encoder, data: tried.append(data.labels) or score(self, encoder, data)
    )
    model = make(name, clip)
    held = pictures(clip, views=1, seed=5)[0][:5], LABELS[:5]
    short = TrainingConfig(optimizer="sgd", learning_rate=0.01, epochs=4)
    hf_tgpt.fit(model, pictures(clip), LABELS, validation=held, training=short)
    assert tried
    assert all(labels.tolist() == LABELS[:5].tolist() for labels in tried)
    fitted = model.peft_config["default"].fitted
    assert fitted["searched_on"] == "5 validation pictures"
    for field, value in fitted["searched"].items():
        assert field == "epochs" or getattr(model.peft_config["default"], field) == value

    tried.clear()
    hf_tgpt.fit(model, pictures(clip), LABELS, training=short)
    assert sum(len(labels) for labels in {id(labels): labels for labels in tried}.values()) % len(LABELS) == 0
    assert model.peft_config["default"].fitted["searched_on"] == f"cross-validation on {len(LABELS)} training pictures"


def test_of_many_pictures_one_part_is_tried_and_one_field_after_the_other(load_clip, monkeypatch):
    """Each choice of ProKeR inverts a matrix as long as the pictures are many, so all of them would take hours."""
    monkeypatch.setattr(head_search, "_MANY", 5)
    settled, settle = [], ProKeR.settle
    monkeypatch.setattr(ProKeR, "settle", lambda self, values: settled.append(len(self.keys)) or settle(self, values))
    model = get_peft_model(load_clip(), hf_tgpt.ProKeRConfig(class_names=CLASS_NAMES))
    labels = torch.arange(32) % 4
    hf_tgpt.fit(model, torch.randn(32, 3, 32, 32), labels)
    beta, regularization = (len(values) for values in ProKeR.grid.values())
    assert len(settled) <= beta + regularization + 3  # and what is given, in each round, and the result
    assert settled.count(24) == len(settled) - 1
    assert model.peft_config["default"].fitted["searched_on"] == "cross-validation on 8 training pictures"


def test_the_values_given_are_used_where_nothing_is_searched(name, load_clip):
    clip = load_clip()
    model = make(name, clip, search=False)
    before = {field: getattr(model.peft_config["default"], field) for field in type(model.learner).grid}
    hf_tgpt.fit(model, pictures(clip), LABELS, training=TrainingConfig(epochs=2))
    config = model.peft_config["default"]
    assert {field: getattr(config, field) for field in before} == before
    assert "searched" not in config.fitted
    one_each = make(name, load_clip(), search=True)  # no picture can be held out
    hf_tgpt.fit(one_each, pictures(clip)[:, :4], LABELS[:4], training=TrainingConfig(epochs=2))
    assert one_each.peft_config["default"].fitted["searched_on"] is None


def test_a_better_value_is_found(load_clip):
    """The cache knows the pictures, and its weight is nothing at first."""
    clip = load_clip()
    model = make("tip_adapter", clip, alpha=0.0, logit_scale=100.0)
    before = (model(pictures(clip, seed=4)[0]).logits.argmax(-1) == LABELS).sum()
    hf_tgpt.fit(model, pictures(clip), LABELS, validation=(pictures(clip, seed=3)[0], LABELS))
    assert model.peft_config["default"].alpha > 0
    assert (model(pictures(clip, seed=4)[0]).logits.argmax(-1) == LABELS).sum() >= before + 3


def test_folds_leave_each_class_a_picture_and_each_picture_its_views():
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
    data = fitting.Features(torch.arange(16.0).reshape(2, 8, 1), labels)
    parts = fitting.held_out(data, seed=0)
    assert len(parts) == 4
    assert sorted(label for _, tried in parts for label in tried.labels.tolist()) == [0] * 5 + [1] * 2
    for train, tried in parts:
        assert set(train.labels.tolist()) == {0, 1, 2}
        assert len(train.labels) + len(tried.labels) == 8
        assert torch.equal(tried.states[1], tried.states[0] + 8)
    assert fitting.held_out(data.select(torch.tensor([0, 5, 7])), seed=0) == []


# Classes that come and go ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gda", "tip_adapter"])
def test_a_class_is_added_and_removed_without_touching_the_others(name, load_clip, tmp_path):
    clip = load_clip()
    views = pictures(clip)
    model = make(name, clip, alpha=5.0, beta=1.0) if name == "tip_adapter" else make(name, clip, alpha=5.0)
    hf_tgpt.fit(model, views, LABELS)
    before = model(views[0]).logits
    bird = 5 + torch.randn(2, 3, *views.shape[2:], generator=torch.Generator().manual_seed(7))
    hf_tgpt.add_classes(model, {"bird": bird, "fish": -bird[0]})
    assert model.class_names == [*CLASS_NAMES, "bird", "fish"] == list(model.config.id2label.values())
    after = model(views[0]).logits
    torch.testing.assert_close(after[:, :4], before, atol=1e-5, rtol=1e-6)
    assert model(bird[0]).logits.argmax(-1).tolist() == [4] * 3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_clip(), tmp_path)
    assert again.get_base_model().class_names[4:] == ["bird", "fish"]
    assert torch.equal(again(views[0]).logits, after)
    hf_tgpt.remove_classes(model, ["bird", CLASS_NAMES[0]])
    assert model.class_names == [*CLASS_NAMES[1:], "fish"]
    torch.testing.assert_close(model(views[0]).logits, after[:, [1, 2, 3, 5]])
    model.save_pretrained(tmp_path / "smaller")
    again = PeftModel.from_pretrained(load_clip(), tmp_path / "smaller")
    assert torch.equal(again(views[0]).logits, model(views[0]).logits)


def test_a_class_is_added_by_files_of_pictures(tmp_path, load_clip):
    from PIL import Image as PILImage

    model = make("gda", load_clip())
    hf_tgpt.fit(model, pictures(model), LABELS)
    for number in range(2):
        PILImage.new("RGB", (40, 50), (200, number, 0)).save(tmp_path / f"{number}.png")
    hf_tgpt.add_classes(
        model, {"newt": [tmp_path / "0.png", PILImage.open(tmp_path / "1.png").convert("RGB")]}, views=3
    )
    assert model.class_names[-1] == "newt"
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"cannot read .*bad\.png"):
        hf_tgpt.add_classes(model, {"toad": [tmp_path / "0.png"], "frog": [tmp_path / "bad.png"]})
    assert len(model.class_names) == 5


def test_classes_that_cannot_come_or_go_are_refused(load_clip):
    model = make("gda", load_clip())
    hf_tgpt.fit(model, pictures(model), LABELS)
    picture = pictures(model)[0][:1]
    for call, message in [
        (lambda: hf_tgpt.add_classes(model, {"Cat": picture}), "holds 'Cat' twice"),
        (lambda: hf_tgpt.add_classes(model, {"newt": []}), r"`pictures\['newt'\]`: give at least one picture"),
        (lambda: hf_tgpt.add_classes(model, {"newt": picture * torch.nan}), r"`pictures\['newt'\]`.*not finite"),
        (lambda: hf_tgpt.remove_classes(model, ["newt"]), "'newt', which is not a class of the model"),
        (lambda: hf_tgpt.remove_classes(model, CLASS_NAMES), "all of the model's classes"),
        (lambda: hf_tgpt.add_classes(make("clap", load_clip()), {"newt": picture}), "CLAP fits all classes together"),
        (lambda: hf_tgpt.remove_classes(make("proker", load_clip()), ["cat"]), "PROKER fits all classes together"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert model.class_names == CLASS_NAMES


# Pictures -------------------------------------------------------------------------------------------------------------


def test_pictures_that_cannot_be_fitted_to_are_named_and_nothing_changes(name, load_clip):
    clip = load_clip()
    model, views = make(name, clip), pictures(clip)
    hf_tgpt.fit(model, views, LABELS, training=TrainingConfig(epochs=2))
    before, fitted = model(views[0]).logits, model.peft_config["default"].fitted
    broken = views.clone()
    broken[1, 2] = torch.nan
    for given, labels, message in [
        (views[:, 1:4], LABELS[1:4], "`pictures` has none of 'cat' \\(1 of 4 classes\\)"),
        (broken, LABELS, "training picture 2 \\(1 of 12\\) are not finite"),
        (views, LABELS + 1, "`labels` holds 4 but there are 4 classes"),
        (views, LABELS[:-1], "`labels` has shape \\(11,\\)"),
        (views, LABELS.float(), "whole numbers"),
        (views, None, "`labels`=None"),
        (views[0, 0], LABELS, r"pass pictures \(n, 3, h, w\)"),
        ((255 * views).byte(), LABELS, "pixel values"),
    ]:
        with pytest.raises(ValueError, match=message):
            hf_tgpt.fit(model, given, labels)
    assert torch.equal(model(views[0]).logits, before)
    assert model.peft_config["default"].fitted == fitted


def test_one_feature_a_class_gives_the_nearest_mean_and_says_so(load_clip):
    clip = load_clip()
    model, one_each = make("gda", clip, search=False), pictures(clip)[0, :4]
    with pytest.warns(UserWarning, match="it reduces to the nearest class mean"):
        hf_tgpt.fit(model, one_each, LABELS[:4])
    assert torch.equal(model(one_each).logits.argmax(-1), LABELS[:4])
    assert "reduces to" in model.peft_config["default"].fitted["note"]
    same = one_each.repeat(3, 1, 1, 1)  # the same pictures again tell no more
    with pytest.warns(UserWarning, match="it reduces to the nearest class mean"):
        hf_tgpt.fit(model, same, LABELS[:4].repeat(3))
    assert torch.equal(model(one_each).logits.argmax(-1), LABELS[:4])


def test_identical_pictures_of_two_classes_give_equal_answers_and_no_nan(name, load_clip):
    clip = load_clip()
    model = make(name, clip, search=False)
    picture = pictures(clip)[0, :1].repeat(8, 1, 1, 1)
    if name == "gda":
        with pytest.warns(UserWarning, match="reduces to"):
            hf_tgpt.fit(model, picture, torch.arange(8) % 4)
    else:
        hf_tgpt.fit(model, picture, torch.arange(8) % 4, training=TrainingConfig(epochs=3))
    assert model(picture).logits.isfinite().all()


def table(clip, names=CLASS_NAMES, labels="names"):
    """A data set of `datasets` whose columns are called otherwise than ours."""
    size = clip.config.vision_config.image_size
    chance = np.random.default_rng(0)
    colours = chance.integers(0, 255, (len(names), 3))
    shown = np.stack([np.broadcast_to(colours[i % len(names)], (size + 4, size + 4, 3)) for i in range(12)])
    noise = chance.integers(-20, 20, shown.shape)
    rows = {
        "photo": list(np.clip(shown + noise, 0, 255).astype(np.uint8)),
        "class": [names[i % len(names)] if labels == "words" else i % len(names) for i in range(12)],
    }
    kind = {"names": ClassLabel(names=names), "words": Value("string"), "numbers": Value("int64")}[labels]
    return Dataset.from_dict(rows, Features({"photo": Image(), "class": kind}))


@pytest.mark.parametrize("labels", ["names", "words", "numbers"])
def test_a_data_set_is_fitted_to_as_it_is(load_clip, labels):
    clip = load_clip()
    model = make("gda", clip)
    data = table(clip, labels=labels)
    assert hf_tgpt.fit(model, DatasetDict({"train": data, "validation": data}), views=3) is model
    assert model.peft_config["default"].fitted["views"] == 3
    assert model.peft_config["default"].fitted["searched_on"] == "12 validation pictures"
    processor = ImageProcessor.from_pretrained(clip.name_or_path)
    shown = processor(list(data["photo"]), return_tensors="pt").pixel_values
    assert (model(shown).logits.argmax(-1) == torch.arange(12) % 4).float().mean() > 0.9


def test_a_data_sets_labels_are_the_adapters_by_name(load_clip):
    clip = load_clip()
    swapped = [CLASS_NAMES[i] for i in (2, 0, 3, 1)]
    models = [make("gda", load_clip(), search=False) for _ in range(2)]
    hf_tgpt.fit(models[0], table(clip), views=1)
    data = table(clip).cast_column("class", Value("int64"))
    renumbered = data.map(lambda row: {"class": swapped.index(CLASS_NAMES[row["class"]])})
    hf_tgpt.fit(models[1], renumbered.cast_column("class", ClassLabel(names=swapped)), views=1)
    assert torch.equal(models[0](pixels(clip)).logits, models[1](pixels(clip)).logits)
    with pytest.raises(ValueError, match="`pictures` has the label 'newt', which is not in `class_names`"):
        hf_tgpt.fit(models[0], table(clip, ["cat", "newt"], "words"))
    with pytest.raises(ValueError, match="`labels` are for pixel values"):
        hf_tgpt.fit(models[0], table(clip), LABELS)
    with pytest.raises(ValueError, match="`views`=0"):
        hf_tgpt.fit(models[0], table(clip), views=0)


def test_only_heads_are_fitted(load_clip):
    for config in (MaPLeConfig(class_names=CLASS_NAMES, prompt_depth=1), LinearProbeConfig(class_names=CLASS_NAMES)):
        model = get_peft_model(load_clip(), config)
        with pytest.raises(ValueError, match="which is not a head on frozen features"):
            hf_tgpt.fit(model, pictures(model), LABELS)
    with pytest.raises(ValueError, match="no active adapter of a head"):
        hf_tgpt.fit(load_clip(), pictures(load_clip()), LABELS)


# Elsewhere ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*(name for name in HEADS if name not in LINEAR), "gda"])  # all linear ones are alike
def test_a_head_goes_to_onnx_exactly(name, load_clip, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    clip = load_clip()
    model = make(name, clip)
    hf_tgpt.fit(model, pictures(clip), LABELS, training=TrainingConfig(epochs=3))
    transform = hf_tgpt.data.ImageTransform.from_processor(
        ImageProcessor.from_pretrained(clip.name_or_path), train=False
    )
    export_onnx(hf_tgpt.Classifier(model, transform), tmp_path / "model.onnx")
    batch = pixels(clip, 5)
    (logits,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"pixel_values": batch.numpy()})
    with torch.no_grad():
        expected = model(batch).logits.float()
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_head_goes_to_plain_transformers_exactly(name, load_clip, tmp_path):
    clip = load_clip()
    model = make(name, clip)
    hf_tgpt.fit(model, pictures(clip), LABELS, training=TrainingConfig(epochs=3))
    weight, bias = model.learner.linear_head(model.get_base_model().untuned_encoder())
    features, _ = features_of(model, pixels(clip))
    expected = model(pixels(clip)).logits.double()
    torch.testing.assert_close(features @ weight.double().T + bias.double(), expected, atol=1e-3, rtol=1e-5)
    transform = hf_tgpt.data.ImageTransform.from_processor(
        ImageProcessor.from_pretrained(clip.name_or_path), train=False
    )
    export_transformers(hf_tgpt.Classifier(model, transform), tmp_path / "plain")
    assert (tmp_path / "plain" / "config.json").exists()


def test_each_head_has_a_recipe_that_crops_gently_and_stores_views(name):
    recipe = json.loads((ROOT / "hf_tgpt" / "recipes" / f"{name}.json").read_text())
    assert (recipe["crop_scale"], recipe["cache_features"]) == (0.5, 10)
    assert training_of(name).crop_scale == 0.5
    assert config_class(name).trains is False


def test_gda_without_its_gaussians_is_zero_shot(load_clip):
    model = get_peft_model(load_clip(), GDAConfig(class_names=CLASS_NAMES, alpha=0.0, search=False)).eval()
    hf_tgpt.fit(model, pictures(model), LABELS)
    features, texts = features_of(model, pixels(model))
    torch.testing.assert_close(
        model(pixels(model)).logits.double(), scale_of(model) * features @ texts.T, atol=1e-4, rtol=1e-5
    )
