"""open_clip's files become folders of transformers with open_clip's answers; other models and files are refused."""

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, pooled
from open_clip_files import (
    VOCABULARY,
    Kind,
    image_features,
    random_tensors,
    text_features,
    write_open_clip,
    write_tokenizer,
)
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPModel

import hf_tgpt
from hf_tgpt import CoOpConfig, convert_base
from hf_tgpt.cli.main import main
from hf_tgpt.encoders.loading import load_image_processor
from hf_tgpt.hub import convert_base as module

HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.75]}
SQUASH = {"size": 27 * 14, "interpolation": "bilinear", "resize_mode": "squash"}
# Small models with what is particular of the real ones: patches and pictures, context, heads, activation, projection.
KINDS = {
    "BioCLIP": (Kind(patch=16, side=14), {}),
    "BioCLIP 2": (Kind(patch=14, side=16, joint=48), {}),
    "LAION L/14": (Kind(patch=14, side=3, joint=64), {"preprocess": HALF}),
    "DataComp B/32 256": (Kind(patch=32, side=8), {}),
    "DFN H/14 378": (Kind(patch=14, side=27, vision=(96, 1, 3), quick_gelu=True), {"preprocess": SQUASH}),
    "as wide as its projection": (Kind(joint=128, text=(128, 1, 8)), {}),
    "CustomTextCLIP": (Kind(custom_text=True, quick_gelu=True), {}),
    "newer projection": (Kind(custom_text=True, linear_projection=True), {}),
    "float16": (Kind(dtype=torch.float16), {}),
    "bfloat16": (Kind(dtype=torch.bfloat16, quick_gelu=True), {}),
}
# Without open_clip_config.json, by options.
BARE = {
    "RemoteCLIP B/32": (Kind(patch=32), {"activation": "gelu"}),
    "GeoRSCLIP B/32": (Kind(patch=32, quick_gelu=True), {"activation": "quick_gelu"}),
    "GeoRSCLIP H/14": (Kind(patch=14, vision=(1088, 1, 16)), {"activation": "gelu"}),
    "Long-CLIP": (Kind(context=248, quick_gelu=True), {"activation": "quick_gelu"}),
    "heads": (Kind(vision=(96, 1, 3), text=(48, 2, 4)), {"activation": "gelu", "heads": (3, 4)}),
}


def check_answers(folder, tensors, kind):
    """That the folder's model has the features which open_clip computes from the tensors, and their type."""
    exact = {"atol": 2e-5, "rtol": 1e-4} if kind.dtype == torch.float32 else {"atol": 0.08, "rtol": 0.08}
    saved = CLIPModel.from_pretrained(folder)
    assert saved.dtype == kind.dtype
    clip = hf_tgpt.load_clip(folder).eval()
    assert clip.dtype == torch.float32
    chance = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, kind.image_size, kind.image_size, generator=chance)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentences = ["cat", "a photo of a newt.", "x" * 300]
    ids = tokenizer(sentences, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape[1] == kind.context
    theirs = ids.clone()
    for row in theirs:  # they pad with 0
        row[row.argmax() + 1 :] = 0
    wide = {name: value.float() for name, value in tensors.items()}
    with torch.no_grad():
        pictures, texts = image_features(wide, kind, pixels), text_features(wide, kind, theirs)
        for ids_in_use in (ids, theirs):
            torch.testing.assert_close(pooled(clip.get_text_features(ids_in_use)), texts, **exact)
        torch.testing.assert_close(pooled(clip.get_image_features(pixels)), pictures, **exact)
        logits = torch.cosine_similarity(pictures[:, None], texts, dim=-1) * wide["logit_scale"].exp()
        torch.testing.assert_close(clip(ids, pixels).logits_per_image, logits, atol=1e-3, rtol=1e-3)
        if kind.dtype != torch.float32:  # as it is saved, it also runs
            half = pooled(saved.get_image_features(pixels.to(kind.dtype)))
            torch.testing.assert_close(half.float(), pictures, **exact)


@pytest.mark.parametrize("name", KINDS)
def test_a_folder_of_the_hub_gives_open_clips_features(name, tmp_path):
    kind, files = KINDS[name]
    tensors = write_open_clip(tmp_path / "theirs", kind, **files)
    facts = convert_base(tmp_path / "theirs", tmp_path / "ours")
    assert facts["activation"] == ("quick_gelu" if kind.quick_gelu else "gelu")
    assert facts["heads"] == [kind.vision[2], kind.text[2]]
    check_answers(tmp_path / "ours", tensors, kind)


@pytest.mark.parametrize("name", BARE)
def test_a_file_alone_gives_open_clips_features_with_what_is_told(name, tmp_path):
    kind, options = BARE[name]
    tensors = write_open_clip(tmp_path, kind, config=False)
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": v for n, v in tensors.items()}}, tmp_path / "model.pt")
    facts = convert_base(tmp_path / "model.pt", tmp_path / "new" / "ours", **options)
    assert facts["heads"] == [kind.vision[2], kind.text[2]]
    check_answers(tmp_path / "new" / "ours", tensors, kind)


def test_options_go_before_the_config(tmp_path):
    kind = Kind(vision=(128, 1, 4), text=(64, 1, 2))
    tensors = write_open_clip(tmp_path / "theirs", kind)
    convert_base(tmp_path / "theirs", tmp_path / "ours", activation="quick_gelu", heads=[2, 4])
    check_answers(tmp_path / "ours", tensors, replace(kind, quick_gelu=True, vision=(128, 1, 2), text=(64, 1, 4)))


def test_names_and_nests_of_old_files_are_read(tmp_path):
    kind = Kind()
    tensors = write_open_clip(tmp_path)
    old = tensors | {"input_resolution": torch.tensor(32), "attn_mask": torch.zeros(77, 77)}
    (tmp_path / "open_clip_model.safetensors").unlink()
    torch.save({"model": old}, tmp_path / "open_clip_pytorch_model.bin")
    save_file(tensors | {"logit_bias": torch.zeros(())}, tmp_path / "another.safetensors")  # is passed over
    convert_base(tmp_path, tmp_path / "ours")
    check_answers(tmp_path / "ours", tensors, kind)


def test_weights_of_several_types_are_widened_to_one(tmp_path):
    tensors = write_open_clip(tmp_path)
    mixed = {name: value.half() if value.ndim > 1 else value for name, value in tensors.items()}
    save_file(mixed, tmp_path / "open_clip_model.safetensors")
    assert convert_base(tmp_path, tmp_path / "ours")["dtype"] == "float32"
    check_answers(tmp_path / "ours", mixed, Kind())


def test_pictures_are_prepared_as_the_config_says(tmp_path):
    write_open_clip(tmp_path / "plain", config=False)
    convert_base(tmp_path / "plain", tmp_path / "0", activation="gelu")
    processor = load_image_processor(f"{tmp_path}/0")
    assert processor.size["shortest_edge"] == processor.crop_size["height"] == 32
    assert processor.do_center_crop
    assert processor.resample == 3
    assert processor.image_mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert processor.image_std == pytest.approx([0.26862954, 0.26130258, 0.27577711])
    write_open_clip(tmp_path / "half", preprocess=HALF | {"mode": "RGB", "size": [32, 32]})
    convert_base(tmp_path / "half", tmp_path / "1")
    processor = load_image_processor(f"{tmp_path}/1")
    assert [list(processor.image_mean), list(processor.image_std)] == [HALF["mean"], HALF["std"]]
    write_open_clip(tmp_path / "squash", preprocess=SQUASH | {"size": 32})
    convert_base(tmp_path / "squash", tmp_path / "2")
    processor = load_image_processor(f"{tmp_path}/2")
    assert (processor.size["height"], processor.size["width"]) == (32, 32)
    assert not processor.do_center_crop
    assert processor.resample == 2


def test_pixels_that_patches_do_not_cover_are_kept(tmp_path):
    """As of 384 pixels in patches of 14."""
    kind = Kind()
    tensors = write_open_clip(tmp_path, kind, vision_cfg=kind.config()["vision_cfg"] | {"image_size": 39})
    assert convert_base(tmp_path, tmp_path / "ours")["image_size"] == 39
    pixels = torch.randn(1, 3, 39, 39)
    with torch.no_grad():
        ours = pooled(hf_tgpt.load_clip(tmp_path / "ours").get_image_features(pixels))
        torch.testing.assert_close(ours, image_features(tensors, kind, pixels), atol=2e-5, rtol=1e-4)


def test_the_folder_takes_adapters_and_may_be_sharded(tmp_path):
    write_open_clip(tmp_path / "theirs")
    convert_base(tmp_path / "theirs", tmp_path / "ours")
    clip = hf_tgpt.load_clip(tmp_path / "ours").eval()
    model = get_peft_model(clip, CoOpConfig(class_names=["cat", "dog"], prompt_length=2)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    logits = model(pixels).logits
    assert logits.shape == (2, 2)
    model.save_pretrained(tmp_path / "adapter")
    shards = tmp_path / "shards"
    CLIPModel.from_pretrained(tmp_path / "ours").save_pretrained(shards, max_shard_size="300KB")
    assert (shards / "model.safetensors.index.json").is_file()
    AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(shards)
    again = hf_tgpt.load_adapter(hf_tgpt.load_clip(shards).eval(), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(pixels).logits, logits)


# What is refused -----------------------------------------------------------------------------------------------------

ONE = torch.zeros(1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text_decoder.resblocks.0.ln_1.weight", "caption decoder of CoCa"),
        ("text.cls_emb", "caption decoder of CoCa"),
        ("visual.layer1.0.conv1.weight", "a ResNet as its image tower"),
        ("visual.trunk.blocks.0.norm1.weight", "an image tower of timm"),
        ("visual.blocks.0.attn.q_bias", "EVA's image tower"),
        ("text.transformer.encoder.layer.0.output.dense.weight", "a text tower of transformers, as RoBERTa"),
        ("logit_bias", "the logit bias of SigLIP"),
        ("visual.transformer.resblocks.0.ls_1.gamma", "layer scale"),
        ("visual.attn_pool.query", "attentional pooling"),
        ("vision_model.embeddings.class_embedding", "the names of transformers already"),
        ("visual.transformer.resblocks.0.attn.ln_q.weight", "attn.ln_q.weight', which plain CLIP does not have"),
        ("text_projection.bias", "'text_projection.bias', which plain CLIP does not have"),
    ],
)
def test_another_architecture_is_named(name, message, tmp_path):
    tensors = write_open_clip(tmp_path)
    save_file(tensors | {name: ONE}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        convert_base(tmp_path, tmp_path / "ours")
    assert name.removeprefix("text.") in str(error.value)
    assert "open_clip's plain CLIP" in str(error.value)
    assert not (tmp_path / "ours").exists()


def without(*names):
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


def with_value(name, change):
    return lambda tensors: tensors | {name: change(tensors[name]).contiguous()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("visual.ln_pre.weight"), "lacks what becomes 'vision_model.pre_layrnorm.weight'"),
        (without("visual.proj"), "lacks 'visual.proj'"),
        (without("logit_scale"), "lacks what becomes 'logit_scale'"),
        (without("transformer.resblocks.0.attn.in_proj_bias"), "lacks what becomes 'text_model.encoder.layers.0"),
        (with_value("visual.conv1.weight", lambda value: value[:, :, :8]), "patches of 8x16 pixels"),
        (with_value("visual.conv1.weight", lambda value: value[:, :1]), "reads 1 channels"),
        (with_value("visual.positional_embedding", lambda value: value[:4]), "3 places for patches"),
        (with_value("visual.proj", lambda value: value[0]), "'visual.proj', which plain CLIP does not have"),
        (with_value("ln_final.weight", lambda value: value[:5]), r"has shape \(5,\), but the other"),
        (with_value("ln_final.weight", lambda value: value / 0), "NaN or infinity"),
        (with_value("ln_final.weight", lambda value: value.to(torch.int8)), "of type torch.int8"),
    ],
)
def test_tensors_that_make_no_clip_are_named(change, message, tmp_path):
    tensors = write_open_clip(tmp_path)
    save_file(change(tensors), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_base(tmp_path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("text_cfg", "no_causal_mask", True, "'no_causal_mask' of 'text_cfg' .* is True, which is not plain CLIP's"),
        ("text_cfg", "pool_type", "last", "is 'last', which is not plain CLIP's"),
        ("vision_cfg", "pool_type", "avg", "is 'avg', which is not plain CLIP's"),
        ("vision_cfg", "norm_kwargs", {"eps": 1e-6}, "'norm_kwargs' of 'vision_cfg'"),
        ("text_cfg", "act_kwargs", {"approximate": "tanh"}, "'act_kwargs' of 'text_cfg'"),
        ("vision_cfg", "attentional_pool", True, "'attentional_pool'"),
        ("vision_cfg", "naflex", True, "'naflex'"),
        ("model_cfg", "multimodal_cfg", {"width": 3}, "'multimodal_cfg'"),
        ("vision_cfg", "layers", 12, "is 12, but the tensors have 2: it is another model's config"),
        ("text_cfg", "context_length", 248, "is 248, but the tensors have 77"),
        ("vision_cfg", "image_size", 224, "is 224, but the tensors have 32"),
        ("model_cfg", "text_cfg", 3, "has no 'vision_cfg' and 'text_cfg'"),
        ("vision_cfg", "head_width", 50, r"`heads`=\[0, 1\] but there are two towers"),
        ("vision_cfg", "head_width", 0, "there are two towers"),
        ("text_cfg", "heads", 5, "5 heads do not divide the text tower's width of 64"),
        ("preprocess_cfg", "resize_mode", "longest", "'longest'; only 'shortest' or 'squash'"),
        ("preprocess_cfg", "interpolation", "random", "'random'; only 'bicubic' or 'bilinear'"),
        ("preprocess_cfg", "size", 224, "is 224; only 32"),
        ("preprocess_cfg", "mean", 0.5, "should be three numbers"),
        ("preprocess_cfg", "patches", 3, "'patches' of 'preprocess_cfg' .* is not known"),
    ],
)
def test_a_config_of_something_else_is_refused(section, field, value, message, tmp_path):
    write_open_clip(tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    model = config["model_cfg"]
    {"model_cfg": model, "preprocess_cfg": config["preprocess_cfg"]}.get(section, model.get(section))[field] = value
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        convert_base(tmp_path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_fields_of_a_config_that_change_nothing_are_passed_over(tmp_path):
    kind = Kind()
    model = kind.config()
    vision = model["vision_cfg"] | {"patch_dropout": 0.5, "ls_init_value": None, "pool_type": "tok", "mlp_ratio": 3}
    write_open_clip(tmp_path, kind, vision_cfg=vision, text_cfg=model["text_cfg"] | {"pool_type": "argmax"})
    check_answers(convert(tmp_path), random_tensors(kind), kind)


def convert(folder, **options):
    convert_base(folder, folder / "ours", **options)
    return folder / "ours"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_cfg": {}, "preprocess_cfg": 3}'])
def test_a_damaged_config_is_named(text, tmp_path):
    write_open_clip(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"open_clip_config\.json"):
        convert(tmp_path)


def test_what_no_tensor_tells_is_asked_for(tmp_path):
    kind = Kind(vision=(96, 1, 3))
    write_open_clip(tmp_path, kind, config=False)
    with pytest.raises(
        ValueError, match=r"`activation`=None.*give 'quick_gelu' for weights of OpenAI, DFN.*'gelu' for"
    ):
        convert(tmp_path)
    with pytest.raises(ValueError, match="`heads`=None, and the towers' widths 96 and 64 are not multiples of 64"):
        convert(tmp_path, activation="gelu")
    with pytest.raises(ValueError, match=r"`heads`=\[5, 1\], but 5 heads do not divide the image tower's width of 96"):
        convert(tmp_path, activation="gelu", heads=[5, 1])
    with pytest.raises(ValueError, match=r"`heads`=\[3\] but there are two towers"):
        convert(tmp_path, activation="gelu", heads=[3])
    with pytest.raises(ValueError, match="`activation`='relu' is not known; choose quick_gelu or gelu"):
        convert(tmp_path, activation="relu")


class Malicious:
    """A pickle that runs a program when it is read."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return os.mkdir, (self.proof,)


def program(path):
    """OpenAI's kind of archive."""
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        (
            "a.pt",
            lambda path: torch.save({"state_dict": {"a": Malicious(path.parent / "proof")}}, path),
            "mkdir, not only",
        ),
        ("a.bin", lambda path: path.write_bytes(pickle.dumps(Malicious(path.parent / "proof"))), "cannot be read"),
        ("a.pt", program, "a TorchScript program, as OpenAI publishes its models"),
        ("a.safetensors", lambda path: path.write_bytes(b"nothing"), "is damaged"),
        ("a.pt", lambda path: path.write_bytes(b"nothing"), "damaged"),
        ("a.pt", lambda path: torch.save({"epoch": 3}, path), "contains no named tensors"),
        ("a.pth", lambda path: torch.save({"x": ONE}, path), "'x', which plain CLIP does not have"),
        ("a.onnx", lambda path: path.write_bytes(b"nothing"), "does not end with .safetensors, .bin, .pt, .pth"),
        ("a.pt", lambda path: None, "is not a file"),
    ],
)
def test_another_file_is_refused(name, write, message, tmp_path):
    path = tmp_path / name
    write(path)
    with pytest.raises(ValueError, match=message):
        convert_base(path, tmp_path / "ours", activation="gelu")
    assert not (tmp_path / "proof").exists()
    assert not (tmp_path / "ours").exists()


def test_a_folder_without_one_file_of_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"should hold one file of weights .* it has none"):
        convert(tmp_path)
    for name in ("a.pt", "b.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"it has a\.pt, b\.safetensors"):
        convert(tmp_path)


def test_tokenizers_of_other_vocabularies_are_refused(tmp_path):
    write_open_clip(tmp_path / "theirs", tokenizer=False)
    with pytest.raises(ValueError, match=r"`tokenizer`='openai/clip-vit-base-patch32' could not be loaded .*connect"):
        convert(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"holds neither tokenizer\.json"):
        convert(tmp_path / "theirs", tokenizer=tmp_path)
    with pytest.raises(
        ValueError, match=rf"ids up to 89, BOS 88 and EOS 89, but the model has {len(VOCABULARY)} words"
    ):
        convert(tmp_path / "theirs", tokenizer=GOLDEN / "clip")
    write_tokenizer(tmp_path / "large")
    (tmp_path / "large" / "vocab.json").write_text(json.dumps(VOCABULARY | {"zz": 500}))
    with pytest.raises(ValueError, match="ids up to 500"):
        convert(tmp_path / "theirs", tokenizer=tmp_path / "large")
    write_tokenizer(tmp_path / "damaged")
    (tmp_path / "damaged" / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="damaged' could not be loaded"):
        convert(tmp_path / "theirs", tokenizer=tmp_path / "damaged")
    assert not (tmp_path / "theirs" / "ours").exists()
    write_tokenizer(tmp_path / "good")
    convert(tmp_path / "theirs", tokenizer=tmp_path / "good")


def test_only_an_empty_or_new_folder_is_written_and_whole(tmp_path, monkeypatch):
    write_open_clip(tmp_path / "theirs")
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "mine").touch()
    with pytest.raises(ValueError, match=r"`folder`=.*ours' is no empty folder; choose a new one"):
        convert_base(tmp_path / "theirs", ours)
    (ours / "mine").unlink()
    save = CLIPModel.save_pretrained

    def corrupted(model, folder):
        save(model, folder)
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {"logit_scale": torch.tensor(1.0)}, folder / "model.safetensors", metadata={"format": "pt"})

    with monkeypatch.context() as patch:
        patch.setattr(CLIPModel, "save_pretrained", corrupted)
        with pytest.raises(ValueError, match="reads otherwise; try another disk"):
            convert_base(tmp_path / "theirs", ours)
    with monkeypatch.context() as patch:
        patch.setattr(module, "put_in_place", lambda *places: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            convert_base(tmp_path / "theirs", ours)
    assert not list(ours.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "theirs"}
    convert_base(tmp_path / "theirs", ours)
    names = {path.name for path in ours.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json"} <= names
    assert oct(ours.stat().st_mode) == oct((tmp_path / "theirs").stat().st_mode)


def test_on_the_command_line(tmp_path, capsys):
    write_open_clip(tmp_path / "theirs", config=False)
    file, ours = str(tmp_path / "theirs" / "open_clip_model.safetensors"), str(tmp_path / "ours")
    assert main(["convert-base", file, "--to", ours]) == 1
    assert "hf-tgpt convert-base: " in (words := capsys.readouterr().err)
    assert "--activation is not given" in words
    assert main(["convert-base", file, "--to", ours, "--activation", "gelu", "--heads", "5", "1"]) == 1
    assert "--heads=[5, 1], but 5 heads" in capsys.readouterr().err
    assert main(["convert-base", file, "--to", ours, "--activation", "gelu", "--heads", "4", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["output"] == ours
    assert facts["heads"] == [4, 2]
    assert main(["convert-base", file, "--to", ours, "--activation", "gelu"]) == 1
    assert "--to=" in capsys.readouterr().err
    assert main(["convert-base", file, "--to", ours + "2", "--activation", "gelu"]) == 0
    assert "A CLIPModel with gelu, 2 and 1 heads" in capsys.readouterr().out
