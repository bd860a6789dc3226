"""The metrics against numbers worked out by hand, without a network, and over two processes."""

import json
import socket
import tempfile

import evaluate
import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from torch.multiprocessing import start_processes
from torch.utils.data import DataLoader, TensorDataset

from hf_tgpt.evaluation.metrics import (
    Accuracy,
    ExpectedCalibrationError,
    HarmonicMean,
    MeanPerClassAccuracy,
    PerClassAccuracy,
    TopKAccuracy,
    classification_metrics,
)

# Six images, four classes; images 1 and 5 are wrong and class 3 has no image.
LOGITS = np.array(
    [
        [3.0, 1.0, 0.0, 0.0],
        [0.0, 2.0, 1.0, 0.0],
        [0.0, 2.0, 1.0, 0.0],
        [1.0, 0.0, 3.0, 0.0],
        [1.0, 0.0, 3.0, 0.0],
        [2.0, 0.0, 1.0, 0.0],
    ]
)
LABELS = np.array([0, 0, 1, 2, 2, 2])
ON_LOGITS = (Accuracy, TopKAccuracy, PerClassAccuracy, MeanPerClassAccuracy, ExpectedCalibrationError)

# Seven images, so that two processes get unequal shares; eight classes, so that the top 5 count.
MANY_LOGITS = np.random.default_rng(0).normal(size=(7, 8)).astype(np.float32)
MANY_LABELS = np.array([0, 1, 1, 2, 3, 3, 6])

# Python 3.12 and later warn of every fork of a process with threads, and torch has threads. The forked processes
# here run no parallel torch code.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def home_cache(tmp_path, monkeypatch):
    """The folder that `evaluate` takes for its cache in the home directory."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "home")
    return tmp_path / "home"


def compute(metric, logits=LOGITS, labels=LABELS):
    return metric.compute(predictions=logits, references=labels)


def logits_of(confidence, classes):
    """Logits whose softmax is `confidence` at class 0 and equal elsewhere."""
    return [np.log(confidence), *[np.log((1 - confidence) / (classes - 1))] * (classes - 1)]


def test_accuracies_are_those_counted_by_hand():
    assert compute(Accuracy()) == {"accuracy": 4 / 6}
    assert compute(PerClassAccuracy()) == {"per_class_accuracy": [1 / 2, 1.0, 2 / 3, None]}
    assert compute(MeanPerClassAccuracy())["mean_per_class_accuracy"] == pytest.approx((1 / 2 + 1 + 2 / 3) / 3)


def test_top_k_accuracy_is_named_after_k_and_absent_if_all_classes_would_count():
    assert compute(TopKAccuracy(k=1)) == {"top1_accuracy": 4 / 6}
    assert compute(TopKAccuracy(k=2)) == {"top2_accuracy": 5 / 6}
    assert compute(TopKAccuracy(k=4)) == compute(TopKAccuracy()) == {}
    assert set(compute(TopKAccuracy(), MANY_LOGITS, MANY_LABELS)) == {"top5_accuracy"}


def test_a_model_that_ties_all_classes_is_not_rewarded():
    logits, labels = np.zeros((4, 4)), np.arange(4)
    assert compute(Accuracy(), logits, labels) == {"accuracy": 1 / 4}
    assert compute(TopKAccuracy(k=3), logits, labels) == {"top3_accuracy": 3 / 4}


def test_calibration_error_of_two_bins_is_the_one_worked_out_by_hand():
    # Half of either pair is right: bins at 0.5 - 0.4 and 0.5 - 0.8 of two images in four each.
    logits = [logits_of(confidence, classes=3) for confidence in (0.4, 0.4, 0.8, 0.8)]
    error = compute(ExpectedCalibrationError(n_bins=2), logits, [0, 1, 0, 1])
    assert error["expected_calibration_error"] == pytest.approx(0.5 * 0.1 + 0.5 * 0.3)
    error = compute(ExpectedCalibrationError(n_bins=1), logits, [0, 1, 0, 1])
    assert error["expected_calibration_error"] == pytest.approx(abs(0.5 - 0.6))


def test_calibration_bins_contain_their_upper_edge():
    logits = [[0.0, 0.0], logits_of(0.8, classes=2)]  # right at confidence 0.5, wrong at 0.8
    error = compute(ExpectedCalibrationError(n_bins=2), logits, [0, 1])
    assert error["expected_calibration_error"] == pytest.approx((0.5 + 0.8) / 2)


def test_calibration_error_has_fifteen_bins_by_default():
    logits = [logits_of(confidence, classes=2) for confidence in (0.81, 0.86, 0.87)]  # edges at 0.8, 0.8667, 0.9333
    for values in (compute(ExpectedCalibrationError(), logits, [0, 0, 1]), classification_metrics(logits, [0, 0, 1])):
        assert values["expected_calibration_error"] == pytest.approx((0.19 + 0.14 + 0.87) / 3)


def test_perfect_calibration_has_no_error():
    logits = [logits_of(0.7, classes=2)] * 10 + [logits_of(0.9, classes=2)] * 10
    labels = [0] * 7 + [1] * 3 + [0] * 9 + [1]
    assert compute(ExpectedCalibrationError(), logits, labels)["expected_calibration_error"] < 1e-6
    assert compute(ExpectedCalibrationError(), [[1000.0, 0.0]], [0]) == {"expected_calibration_error": 0.0}


def test_harmonic_mean_is_the_published_one_of_maple():
    mean = HarmonicMean().compute(base=[0.8228], new=[0.7514])["harmonic_mean"]
    assert 100 * mean == pytest.approx(78.55, abs=0.01)


def test_harmonic_mean_averages_the_pairs_first():
    assert HarmonicMean().compute(base=[1.0, 0.5], new=[0.25, 0.75]) == {"harmonic_mean": 2 * 0.75 * 0.5 / 1.25}


def test_harmonic_mean_of_nothing_right_is_zero():
    assert HarmonicMean().compute(base=[0.0], new=[0.0]) == {"harmonic_mean": 0.0}


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([], [], r"`predictions` \(logits\) is empty; pass at least one"),
        ([[]], [0], r"`predictions` \(logits\) is empty; pass at least one"),
        ([[1.0, 2.0], [1.0]], [0, 0], r"`predictions` \(logits\) row 1 has 1 values and row 0 has 2; score all"),
        ([[1.0, 2.0], [1.0, np.nan]], [0, 0], r"`predictions` \(logits\) row 1 has nan for class 1; look for"),
        ([[np.inf, 2.0], [1.0, 1.0]], [0, 0], r"`predictions` \(logits\) row 0 has inf for class 0; look for"),
        ([[1.0, 2.0], [1.0, 1.0]], [0, 2], r"`references` \(labels\) row 1 is 2 but .* 2 classes; number .* 0 to 1"),
        ([[1.0, 2.0], [1.0, 1.0]], [-1, 0], r"`references` \(labels\) row 0 is -1 but .* 2 classes; number .* 0 to 1"),
    ],
)
def test_bad_input_is_named_with_its_remedy(logits, labels, message):
    for metric in ON_LOGITS:
        with pytest.raises(ValueError, match=message):
            compute(metric(keep_in_memory=True), logits, labels)
    with pytest.raises(ValueError, match=message):
        classification_metrics(logits, labels)


def test_arrays_of_another_shape_or_type_are_refused():
    with pytest.raises(ValueError, match=r"`predictions` \(logits\) .* pass logits \(n, c\), not class ids"):
        classification_metrics(np.array([0, 1]), np.array([0, 1]))
    with pytest.raises(ValueError, match=r"`references` \(labels\) has shape \(5,\) .* each of 6 images"):
        classification_metrics(LOGITS, LABELS[:5])
    with pytest.raises(ValueError, match=r"`references` \(labels\) has .* type float64; pass one integer"):
        classification_metrics(LOGITS, LABELS.astype(float))


def test_settings_and_accuracies_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"`k`=0 .* at least 1"):
        TopKAccuracy(k=0)
    with pytest.raises(ValueError, match=r"`n_bins`=1\.5 .* at least 1"):
        ExpectedCalibrationError(n_bins=1.5)
    with pytest.raises(ValueError, match=r"`base`=82\.28 .* divide percents by 100"):
        HarmonicMean(keep_in_memory=True).compute(base=[82.28], new=[0.75])
    with pytest.raises(ValueError, match="`new`=nan "):
        HarmonicMean(keep_in_memory=True).compute(base=[0.5], new=[np.nan])
    with pytest.raises(ValueError, match="`base` is empty"):
        HarmonicMean(keep_in_memory=True).compute(base=[], new=[])


def test_metrics_and_classification_metrics_agree_without_a_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a metric opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    metrics = evaluate.combine([metric() for metric in ON_LOGITS])
    for batch in (slice(0, 3), slice(3, 7)):
        metrics.add_batch(predictions=MANY_LOGITS[batch], references=MANY_LABELS[batch])
    assert metrics.compute() == classification_metrics(MANY_LOGITS, MANY_LABELS)
    assert HarmonicMean().compute(base=[0.75], new=[0.5]) == {"harmonic_mean": 0.6}


def test_classification_metrics_are_plain_numbers_and_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    values = classification_metrics(LOGITS, LABELS)
    assert json.loads(json.dumps(values)) == values
    assert set(values) == {*("accuracy", "per_class_accuracy", "mean_per_class_accuracy", "expected_calibration_error")}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("metric", ON_LOGITS)
def test_a_metric_in_memory_writes_no_file(metric, home_cache):
    compute(metric(keep_in_memory=True))
    assert not [path for path in home_cache.rglob("*") if path.is_file()]


def _gather_and_compute(result):
    # A state that another test left behind says that there is one process; parallel torch code may hang in a fork.
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    data = TensorDataset(torch.from_numpy(MANY_LOGITS), torch.from_numpy(MANY_LABELS))
    metrics = evaluate.combine([metric(keep_in_memory=True) for metric in ON_LOGITS])
    for batch in accelerator.prepare(DataLoader(data, batch_size=2)):
        logits, labels = accelerator.gather_for_metrics(batch)
        if accelerator.is_main_process:
            metrics.add_batch(predictions=logits, references=labels)
    if accelerator.is_main_process:
        result.write_text(json.dumps(metrics.compute()))
    accelerator.end_training()


@forks
def test_values_are_right_after_accelerate_gathers_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # accelerate warns if it has to choose the number
    debug_launcher(_gather_and_compute, args=(tmp_path / "result.json",), num_processes=2)
    assert json.loads((tmp_path / "result.json").read_text()) == classification_metrics(MANY_LOGITS, MANY_LABELS)


def _compute_own_share(process_id, folder):
    share = slice(0, 5) if process_id == 0 else slice(5, 7)
    values = {}
    for metric in ON_LOGITS:
        shared = {"num_process": 2, "process_id": process_id, "cache_dir": str(folder), "experiment_id": "test"}
        result = compute(metric(**shared, timeout=20), MANY_LOGITS[share], MANY_LABELS[share])
        assert (result is None) == (process_id == 1)
        values |= result or {}
    (folder / f"{process_id}.json").write_text(json.dumps(values))


@forks
def test_values_are_right_in_the_distributed_mode_of_evaluate(tmp_path):
    start_processes(_compute_own_share, args=(tmp_path,), nprocs=2, start_method="fork")
    assert json.loads((tmp_path / "0.json").read_text()) == classification_metrics(MANY_LOGITS, MANY_LABELS)
    assert json.loads((tmp_path / "1.json").read_text()) == {}
    assert not list(tmp_path.rglob("*.arrow"))
