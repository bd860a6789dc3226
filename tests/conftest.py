"""Tiny random CLIPs of different shapes on disk, and one row for each method. Nothing here needs the network."""

import copy
import functools
import os
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the models are so small that threads only wait for each other

import datasets
import huggingface_hub
import pytest
import torch
import transformers
from hub_server import Hub
from huggingface_hub import constants
from peft import PeftConfig, get_peft_model
from PIL import Image as PILImage
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    MetaClip2Config,
    MetaClip2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from hf_tgpt import (
    CLAPConfig,
    CLIPAdapterConfig,
    CoCoOpConfig,
    CoOpConfig,
    GDAConfig,
    IVLPConfig,
    KgCoOpConfig,
    LinearProbeConfig,
    LPPlusPlusConfig,
    MaPLeConfig,
    MMRLConfig,
    MutualPromptConfig,
    ProKeRConfig,
    PromptSRCConfig,
    TaskResConfig,
    TGPTConfig,
    TipAdapterConfig,
    ZSLPConfig,
    config_class,
    fit,
)
from hf_tgpt.adapters.feature_head import FeatureHead
from hf_tgpt.cli.main import main
from hf_tgpt.evaluation import plots
from hf_tgpt.utils.compat import pil_image_processor

torch.set_num_threads(1)

ImageProcessor = pil_image_processor()
TESTS = Path(__file__).parent
ROOT = TESTS.parent
GOLDEN = TESTS / "golden"
CLASS_NAMES = ["cat", "red circle", "blue striped square", "forest"]


def many_names(count):
    """Up to a hundred names, each of two words that the tiny models' tokenizers know."""
    words = ["cat", "dog", "circle", "forest", "red", "blue", "square", "photo", "green", "tree"]
    return [f"{first} {second}" for first in words for second in words][:count]


@dataclass(frozen=True)
class Method:
    """One row of the matrix of methods x promises."""

    config_class: type[PeftConfig]
    fields: dict = field(default_factory=dict)
    parameters: int = 0  # tensors that are trained, on the "plain" shape
    buffers: int = 0  # tensors that are fitted and not trained
    open: bool = True  # answers CLIP's own call and takes new class names
    conditioned: bool = False  # has text features for each image only
    prompts: bool = True  # puts learned tokens into sentences
    fused: bool = False  # has a second answer for trained classes, which the model's own call does not give

    def config(self, class_names=CLASS_NAMES, **fields):
        return self.config_class(class_names=class_names, **(self.fields | fields))

    @property
    def tensors(self):
        """How many a saved adapter has."""
        return self.parameters + self.buffers

    def has(self, name):
        """Whether its config has a field of this name."""
        return name in self.config_class.__dataclass_fields__


METHODS = {
    "maple": Method(MaPLeConfig, {"prompt_depth": 2}, parameters=6),
    "tgpt": Method(TGPTConfig, {"num_category_queries": 6, "num_content_queries": 8}, parameters=39, open=False),
    "coop": Method(CoOpConfig, {"prompt_length": 1, "initial_text": "a photo of a"}, parameters=1),
    "cocoop": Method(CoCoOpConfig, {"reduction": 2}, parameters=5, conditioned=True),
    "mutual_prompt": Method(MutualPromptConfig, {"top_k": 2, "reduction": 2}, parameters=10, conditioned=True),
    "ivlp": Method(IVLPConfig, {"text_prompt_depth": 2, "vision_prompt_depth": 2}, parameters=4),
    "kgcoop": Method(KgCoOpConfig, {"prompt_length": 1, "anchor_weight": 0.5}, parameters=1),
    "promptsrc": Method(PromptSRCConfig, {"text_prompt_depth": 2, "vision_prompt_depth": 2}, parameters=4),
    "mmrl": Method(MMRLConfig, {"num_tokens": 2, "token_width": 8}, parameters=6, fused=True),
    "linear_probe": Method(LinearProbeConfig, parameters=2, open=False, prompts=False),
    "gda": Method(GDAConfig, buffers=3, open=False, prompts=False),
    "tip_adapter": Method(TipAdapterConfig, {"alpha": 2.0, "search": False}, buffers=2, open=False, prompts=False),
    "proker": Method(ProKeRConfig, {"beta": 3.0, "search": False}, buffers=2, open=False, prompts=False),
    "zs_lp": Method(ZSLPConfig, parameters=1, open=False, prompts=False),
    "clap": Method(CLAPConfig, parameters=1, open=False, prompts=False),
    "lp_plus_plus": Method(LPPlusPlusConfig, parameters=3, open=False, prompts=False),
    "task_res": Method(TaskResConfig, parameters=1, open=False, prompts=False),
    "clip_adapter": Method(CLIPAdapterConfig, {"residual_ratio": 0.5}, parameters=2, prompts=False),
}
# Those that are fitted to frozen features.
HEADS = [name for name in METHODS if not METHODS[name].config_class.trains]
# Those that read class sentences.
READERS = [name for name in METHODS if METHODS[name].prompts]

# Widths, depths, context, patch, projection: no two alike.
SHAPES = {
    "plain": dict(text=(32, 2), vision=(48, 3), projection=32, context=30, image=32, patch=16),
    "narrow_projection": dict(text=(40, 3), vision=(24, 2), projection=16, context=24, image=24, patch=8),
    "legacy_eos": dict(text=(64, 2), vision=(32, 4), projection=64, context=77, image=48, patch=16),
    "metaclip_2": dict(text=(48, 2), vision=(40, 2), projection=24, context=32, image=32, patch=8),
    # transformers' pipelines fill SigLIP's sentences up to 64 tokens; its projection is as wide as its image tower.
    "siglip": dict(text=(48, 2), vision=(40, 2), projection=40, context=64, image=32, patch=8),
    "chinese_clip": dict(text=(48, 2), vision=(40, 2), projection=24, context=40, image=32, patch=8),
}
# What a random SigLIP is to have of a trained one.
STARTS = {"logit_scale": 2.0, "logit_bias": -3.0}
CLIPS = [shape for shape in SHAPES if shape not in ("siglip", "chinese_clip")]


def make_clip(shape: str, folder: Path) -> str:
    """Writes a random CLIP, or another dual encoder, with its tokenizer's files to `folder`."""
    sizes = SHAPES[shape]
    config_class, model_class, tokenizer = {
        "metaclip_2": lambda: (MetaClip2Config, MetaClip2Model, metaclip_tokenizer()),
        "siglip": lambda: (SiglipConfig, SiglipModel, siglip_tokenizer()),
        "chinese_clip": lambda: (ChineseCLIPConfig, ChineseCLIPModel, chinese_tokenizer()),
    }.get(shape, lambda: (CLIPConfig, CLIPModel, AutoTokenizer.from_pretrained(GOLDEN / "clip")))()
    # OpenAI's first configs name token 2 as EOS and mean the highest id, which CLIP looks for when it reads a 2.
    eos = 2 if shape == "legacy_eos" else tokenizer.eos_token_id

    def tower(width, layers):
        return dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4)

    config = config_class(
        projection_dim=sizes["projection"],
        text_config=tower(*sizes["text"])
        | dict(
            vocab_size=len(tokenizer),
            max_position_embeddings=sizes["context"],
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=eos,
            pad_token_id=tokenizer.pad_token_id,
            **({"projection_size": sizes["projection"]} if shape == "siglip" else {}),
        ),
        vision_config=tower(*sizes["vision"]) | dict(image_size=sizes["image"], patch_size=sizes["patch"]),
    )
    model = model_class(config)
    chance = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():  # the same with every version of transformers
        if weight.ndim > 1 or name.endswith("class_embedding"):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5, generator=chance)
        elif shape == "siglip" and name in STARTS:
            nn.init.constant_(weight, STARTS[name])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": sizes["image"], "width": sizes["image"]}
    processor = {
        "siglip": lambda: pil_image_processor("SiglipImageProcessor")(size=square),
        "chinese_clip": lambda: pil_image_processor("ChineseCLIPImageProcessor")(size=square, crop_size=square),
    }.get(shape, lambda: ImageProcessor(size={"shortest_edge": sizes["image"]}, crop_size=square))()
    processor.save_pretrained(folder)
    return str(folder)


# Words of other languages: those that begin a word after a space, and those of scripts that have none.
SPACED = ["صورة", "قطة", "كلب", "תמונה", "חתול", "כלב", "ein", "foto", "von", "grün", "hündin", "kater"]
UNSPACED = ["ภาพ", "แมว", "หมา", *"一张猫狗的照片只红色圆形。"]


def known_words():
    """The words of the golden tokenizer, without the mark of their end."""
    golden = AutoTokenizer.from_pretrained(GOLDEN / "clip").get_vocab()
    return sorted({word.removesuffix("</w>") for word in golden if word.removesuffix("</w>").isalnum()})


def sentence_pieces(special, sentence, *more_normalizers):
    """A tokenizer in the manner of SentencePiece, in lower case, which knows words of many languages."""
    pieces = [*special, *(f"▁{word}" for word in [*known_words(), *SPACED]), "▁", *".,", *UNSPACED]
    vocabulary = [(piece, -1.0) for piece in dict.fromkeys(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=special.index("<unk>")))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *more_normalizers])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    named = [(token, special.index(token)) for token in special if token in sentence.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=sentence, special_tokens=named)
    return tokenizer


def metaclip_tokenizer():
    """MetaCLIP 2's special tokens: BOS is 0, padding 1 and EOS really is 2."""
    tokenizer = sentence_pieces(["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>")
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def siglip_tokenizer(end: str = "</s>", padding: str = "</s>"):
    """SigLIP's special tokens: no BOS, padding that may be EOS; punctuation is dropped."""
    special = list(dict.fromkeys([padding, end, "<unk>"]))
    tokenizer = sentence_pieces(special, f"$A {end}", normalizers.Replace(Regex(r"\p{P}"), ""))
    names = dict(eos_token=end, pad_token=padding, unk_token="<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids"], model_max_length=64, **names
    )


def chinese_tokenizer():
    """BERT's: CLS before and SEP behind a sentence, Chinese characters as words of their own, words in pieces."""
    normalizer = normalizers.BertNormalizer()  # takes accents off
    words = [*known_words(), *map(normalizer.normalize_str, SPACED)]
    pieces = [*words, *(f"##{word}" for word in words), *".,", *UNSPACED]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *pieces]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def pooled(answer):
    """Of the answer to get_text_features or get_image_features the features, which transformers 4 gives as they are."""
    return answer if isinstance(answer, torch.Tensor) else answer.pooler_output


# The files with the slowest tests. They come first, so that no worker is left alone with one at the end.
SLOW = ("training/test_processes.py", "training/test_faults.py", "training/test_soak.py", "inference/test_export.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not str(item.path).endswith(SLOW))


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """What `datasets` and the folder index cache in the tests goes with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(autouse=True)
def no_drawing(request, monkeypatch):
    """Drawing takes a third of a short run, so pictures are empty but in the tests that are about them."""
    if request.node.get_closest_marker("draws") is None:
        monkeypatch.setattr(plots, "_draw", _write_empty_picture)


def _write_empty_picture(figure, path):
    PILImage.new("RGB", (2, 2), "white").save(path, "PNG")
    return set()  # characters that no font has


@pytest.fixture(scope="session")
def clip_folders(tmp_path_factory):
    return {shape: make_clip(shape, tmp_path_factory.mktemp(shape)) for shape in SHAPES}


@pytest.fixture
def load_clip(clip_folders):
    """load_clip("plain") -> a fresh model in evaluation mode."""

    def load(shape="plain", **kwargs):
        if kwargs:
            return AutoModel.from_pretrained(clip_folders[shape], **kwargs).eval()
        return copy.deepcopy(loaded(clip_folders[shape]))

    return load


@functools.cache
def loaded(folder):
    """A model of which tests get copies, in a quarter of the time that loading takes."""
    return AutoModel.from_pretrained(folder).eval()


def close_session():
    """Has the Hub's client ask again whether it is offline, and where the Hub is."""
    (getattr(huggingface_hub, "close_session", None) or huggingface_hub.utils.reset_sessions)()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The loopback Hub in place of the real one, for this test alone, with the token of "me" and an empty cache."""
    with Hub() as hub:
        close_session()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", False, raising=False)  # transformers 4's
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE  # where huggingface_hub before 1.0 looks for it
        monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.endpoint)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # made anew, with this endpoint
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield hub
        close_session()


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture(params=[name for name in METHODS if METHODS[name].parameters])
def trained(request):
    return METHODS[request.param]


@pytest.fixture(params=[name for name in METHODS if name not in HEADS])
def stepped(request):
    return METHODS[request.param]


@pytest.fixture(params=READERS)
def reader(request):
    return METHODS[request.param]


@pytest.fixture
def adapt(load_clip):
    """adapt(method) -> a PeftModel on a fresh tiny CLIP, in evaluation mode, with weights that are not the start's."""

    def make(method, shape="plain", seed=1, **fields):
        torch.manual_seed(seed)
        model = get_peft_model(load_clip(shape), method.config(**fields)).eval()
        shake(model)
        return model

    return make


def shake(model):
    """Moves every adapter weight, and fits what is no weight, so that nothing passes by being where it started."""
    if isinstance(learner := getattr(model, "learner", None), FeatureHead) and not list(learner.parameters()):
        count = len(model.class_names)
        pictures = torch.randn(pixels(model, 3 * count).shape)
        fit(model, pictures, torch.arange(3 * count) % count)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def pixels(model, count=3, seed=0):
    """A batch of random pictures of the model's size."""
    size = model.config.vision_config.image_size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def token_ids(model, sentences):
    """Padded ids, as a user of the model would make them."""
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    padding = "max_length" if model.config.model_type == "siglip" else True
    return tokenizer(sentences, padding=padding, return_tensors="pt").input_ids


def make_classifier(method, clip, class_names, **fields):
    """A method on a base model, to be trained."""
    return config_class(method)(class_names=class_names, **fields).build(clip)


class Failed(Exception):
    """What a program said on stderr before it ended with status 1."""


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of pictures as people have them: splits, class folders, JPEG, one of them grey."""
    folder = tmp_path_factory.mktemp("pictures")
    colours = {"ripe_tomato": (210, 30, 20), "lime": (120, 200, 40)}
    for split, count, width in (("train", 5, 80), ("val", 2, 90), ("test", 4, 100)):
        for name, colour in colours.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = PILImage.new("RGB", (width + i, 70), tuple(min(255, v + 5 * i) for v in colour))
                (image.convert("L") if i == 4 else image).save(folder / split / name / f"{i}.jpg")
    return folder


@pytest.fixture
def run_command(capsys):
    """run_command("train", *arguments) runs a command of hf-tgpt in this process and returns what it printed."""

    def run(command, *arguments):
        try:
            status = main([command, *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        if status:
            raise Failed(err) if status == 1 else SystemExit(status)
        return out

    return run
