"""`hf-tgpt compare`: what it takes, what it leaves, and how it ends."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

import psutil
import pytest
from conftest import Failed

from hf_tgpt.cli import compare as command
from hf_tgpt.cli.compare_plan import FAST, LABELS, chosen_methods, data_folder, method_folder, short_names
from hf_tgpt.cli.main import main

# A training of so many steps that it does not end by itself.
ENDLESS = "endless: coop --recipes toy --max_steps 1000000 --save_every 1"


def compare(output, *arguments):
    words = ["compare", "--model", "toy", "--output_dir", output, *arguments]
    return [sys.executable, "-m", "hf_tgpt", *map(str, words)]


def refused(capsys, *arguments):
    try:
        status = main(["compare", *map(str, arguments)])
    except SystemExit as end:
        status = end.code
    assert status in (1, 2)
    return capsys.readouterr().err.strip().splitlines()[-1]


# What it takes -------------------------------------------------------------------------------------------------------


def test_methods_are_known_by_any_spelling_of_their_names():
    asked = ["tgp_t", "MAPLE", "clip-adapter", "lp_plus_plus", "LP++", "Linear-Probe", "mutual_prompt", "zs lp"]
    labels = [method.label for method in chosen_methods(asked)]
    assert labels == ["TGP-T", "MaPLe", "CLIP-Adapter", "LP++", "linear probe", "mutual", "ZS-LP"]
    assert [method.label for method in chosen_methods(["fast"])] == list(FAST)
    assert [method.label for method in chosen_methods(["ALL", "gda"])] == list(LABELS)
    (own,) = chosen_methods(["half: tip_adapter --alpha 0.5"])
    assert (own.label, own.words) == ("half", ("tip_adapter", "--alpha", "0.5"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "maple", "magic"), "--methods: 'magic' is unknown; choose from fast, all, zero-shot"),
        (("--methods", "a: maple", "a: coop"), "--methods: two are called 'a'"),
        (("--methods", "a: maple --seed 1"), "--seed is set for each run by this command; use --seeds"),
        (("--methods", "a: maple --shots 1"), "--shots is set for each run by this command; use --shots beside"),
        (("--methods", "deep: maple --prompt_depth x"), "deep: argument --prompt_depth"),
        (("--methods", "gda", "maple", "--alpha", "1"), "MaPLe: unrecognized arguments: --alpha 1"),
        (("--seed", "1"), "--seed is set for each run by this command; use --seeds."),
        (("--classes", "old"), "hf-tgpt compare: error: argument --classes: invalid choice: 'old'"),
        (("--epochs", "0"), "zero-shot: --epochs=0: choose a number above 0"),
        (("--shots", "0"), "argument --shots: 0: choose 1 or more"),
        (("--dataset", "no/where/at"), "--dataset='no/where/at' does not exist; correct the path"),
        (("--test_datasets", "no/where/at"), "--dataset='no/where/at' does not exist; correct the path"),
        (("--launcher", "no-such-launcher launch"), "there is no program 'no-such-launcher'"),
        (("--classes", "new", "--protocols", "base-to-new"), "--classes=new is for few-shot alone"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_refused_before_the_first_run(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "runner", lambda launcher: pytest.fail("a run was started"))
    last = refused(capsys, "--model", "toy", "--output_dir", tmp_path / "results", *arguments)
    assert message in last
    assert not (tmp_path / "results").exists()


def test_shots_that_a_class_lacks_are_refused_once_before_the_first_run(pictures, tmp_path, monkeypatch, run_command):
    monkeypatch.setattr(command, "runner", lambda launcher: pytest.fail("a run was started"))
    about = ("--dataset", pictures, "--model", "toy", "--output_dir", tmp_path / "results", "--methods", "gda", "coop")
    with pytest.raises(Failed, match=r"--shots=16 but class 'lime' has 5 images.*pass --allow_fewer") as refused:
        run_command("compare", *about, "--shots", 1, 16, "--seeds", 0, 1)
    assert str(refused.value).count("--shots=16") == 1
    with pytest.raises(pytest.fail.Exception, match="a run was started"):
        run_command("compare", *about, "--shots", 16, "--allow_fewer")


def test_data_sets_have_short_names_and_folders_of_their_own(tmp_path, monkeypatch):
    for folder in ("old/birds", "new/birds", "photos"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    sources = ["old/birds", str(tmp_path / "new" / "birds"), "photos", "toyworld:codes", "org/pictures", "dtd:photos"]
    names = short_names(sources)
    assert list(names.values()) == ["old/birds", "new/birds", "photos", "toyworld:codes", "org/pictures", "dtd"]
    folders = [data_folder(source) for source in sources]
    assert len(set(folders)) == len(sources)
    assert folders[0].startswith("birds-")
    assert folders[5].startswith("dtd-")
    assert not any(str(tmp_path).strip("/").replace("/", "_") in folder for folder in folders)
    assert data_folder("./photos/../photos") == data_folder("photos")
    assert short_names(["dtd:old/birds", "dtd:new/birds"])["dtd:old/birds"] == "dtd:old/birds"


def test_options_of_a_method_and_of_all_make_another_folder(tmp_path):
    plain, own = chosen_methods(["gda", "gda --alpha 2"])
    model = ["--model", str(tmp_path)]
    folders = {method_folder(plain, []), method_folder(own, []), method_folder(plain, model)}
    assert len(folders) == 3
    assert not any(tmp_path.name in folder for folder in folders)


# What it leaves ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments) compares on the toy CLIP, with runs in this process; returns the status and what was printed."""

    class InThisProcess:
        def run(self, arguments, log):
            said = io.StringIO()
            with redirect_stdout(io.StringIO()), redirect_stderr(said):
                try:
                    failed = main(arguments) != 0
                except SystemExit as end:
                    return str(end)
            return said.getvalue().splitlines()[-1] if failed else ""

    @contextmanager
    def here(launcher):
        yield InThisProcess()

    def run(*arguments):
        monkeypatch.setattr(command, "runner", here)
        status = main(["compare", "--model", "toy", "--output_dir", str(tmp_path / "results"), *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.mark.filterwarnings("ignore:GDA has one feature for each class")  # of pictures of one colour
def test_a_comparison_tells_the_best_goes_on_and_lists_what_failed(run, pictures, tmp_path):
    output, about = tmp_path / "results", ("--dataset", pictures, "--shots", 2, "--seeds", 0, 1)
    status, out, err = run(*about, "--methods", "zero_shot", "GDA", "broken: coop --max_steps 3 --learning_rate 1e30")
    assert status == 1
    said = err.splitlines()
    assert said[0] == f"3 methods, 6 runs, 0 of them done -> {output}"
    assert said[1].startswith(f"[1/6] {pictures.name}, 2 shots, zero-shot, seed 0: ")
    assert said[1].endswith(" left")
    assert any(line.startswith(f"[6/6] {pictures.name}, 2 shots, broken, seed 1: failed: ") for line in said)
    assert said[-3] == "2 failed:"
    assert "broken, seed 1: hf-tgpt train: " in said[-1]
    assert not list(output.rglob("coop*/**/results.json"))

    table = (output / "table.md").read_text()
    assert out.strip() == table.strip()
    assert f"**{pictures.name}**, 2 shots, seeds 0, 1" in table
    assert "\n| GDA | **100.0 ± 0.0** | 0 | " in table
    assert "\nBest on all classes: " in table
    assert "paired over 2 seeds, 95 % interval" in table
    with (output / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in ("zero-shot", "GDA") for s in "01"]
    for file in [*output.glob("*.*"), *output.glob("*/")]:
        if file.suffix in (".md", ".csv"):
            assert str(tmp_path) not in file.read_text()
        assert str(tmp_path).strip("/").replace("/", "_") not in file.name
    assert {file.name for file in output.glob("*.png")} == {
        f"{pictures.name}{part}.png" for part in ("", "-costs", "-classes")
    }
    before = {file: file.stat().st_mtime_ns for file in output.rglob("results.json")}
    assert len(before) == 4

    status, out, err = run(*about, "--methods", "gda", "zero-shot", "--json", "--shots", 1, 2)
    assert status == 0, err
    assert err.startswith(f"2 methods, 8 runs, 4 of them done -> {output}\n[1/8] ")
    assert all(file.stat().st_mtime_ns == when for file, when in before.items())
    (folder,) = output.glob("*/gda*/2-shots-seed-0/all")
    assert err.splitlines()[-1] == f"The best method's adapter, {pictures.name}, 2 shots, GDA, seed 0: {folder}"
    told = json.loads(out)
    assert {row["shots"] for row in told["table"]} == {1, 2}
    assert told["failures"] == []
    assert told["best"][0]["best"] == "GDA"
    results = json.loads(next(output.rglob("gda*/2-shots-seed-0/all/results.json")).read_text())
    assert results["class_names"] == ["lime", "ripe tomato"]
    assert results["per_class_accuracy"] == [1.0, 1.0]
    assert "over shots, seeds 0, 1" in (output / "table.md").read_text()
    assert (output / f"{pictures.name}-shots.png").exists()


def test_what_features_cost_is_counted_though_another_run_stored_them(run, pictures, tmp_path):
    _, out, _ = run("--dataset", pictures, "--seeds", 0, "--methods", "GDA", "ProKeR", "--json")
    first, second = (json.loads(next(tmp_path.rglob(f"{name}*/**/results.json")).read_text())
                     for name in ("gda", "proker"))  # fmt: skip
    assert first["feature_seconds"] == 0 < second["feature_seconds"]
    told = {row["method"]: row["seconds"] for row in json.loads(out)["runs"]}
    assert told["GDA"] == first["seconds"]
    assert told["ProKeR"] == pytest.approx(second["seconds"] + second["feature_seconds"])


def test_base_to_new_and_other_data_sets_are_tested_beside(run, pictures, tmp_path):
    shutil.copytree(pictures / "test", tmp_path / "others")
    about = ("--dataset", pictures, "--shots", 2, "--seeds", 0, "--test_datasets", tmp_path / "others")
    protocols = ("--protocols", "few-shot", "base-to-new", "--class_pictures")
    status, out, err = run(*about, *protocols, "--methods", "clip-adapter", "GDA")
    assert status == 0, err
    assert "| method | base | new | H | all classes | on others | trained parameters |" in out
    assert "\n| CLIP-Adapter | **100.0** | **100.0** | **100.0** | **100.0** | **100.0** | " in out
    assert "\n| GDA | **100.0** |  |  | **100.0** | **100.0** | " in out  # its classes are fixed
    assert len(list(tmp_path.rglob("clip_adapter*/**/*-new.png"))) == 1
    assert len(list(tmp_path.rglob("clip_adapter*/**/others-*-all.png"))) == 1


# How it ends ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def started(pictures):
    """started(output, *arguments) -> a comparison whose run has a checkpoint, and all processes that it has."""
    running = []

    def start(output, *arguments):
        about = ("--dataset", pictures, "--shots", 2, "--seeds", 0, *arguments)
        program = subprocess.Popen(compare(output, *about), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        running.append(psutil.Process(program.pid))
        deadline = time.monotonic() + 120
        while not list(output.rglob("checkpoint-*/states.json")):
            assert program.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = running[0].children(recursive=True)
        running.extend(children)
        return program, children

    yield start
    with suppress(psutil.NoSuchProcess):  # of a test that failed; its training would never end
        running.extend(running[0].children(recursive=True))
    for process in running:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def ended(processes):
    """Whether all of them end within half a minute."""
    return not psutil.wait_procs(processes, timeout=30)[1]


def test_a_stop_is_passed_on_and_the_seconds_of_all_parts_add_up(run, started, pictures, tmp_path):
    output = tmp_path / "results"
    begun = time.monotonic()
    program, processes = started(output, "--methods", ENDLESS)
    time.sleep(1)
    program.send_signal(signal.SIGTERM)
    assert program.wait(60) == 143
    first = time.monotonic() - begun
    assert ended(processes)
    (checkpoint,) = output.rglob("checkpoint-*/states.json")
    spent = json.loads(checkpoint.read_text())["clock"]["seconds"]
    assert 1 < spent < first

    # The same run with less to do, which the folder's note allows as if it had been so from the start.
    (note,) = output.rglob("run.json")
    steps = int(checkpoint.parent.name.rpartition("-")[2]) + 10
    note.write_text(note.read_text().replace("1000000", str(steps)))
    shorter = ENDLESS.replace("1000000", str(steps))
    (folder,) = output.glob("*/coop*")
    folder.rename(folder.with_name(folder.name.replace("1000000", str(steps))))
    status, _, err = run("--dataset", pictures, "--shots", 2, "--seeds", 0, "--methods", shorter)
    assert status == 0, err
    (results,) = output.rglob("results.json")
    assert json.loads(results.read_text())["seconds"] > spent


def test_nothing_is_left_of_a_comparison_that_is_killed_nor_of_what_a_launcher_launched(started, tmp_path):
    output = tmp_path / "results"
    program, processes = started(output, "--methods", ENDLESS, "--launcher", "accelerate launch")
    os.kill(program.pid, signal.SIGKILL)
    program.wait(10)
    assert ended(processes)
