"""The program `hf-tgpt`: quick to answer, streaming, and honest in its exit status."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, GOLDEN, METHODS, ImageProcessor, make_classifier, make_clip, shake
from PIL import Image
from releases import TOLERANCE, Case, release_files
from transformers import CLIPModel

import hf_tgpt
from hf_tgpt.cli import predict_processes
from hf_tgpt.cli.main import main
from hf_tgpt.cli.predict import find_files
from hf_tgpt.cli.predict_rows import Output

SIDE = 32


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """{"maple": folder, ...} on a base model with an image processor."""
    root = tmp_path_factory.mktemp("adapters")
    base = make_clip("plain", root / "base")
    crop = {"height": SIDE, "width": SIDE}
    ImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(base)
    for name in ("maple", "tgpt", "coop", "linear_probe"):
        torch.manual_seed(1)
        fields = METHODS[name].fields if name in METHODS else {}
        model = make_classifier(name, hf_tgpt.load_clip(base).eval(), CLASS_NAMES, **fields).eval()
        shake(model)
        model.save_pretrained(root / name)
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (5, 40, 50, 3), dtype=np.uint8)
    for i, name in enumerate(["b.png", "a.jpg", "inner/c.png", "inner/d.webp", ".hidden.png"]):
        Image.fromarray(noise[i]).save(folder / name)
    return folder


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_help_needs_none_of_the_slow_imports():
    code = (
        "import sys\n"
        "from hf_tgpt.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: code = stop.code\n"
        "slow = {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)\n"
        "assert not slow, slow\n"
        "sys.exit(code)"
    )
    for arguments, status in ((["--help"], 0), (["predict", "--help"], 0), (["predcit"], 2), ([], 2)):
        command = [sys.executable, "-c", code, *arguments]
        outcome = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        assert outcome.returncode == status, outcome.stderr


def test_predict_writes_a_json_line_for_each_picture_in_order(adapters, pictures, capsys):
    assert run("predict", adapters["maple"], pictures, "--top_k", 2) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["image"] for row in rows] == [
        str(pictures / name) for name in ("a.jpg", "b.png", "inner/c.png", "inner/d.webp")
    ]
    classifier = hf_tgpt.load_classifier(adapters["maple"])
    answers = classifier([row["image"] for row in rows], top_k=2)
    for row, answer in zip(rows, answers, strict=True):
        assert row["top_k"] == answer
        assert {"label": row["label"], "score": row["score"]} == row["top_k"][0]
    assert "predicting" not in err  # no bar without a terminal


def test_predict_writes_csv_and_takes_other_class_names(adapters, pictures, tmp_path):
    output, names = tmp_path / "new" / "rows.csv", tmp_path / "names.txt"
    names.write_text("forest\nzigzag texture\n")
    assert run("predict", adapters["coop"], pictures / "a.jpg", "--output", output, "--class_names_file", names) == 0
    with output.open(encoding="utf-8-sig") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == ["image", "label", "score", "label_2", "score_2", "error"]
    assert {row["label"], row["label_2"]} == {"forest", "zigzag texture"}
    assert [path.name for path in output.parent.iterdir()] == ["rows.csv"]


def test_a_field_is_changed_for_one_call_alone(adapters, pictures, capsys):
    def scores(*arguments):
        assert run("predict", adapters["tgpt"], pictures, *arguments) == 0
        return capsys.readouterr().out

    config = Path(adapters["tgpt"], "adapter_config.json")
    before, saved = scores(), config.read_bytes()
    assert scores("--set", "wise_ft=0.5") != before
    assert config.read_bytes() == saved
    assert scores() == before
    assert run("predict", adapters["tgpt"], pictures, "--set", "head=1") == 1
    assert "--set: 'head' is not a field of TGPTConfig that may change" in capsys.readouterr().err


def test_files_that_are_no_pictures_are_skipped_counted_and_listed(adapters, tmp_path, capsys):
    folder = tmp_path / "many"
    folder.mkdir()
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    for i in range(1000):
        picture.save(folder / f"{i:04}.bmp")
    for name in ("0500.bmp", "0999.bmp"):
        (folder / name).write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    output = tmp_path / "rows.jsonl"
    assert run("predict", adapters["linear_probe"], folder, "--output", output, "--batch_size", 100) == 3
    err = capsys.readouterr().err
    assert "left out: 1 .txt;" in err
    assert "2 of 1000 files could not be read and were skipped:" in err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 1000
    for name in ("0500.bmp", "0999.bmp"):
        assert f"cannot read {folder / name}" in err
        (reason,) = [row["error"] for row in rows if row["image"] == str(folder / name)]
        assert "it is not a picture of a known kind" in reason


def test_a_csv_opens_in_a_spreadsheet_as_it_is(adapters, tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "Äpfel.png")
    (tmp_path / "halb.jpg").write_bytes(b"\xff\xd8")
    output = tmp_path / "rows.csv"
    assert run("predict", adapters["coop"], tmp_path, "--output", output, "--top_k", 1) == 3
    content = output.read_bytes()
    assert content.startswith(b"\xef\xbb\xbfimage,label,score,error\n")  # by the mark Excel recognises UTF-8
    rows = list(csv.DictReader(content.decode("utf-8-sig").splitlines()))
    assert re.fullmatch(r"[01]\.\d{4}", rows[1]["score"])
    assert (rows[0]["label"], rows[0]["score"]) == ("", "")
    assert "halb.jpg" in rows[0]["error"]
    assert rows[1]["image"].endswith("Äpfel.png")


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_prediction_that_was_killed_goes_on_where_it_was(name, adapters, pictures, tmp_path, capsys, monkeypatch):
    command, output = ("predict", adapters["maple"], pictures, "--top_k", "2", "--batch_size", "1"), tmp_path / name
    assert run(*command, "--output", tmp_path / f"whole-{name}") == 0
    asked = []

    def dies(image):
        asked.append(image)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return load_image(image)

    load_image = hf_tgpt.inference.classifier.load_image
    monkeypatch.setattr(hf_tgpt.inference.classifier, "load_image", dies)
    assert run(*command, "--output", output) == 130
    assert not output.exists()
    with (tmp_path / f"{name}.part").open("ab") as draft:
        draft.write(b"a row that was cut o")
    assert run(*command, "--output", output) == 0
    assert len(asked) == 5  # two that were done, the one that was under way, and the two that were left
    assert "2 of 4 pictures are already in the output" in capsys.readouterr().err
    assert output.read_bytes() == (tmp_path / f"whole-{name}").read_bytes()
    assert not list(tmp_path.glob("*.part*"))


def test_rows_of_another_adapter_are_not_gone_on_with(adapters, pictures, tmp_path, monkeypatch):
    output = tmp_path / "rows.jsonl"
    (tmp_path / "rows.jsonl.part").write_text('{"image": "a", "label": "b"}\n')
    (tmp_path / "rows.jsonl.part.json").write_text('{"adapter": "another"}')
    assert run("predict", adapters["maple"], pictures / "a.jpg", "--output", output) == 0
    assert len(output.read_text().splitlines()) == 1


def test_pictures_may_be_listed_in_a_file_or_on_standard_input(adapters, pictures, tmp_path, capsys, monkeypatch):
    listed = f"{pictures / 'b.png'}\n\n{pictures / 'a.jpg'}\n"
    (tmp_path / "list.txt").write_text(listed)
    monkeypatch.setattr("sys.stdin", io.StringIO(listed))
    for name in (tmp_path / "list.txt", "-"):
        assert run("predict", adapters["maple"], "--list", name) == 0
        images = [json.loads(line)["image"] for line in capsys.readouterr().out.splitlines()]
        assert images == [str(pictures / "b.png"), str(pictures / "a.jpg")]


def test_prediction_takes_the_pictures_that_training_would(adapters, pictures, capsys):
    (pictures / "@eaDir").mkdir()
    Image.new("RGB", (8, 8)).save(pictures / "@eaDir" / "thumbnail.jpg")
    (pictures / "notes.txt").write_text("x")
    os.mkfifo(pictures / "pipe.jpg")
    assert run("predict", adapters["maple"], pictures) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert "left out: 1 'pipe.jpg' (a pipe, a device or a link that leads nowhere), 1 .txt" in err


def test_progress_is_told_in_lines_where_nobody_watches(adapters, pictures, capsys, monkeypatch):
    monkeypatch.setattr("hf_tgpt.cli.predict_processes._SECONDS", 0)
    assert run("predict", adapters["maple"], pictures) == 0
    assert "3 of 4 pictures\n4 of 4 pictures\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "{maple}", "missing"], "'missing' does not exist; correct the path"),
        (["predict", "{maple}", "{empty}"], "There is no picture in"),
        (["predict", "{empty}", "{picture}"], "adapter_config.json"),
        (["predict", "{tgpt}", "{picture}", "--class_names", "zebra"], "not 'zebra'"),
        (["predict", "{maple}", "{picture}", "--class_names", "forest", "forest"], "holds 'forest' twice"),
        (["predict", "{maple}", "{picture}", "--class_names_file", "{empty}/none.txt"], "none.txt"),
        (["predict", "{maple}", "{picture}", "--output", "{base}"], "is a folder; name a file"),
        (["predict", "{maple}", "{picture}", "--device", "abacus"], "--device='abacus' cannot be used here"),
        (["evaluate", "--adapter", "{maple}", "--output", "{base}"], "is a folder; name a file"),
        (["evaluate", "--adapter", "{maple}", "--picture", "change.jpg"], "does not end with .png"),
        (["describe", "--model", "m", "--dataset", "d", "--output", "o", "--device", "abacus"], "--device='abacus'"),
        (["info", "runs/deep/mistyped"], "runs/deep/mistyped (no folder here) is not the id of a repository"),
        (["info", "./missing"], "There is no adapter in './missing'"),
        (["info", "{empty}"], "There is no adapter in"),
        (["export", "{maple}", "{empty}/model"], "ends with .onnx"),
        (["export", "{maple}", "{empty}/out", "--format", "transformers"], "learns prompts in the image tower"),
        (["export", "{maple}", "{empty}/out", "--format", "transformers", "--int8", "toyworld"], "is only for ONNX"),
        (["export", "{maple}", "{empty}/m.onnx", "--int8", "toyworld", "--dtype", "fp16"], "int8 is made from float32"),
        (
            ["convert", "none", "{empty}/out", "--method", "coop", "--model", "{base}"],
            "does not contain its class names",
        ),
        (
            ["convert", "none", "{empty}/out", "--method", "coop", "--model", "{base}", "--class_names", "a"],
            "'none' is not a file",
        ),
        (["convert", "none", "{maple}", "--method", "coop", "--model", "{base}"], "already holds files"),
    ],
)
def test_what_is_wrong_is_said_on_stderr_with_status_1(arguments, message, adapters, pictures, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = adapters | dict(picture=pictures / "a.jpg", empty=tmp_path / "empty")
    assert run(*(argument.format(**places) for argument in arguments)) == 1
    out, err = capsys.readouterr()
    assert message in err
    assert not out
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize(("name", "open_list"), [("maple", True), ("tgpt", False), ("linear_probe", False)])
def test_info_tells_what_is_in_an_adapter(name, open_list, adapters, capsys):
    assert run("info", adapters[name], "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["method"] == name
    assert facts["base_model"] == adapters["base"]
    assert facts["class_names"] == CLASS_NAMES
    assert facts["class_list"] == ("open" if open_list else "closed")
    model = hf_tgpt.load_trained(hf_tgpt.load_clip(adapters["base"]), adapters[name])
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.learner.parameters())
    assert run("info", adapters[name]) == 0
    words = capsys.readouterr().out
    assert f" 4, {facts['class_list']} list: cat, red circle" in words


def test_an_adapter_of_a_package_that_is_missing_is_not_called_damaged(adapters, tmp_path, capsys):
    folder = shutil.copytree(adapters["coop"], tmp_path / "foreign")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "THEIRS"}))
    assert run("info", folder) == 1
    assert "the method 'THEIRS', which neither hf_tgpt" in capsys.readouterr().err


def test_convert_makes_a_folder_that_loads(tmp_path, capsys):
    case = Case("coop_ctx4_front")
    names = case.metadata["class_names"]
    output = tmp_path / "adapter"
    options = ["--method", "coop", "--model", GOLDEN / "clip", "--class_names", *names]
    fields = ["--set", f"initial_text={json.dumps(case.metadata.get('ctx_init'))}", "class_position=front"]
    assert run("convert", *release_files(case, tmp_path), output, *options, *fields) == 0
    assert f"coop for {len(names)} classes" in capsys.readouterr().out
    model = hf_tgpt.load_adapter(CLIPModel.from_pretrained(GOLDEN / "clip"), output).eval()
    torch.testing.assert_close(model(case["pixel_values"]).logits, case["logits"], **TOLERANCE)
    assert run("convert", "none", tmp_path / "new", *options, "--set", "colour=red") == 1
    assert "'colour' is not a field of coop's config" in capsys.readouterr().err


def test_export_writes_onnx_with_int8_and_what_that_costs(adapters, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    noise = np.random.default_rng(0).integers(0, 256, (len(CLASS_NAMES), 3, 40, 40, 3), dtype=np.uint8)
    for split in ("train", "test"):
        for name, images in zip(CLASS_NAMES, noise + (split == "test"), strict=True):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i, pixels in enumerate(images):
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    output = tmp_path / "out" / "model.onnx"
    names = ["--class_names", *sorted(CLASS_NAMES)]
    assert run("export", adapters["coop"], output, "--int8", tmp_path / "data", "--json", *names) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images"] == 12
    written = json.loads((tmp_path / "out" / "model.json").read_text())
    assert written["int8"]["accuracy"] == facts["accuracy"]
    assert {path.name for path in output.parent.iterdir()} == {"model.onnx", "model.int8.onnx", "model.json"}
    assert run("export", adapters["coop"], output, "--int8", tmp_path / "data") == 1
    assert "has other classes than the model" in capsys.readouterr().err


def test_predictions_are_one_json_object_if_asked(adapters, pictures, tmp_path, capsys):
    (pictures / "broken.png").write_bytes(b"no picture")
    assert run("predict", adapters["maple"], pictures) == 3
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert run("predict", adapters["maple"], pictures, "--json") == 3
    assert json.loads(capsys.readouterr().out) == {"output": None, "images": 5, "skipped": 1, "rows": rows}
    output = tmp_path / "rows.csv"
    assert run("predict", adapters["maple"], pictures, "--json", "--output", output) == 3
    assert json.loads(capsys.readouterr().out) == {"output": str(output), "images": 5, "skipped": 1}
    assert run("predict", adapters["maple"], pictures, "--json", "--format", "csv") == 1
    assert json.loads(capsys.readouterr().out)["error"].startswith("--json prints JSON, not CSV")


def test_the_page_prints_its_address_as_json_if_asked(adapters, monkeypatch, capsys):
    pytest.importorskip("gradio")
    monkeypatch.setattr("hf_tgpt.cli.demo.make_page", lambda *_: None)
    monkeypatch.setattr("hf_tgpt.cli.demo.serve", lambda *_: None)
    assert run("demo", adapters["coop"], "--port", "0", "--json") == 0
    assert json.loads(capsys.readouterr().out)["url"].startswith("http://127.0.0.1:")


def test_ctrl_c_ends_a_command_without_a_traceback(adapters, monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_tgpt.cli.info.main", interrupted)
    assert run("info", adapters["maple"]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_file_that_holds_no_predictions_is_not_replaced(adapters, pictures, tmp_path, capsys, suffix):
    output = tmp_path / f"mine{suffix}"
    command = ("predict", adapters["coop"], pictures / "a.jpg", "--output", output)
    for labels in ("image,label\na.jpg,cat\n", '{"file": "a.jpg"}\n'):
        output.write_text(labels)
        assert run(*command) == 1
        assert (
            f"--output='{output}' is there already and holds no predictions as {suffix[1:]}" in capsys.readouterr().err
        )
        assert output.read_text() == labels
    output.write_text("")
    for _ in range(2):  # its own may be made again
        assert run(*command) == 0


# Several processes ---------------------------------------------------------------------------------------------------


def test_several_processes_go_on_where_several_were_killed_and_write_what_one_writes(
    adapters, pictures, tmp_path, capsys, monkeypatch
):
    for number in range(6):
        Image.new("RGB", (9, 9), (40 * number, 9, 99)).save(pictures / f"n{number}.png")
    (pictures / "m.png").write_bytes(b"no picture")
    command, output = ("predict", adapters["maple"], pictures, "--top_k", "2"), tmp_path / "rows.csv"
    assert run(*command, "--output", tmp_path / "one.csv", "--batch_size", "1") == 3
    rows = list(csv.DictReader((tmp_path / "one.csv").read_text("utf-8-sig").splitlines()))
    assert [row["image"] for row in rows] == find_files([str(pictures)])  # the damaged one in its place, too

    def dies(image):
        if Path(image).name == "n2.png":
            raise KeyboardInterrupt
        return load_image(image)

    load_image = hf_tgpt.inference.classifier.load_image
    with monkeypatch.context() as patch:
        patch.setattr(hf_tgpt.inference.classifier, "load_image", dies)
        assert run(*command, "--output", output, "--batch_size", "1") == 130
    draft = tmp_path / "rows.csv.part"
    lines = draft.read_bytes().splitlines(keepends=True)  # as two processes leave theirs
    draft.unlink()
    draft.with_name("rows.csv.part.0").write_bytes(b"".join(lines[::2]) + b'{"image": "a row that was cu')
    draft.with_name("rows.csv.part.list").write_text("[]")
    draft.with_name("rows.csv.part.1").write_bytes(b"".join([*lines[1::2], lines[0]]))
    capsys.readouterr()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    words = [*launch, "-m", "hf_tgpt", *map(str, command), "--output", str(output)]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert output.read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert f"{len(lines)} of {len(rows)} pictures are already in the output." in ended.stderr
    manifest = json.loads((tmp_path / "rows.csv.manifest.json").read_text())
    assert (manifest["images"], manifest["answered"], manifest["processes"]) == (len(rows), len(rows) - 1, 2)
    assert manifest["done_before"] == len(lines)
    ((skipped,),) = [manifest["skipped"]]
    assert skipped["image"] == str(pictures / "m.png")
    assert "not a picture of a known kind" in skipped["error"]
    assert not list(tmp_path.glob("*.part*"))


def test_several_processes_take_the_precision_that_the_first_has_measured(monkeypatch):
    assert predict_processes.Processes().precision("auto") == "auto"
    monkeypatch.setenv("WORLD_SIZE", "2")
    state = SimpleNamespace(num_processes=2, process_index=1, device="cpu")
    monkeypatch.setattr(predict_processes, "Accelerator", lambda **options: state)
    monkeypatch.setattr(predict_processes, "broadcast_object_list", lambda own: ["bf16"])
    assert predict_processes.Processes().precision("auto") == "bf16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--output is not given, and several processes cannot write to one stdout"),
        (["--output", "x.csv", "--list", "-"], "is read by one process alone; name a file"),
        (["--output", "x.csv", "--sort_into", "sorted"], "--sort_into is for one process"),
    ],
)
def test_several_processes_refuse_what_only_one_can_do(arguments, message, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = SimpleNamespace(num_processes=2, process_index=0, device="cpu")
    monkeypatch.setattr("hf_tgpt.cli.predict_processes.Accelerator", lambda **options: state)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("predict", "nothing", pictures, *arguments) == 1
    assert message in capsys.readouterr().err


def test_two_calls_do_not_write_to_one_file(adapters, pictures, tmp_path, capsys):
    output = Output(tmp_path / "rows.csv", {})
    lock = output.lock()
    assert run("predict", adapters["maple"], pictures, "--output", output.path) == 1
    assert "is being written by another call; wait for its end" in capsys.readouterr().err
    lock.release()
