"""Class names of all languages in what the commands write and print."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from hf_tgpt.cli.main import main
from hf_tgpt.evaluation import plots

pytestmark = pytest.mark.draws

NAMES = ["قطة", "猫"]


@pytest.fixture
def run_folder(clip_folders, tmp_path):
    """A run of one step on pictures whose folders have Chinese and Arabic names, in Chinese sentences."""
    noise = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in NAMES:
            (tmp_path / "pictures" / split / name).mkdir(parents=True)
            for i in range(2):
                picture = Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8))
                picture.save(tmp_path / "pictures" / split / name / f"{i}.png")
    about = ["--dataset", f"{tmp_path}/pictures", "--model", clip_folders["chinese_clip"], "--shots", "2"]
    about += ["--method", "coop", "--initial_text", "一张{}的照片。", "--prompt_length", "2", "--max_steps", "1"]
    assert main(["train", *about, "--output_dir", f"{tmp_path}/run"]) == 0
    return tmp_path / "run"


def test_names_are_readable_in_what_a_run_leaves(run_folder, capsys, monkeypatch):
    results = (run_folder / "results.json").read_text(encoding="utf-8")
    assert '"猫"' in results
    assert json.loads(results)["class_names"] == NAMES
    beside = "\u2068قطة\u2069, 猫"  # from right to left by itself
    assert f"\n{beside}\n" in (run_folder / "README.md").read_text(encoding="utf-8")
    pictures = str(run_folder.parent / "pictures" / "test")
    commands = {
        ("info", str(run_folder)): beside,
        (
            "evaluate",
            str(run_folder),
            "--dataset",
            str(run_folder.parent / "pictures"),
            "--templates",
            "صورة {}",
        ): "4 pictures",
        ("predict", str(run_folder), pictures): '"label": "',
    }
    capsys.readouterr()
    for command, expected in commands.items():
        assert main(list(command)) == 0
        assert expected in capsys.readouterr().out
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert main(["info", str(run_folder)]) == 0
    narrow.flush()
    assert rb"\u2069, \u732b" in narrow.buffer.getvalue()


def test_a_picture_has_another_font_for_names_that_matplotlibs_lacks_or_says_so(tmp_path, monkeypatch):
    families = []
    accuracies = {"per_class_accuracy": [0.0, 0.5]}
    monkeypatch.setattr(plots, "_families_with", lambda missing: families.append(missing) or [])
    with pytest.warns(UserWarning, match=r"classes.png has boxes in place of '猫', which no font of this machine has"):
        plots.plot_classes(tmp_path / "classes.png", NAMES, accuracies, accuracies, np.arange(2), np.arange(2))
    assert families == [{"猫"}]
    monkeypatch.undo()
    assert plots._families_with({"\u222b"})  # an integral sign, which matplotlib's own has
    assert not any(name.startswith("Last Resort") for name in plots._families_with({"猫", "\ue000"}))
