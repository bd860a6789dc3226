"""The training loop: it learns, keeps the best and resumes exactly."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import HEADS, METHODS
from datasets import ClassLabel, Dataset, Features, Image, Value
from peft import get_peft_model, get_peft_model_state_dict
from PIL import Image as PILImage
from transformers import AutoTokenizer

from hf_tgpt.data import FewShotImages, ImageTransform
from hf_tgpt.evaluation.accuracy import evaluate, evaluation_loader
from hf_tgpt.training import batches, loop
from hf_tgpt.training.checkpoint import find_checkpoint
from hf_tgpt.training.config import TrainingConfig, rate
from hf_tgpt.training.loop import train
from hf_tgpt.training.run_folder import prepare_output_dir

COLOURS = {"cat": (200, 30, 30), "forest": (30, 160, 40), "red circle": (40, 50, 220)}


def coloured_squares(per_class, captions=False):
    """Pictures that only differ by colour, in a handful of shades."""
    rows = [(label, i) for label in range(len(COLOURS)) for i in range(per_class)]
    values = list(COLOURS.values())
    columns = {
        "image": [
            PILImage.new("RGB", (40, 36), tuple(min(255, v + 3 * i) for v in values[label])) for label, i in rows
        ],
        "label": [label for label, _ in rows],
    }
    features = {"image": Image(), "label": ClassLabel(names=list(COLOURS))}
    if captions:
        columns["caption"] = [f"a photo of a {list(COLOURS)[label]}." for label, _ in rows]
        features["caption"] = Value("string")
    return Dataset.from_dict(columns, features=Features(features))


def images(per_class=8, train=False, captions=True, size=32):
    transform = ImageTransform(size, (0.5,) * 3, (0.25,) * 3, train=train)
    return FewShotImages(coloured_squares(per_class, captions), transform, seed=0)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def run(load_clip, clip_folders, tmp_path, accelerator):
    """run(method, ...) trains on coloured squares -> (model, history)."""

    def run(method, folder="run", resume=False, validate=True, **fields):
        torch.manual_seed(0)
        model = get_peft_model(load_clip(), method.config(class_names=list(COLOURS)))
        config = TrainingConfig(**(dict(learning_rate=0.02, batch_size=6, epochs=4) | fields))
        validation = evaluation_loader(images(3), accelerator) if validate else None
        tokenizer = AutoTokenizer.from_pretrained(clip_folders["plain"])
        output_dir = tmp_path / folder
        output_dir.mkdir(exist_ok=True)
        options = dict(tokenizer=tokenizer, validation=validation, resume=resume)
        return model, train(model, images(train=True), config, accelerator, output_dir, **options)

    return run


STEPPED = [name for name in METHODS if name not in HEADS]


@pytest.mark.parametrize(("name", "optimizer"), [*((name, "sgd") for name in STEPPED), ("tgpt", "adamw")])
def test_training_learns(name, run, accelerator, optimizer):
    stepped = METHODS[name]
    model, history = run(stepped, optimizer=optimizer, learning_rate=0.01, epochs=12)
    assert history[-1]["loss"] < history[0]["loss"]
    metrics = evaluate(model, evaluation_loader(images(5), accelerator), accelerator)
    assert metrics["accuracy"] > 0.6  # the features of a random CLIP, which methods without vision prompts must take
    assert len(metrics["per_class_accuracy"]) == len(COLOURS)
    assert ("wise_ft_accuracy" in metrics) == stepped.has("wise_ft")


def test_the_active_adapter_is_the_one_that_is_trained_and_kept(load_clip, clip_folders, tmp_path, accelerator):
    method = METHODS["maple"]
    model = get_peft_model(load_clip(), method.config(class_names=list(COLOURS)), adapter_name="first")
    model.add_adapter("second", method.config(class_names=list(COLOURS)))
    model.set_adapter("second")
    before = {name: value.clone() for name, value in get_peft_model_state_dict(model, adapter_name="first").items()}
    start = {name: value.clone() for name, value in get_peft_model_state_dict(model, adapter_name="second").items()}
    config = TrainingConfig(learning_rate=0.02, batch_size=6, epochs=2)
    train(model, images(), config, accelerator, tmp_path, validation=evaluation_loader(images(2), accelerator))
    after = get_peft_model_state_dict(model, adapter_name="first")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    after = get_peft_model_state_dict(model, adapter_name="second")
    assert not any(torch.equal(after[name], value) for name, value in start.items())


def test_wise_ft_is_reported_at_equal_shares_whatever_the_config_says(run, accelerator):
    model, _ = run(METHODS["tgpt"], epochs=1)
    reported = []
    for share in (0.0, 0.9):
        model.learner.config.wise_ft = share
        reported.append(evaluate(model, evaluation_loader(images(5), accelerator), accelerator)["wise_ft_accuracy"])
    assert reported[0] == reported[1]


def test_the_best_epoch_is_kept(run, monkeypatch, tmp_path):
    accuracies = iter([0.2, 0.9, 0.9, 0.1])
    kept = []

    def pretend(model, *args):
        kept.append({name: value.clone() for name, value in get_peft_model_state_dict(model).items()})
        return {"accuracy": next(accuracies)}

    monkeypatch.setattr(loop, "evaluate", pretend)
    model, history = run(METHODS["maple"])
    assert [row["validation_accuracy"] for row in history] == [0.2, 0.9, 0.9, 0.1]
    final = get_peft_model_state_dict(model)
    assert all(torch.equal(final[name], value) for name, value in kept[1].items())
    assert not all(torch.equal(final[name], value) for name, value in kept[3].items())


def test_without_validation_the_last_epoch_is_kept(run, tmp_path):
    run(METHODS["maple"], validate=False)
    assert not (tmp_path / "run" / "best_adapter.safetensors").exists()


def test_a_stopped_run_resumes_exactly(stepped, run, monkeypatch):
    whole, history = run(stepped, "whole", epochs=3)
    save, saved = loop.save_checkpoint, []

    def stop_after_two(*args):
        save(*args)
        saved.append(args)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run(stepped, "stopped", epochs=3)
    monkeypatch.setattr(loop, "save_checkpoint", save)
    resumed, resumed_history = run(stepped, "stopped", resume=True, epochs=3)
    assert resumed_history == history
    weights = get_peft_model_state_dict(resumed)
    assert all(torch.equal(value, weights[name]) for name, value in get_peft_model_state_dict(whole).items())


def test_a_checkpoint_holds_no_frozen_weight(run, tmp_path):
    model, _ = run(METHODS["maple"])
    size = sum(file.stat().st_size for file in find_checkpoint(tmp_path / "run").rglob("*"))
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size < 6 * trained + 50_000  # weights, AdamW's two moments, random states
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_accumulated_batches_equal_one_batch(run):
    # AdamW would hide a wrong scale of the gradients, and turn rounding into steps where they are nearly 0.
    about = dict(epochs=1, validate=False, optimizer="sgd")
    whole, _ = run(METHODS["maple"], "whole", **about)
    parts, _ = run(METHODS["maple"], "parts", **about, gradient_accumulation_steps=3)
    weights = get_peft_model_state_dict(parts)
    for name, value in get_peft_model_state_dict(whole).items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-4)


def test_every_epoch_has_an_order_and_augmentations_of_its_own(run, monkeypatch):
    orders, augmentations = [], []
    order, get = batches.EpochSampler.__iter__, FewShotImages.__getitem__

    def iterate(self):
        orders.append(list(order(self)))
        return iter(orders[-1])

    def read(self, index):
        item = get(self, index)
        if index == 0:
            augmentations.append(item["pixel_values"].sum().item())
        return item

    monkeypatch.setattr(batches.EpochSampler, "__iter__", iterate)
    monkeypatch.setattr(FewShotImages, "__getitem__", read)
    run(METHODS["maple"], epochs=3, validate=False)
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert len(augmentations) == 3


def test_max_steps_may_end_within_an_epoch(run):
    _, history = run(METHODS["maple"], max_steps=6)
    assert [row["step"] for row in history] == [4, 6]


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(run, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *args, **kwargs: args[0].sum() * float("nan"))
    with pytest.raises(
        FloatingPointError,
        match=r"The loss or its gradient is not finite at step 0 \(learning rate 0.02, training images "
        r"\[\d+(, \d+){5}\]\); lower `learning_rate`",
    ):
        run(METHODS["maple"])


def test_class_names_that_are_not_the_data_sets_are_refused(load_clip, accelerator, tmp_path):
    swapped = ["forest", "cat", "red circle"]
    model = get_peft_model(load_clip(), METHODS["maple"].config(class_names=swapped))
    with pytest.raises(ValueError, match="are not the data set's: label 0 is 'cat' there"):
        train(model, images(), TrainingConfig(), accelerator, tmp_path)


def test_captions_need_a_tokenizer(load_clip, accelerator, tmp_path):
    model = get_peft_model(load_clip(), METHODS["tgpt"].config(class_names=list(COLOURS)))
    with pytest.raises(ValueError, match="`tokenizer`=None but this method uses the images' captions"):
        train(model, images(), TrainingConfig(), accelerator, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(optimizer="lion"), "`optimizer`='lion': choose one of sgd, adamw"),
        (dict(learning_rate=0.0), "`learning_rate`=0.0: choose a number above 0"),
        (dict(batch_size=0), "`batch_size`=0: choose a number above 0"),
        (dict(epochs=-1), "`epochs`=-1: choose a number above 0"),
        (dict(max_grad_norm=0.0), "`max_grad_norm`=0.0: choose a number above 0"),
        (dict(seed=-1), "`seed`=-1: choose 0 or more"),
    ],
)
def test_training_settings_have_ranges(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**fields)


def test_a_batch_that_cannot_be_shared_is_refused(run):
    with pytest.raises(ValueError, match="`batch_size`=6 with 24 images cannot be shared by 1 processes x 4"):
        run(METHODS["maple"], gradient_accumulation_steps=4)


def test_the_rate_warms_up_and_follows_a_cosine():
    config = TrainingConfig(learning_rate=0.1, warmup_epochs=1, warmup_learning_rate=1e-3)
    rates = [rate(step, 30, 10, config) for step in range(31)]
    assert rates[:10] == [pytest.approx(0.01)] * 10
    assert rates[10] == 1
    assert rates[20] == pytest.approx(0.5)
    assert rates[30] == pytest.approx(0)
    linear = TrainingConfig(warmup_steps=4)
    assert [rate(step, 10, 10, linear) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


class TestOutputDir:
    settings = {"method": "maple", "seed": 0}  # noqa: RUF012

    def test_another_run_is_not_overwritten(self, tmp_path, accelerator):
        prepare_output_dir(tmp_path / "run", self.settings, False, accelerator)
        (tmp_path / "run" / "checkpoint-1").mkdir()
        with pytest.raises(ValueError, match="already holds another run"):
            prepare_output_dir(tmp_path / "run", self.settings, False, accelerator)

    def test_resume_needs_a_run_with_the_same_settings(self, tmp_path, accelerator):
        with pytest.raises(ValueError, match="contains no run; start without `resume`"):
            prepare_output_dir(tmp_path / "run", self.settings, True, accelerator)
        prepare_output_dir(tmp_path / "run", self.settings, False, accelerator)
        prepare_output_dir(tmp_path / "run", self.settings, True, accelerator)
        with pytest.raises(ValueError, match=r"`seed`=1 but the run in .* has 0"):
            prepare_output_dir(tmp_path / "run", self.settings | {"seed": 1}, True, accelerator)

    def test_a_folder_that_a_machine_does_not_see_is_refused(self, tmp_path):
        other = SimpleNamespace(is_main_process=False, process_index=1)
        with pytest.raises(
            ValueError, match="does not exist for process 1; all machines of a run must share the folder"
        ):
            prepare_output_dir(tmp_path / "elsewhere", self.settings, False, other)


def test_a_warm_up_as_long_as_the_training_is_cut_to_a_tenth_and_said(run, caplog):
    config = TrainingConfig(warmup_steps=200)
    shares = [rate(step, 60, 10, config) for step in range(60)]
    assert shares[:6] == [pytest.approx((step + 1) / 6) for step in range(6)]
    assert shares[6] == 1
    assert shares[-1] < 0.01
    assert [rate(step, 201, 10, config) for step in (0, 199)] == [1 / 200, 1]  # it fits
    run(METHODS["maple"], max_steps=10, warmup_epochs=9, validate=False)
    assert caplog.messages == ["The warm-up of 36 steps is cut to 1, because there are only 10 steps in all."]
