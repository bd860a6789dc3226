"""Image states kept on disk: the same training, found again, never stale, never half a file."""

import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CLASS_NAMES, METHODS, pixels, token_ids
from datasets import Dataset
from peft import get_peft_model
from PIL import Image as PILImage
from safetensors.torch import save_file
from test_training import COLOURS, coloured_squares, images
from transformers import AutoTokenizer

from hf_tgpt.data import FewShotImages, ImageTransform
from hf_tgpt.encoders import encoder_of
from hf_tgpt.evaluation.accuracy import evaluate, evaluation_loader
from hf_tgpt.training import features
from hf_tgpt.training.config import TrainingConfig
from hf_tgpt.training.features import CachedImages, cache_features
from hf_tgpt.training.loop import train

IVLP_TEXT_ONLY = ("ivlp", dict(text_prompt_depth=2, vision_prompt_length=0))
FROZEN_VISION = {
    "tgpt": ("tgpt", {}),
    "coop": ("coop", {}),
    "cocoop": ("cocoop", {}),
    "ivlp": IVLP_TEXT_ONLY,
    "mutual_prompt": ("mutual_prompt", dict(vision_prompt_length=0)),
}


def noise(train):
    """Pictures that a crop changes, unlike squares of one colour."""
    rng = np.random.default_rng(0)
    pictures = [PILImage.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).resize((40, 36)) for _ in range(12)]
    columns = {"image": pictures, "label": [i // 4 for i in range(12)], "caption": ["a photo of a cat."] * 12}
    transform = ImageTransform(32, (0.5,) * 3, (0.25,) * 3, train=train)
    return FewShotImages(Dataset.from_dict(columns, features=coloured_squares(1, captions=True).features), transform)


@pytest.fixture
def make(load_clip):
    """make("coop") -> a PeftModel for the coloured squares, with the same weights each time."""

    def make(name, shape="plain", **fields):
        torch.manual_seed(0)
        method, more = FROZEN_VISION.get(name, (name, {}))
        names = {"class_names": list(COLOURS)}
        return get_peft_model(load_clip(shape), METHODS[method].config(**(names | more | fields)))

    return make


@pytest.fixture
def losses(make, clip_folders, tmp_path):
    """losses(name, images, epochs) -> the losses of a training."""

    def losses(name, seen, epochs=2):
        tokenizer = AutoTokenizer.from_pretrained(clip_folders["plain"])
        config = TrainingConfig(learning_rate=0.02, batch_size=6, epochs=epochs, save_every=0)
        history = train(make(name), seen, config, Accelerator(cpu=True), tmp_path, tokenizer)
        return [row["loss"] for row in history]

    return losses


@pytest.mark.parametrize("name", FROZEN_VISION)
def test_training_from_kept_states_is_training_on_the_pictures(name, make, losses, tmp_path):
    kept = cache_features(make(name), images(), 1, tmp_path / "kept", torch.float32)
    assert losses(name, kept) == pytest.approx(losses(name, images()), abs=1e-5)


def test_as_many_views_as_epochs_are_live_augmentation(make, losses, tmp_path):
    kept = cache_features(make("tgpt"), noise(train=True), 3, tmp_path / "kept", torch.float32)
    live = losses("tgpt", noise(train=True), epochs=3)
    assert losses("tgpt", kept, epochs=3) == pytest.approx(live, abs=1e-5)
    assert live != pytest.approx(losses("tgpt", noise(train=False), epochs=3), abs=1e-5)  # the augmentation matters


def test_views_take_turns_whenever_a_run_resumes(make, tmp_path):
    kept = cache_features(make("coop"), noise(train=True), 2, tmp_path)
    views = []
    for epoch in (0, 1, 2, 5):
        kept.set_epoch(epoch)
        views.append(kept[4]["image_states"])
    assert torch.equal(views[0], views[2])
    assert torch.equal(views[1], views[3])
    assert not torch.equal(views[0], views[1])


def test_half_precision_is_the_default_and_close(make, losses, tmp_path):
    kept = cache_features(make("tgpt"), images(), 1, tmp_path / "kept")
    assert kept.states.dtype == torch.float16
    assert kept.states.shape == (1, 24, 5, 48)  # views, images, CLS and patches, vision width
    assert losses("tgpt", kept) == pytest.approx(losses("tgpt", images()), rel=1e-2)


def test_labels_and_captions_come_through(make, tmp_path):
    kept, live = cache_features(make("tgpt"), images(), 1, tmp_path), images()
    assert len(kept) == len(live)
    for row in (0, 9, -1):
        assert {name: kept[row][name] for name in ("labels", "caption")} == {
            name: live[row][name] for name in ("labels", "caption")
        }
    assert "pixel_values" not in kept[0]


def test_evaluation_takes_kept_states(make, tmp_path):
    model, accelerator = make("tgpt").eval(), Accelerator(cpu=True)
    live = evaluate(model, evaluation_loader(images(3), accelerator), accelerator)
    kept = cache_features(model, images(3), 1, tmp_path, torch.float32)
    again = evaluate(model, evaluation_loader(kept, accelerator), accelerator)
    assert again["per_class_accuracy"] == live["per_class_accuracy"]


@pytest.fixture
def count(monkeypatch):
    """How often files are made."""
    made, write = [], features._write
    monkeypatch.setattr(features, "_write", lambda *args: made.append(args[0]) or write(*args))
    return made


def test_kept_states_are_found_again_by_other_methods_and_labels_too(make, count, caplog, tmp_path):
    first = cache_features(make("coop"), images(), 1, tmp_path)
    second = cache_features(make("cocoop"), images(captions=False), 1, tmp_path)
    assert len(count) == 1
    assert not caplog.messages
    assert torch.equal(first[3]["image_states"], second[3]["image_states"])


def other_pictures():
    few = images()
    return FewShotImages(coloured_squares(8).select([1, 0, *range(2, 24)]), few.transform, few.seed)


def other_size():
    return FewShotImages(coloured_squares(8), ImageTransform(32, (0.4,) * 3, (0.25,) * 3, train=False))


def other_seed():
    return FewShotImages(images().dataset, images().transform, seed=1)


@pytest.mark.parametrize(
    "changes",
    [
        dict(images=other_pictures),
        dict(images=other_size),
        dict(images=other_seed),
        dict(views=2),
        dict(dtype=torch.bfloat16),
        dict(name="tgpt"),
        dict(weights=1.01),
    ],
    ids=["data", "transform", "seed", "views", "dtype", "method's view", "model"],
)
def test_kept_states_are_made_anew_for_another(changes, make, count, caplog, tmp_path):
    cache_features(make("coop"), images(), 1, tmp_path)
    model = make(changes.get("name", "coop"))
    with torch.no_grad():
        next(model.get_base_model().vision_model.encoder.layers[1].parameters()).mul_(changes.get("weights", 1))
    new = changes.get("images", images)()
    kept = cache_features(model, new, changes.get("views", 1), tmp_path, changes.get("dtype", torch.float16))
    assert len(count) == 2
    assert not caplog.messages
    assert len(list(tmp_path.iterdir())) == 2  # the first is left for those that it fits
    expected = model.learner.image_states(encoder_of(model.get_base_model()), new[5]["pixel_values"][None])[0]
    torch.testing.assert_close(kept[5]["image_states"].float(), expected, atol=2e-2, rtol=2e-2)


def test_a_picture_that_changed_in_its_file_is_noticed(make, count, tmp_path):
    def folder_images():
        data = coloured_squares(2).map(lambda row, i: {"image": str(tmp_path / f"{i}.png")}, with_indices=True)
        return FewShotImages(data, images().transform)

    for i in range(6):
        PILImage.new("RGB", (40, 40), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    cache_features(make("coop"), folder_images(), 1, tmp_path)
    cache_features(make("coop"), folder_images(), 1, tmp_path)
    assert len(count) == 1
    PILImage.new("RGB", (50, 40), (0, 255, 0)).save(tmp_path / "3.png")
    cache_features(make("coop"), folder_images(), 1, tmp_path)
    assert len(count) == 2


def test_an_interrupted_file_is_not_believed(make, monkeypatch, tmp_path):
    model, looked = make("coop"), []
    look = type(model.learner).image_states

    def stop(*args):
        looked.append(1)
        if len(looked) == 2:
            raise KeyboardInterrupt
        return look(*args)

    monkeypatch.setattr(type(model.learner), "image_states", stop)
    with pytest.raises(KeyboardInterrupt):
        cache_features(model, images(), 1, tmp_path, batch_size=8)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(type(model.learner), "image_states", look)
    assert len(cache_features(model, images(), 1, tmp_path).states[0]) == 24


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_file_is_made_anew(damage, make, caplog, tmp_path):
    path = cache_features(make("coop"), images(), 1, tmp_path).path
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        save_file({"states": torch.zeros(1)}, path)
    assert cache_features(make("coop"), images(), 1, tmp_path).states.shape == (1, 24, 32)
    assert caplog.messages == [f"{path} is damaged; it is computed again."]


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_file_is_mapped_and_not_read(tmp_path):
    save_file({"states": torch.zeros(2, 24, 1_000_000, dtype=torch.float16)}, tmp_path / "states")  # 96 MB
    before = resident_bytes()
    kept = CachedImages(images(), tmp_path / "states")
    assert not kept[7]["image_states"].any()
    assert resident_bytes() - before < 20e6


def test_a_worker_gets_the_files_name_and_not_its_content(make, tmp_path):
    kept = cache_features(make("tgpt"), images(16), 8, tmp_path)
    kept[0]
    sent = pickle.dumps(kept)
    assert len(sent) < kept.states.nbytes / 2
    assert torch.equal(pickle.loads(sent)[5]["image_states"], kept[5]["image_states"])


def test_states_beyond_half_precision_are_refused(make, tmp_path):
    model = make("coop")
    with torch.no_grad():
        model.get_base_model().visual_projection.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"`dtype`=torch.float16 cannot hold image states up to .*float32"):
        cache_features(model, images(), 1, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["maple", "ivlp", "mutual_prompt"])
def test_methods_with_visual_prompts_refuse(name, adapt, tmp_path):
    model, message = adapt(METHODS[name]), f"{name.upper()} as configured learns prompts in the vision tower"
    with pytest.raises(ValueError, match=f"{message}.* Train on the pictures, or"):
        cache_features(model, images(), 1, tmp_path)
    with pytest.raises(ValueError, match=message):
        model(image_states=torch.zeros(3, 32))


def test_bad_requests_are_explained(make, tmp_path):
    model = make("coop")
    with pytest.raises(ValueError, match="`views`=0 but every image needs one"):
        cache_features(model, images(), 0, tmp_path)
    with pytest.raises(ValueError, match=r"`dtype`=torch.int8 cannot be kept; choose one of torch.float16"):
        cache_features(model, images(), 1, tmp_path, torch.int8)
    with pytest.raises(ValueError, match="`image_states` replace `pixel_values`"):
        model(pixels(model), image_states=torch.zeros(3, 32))
    with pytest.raises(ValueError, match="`image_states` is not an argument of COOP"):
        model(input_ids=token_ids(model, ["a photo of a cat."]), image_states=torch.zeros(3, 32))
    with model.disable_adapter(), pytest.raises(ValueError, match="`model` has no active adapter"):
        cache_features(model, images(), 1, tmp_path)


@pytest.mark.parametrize("name", FROZEN_VISION)
def test_a_frozen_vision_tower_builds_no_graph_and_saves_nothing(name, adapt):
    method, fields = FROZEN_VISION[name]
    model = adapt(METHODS[method], **fields).train()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        states = model.learner.image_states(encoder_of(model.get_base_model()), pixels(model))
    assert saved == []
    assert states.grad_fn is None

    outputs = []
    for layer in model.get_base_model().vision_model.encoder.layers:
        layer.register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    captions = {"caption_ids": token_ids(model, CLASS_NAMES[:3])} if method == "tgpt" else {}
    model(pixel_values=pixels(model), labels=torch.tensor([0, 3, 1]), **captions).loss.backward()
    assert len(outputs) == 3  # one pass through three layers
    assert not any(output.requires_grad for output in outputs)


def test_a_folder_without_room_is_refused_before_the_work(make, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 50, 50))
    with pytest.raises(ValueError, match=r"`views`=3 of 24 images take 0\.0 GB"):
        cache_features(make("coop"), images(), 3, tmp_path)
    assert list(tmp_path.iterdir()) == []
