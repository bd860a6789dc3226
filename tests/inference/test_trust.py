"""Probabilities that held-out pictures confirm, answers of several classes, and pictures of none of them."""

import csv
import json
import math
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, METHODS, Failed, ImageProcessor, make_classifier, make_clip, shake
from PIL import Image
from safetensors.torch import load_file

import hf_tgpt
from hf_tgpt.adapters.config import change_config
from hf_tgpt.evaluation.calibration import (
    Calibration,
    calibrate,
    digest_of_weights,
    familiarity,
    fit_temperature,
    read_calibration,
    settings_of,
    tell_apart,
)  # fmt: skip
from hf_tgpt.evaluation.metrics import classification_metrics
from hf_tgpt.inference.demo import Demonstration
from hf_tgpt.inference.onnx import describe, export_onnx
from hf_tgpt.inference.plain_transformers import export_transformers

SIDE = 32


def picture(seed):
    noise = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(noise)


PICTURES = [picture(seed) for seed in range(6)]


def drawn(count, classes=4, confidence=4.0, seed=0):
    """Logits that are `confidence` times too large, and labels that follow their softmax before that."""
    chance = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=chance)
    return confidence * logits, torch.multinomial(logits.softmax(-1), 1, generator=chance).squeeze(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"maple": folder, ...} of adapters on one tiny base model."""
    root = tmp_path_factory.mktemp("adapters")
    base = make_clip("plain", root / "base")
    ImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(base)
    for name in ("maple", "gda", "tgpt", "coop"):
        torch.manual_seed(1)
        model = make_classifier(name, hf_tgpt.load_clip(base).eval(), CLASS_NAMES, **METHODS[name].fields).eval()
        shake(model)
        model.save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


def calibrated(folder, count=400, **changes):
    """The adapter in a folder with a calibration by pictures of noise, and random labels of them."""
    classifier = hf_tgpt.load_classifier(folder)
    with torch.no_grad():
        pixels = torch.randn(24, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        logits = classifier.model(pixels).logits.float().repeat(math.ceil(count / 24), 1)[:count]
    labels = torch.multinomial((logits / 3).softmax(-1), 1, generator=torch.Generator().manual_seed(1)).squeeze(1)
    notes = {"weights": digest_of_weights(folder), "settings": settings_of(classifier.model.learner.config)}
    classifier.calibration = calibrate(logits, labels, classifier.class_names, **(notes | changes))
    return classifier


# What is learned from logits -----------------------------------------------------------------------------------------


def test_the_temperature_is_found_and_the_calibration_error_falls():
    logits, labels = drawn(4000)
    assert fit_temperature(logits, labels) == pytest.approx(4, rel=0.1)
    fresh, truth = drawn(4000, seed=1)
    trusted = calibrate(logits, labels, CLASS_NAMES)
    before, after = (
        classification_metrics(values.numpy(), truth.numpy())["expected_calibration_error"]
        for values in (fresh, trusted.scaled(fresh))
    )
    assert before > 0.15
    assert after < 0.04


def test_few_pictures_all_answered_right_do_not_make_the_answers_certain():
    logits = 3 * torch.eye(4)
    assert 0.2 < fit_temperature(logits, torch.arange(4)) < 1


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("count", [20, 60])
def test_the_true_class_is_among_the_answer_as_often_as_wanted(coverage, count):
    """Over 80 draws of held-out pictures, and of new ones; answers of so many classes are not larger than need be."""
    attained = []
    for seed in range(80):
        trusted = calibrate(*drawn(count, 10, seed=2 * seed), [str(i) for i in range(10)])
        fresh, truth = drawn(100, 10, seed=2 * seed + 1)
        answers = trusted.answers(fresh, list(trusted.probabilities), coverage)
        attained.append(answers.gather(1, truth[:, None]).double().mean().item())
        assert answers.any(-1).all()
    assert np.mean(attained) > coverage - 0.01
    if coverage > 0.5:  # below, the likeliest class alone is right more often
        assert np.mean(attained) < coverage + 1 / (count + 1) + 0.02


def test_the_coverage_holds_for_each_class_that_has_enough_pictures():
    """One class is hard, so that a common threshold would let it down."""
    names, missed = ["easy", "hard"], {True: [], False: []}
    for seed in range(30):
        logits, labels = drawn(200, 2, confidence=1, seed=seed)
        logits[:, 1] -= 2 * (labels == 1)
        held, fresh, truth = logits[:100], logits[100:], labels[100:]
        for own in (True, False):
            trusted = calibrate(held, labels[:100], names)
            if not own:  # as if all pictures were of one class
                together = [*trusted.probabilities["easy"], *trusted.probabilities["hard"]]
                trusted = Calibration(trusted.temperature, {"easy": together, "hard": []}, None)
            hits = trusted.answers(fresh, names, 0.8).gather(1, truth[:, None]).squeeze(1)
            missed[own].append(hits[truth == 1].double().mean().item())
    assert np.mean(missed[True]) > 0.78
    assert np.mean(missed[False]) < 0.75


def test_classes_without_enough_pictures_share_a_threshold():
    logits, labels = drawn(300)
    labels[labels == 3] = 0
    few = (labels == 2).nonzero().squeeze(1)[3:]
    keep = torch.ones(300, dtype=torch.bool)
    keep[few] = False
    trusted = calibrate(logits[keep], labels[keep], CLASS_NAMES)
    assert [len(own) for own in trusted.probabilities.values()][2:] == [3, 0]
    least = trusted.least_probabilities(0.9, CLASS_NAMES)
    assert least[2] == least[3]  # of three pictures and none: they are joined by the next class
    assert len({*least.tolist()}) == 2
    assert trusted.least_probabilities(0.9, CLASS_NAMES[::-1]).tolist() == least.tolist()[::-1]


def test_a_coverage_beyond_what_so_few_pictures_tell_is_refused_with_their_resolution():
    trusted = calibrate(*drawn(18), CLASS_NAMES)
    assert trusted.least_probabilities(18 / 19, CLASS_NAMES).shape == (4,)
    with pytest.raises(
        ValueError, match=r"`coverage`=0\.95 needs 19 held-out pictures.* with 18.*steps of 1/19.*0\.947"
    ):
        trusted.least_probabilities(0.95, CLASS_NAMES)
    for wrong in (0, 1, 90, -0.5):
        with pytest.raises(ValueError, match=f"`coverage`={wrong}: choose a share between 0 and 1"):
            trusted.least_probabilities(wrong, CLASS_NAMES)


def test_the_stated_share_of_right_answers_is_kept():
    kept = []
    for seed in range(60):
        trusted = calibrate(*drawn(100, seed=2 * seed), CLASS_NAMES, kept=0.8)
        fresh, truth = drawn(200, seed=2 * seed + 1)
        right = fresh.argmax(-1) == truth
        kept.append((~trusted.rejected(fresh[right])).double().mean().item())
    assert 0.79 < np.mean(kept) < 0.84


def test_too_few_right_answers_tell_no_strangers():
    trusted = calibrate(torch.eye(4), torch.arange(4), CLASS_NAMES)
    with pytest.raises(ValueError, match=r"to keep 0\.95 of the right answers takes 19 of them.*--reject 0\.8"):
        trusted.rejected(torch.eye(4))


def test_strangers_are_told_apart_as_by_counting_all_pairs():
    chance = torch.Generator().manual_seed(0)
    known = torch.randint(0, 12, (50,), generator=chance).double() + 3
    unknown = torch.randint(0, 12, (40,), generator=chance).double()
    pairs = (known[:, None] > unknown).double() + 0.5 * (known[:, None] == unknown)
    measured = tell_apart(known, unknown)
    assert measured["auroc"] == pytest.approx(pairs.mean().item())
    threshold = max(t for t in range(20) if (known >= t).double().mean() >= 0.95)
    assert measured["fpr95"] == pytest.approx((unknown >= threshold).double().mean().item())
    assert familiarity(torch.tensor([[1.0, 3.0]])).tolist() == [3.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(0, 4)}, "`logits` must be of at least one picture"),
        ({"logits": torch.full((2, 4), float("nan"))}, "`logits` must be .* finite"),
        ({"unknown": torch.zeros(0, 4)}, "`unknown` must be"),
        ({"kept": 95}, "`kept`=95: choose a share between 0 and 1"),
    ],
)
def test_what_cannot_be_calibrated_with_is_named(change, message):
    given = {"logits": torch.eye(4), "labels": torch.arange(4), "class_names": CLASS_NAMES} | change
    with pytest.raises(ValueError, match=message):
        calibrate(**given)


# The classifier ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maple", "gda"])
def test_a_calibration_changes_scores_and_never_the_order_of_labels(name, folders):
    plain, trusted = hf_tgpt.load_classifier(folders[name]), calibrated(folders[name])
    for temperature in (trusted.calibration.temperature, 1e-3, 1e3):
        trusted.calibration = Calibration(temperature, trusted.calibration.probabilities, None)
        for before, after in zip(plain(PICTURES, top_k=None), trusted(PICTURES, top_k=None), strict=True):
            assert [part["label"] for part in before] == [part["label"] for part in after]
            assert before != after
            scores = [part["score"] for part in after]
            assert scores == sorted(scores, reverse=True)
            assert sum(scores) == pytest.approx(1)


def test_without_a_calibration_scores_are_as_ever_and_more_is_refused_with_the_command(folders):
    classifier = hf_tgpt.load_classifier(folders["maple"])
    with torch.no_grad():
        logits = classifier.model(torch.stack([classifier.transform(image) for image in PICTURES])).logits
    for answer, scores in zip(classifier(PICTURES, top_k=None), logits.softmax(-1), strict=True):
        assert [part["score"] for part in answer] == sorted(scores.tolist(), reverse=True)
    for asked in ({"coverage": 0.9}, {"reject": True}):
        with pytest.raises(ValueError, match=f"`{next(iter(asked))}`=.*hf-tgpt calibrate"):
            classifier(PICTURES[0], **asked)


def test_coverage_answers_with_a_list_of_classes_whatever_top_k_is(folders):
    classifier = calibrated(folders["maple"])
    every = classifier(PICTURES, top_k=None)
    least = classifier.calibration.least_probabilities(0.9, CLASS_NAMES)
    for answer, all_classes in zip(classifier(PICTURES, top_k=1, coverage=0.9), every, strict=True):
        expected = [part for part in all_classes if part["score"] >= least[CLASS_NAMES.index(part["label"])]]
        assert answer == (expected or all_classes[:1])
    assert len(classifier(PICTURES[0], coverage=0.995)) >= len(classifier(PICTURES[0], coverage=0.3))
    assert [len(answer) for answer in classifier(iter(PICTURES), coverage=0.995)]


def test_a_stranger_has_no_label_and_a_nearest_class(folders):
    classifier = calibrated(folders["maple"])
    plain = classifier(PICTURES[0])
    classifier.calibration = replace(classifier.calibration, reject_below=1e6)
    score = pytest.approx(plain[0]["score"])
    stranger = [{"label": None, "nearest": plain[0]["label"], "score": score}]
    assert classifier(PICTURES[0], reject=True) == stranger
    assert classifier(PICTURES[0], reject=True, coverage=0.9) == stranger
    assert classifier(PICTURES[0]) == plain
    classifier.calibration = replace(classifier.calibration, reject_below=-1e6)
    assert classifier(PICTURES[0], reject=True) == plain


def test_other_classes_are_answered_as_without_a_calibration_and_some_of_its_own_with_it(folders):
    plain, trusted = hf_tgpt.load_classifier(folders["maple"]), calibrated(folders["maple"])
    others, some = ["circle", "forest"], CLASS_NAMES[1:3]
    assert trusted(PICTURES[0], class_names=others) == plain(PICTURES[0], class_names=others)
    assert trusted(PICTURES[0], class_names=some) != plain(PICTURES[0], class_names=some)
    assert trusted(PICTURES[0], class_names=CLASS_NAMES[::-1], coverage=0.9) == [
        {**part, "score": pytest.approx(part["score"])} for part in trusted(PICTURES[0], coverage=0.9)
    ]
    for names in (others, some):
        with pytest.raises(ValueError, match=r"`coverage`=0\.9 needs the classes that the adapter was calibrated with"):
            trusted(PICTURES[0], class_names=names, coverage=0.9)


def test_a_changed_setting_is_not_what_was_calibrated(folders):
    plain, trusted = hf_tgpt.load_classifier(folders["tgpt"]), calibrated(folders["tgpt"])
    assert trusted(PICTURES[0], coverage=0.9)
    for classifier in (plain, trusted):
        change_config(classifier.model, {"wise_ft": "0.3"})
    assert trusted(PICTURES[0]) == plain(PICTURES[0])
    with pytest.raises(ValueError, match=r"`coverage`=0\.9 needs the adapter's settings as they were calibrated"):
        trusted(PICTURES[0], coverage=0.9)


def test_threads_get_each_what_they_asked_for(folders):
    classifier = calibrated(folders["maple"])
    questions = [{}, {"coverage": 0.9}, {"coverage": 0.3}, {"reject": True}, {"class_names": ["circle", "forest"]}] * 4
    alone = [classifier(PICTURES, **question) for question in questions]
    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(lambda question: classifier(PICTURES, **question), questions)) == alone


# The file beside the adapter -----------------------------------------------------------------------------------------


def test_a_calibration_is_saved_beside_the_adapter_read_with_it_and_changes_no_other_file(folders, tmp_path):
    folder = shutil.copytree(folders["maple"], tmp_path / "run")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    classifier = calibrated(folder)
    classifier.calibration.save(folder)
    assert read_calibration(folder) == classifier.calibration
    loaded = hf_tgpt.load_classifier(folder)
    assert loaded(PICTURES, coverage=0.9) == classifier(PICTURES, coverage=0.9)
    assert pickle.loads(pickle.dumps(loaded.calibration)) == loaded.calibration
    loaded(PICTURES[0], reject=True)
    loaded.model.save_pretrained(tmp_path / "again")
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "calibration.json"} == before
    again = (tmp_path / "again" / "adapter_model.safetensors").read_bytes()
    assert again == before["adapter_model.safetensors"]
    assert read_calibration(tmp_path / "again") is None


def test_a_calibration_of_other_weights_is_not_used_and_a_damaged_one_is_named(folders, tmp_path):
    folder = shutil.copytree(folders["maple"], tmp_path / "run")
    calibrated(folder, weights="other").calibration.save(folder)
    with pytest.warns(UserWarning, match=r"other weights than the adapter's and is not used; .*hf-tgpt calibrate"):
        assert read_calibration(folder) is None
    odd = {"temperature": 1, "probabilities": {"cat": [0.5]}, "reject_below": None}
    changes = ({"temperature": 0}, {"probabilities": {}}, {"probabilities": {"cat": ["x"]}}, {"reject_below": "x"})
    for damaged in ("{", "[]", "{}", *(json.dumps(odd | change) for change in changes)):
        (folder / "calibration.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"calibration\.json' is damaged .*remove it or write it again"):
            hf_tgpt.load_classifier(folder)


def test_exports_hold_the_temperature_in_their_logits_and_the_thresholds_beside_them(folders, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    classifier = calibrated(folders["gda"])
    facts = export_onnx(classifier, tmp_path / "model.onnx")["calibration"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    pixels = torch.stack([classifier.transform(image) for image in PICTURES])
    (logits,) = map(torch.from_numpy, session.run(None, {"pixel_values": pixels.numpy()}))
    for answer, scores in zip(classifier(PICTURES, top_k=None), logits.softmax(-1).tolist(), strict=True):
        expected = {label: pytest.approx(score, abs=1e-4) for label, score in zip(CLASS_NAMES, scores, strict=True)}
        assert {part["label"]: part["score"] for part in answer} == expected
    assert json.loads((tmp_path / "model.json").read_text())["calibration"] == facts
    belongs = logits.softmax(-1) >= torch.tensor(facts["least_probabilities"]["0.9"])
    belongs[torch.arange(len(PICTURES)), logits.argmax(-1)] = True
    assert belongs.sum(-1).tolist() == [len(answer) for answer in classifier(PICTURES, coverage=0.9)]
    rejected = (logits.amax(-1) < facts["reject_below"]).tolist()
    assert rejected == [answer[0]["label"] is None for answer in classifier(PICTURES, reject=True)]
    assert list(describe(classifier, CLASS_NAMES[:2])["calibration"]) == ["temperature"]
    assert "calibration" not in describe(hf_tgpt.load_classifier(folders["gda"]), CLASS_NAMES)
    weights = {}
    for name, exported in {"with": classifier, "without": hf_tgpt.load_classifier(folders["gda"])}.items():
        export_transformers(exported, tmp_path / name)
        weights[name] = load_file(tmp_path / name / "classifier.safetensors")["weight"]
    assert torch.allclose(weights["with"] * classifier.calibration.temperature, weights["without"], rtol=1e-4)


@pytest.fixture
def answer(tmp_path):
    """answer(classifier, class names) -> what the page shows of the first picture."""
    pytest.importorskip("matplotlib")
    PICTURES[0].save(tmp_path / "0.png")
    dropped = {"path": str(tmp_path / "0.png"), "orig_name": "0.png"}

    def ask(classifier, names=CLASS_NAMES):
        html = Demonstration(classifier).answer(dropped, "\n".join(names))
        return " ".join(re.sub("<style>.*</style>|<[^>]*>", "", html, flags=re.DOTALL).split())

    return ask


def test_the_page_says_where_a_picture_shows_none_of_the_classes(folders, answer):
    classifier = calibrated(folders["maple"])
    for below, says in ((1e6, True), (-1e6, False), (None, False)):
        classifier.calibration = replace(classifier.calibration, reject_below=below)
        nearest = classifier(PICTURES[0], 1)[0]["label"]
        says_so = f"The picture shows none of these classes. The nearest is {nearest}." in answer(classifier)
        assert says_so == says == ("One of these in" not in answer(classifier))
    classifier.calibration = replace(classifier.calibration, reject_below=1e6)
    assert "calibrated with other classes" in answer(classifier, ["circle", "forest"])


def test_the_page_names_the_classes_of_a_coverage_that_the_calibration_can_tell(folders, answer):
    classifier = calibrated(folders["maple"])
    classifier.calibration = replace(classifier.calibration, reject_below=None)
    labels = ", ".join(part["label"] for part in classifier(PICTURES[0], coverage=0.9))
    assert f"One of these in 90 % of cases: {labels}. adapter" in answer(classifier)
    classifier.calibration = calibrated(folders["maple"], count=5).calibration
    labels = ", ".join(part["label"] for part in classifier(PICTURES[0], coverage=0.83))
    few = f"One of these in 83 % of cases: {labels}. The adapter is calibrated with 5 pictures, too few for 90 %."
    assert few in answer(classifier)
    classifier.calibration = None
    assert "One of these in" not in answer(classifier)
    assert "hf-tgpt calibrate" in answer(classifier)


# The command line ----------------------------------------------------------------------------------------------------


def test_rows_of_predict_hold_the_answers_classes_and_the_nearest_of_a_stranger(folders, tmp_path, run_command):
    folder = shutil.copytree(folders["maple"], tmp_path / "run")
    classifier = calibrated(folder)
    below = familiarity_of(classifier, PICTURES[1]) + 1e-3
    classifier.calibration = replace(classifier.calibration, reject_below=below)
    classifier.calibration.save(folder)
    for number, image in enumerate(PICTURES):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        image.save(tmp_path / "pictures" / f"{number}.png")
    expected = classifier(PICTURES, coverage=0.9, reject=True)
    assert None in {answer[0]["label"] for answer in expected}
    asked = ("predict", folder, tmp_path / "pictures", "--coverage", 0.9, "--reject")
    rows = [json.loads(line) for line in run_command(*asked).splitlines()]
    for row, answer in zip(rows, expected, strict=True):
        assert row["label"] == answer[0]["label"]
        assert row["labels"] == [part["label"] for part in answer if part["label"]]
        assert row.get("nearest") == answer[0].get("nearest")
    run_command(*asked, "--output", tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(encoding="utf-8-sig") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["image", "label", "score", "labels", "nearest", "error"]
    for row, answer in zip(table, expected, strict=True):
        assert row["label"] == (answer[0]["label"] or "")
        assert row["labels"].split("; ") == [part["label"] or "" for part in answer]
        assert row["nearest"] == answer[0].get("nearest", "")
    replace(classifier.calibration, reject_below=None).save(folder)  # as where there were too few pictures
    with pytest.raises(Failed, match=r"to keep 0\.95 of the right answers"):
        run_command(*asked, "--output", tmp_path / "more.csv", "--sort_into", tmp_path / "sorted")
    assert not [*tmp_path.glob("more.csv*"), *tmp_path.glob("sorted")]


def familiarity_of(classifier, image):
    with torch.no_grad():
        return familiarity(classifier.model(classifier.transform(image)[None]).logits).item()
