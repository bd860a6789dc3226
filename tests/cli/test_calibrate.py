"""`hf-tgpt calibrate`, and what training calibrates by itself."""

import json
import shutil

import numpy as np
import pytest
from conftest import Failed
from PIL import Image

import hf_tgpt
from hf_tgpt.adapters.folder import CLASS_FEATURES, digest_of_weights
from hf_tgpt.encoders.base import DualEncoder
from hf_tgpt.evaluation.calibration import read_calibration

FEW = ["--model", "toy", "--shots", "4", "--cache_features", "1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Splits of two classes, with a validation split; strangers beside them."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0)
    colours = {"tomato": (210, 30, 20), "lime": (120, 200, 40)}
    for split, count in (("train", 4), ("val", 12), ("test", 4)):
        for name, colour in colours.items():
            (folder / "own" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + noise.integers(-40, 40, (70, 80, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "own" / split / name / f"{i}.png")
    (folder / "strangers").mkdir()
    for i in range(3):
        Image.fromarray(noise.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(folder / "strangers" / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    """{"gda": folder, "coop": folder}, trained on data with a validation split."""
    root = tmp_path_factory.mktemp("runs")
    for method in ("gda", "coop"):
        more = FEW if method == "gda" else ["--model", "toy", "--shots", "4", "--max_steps", "1", "--batch_size", "4"]
        arguments = ["train", "--dataset", photos / "own", "--method", method, *more, "--output_dir", root / method]
        assert hf_tgpt.cli.main.main([str(argument) for argument in arguments]) == 0
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def run(runs, tmp_path):
    """run("gda") -> a copy of the run."""
    return lambda method: shutil.copytree(runs[method], tmp_path / method)


def test_stored_class_features_spare_calibrate_and_evaluate_the_text_tower(
    run, photos, run_command, monkeypatch, tmp_path
):
    encoded, leave = [], DualEncoder.leave_text
    monkeypatch.setattr(DualEncoder, "leave_text", lambda *args: encoded.append(1) or leave(*args))

    def passes(*command):
        encoded.clear()
        run_command(*command)
        return len(encoded)

    folder = run("coop")
    calibrate, evaluate = ("calibrate", folder), ("evaluate", folder, "--dataset", photos / "own")
    commands = [calibrate, evaluate, (*evaluate, "--output_dir", tmp_path / "report")]
    kept = [passes(*command) for command in commands]
    (folder / CLASS_FEATURES).unlink()
    assert kept == [passes(*command) - 1 for command in commands] == [0, 1, 1]  # zero-shot's sentences remain


@pytest.mark.parametrize("method", ["gda", "coop"])
def test_training_calibrates_on_its_validation_pictures(method, runs, run_command):
    calibration = read_calibration(runs[method])
    assert f"temperature {calibration.temperature:.3g}, by 8 validation pictures" in run_command("info", runs[method])
    assert calibration.pictures == "8 validation pictures"  # four of each class
    assert list(calibration.probabilities) == ["lime", "tomato"]
    assert calibration.weights == digest_of_weights(runs[method])


def test_one_command_calibrates_with_all_validation_pictures_of_the_runs_own_data(run, run_command, photos):
    folder = run("coop")
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    facts = json.loads(run_command("calibrate", folder, "--unknown", photos / "strangers", "--reject", 0.5, "--json"))
    calibration = read_calibration(folder)
    assert facts["images"] == calibration.count == 24
    assert facts["temperature"] == calibration.temperature
    assert facts["kept"] == calibration.kept == 0.5
    assert facts["strangers"]["pictures"] == 3
    assert 0 <= facts["strangers"]["auroc"] <= 1
    after = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert {name for name in after if after[name] != before.get(name)} == {"calibration.json"}
    classifier = hf_tgpt.load_classifier(folder)
    assert classifier(photos / "own/test/lime/0.png", coverage=0.9)
    text = run_command("calibrate", folder, "--dataset", photos / "own")
    assert "24 held-out pictures" in text
    assert "0.960 at most, in steps of 1/25; 0.9 takes" in text


def test_without_held_out_pictures_a_head_is_cross_validated_and_another_method_refused(
    run, run_command, photos, tmp_path, capsys
):
    without = shutil.copytree(photos / "own", tmp_path / "without", ignore=shutil.ignore_patterns("val"))
    assert hf_tgpt.cli.main.main(["calibrate", str(run("gda")), "--dataset", str(without), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["pictures"] == "cross-validation on 8 training pictures"
    assert "the training pictures are cross-validated" in err
    with pytest.raises(Failed, match=r"--dataset=.* has no pictures that the adapter was not trained on"):
        run_command("calibrate", run("coop"), "--dataset", without)


def test_pictures_that_were_trained_on_are_left_out_of_others(run, run_command, photos, tmp_path, capsys):
    mixed = shutil.copytree(photos / "own" / "test", tmp_path / "mixed")
    for name in ("lime", "tomato"):
        shutil.copy(photos / "own" / "train" / name / "0.png", mixed / name / "seen.png")
    assert hf_tgpt.cli.main.main(["calibrate", str(run("gda")), "--dataset", str(mixed), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["images"] == 8
    assert "2 pictures are left out, since the adapter was trained on them" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{none}"], "is no folder here"),
        (["{bare}"], "--dataset is not given, and .* does not record which pictures"),
        (["{gda}", "--dataset", "{strange}"], "--dataset has pictures of 'pear'.*no class of the adapter"),
        (["{gda}", "--unknown", "{none}"], "does not exist"),
    ],
)
def test_what_cannot_be_calibrated_is_named(arguments, message, run, run_command, photos, tmp_path):
    places = {"none": tmp_path / "none", "gda": run("gda"), "bare": tmp_path / "bare", "strange": tmp_path / "strange"}
    shutil.copytree(places["gda"], places["bare"], ignore=shutil.ignore_patterns("run.json", "results.json"))
    shutil.copytree(photos / "own" / "test" / "lime", places["strange"] / "pear")
    with pytest.raises(Failed, match=message):
        run_command("calibrate", *(argument.format(**places) for argument in arguments))


def test_evaluation_shows_the_calibration_error_before_and_after(run, run_command, photos):
    folder = run("coop")
    results = json.loads(run_command("evaluate", folder, "--dataset", photos / "own", "--json"))
    assert results["temperature"] == read_calibration(folder).temperature
    assert results["uncalibrated_error"] != results["expected_calibration_error"]
    (folder / "calibration.json").unlink()
    plain = json.loads(run_command("evaluate", folder, "--dataset", photos / "own", "--json"))
    assert plain["expected_calibration_error"] == results["uncalibrated_error"]
    assert "temperature" not in plain


def test_shares_are_shares(run, run_command):
    for command, option in (("calibrate", "--reject"), ("predict", "--coverage")):
        with pytest.raises(SystemExit, match="2"):
            run_command(command, "runs/mine", option, "90")
