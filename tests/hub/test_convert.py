"""Checkpoint files as the research releases write them become adapter folders; other files are refused unread."""

import os
import pickle

import pytest
import torch
from conftest import GOLDEN
from peft import PeftModel
from releases import CASES, TOLERANCE, Case, release_files, write_release
from safetensors.torch import save_file
from transformers import CLIPModel

from hf_tgpt import adapter_from_release
from hf_tgpt.hub.convert import read_checkpoint

# What a case's config holds that its tensors do not tell.
TOLD = ("initial_text", "class_position", "templates", "layers", "alpha")


@pytest.mark.parametrize("name", CASES)
def test_a_released_file_becomes_an_adapter_folder_with_its_logits(name, tmp_path):
    case = Case(name)
    told = {field: getattr(case.config(), field) for field in TOLD if hasattr(case.config(), field)}
    clip = CLIPModel.from_pretrained(GOLDEN / "clip")
    model = adapter_from_release(release_files(case, tmp_path), case.method, clip, case.metadata["class_names"], **told)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(CLIPModel.from_pretrained(GOLDEN / "clip"), tmp_path / "adapter").eval()
    for converted in (model, again):
        torch.testing.assert_close(converted(case["pixel_values"]).logits, case["logits"], **TOLERANCE)
    assert again.peft_config["default"].class_names == case.metadata["class_names"]


def test_half_precision_data_parallel_and_safetensors_are_read_too(tmp_path):
    case = Case("maple_ctx2_depth3")
    clip = CLIPModel.from_pretrained(GOLDEN / "clip")
    half = {f"module.{name}": value.half() for name, value in case.group("param.").items()}
    save_file(half, tmp_path / "model.safetensors")
    files = tmp_path / "model.safetensors", write_release(tmp_path / "model.pth.tar-2", half)
    for file in files:
        model = adapter_from_release(file, "maple", clip, case.metadata["class_names"])
        assert model.learner.text_prompts[0].dtype == torch.float32
        torch.testing.assert_close(model(case["pixel_values"]).logits, case["logits"], atol=0.1, rtol=0)
        clip = model.unload()


class Malicious:
    """A pickle that runs a program when it is read."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return os.mkdir, (self.proof,)


@pytest.mark.parametrize("options", [{}, dict(_use_new_zipfile_serialization=False)], ids=["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(options, tmp_path):
    file = tmp_path / "model.pth.tar-5"
    torch.save({"state_dict": {"ctx": torch.zeros(2, 64)}, "epoch": Malicious(tmp_path / "proof")}, file, **options)
    with pytest.raises(ValueError, match=r"(posix|nt)\.mkdir, not only tensors"):
        read_checkpoint(file)
    assert not (tmp_path / "proof").exists()


def test_a_name_at_which_torch_would_take_hours_is_refused_at_once(tmp_path):
    file = tmp_path / "model.pth.tar-5"
    torch.save({"state_dict": {"ctx": torch.zeros(2, 64)}}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes().replace(b"ccollections\n", b"c" + b"x" * 1_000_000 + b"\n"))
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(file)


def test_what_stands_in_for_training_leftovers_is_not_the_real_thing(tmp_path, monkeypatch):
    def forbidden(*args):
        raise AssertionError("code named in the file was run")

    file = write_release(tmp_path / "model.pth.tar-5", {"ctx": torch.zeros(2, 64)})
    for kind in (torch.optim.SGD, torch.optim.lr_scheduler.CosineAnnealingLR):
        monkeypatch.setattr(kind, "__setstate__", forbidden, raising=False)
    assert list(read_checkpoint(file)) == ["ctx"]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"no checkpoint" * 50), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(pickle.dumps({"ctx": 1})), "cannot be read|no named tensors"),
        (lambda path: torch.save({"state_dict": {"epoch": 3}}, path), "contains no named tensors"),
        (lambda path: torch.save([torch.zeros(2)], path), "contains no named tensors"),
        (lambda path: torch.save(torch.nn.Linear(2, 2), path), r"torch\.nn\.modules\.linear\.Linear, not only tensors"),
        (lambda path: None, "is not a file"),
    ],
)
def test_other_files_are_refused_with_the_reason(write, message, tmp_path):
    path = tmp_path / "model.pth.tar-5"
    write(path)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = write_release(tmp_path / "model.pth.tar-5", {"ctx": torch.zeros(200, 64)})
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="damaged or not a released checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("coop_ctx4_csc", dict(class_names=["a", "b"]), "2 names but the checkpoint was trained on 5 classes"),
        ("tgpt_cat8_con12", dict(class_names=["a", "b"]), "2 names but the checkpoint was trained on 5 classes"),
        ("coop_ctx4", dict(method="tgpt"), "has no tensor of a released tgpt checkpoint"),
        ("coop_ctx4", dict(method="mutual_prompt"), "`method`=.mutual_prompt. has no released checkpoints"),
        ("coop_ctx4", dict(class_names=[]), "pass a list with the name of every class"),
    ],
)
def test_what_does_not_go_together_is_named(name, change, message, tmp_path):
    case = Case(name)
    clip = CLIPModel.from_pretrained(GOLDEN / "clip")
    arguments = dict(method=case.method, clip=clip, class_names=case.metadata["class_names"]) | change
    with pytest.raises(ValueError, match=message):
        adapter_from_release(release_files(case, tmp_path), **arguments)
    assert type(clip) is CLIPModel


def test_one_of_tgpts_two_files_is_not_enough(tmp_path):
    case = Case("tgpt_cat8_con12")
    clip = CLIPModel.from_pretrained(GOLDEN / "clip")
    with pytest.raises(ValueError, match="'head' has shape none"):
        adapter_from_release(release_files(case, tmp_path)[0], "tgpt", clip, case.metadata["class_names"])


def test_weights_that_are_not_finite_are_refused(tmp_path):
    case = Case("coop_ctx4")
    path = write_release(tmp_path / "model.pth.tar-5", {"ctx": case["param.prompt_learner.ctx"] * float("nan")})
    with pytest.raises(ValueError, match="'text_prompts' of the checkpoint holds NaN"):
        adapter_from_release(path, "coop", CLIPModel.from_pretrained(GOLDEN / "clip"), case.metadata["class_names"])
