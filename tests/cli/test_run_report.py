"""What a run leaves for a person to look at: report.html and predictions.csv."""

import base64
import contextlib
import csv
import io
import json
import re
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ImageProcessor, make_classifier, make_clip
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import CLIPModel

from hf_tgpt.cli import compare, page, report
from hf_tgpt.cli.main import main
from hf_tgpt.data import ImageTransform, load_splits
from hf_tgpt.evaluation.error_analysis import ErrorAnalysis, accuracy_interval
from hf_tgpt.evaluation.metrics import classification_metrics
from hf_tgpt.inference.classifier import Classifier

NAMES = ["<b>red", "dog", "forest"]
PROCESSOR = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_clip("plain", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Noise, so that a model of one step is wrong about some of it."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 2), ("test", 4)):
        for name in NAMES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(base, pictures, tmp_path_factory):
    """The folder of a training of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["train", "--method", "ivlp", "--text_prompt_depth", "1", "--vision_prompt_depth", "1", "--model", base]
    words += ["--dataset", str(pictures), "--shots", "2", "--batch_size", "6", "--epochs", "2", "--output_dir"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main([*words, str(folder)]) == 0
    assert f"What it gets wrong: {folder}/report.html" in out.getvalue()
    return folder


def rows_of(folder):
    with (folder / "predictions.csv").open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_a_page_that_stands_alone(run):
    assert (run / "training.png").stat().st_size > 5_000  # drawn in earnest, as the fixture is the module's
    html = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|<link|(src|href)=.?(http|/|file)|url\(|@import", html)
    addresses = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert addresses
    for address in addresses:
        assert max(Image.open(io.BytesIO(base64.b64decode(address))).size) <= 160
    assert "color-scheme: light dark" in html
    assert "@media print" in html
    assert "<b>red" not in html
    assert "&lt;b&gt;red" in html


def test_the_page_tells_the_results_of_the_run_and_how_to_repeat_it(run):
    html = (run / "report.html").read_text(encoding="utf-8")
    results = json.loads((run / "results.json").read_text())
    low, high = accuracy_interval(results["accuracy"], 12)
    assert f"<strong>{100 * results['accuracy']:.1f} %</strong> of 12 test pictures" in html
    assert f"{100 * low:.1f} % to {100 * high:.1f} %" in html
    assert html.count("<polyline") == 3  # accuracy in training and validation, loss
    temperature = json.loads((run / "calibration.json").read_text())["temperature"]
    assert f"divided by the temperature {temperature:.3g}, which was\nmeasured with 6 validation pictures" in html
    assert f"from\n{results['expected_calibration_error']:.3f} to " in html
    assert "where CLS looks in the last layer" in html
    assert "hf-tgpt train --method ivlp --text_prompt_depth 1" in html


def test_the_table_lists_all_pictures_the_most_confident_wrong_answers_first(run, pictures):
    assert (run / "predictions.csv").read_bytes().startswith(b"\xef\xbb\xbffile,label,prediction,score,correct\n")
    rows = rows_of(run)
    assert {row["file"] for row in rows} == {str(file) for file in (pictures / "test").rglob("*.png")}
    assert all((row["label"] == row["prediction"]) == (row["correct"] == "true") for row in rows)
    assert all(f"/{row['label']}/" in row["file"] for row in rows)
    hits = [row["correct"] == "true" for row in rows]
    assert hits == sorted(hits)
    assert np.mean(hits) == json.loads((run / "results.json").read_text())["accuracy"]
    wrong = [float(row["score"]) for row in rows if row["correct"] == "false"]
    right = [float(row["score"]) for row in rows if row["correct"] == "true"]
    assert (wrong, right) == (sorted(wrong, reverse=True), sorted(right))


def test_predictions_and_scores_are_those_of_predict(run, pictures, tmp_path):
    assert main(["predict", str(run), str(pictures / "test"), "--output", str(tmp_path / "rows.csv")]) == 0
    with (tmp_path / "rows.csv").open(encoding="utf-8-sig", newline="") as file:
        predicted = {row["image"]: row for row in csv.DictReader(file)}
    for row in rows_of(run):
        assert row["prediction"] == predicted[row["file"]]["label"]
        assert float(row["score"]) == pytest.approx(float(predicted[row["file"]]["score"]), abs=2e-4)


def test_an_evaluation_writes_its_report_into_its_own_folder_and_never_over_a_run(run, pictures, tmp_path, capsys):
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    out = tmp_path / "out"
    for _ in range(2):  # the second replaces the first
        assert main(["evaluate", str(run), "--dataset", str(pictures), "--output_dir", str(out)]) == 0
    assert f"What it gets wrong: {out}/report.html" in capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == {"evaluation.json", "predictions.csv", "report.html"}
    results = json.loads((out / "evaluation.json").read_text())
    assert rows_of(out) == rows_of(run)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert f"from\n{results['uncalibrated_error']:.3f} to {results['expected_calibration_error']:.3f}." in html
    assert "hf-tgpt evaluate" in html
    assert main(["evaluate", str(run), "--dataset", str(pictures), "--output_dir", str(run)]) == 1
    assert "holds other files; choose a new folder, or that of an earlier evaluation" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_an_evaluation_among_the_pictures_is_not_taken_for_a_class(pictures, tmp_path):
    for folder, name in (("cat", "cat.png"), ("dog", "dog.png"), ("results", "kept.png")):
        (tmp_path / folder).mkdir()
        shutil.copy(pictures / "test" / "dog" / "0.png", tmp_path / folder / name)
    (tmp_path / "results" / "evaluation.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the pictures are equal
        splits = load_splits(str(tmp_path), seed=None)
    assert splits["test"].features["label"].names == ["cat", "dog"]


def test_runs_of_a_comparison_write_no_report_unless_asked(monkeypatch, pictures, tmp_path):
    trainings = []
    runner = SimpleNamespace(run=lambda words, log: trainings.append(words) or "left out")
    monkeypatch.setattr(compare, "runner", lambda launcher: contextlib.nullcontext(runner))
    about = ["--dataset", str(pictures), "--model", "toy", "--methods", "gda", "--seeds", "0", "--output_dir"]
    for i, more in enumerate(([], ["--report"])):
        assert compare.main([*about, str(tmp_path / str(i)), *more]) == 1
        args = compare.parse_arguments(trainings[-1][1:])
        assert args.run.report == bool(more)


def judged(base, count, names=("cat", "dog", "forest"), seed=0, **fields):
    """A test of `count` pictures without files, by random logits."""
    rng = np.random.default_rng(seed)
    columns = {
        "image": [Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(count)],
        "label": rng.integers(0, len(names), count).tolist(),
    }
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(names))})
    logits, labels = rng.normal(size=(count, len(names))), np.array(columns["label"])
    metrics = classification_metrics(logits, labels)
    model = make_classifier("gda", CLIPModel.from_pretrained(base), list(names))
    return report.Tested(
        **{
            "title": "gda on noise",
            "results": metrics,
            "zero_shot": metrics,
            "logits": logits,
            "labels": labels,
            "class_names": list(names),
            "pictures": Dataset.from_dict(columns, features=features),
            "classifier": Classifier(model, ImageTransform.from_processor(ImageProcessor(**PROCESSOR), train=False)),
            "calibration": None,
            "command": ["train"],
            "settings": {},
        }
        | fields
    )


def test_only_the_pictures_that_are_shown_are_read_again(base, tmp_path, monkeypatch):
    read, decode = [], page.decode_image
    monkeypatch.setattr(page, "decode_image", lambda record: read.append(record) or decode(record))
    report.write_report(tmp_path, judged(base, 200))
    assert len(read) == 6 * 3  # three of each pair of classes
    assert len(rows_of(tmp_path)) == 200
    html = (tmp_path / "report.html").read_text()
    assert re.search(r"dog taken for cat: \d+ pictures, 3 shown", html)
    assert re.search(r"row \d+ \(0\.\d\d, right 0\.\d\d\)", html)
    assert len(html) < 200_000


def test_of_many_classes_the_most_confused_are_shown_and_that_is_said(base, tmp_path):
    names = [f"{word} {i}" for word in ("cat", "dog", "red") for i in range(10)]
    report.write_report(tmp_path, judged(base, 300, names))
    html = (tmp_path / "report.html").read_text()
    assert "Of 30 classes these are the 20 that\nare confused most" in html
    assert html.count('class="own"') == 20
    assert re.search(r"of \d+ pairs of classes that\nare confused, these are the 9 with the most pictures", html)


def test_without_matplotlib_the_page_says_why_attention_is_missing(base, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "can_plot", lambda: False)
    report.write_report(tmp_path, judged(base, 10))
    assert "This is left out: it needs matplotlib (pip install" in (tmp_path / "report.html").read_text()


def test_a_picture_that_has_gone_is_listed_without_its_small_copy(base, tmp_path, monkeypatch):
    about = judged(base, 2, logits=np.array([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]]), labels=np.array([1, 0]))
    file = tmp_path / "=1+1.png"
    Image.new("RGB", (20, 20)).save(file)
    monkeypatch.chdir(tmp_path)
    pictures = Dataset.from_dict({"image": ["=1+1.png"] * 2, "label": [1, 0]}, features=about.pictures.features)
    file.unlink()
    report.write_report(tmp_path, report.Tested(**{**vars(about), "pictures": pictures}))
    html = (tmp_path / "report.html").read_text()
    assert "This is left out: the pictures cannot be read any more." in html
    assert "=1+1.png (0.91, right 0.05)" in html
    assert "<img" not in html
    assert {row["file"] for row in rows_of(tmp_path)} == {"'=1+1.png"}  # which no spreadsheet takes for a formula


def test_the_interval_is_wilsons():
    assert accuracy_interval(0.9, 10) == pytest.approx((0.596, 0.982), abs=1e-3)
    assert accuracy_interval(0.0, 20) == pytest.approx((0.0, 0.161), abs=1e-3)
    assert accuracy_interval(1.0, 20) == pytest.approx((0.839, 1.0), abs=1e-3)


def test_the_analysis_counts_what_was_confused():
    answers, labels = np.array([0, 1, 1, 1, 2, 0]), np.array([0, 0, 0, 1, 1, 2])
    errors = ErrorAnalysis(3 * np.eye(4)[answers], labels, ["cat", "dog", "fox", "newt"])
    by_class = {row["label"]: (row["pictures"], row["recall"], row["precision"]) for row in errors.by_class()}
    assert list(by_class) == ["fox", "cat", "dog"]  # the worst first; there is no picture of a newt
    assert by_class == {"fox": (1, 0, 0), "cat": (3, pytest.approx(1 / 3), 0.5), "dog": (2, 0.5, pytest.approx(1 / 3))}
    assert errors.confused_pairs()[0] == {"label": "cat", "taken_for": "dog", "rows": [1, 2]}
    assert errors.confusion(2) == {"label": ["cat", "dog"], "counts": [[1, 2], [0, 1]], "elsewhere": [0, 1]}
    (only,) = errors.reliability()
    score = np.exp(3) / (np.exp(3) + 3)
    assert (only.low, only.high, only.pictures) == (pytest.approx(0.8), 0.9, 6)
    assert (only.score, only.accuracy) == (pytest.approx(score), pytest.approx(1 / 3))
