"""What is shown of an adapter is what it computes with."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, METHODS, ImageProcessor, make_classifier, make_clip, shake
from PIL import Image

from hf_tgpt import load_classifier, load_clip
from hf_tgpt.cli.main import main
from hf_tgpt.data import ImageTransform
from hf_tgpt.encoders import encoder_of
from hf_tgpt.inference import explain
from hf_tgpt.inference.classifier import Classifier

pytestmark = pytest.mark.draws

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
PROCESSOR = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture
def classifier(load_clip):
    def make(name, **fields):
        torch.manual_seed(1)
        fields = (METHODS[name].fields if name in METHODS else {}) | fields
        model = make_classifier(name, load_clip(), CLASS_NAMES, **fields).eval()
        shake(model)
        return Classifier(model, ImageTransform.from_processor(ImageProcessor(**PROCESSOR), train=False))

    return make


@pytest.mark.parametrize("name", ["maple", "coop", "cocoop", "mutual_prompt", "ivlp"])
def test_a_prompt_that_is_a_word_is_nearest_to_it(name, classifier):
    asked = classifier(name)
    clip, learner = asked.model.get_base_model(), asked.model.learner
    (word,) = learner.tokenizer(encoder_of(clip))("forest")["input_ids"][1:-1]
    prompts = learner.text_prompts if torch.is_tensor(learner.text_prompts) else learner.text_prompts[0]
    prompts.data[0] = encoder_of(clip).words()[word]
    words = explain.nearest_words(asked, count=3)["text"]
    assert len(words) == len(prompts)
    assert [len(row) for row in words] == [3] * len(prompts)
    assert words[0][0] == ("forest", pytest.approx(0, abs=1e-3))
    assert words[0] == sorted(words[0], key=lambda pair: pair[1])


def test_class_specific_prompts_are_listed_by_class_and_tgpts_by_sentence(classifier):
    assert list(explain.nearest_words(classifier("coop", class_specific=True))) == CLASS_NAMES
    words = explain.nearest_words(classifier("tgpt"), PICTURE, count=2)
    assert {name: len(rows) for name, rows in words.items()} == {"category": 6, "content": 8}
    with pytest.raises(ValueError, match="`image`=None"):
        explain.nearest_words(classifier("tgpt"))
    with pytest.raises(ValueError, match="learns no text tokens"):
        explain.nearest_words(classifier("ivlp", text_prompt_length=0))
    with pytest.raises(ValueError, match="LINEAR_PROBE as configured learns no text tokens"):
        explain.nearest_words(classifier("linear_probe"))


def test_the_bonders_weights_are_those_that_make_its_prompts(classifier):
    bonder = classifier("tgpt").model.learner.content_bonder
    width = bonder.cross_out.in_features
    queries, tokens = torch.randn(1, 8, width), torch.randn(3, 5, width)
    weights = bonder.attention(queries, tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 8))
    own = queries + bonder.self_attention(bonder.norm_self(queries))
    own = own + bonder.cross_out(weights @ bonder.norm_image(tokens))
    torch.testing.assert_close(own + bonder.mlp(bonder.norm_mlp(own)), bonder(queries, tokens))


def test_bonder_maps_lie_over_the_patches(classifier):
    maps = explain.bonder_attention(classifier("tgpt"), PICTURE)
    assert {name: tuple(weights.shape) for name, weights in maps.items()} == {
        "category": (6, 2, 2),
        "content": (8, 2, 2),
    }
    assert all((weights.sum((1, 2)) < 1).all() for weights in maps.values())
    with pytest.raises(ValueError, match="MAPLE has no Bonder"):
        explain.bonder_attention(classifier("maple"), PICTURE)


@pytest.mark.parametrize("name", ["maple", "tgpt", "mutual_prompt", "lora", "zero-shot"])
def test_image_attention_shows_every_method(name, classifier):
    asked = classifier(name)
    before = asked(PICTURE)
    weights = explain.image_attention(asked, PICTURE)
    assert weights.shape == (4, 2, 2)
    assert (weights.sum((1, 2)) < 1).all()
    assert (explain.image_attention(asked, PICTURE, layer=0) != weights).any()
    assert asked(PICTURE) == before


def test_image_attention_is_transformers_own_where_there_are_no_prompts(classifier, load_clip):
    plain = load_clip(attn_implementation="eager").vision_model
    asked = classifier("zero-shot")
    with torch.no_grad():
        expected = plain(asked.transform(PICTURE)[None], output_attentions=True).attentions[-1][0, :, 0, 1:]
    torch.testing.assert_close(explain.image_attention(asked, PICTURE).flatten(1), expected)


def test_chosen_classes_are_the_most_relevant_and_share_the_prompt(classifier):
    asked = classifier("mutual_prompt", top_k=2)
    used, relevance = [], asked.model.learner.relevance
    asked.model.learner.relevance = lambda *features: used.append(relevance(*features)) or used[-1]
    asked(PICTURE)
    chosen = explain.chosen_classes(asked, PICTURE)
    assert [part["score"] for part in chosen] == pytest.approx(used[0][0].topk(2).values.tolist())
    assert len(chosen) == 2
    assert sum(part["score"] for part in chosen) == pytest.approx(1)
    assert {part["label"] for part in chosen} <= set(CLASS_NAMES)
    alike = explain.chosen_classes(classifier("mutual_prompt", relevance_weighting=False), PICTURE)
    assert [part["score"] for part in alike] == pytest.approx([0.25] * 4)
    with pytest.raises(ValueError, match="no visual prompt made of class texts"):
        explain.chosen_classes(classifier("cocoop"), PICTURE)


def test_a_figure_shows_the_picture_and_every_map(classifier, tmp_path):
    asked = classifier("tgpt")
    seen = explain.as_seen(asked, PICTURE)
    assert seen.size == (32, 32)
    torch.testing.assert_close(asked.transform(seen), asked.transform(PICTURE), atol=0.02, rtol=0)
    maps = {name: weights.mean(0) for name, weights in explain.bonder_attention(asked, PICTURE).items()}
    figure = explain.attention_figure(asked, PICTURE, maps)
    assert [axes.get_title() for axes in figure.axes] == ["", "category", "content"]
    figure.savefig(tmp_path / "attention.png")
    with Image.open(tmp_path / "attention.png") as written:
        assert written.size[0] > 500


@pytest.fixture
def run_folder(tmp_path):
    """A saved adapter of cats and dogs, and a folder of pictures of both, one of them damaged."""
    clip = load_clip(make_clip("plain", tmp_path / "base")).eval()
    make_classifier("tgpt", clip, ["cat", "dog"], **METHODS["tgpt"].fields).save_pretrained(tmp_path / "run")
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            PICTURE.save(tmp_path / "pictures" / name / f"{name}-{i}.png")
    (tmp_path / "pictures" / "cat" / "cat-0.png").write_bytes(b"\x89PNG")
    return tmp_path


def explained(capsys, *arguments):
    status = main(["explain", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_the_command_plots_pictures_of_every_class_and_names_a_damaged_one(run_folder, capsys):
    output = run_folder / "new" / "attention.svg"
    pictures = run_folder / "pictures"
    status, facts = explained(capsys, run_folder / "run", pictures, "--count", 3, "--output", output)
    assert status == 3
    names = [os.path.basename(picture["image"]) for picture in facts["pictures"]]
    assert names == ["dog-0.png", "cat-1.png", "dog-1.png"]
    assert [picture["class"] for picture in facts["pictures"]] == ["dog", "cat", "dog"]
    assert ["cat-0.png" in reason for reason in facts["skipped"]] == [True]
    assert output.stat().st_size > 5_000
    classifier = load_classifier(run_folder / "run", base_model=str(run_folder / "base"))
    (answer,) = classifier(PICTURE, top_k=1)
    assert [picture["label"] for picture in facts["pictures"]] == [answer["label"]] * 3


def test_the_command_takes_one_picture_without_a_label(run_folder, capsys, monkeypatch):
    monkeypatch.chdir(run_folder)
    status, facts = explained(capsys, "run", "pictures/dog/dog-0.png")
    assert (status, facts["output"], len(facts["pictures"])) == (0, "attention.png", 1)
    assert facts["pictures"][0]["class"] is None
    assert (run_folder / "attention.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pictures", "--output", "attention.txt"], "none of .png, .svg and .pdf"),
        (["pictures/cat/cat-0.png"], "none of 1 can be read"),
    ],
)
def test_the_command_refuses_what_it_cannot_plot(arguments, words, run_folder, capsys, monkeypatch):
    monkeypatch.chdir(run_folder)
    status, facts = explained(capsys, "run", *arguments)
    assert status == 1
    assert words in facts["error"]
