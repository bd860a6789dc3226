"""The program `hf-tgpt`: its commands and their exit status.

A command's module, and with it torch, PEFT and transformers, is imported when the command runs; help and errors for
mistyped options do not wait for them if they need not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from typing import Any

from ..utils.version import __version__
from .options import (
    ADAPTER,
    EXIT,
    TO_LABEL,
    CommandParser,
    WrongArguments,
    add_base_model,
    add_classes,
    add_json,
    add_model,
    add_pictures,
    add_trust,
    at_least_one,
    fraction,
    port,
    underscored,
    whole_number,
)
from .words import in_options, speak_of

_DESCRIPTION = (
    "Few-shot learning with CLIP: trains adapters from a few pictures, classifies with them and exports them."
)
# Their arguments depend on the method's config or on the data, so their modules define their parsers.
PARSED_BY_THEMSELVES = {
    "train": "train an adapter and compare it with zero-shot CLIP",
    "evaluate": "test an adapter on any data set, beside zero-shot CLIP",
    "calibrate": "calibrate an adapter on held-out pictures: trusted probabilities, coverage, none of these",
    "compare": "compare methods on your pictures over shots and seeds: tables, plots, the best one",
    "describe": "write a description of each training image with a vision-language model",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, TextIOWrapper):  # without Unicode, a terminal shows \\u732b for a class name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _run(underscored(arguments))
    except WrongArguments as error:
        if "--json" in arguments:
            print(json.dumps({"error": error.message}, ensure_ascii=False))
        raise
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{str(error.filename)!r} cannot be used ({error.strerror}); name another path."
        text = in_options(text)
        print(f"hf-tgpt {arguments[0]}: {text}", file=sys.stderr)
        if "--json" in arguments:
            print(json.dumps({"error": text}, ensure_ascii=False))
        return 1


def _run(arguments: Sequence[str]) -> int:
    command = arguments[0] if arguments else ""
    args = None if command in PARSED_BY_THEMSELVES else parse(arguments)
    # Omits the source line of a warning; set before the imports, which may warn.
    warnings.formatwarning = lambda message, *place, **line: f"Note: {in_options(str(message))}\n"
    # This import takes seconds.
    module = import_module(f".{(command if args is None else args.command).replace('-', '_')}", __package__)
    if args is None:
        return module.main(arguments[1:], prog=f"hf-tgpt {command}") or 0
    return module.main(args)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command without its own parser; ends the program for wrong ones."""
    top, commands = parser()
    args, unknown = top.parse_known_args(arguments)
    commands.choices[args.command].refuse_unknown(unknown)
    speak_of(commands.choices[args.command])
    return args


class _Completion(argparse.Action):
    """Prints a shell's completion script and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, args: Any, shell: Any, option: str | None = None) -> None:
        print(import_module(".completion", __package__).script(shell))  # imports all libraries
        parser.exit()


def parser() -> tuple[CommandParser, argparse._SubParsersAction]:
    """The parser of all commands but those with their own parsers, and the commands in it."""
    top = CommandParser("hf-tgpt", description=_DESCRIPTION, epilog=f"`hf-tgpt COMMAND --help` explains one.\n\n{EXIT}")
    top.add_argument("--version", action="version", version=f"hf-tgpt {__version__}")
    top.add_argument(
        "--print_completion", action=_Completion, choices=["bash", "zsh", "tcsh"],
        help="print a script that completes commands and options in this shell (needs shtab)"
    )  # fmt: skip
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def command(name: str, help: str, examples: str) -> CommandParser:
        return commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", examples=examples)

    for name, help in PARSED_BY_THEMSELVES.items():
        commands.add_parser(name, help=help, add_help=False)

    check = command("check", "find wrong labels, duplicates, outliers and damaged pictures before training", """
hf-tgpt check pictures
hf-tgpt check pictures --output_dir checked --count 100
hf-tgpt check pictures --json > problems.json
""")  # fmt: skip
    add_pictures(check)
    check.add_argument("--output_dir", help="a folder for the page check.html, the table problems.csv and check.json, "
                       "new or from an earlier check (default: a new one in runs/)")  # fmt: skip
    check.add_argument("--count", type=at_least_one, default=24, help="entries per list on the page "
                       "(default: %(default)s)")  # fmt: skip
    check.add_argument("--cache_dir", help="the folder of stored features (default: in --output_dir)")
    add_base_model(check)
    add_json(check)
    check.lead_with("output_dir", "count", "model", "json")

    embed = command("embed", "write the image features of pictures into a file", """
hf-tgpt embed pictures --output features.npz
hf-tgpt embed pictures --output features.parquet --adapter runs/mine
""")  # fmt: skip
    add_pictures(embed)
    embed.add_argument("--output", required=True, help="a file that ends with .npz (arrays files, labels, splits and "
                       "features) or .parquet (columns file, label, split and features)")  # fmt: skip
    embed.add_argument("--adapter", help=f"use its image tower instead of the base model's: {ADAPTER}")
    add_base_model(embed)
    add_json(embed)
    embed.lead_with("output", "adapter", "model", "json")

    predict = command("predict", "classify pictures", """
hf-tgpt predict runs/mine pictures --output rows.csv
hf-tgpt predict runs/mine pictures --sort_into sorted --min_score 0.5
find pictures -name "*.jpg" | hf-tgpt predict runs/mine --list - > rows.jsonl
""")  # fmt: skip
    predict.add_argument("adapter", help=ADAPTER)
    predict.add_argument("images", nargs="*", help="files, folders of pictures at any depth, or URLs")
    predict.add_argument("--list", metavar="FILE", help="a text file of more pictures, a path per line; - is stdin")
    predict.add_argument("--output", help="a file that ends with .csv, .jsonl or .parquet; a stopped command "
                         "continues where it left off (default: JSON lines on stdout)")  # fmt: skip
    predict.add_argument(
        "--format", choices=["jsonl", "csv", "parquet"], help="(default: by the ending of --output, or jsonl)"
    )
    predict.add_argument("--sort_into", metavar="FOLDER", help="also make a folder for each class there, with links to "
                         "the pictures predicted as that class; no picture is moved")  # fmt: skip
    predict.add_argument("--min_score", type=fraction, metavar="S", help="with --sort_into: pictures whose best score "
                         "is lower go to the folder unsure (default: 0)")  # fmt: skip
    predict.add_argument("--copy", action="store_true", help="with --sort_into: copies instead of links")
    predict.add_argument(
        "--top_k", type=at_least_one, default=5, help="number of classes per picture (default: %(default)s)"
    )
    add_classes(predict)
    predict.add_argument(
        "--scores", choices=["softmax", "sigmoid"], default="softmax", help="softmax over all classes or, for "
        "SigLIP, a sigmoid per class: all low if the picture shows none of them (default: %(default)s)"
    )  # fmt: skip
    add_trust(predict)
    predict.add_argument(
        "--batch_size", type=at_least_one, default=32, help="pictures per batch (default: %(default)s)"
    )
    add_model(predict)
    add_json(predict)
    predict.lead_with("output", "sort_into", "min_score", "top_k", "class_names", "json")

    suggest = command("suggest", "choose which pictures to label next, and take the labels in", """
hf-tgpt suggest runs/mine unlabelled --count 20
hf-tgpt suggest runs/mine --answers to-label/answers.csv
""")  # fmt: skip
    suggest.add_argument("adapter", help=ADAPTER)
    suggest.add_argument("images", nargs="*", help="files, or folders of pictures at any depth, without labels")
    suggest.add_argument("--list", metavar="FILE", help="a text file of more pictures, a path per line; - is stdin")
    suggest.add_argument("--count", type=at_least_one, default=20, help="pictures to choose (default: %(default)s)")
    suggest.add_argument("--output", metavar="FOLDER", default=TO_LABEL, help="for the page suggest.html, the table "
                         "answers.csv and links to the pictures, or with --answers for the table labelled.csv; new or "
                         "from an earlier call (default: %(default)s)")  # fmt: skip
    suggest.add_argument("--answers", metavar="FILE", help="a table that the page saved or that you filled in: write "
                         "labelled.csv, which lists these pictures and those of the run, for training")  # fmt: skip
    suggest.add_argument("--cache_dir", help="the folder of stored features (default: in --output)")
    suggest.add_argument("--num_workers", type=whole_number, default=0, help="processes that decode pictures "
                         "(default: threads of this one)")  # fmt: skip
    add_model(suggest)
    add_json(suggest)
    suggest.lead_with("count", "output", "answers", "json")

    demo = command("demo", "serve a web page that classifies pictures, beside zero-shot CLIP", """
hf-tgpt demo runs/mine
hf-tgpt demo runs/mine --examples
hf-tgpt demo runs/mine --host 0.0.0.0 --port 8080
""")  # fmt: skip
    demo.add_argument("adapter", help=ADAPTER)
    demo.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    demo.add_argument("--port", type=port, default=7860, help="(default: %(default)s; 0: any free port)")
    demo.add_argument(
        "--examples", nargs="?", const=True, metavar="DATASET", help="also show the training pictures nearest to a "
        "picture, to everyone who opens the page: from this data set or, if none is named, the run's (default: off)"
    )  # fmt: skip
    demo.add_argument("--cache_dir", help="the folder of stored features of the examples (default: features in the "
                      "run's folder)")  # fmt: skip
    add_model(demo)
    add_json(demo)
    demo.lead_with("examples", "host", "port", "device")

    explain = command("explain", "plot where an adapter looks in a few pictures", """
hf-tgpt explain runs/mine pictures --output attention.png
hf-tgpt explain runs/mine cat.jpg --output cat-attention.svg
""")  # fmt: skip
    explain.add_argument("adapter", help=ADAPTER)
    add_pictures(explain)
    explain.add_argument("--output", default="attention.png", help="a file that ends with .png, .svg or .pdf (default: "
                         "%(default)s)")  # fmt: skip
    explain.add_argument("--count", type=at_least_one, default=4, help="pictures in the plot, from as many classes as "
                         "possible (default: %(default)s)")  # fmt: skip
    add_model(explain)
    add_json(explain)
    explain.lead_with("output", "count", "device", "json")

    serve = command("serve", "serve adapters over HTTP, for other programs", """
hf-tgpt serve runs/mine
hf-tgpt serve cats=runs/mine dogs=runs/my-run --host 0.0.0.0 --port 8080
""")  # fmt: skip
    serve.add_argument("adapters", nargs="+", metavar="ADAPTER", help=f"{ADAPTER}; NAME=ADAPTER names it, by default "
                       "after its folder; adapters of one base model share its memory")  # fmt: skip
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=port, default=8000, help="(default: %(default)s; 0: any free port)")
    for name, default, help in (
        ("batch", 32, "pictures that go through the model together"),
        ("wait_ms", 5, "milliseconds that a picture waits for others while the model is idle"),
        ("queue", 256, "waiting pictures of all requests; more are refused with 503"),
        ("pictures", 64, "pictures per request"),
        ("body", 32, "MiB per request"),
        ("megapixels", 50, "million pixels per picture"),
    ):
        least = whole_number if name == "wait_ms" else at_least_one
        serve.add_argument(f"--max_{name}", type=least, default=default, help=f"{help} (default: %(default)s)")
    serve.add_argument("--timeout", type=at_least_one, default=30, help="seconds per request (default: %(default)s)")
    add_model(serve)
    add_json(serve)
    serve.lead_with("host", "port", "max_batch", "device")

    info = command("info", "show what an adapter contains", """
hf-tgpt info runs/mine
hf-tgpt info runs/mine --json
""")  # fmt: skip
    info.add_argument("adapter", help=ADAPTER)
    add_json(info)

    export = command("export", "export a model with fixed classes for programs without hf-tgpt", """
hf-tgpt export runs/mine model.onnx --int8 pictures
hf-tgpt export runs/mine model.onnx --dtype fp16
hf-tgpt export runs/my-coop-run folder --format transformers
""")  # fmt: skip
    export.add_argument("adapter", help=ADAPTER)
    export.add_argument("output", help="a file that ends with .onnx; for --format transformers a folder")
    export.add_argument("--format", choices=["onnx", "transformers"], default="onnx", help="(default: %(default)s)")
    export.add_argument(
        "--int8", metavar="DATASET", help="also write NAME.int8.onnx, and compare both on the test pictures of this "
        "data set: a folder, a file, a Hub id or a known name, as in training"
    )  # fmt: skip
    add_classes(export)
    add_model(export)
    add_json(export)
    export.lead_with("format", "int8", "class_names", "json")

    push = command("push", "publish an adapter on the Hub, as a model or as a web page (Space)", """
hf-tgpt push runs/mine me/my-adapter --private
hf-tgpt push runs/mine me/my-page --space
""")  # fmt: skip
    push.add_argument("adapter", help="a folder that training wrote")
    push.add_argument("repository", metavar="USER/NAME", help="where to publish it; created if missing")
    kinds = push.add_mutually_exclusive_group()
    kinds.add_argument("--space", action="store_true", help="as a Space: the page of `hf-tgpt demo`, with the adapter")
    kinds.add_argument("--endpoint", action="store_true", help="add handler.py and requirements.txt, with which "
                       "Inference Endpoints serve it")  # fmt: skip
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--revision", help="the branch (default: main)")
    push.add_argument("--package", metavar="REQUIREMENT", help="what --space and --endpoint install, such as the URL "
                      "of a wheel (default: the released hf-tgpt)")  # fmt: skip
    add_json(push)
    push.lead_with("space", "endpoint", "private", "json")

    convert = command("convert", "convert a checkpoint of a method's released code to an adapter", """
hf-tgpt convert model.pth.tar-5 my-adapter --method maple --model openai/clip-vit-base-patch16 \\
    --class_names_file names.txt
hf-tgpt convert prompt_learner.pth.tar-50 cls_head.pth.tar-50 my-adapter --method tgpt \\
    --model openai/clip-vit-base-patch16 --class_names cat dog
""")  # fmt: skip
    convert.add_argument("checkpoint", nargs="+", help="model.pth.tar-N; for TGP-T, of prompt_learner and cls_head")
    convert.add_argument("output", help="the folder of the adapter")
    convert.add_argument("--method", required=True, help="maple, tgpt, coop, cocoop or ivlp (also VPT)")
    convert.add_argument("--model", required=True, help="the CLIP it was trained on: a Hub id or folder")
    add_classes(convert, "in the order of the labels in training")
    add_json(convert)
    convert.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE",
        help='config fields that cannot be read from the tensors: initial_text="a photo of a", class_position=front'
    )  # fmt: skip
    convert.lead_with("method", "model", "class_names", "class_names_file", "set")

    base = command("convert-base", "convert open_clip's files of a CLIP to a base model of transformers", """
hf-tgpt convert-base bioclip --to bioclip-transformers
hf-tgpt convert-base bioclip/open_clip_model.safetensors --to my-clip --activation gelu
""")  # fmt: skip
    base.add_argument(
        "file", help=".safetensors, .bin, .pt or .pth, or its folder; open_clip_config.json there is read"
    )
    base.add_argument("--to", required=True, metavar="FOLDER", help="a new folder, to be used as --model")
    base.add_argument("--activation", choices=["quick_gelu", "gelu"], help="needed without open_clip_config.json")
    base.add_argument(
        "--heads", nargs=2, type=at_least_one, metavar=("VISION", "TEXT"),
        help="attention heads (default: from open_clip_config.json; without it as in open_clip's models: of width "
        "64, and 16 in image towers wider than 1024)"
    )  # fmt: skip
    base.add_argument(
        "--tokenizer", help="a Hub id or folder (default: the one beside the file, else openai/clip-vit-base-patch32)"
    )
    add_json(base)
    base.lead_with("to", "activation", "tokenizer")
    return top, commands
