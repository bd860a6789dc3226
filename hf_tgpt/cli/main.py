"""The program `hf-tgpt`: which commands there are, and their exit status.

A command's module, and with it torch, PEFT and transformers, is imported when the command runs; help and a mistyped
option do not wait for them, where they need not.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from .options import ADAPTER, CommandParser, add_classes, add_json, add_model, at_least_one, port, underscored
from .words import in_options, speak_of

_DESCRIPTION = (
    "Few-shot learning with CLIP: trains adapters from a few pictures, classifies with them, takes them elsewhere."
)
# Their arguments depend on the method's config or on the data, so their modules make and explain them.
_PARSED_BY_THEMSELVES = {
    "train": "train an adapter, and compare it with zero-shot CLIP",
    "evaluate": "an adapter on any data set, beside zero-shot CLIP",
    "compare": "methods on your pictures, over shots and seeds: a table, pictures, the best one",
    "describe": "a description of each training image, by a model that looks at pictures",
}
_EXIT = (
    "exit status: 0 done; 1 failed (of a comparison: any run); 2 wrong arguments; 3 done, but some files could not be "
    "read and were skipped; 130 stopped by Ctrl-C; 143 training or comparison stopped by SIGTERM"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    arguments = underscored(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else ""
    args = None if command in _PARSED_BY_THEMSELVES else parse(arguments)
    # Without the line of code that a warning comes from; before the imports, which may warn.
    warnings.formatwarning = lambda message, *place, **line: f"Note: {in_options(str(message))}\n"
    try:  # what is imported here takes seconds
        name = command if args is None else args.command
        module = import_module(f".{name.replace('-', '_')}", __package__)
        if args is None:
            return module.main(arguments[1:], prog=f"hf-tgpt {command}") or 0
        return module.main(args)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{str(error.filename)!r} cannot be used ({error.strerror}); name another path."
        print(f"hf-tgpt {command}: {in_options(text)}", file=sys.stderr)
        return 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command that does not parse them by itself; ends the program for wrong ones."""
    top, commands = parser()
    args, unknown = top.parse_known_args(arguments)
    commands.choices[args.command].refuse_unknown(unknown)
    speak_of(commands.choices[args.command])
    return args


def parser() -> tuple[CommandParser, argparse._SubParsersAction]:
    """The parser of all commands but those that parse by themselves, and the commands in it."""
    top = CommandParser("hf-tgpt", description=_DESCRIPTION, epilog=_EXIT, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help, epilog=_EXIT, allow_abbrev=False)

    for name, help in _PARSED_BY_THEMSELVES.items():
        commands.add_parser(name, help=help, add_help=False)

    predict = command("predict", "the classes of pictures, a line each")
    predict.add_argument("adapter", help=ADAPTER)
    predict.add_argument("images", nargs="*", help="files, folders of pictures at any depth, or URLs")
    predict.add_argument("--list", metavar="FILE", help="a file that lists more of them, a line each; - is stdin")
    predict.add_argument("--output", help="a file that ends with .csv or .jsonl; killed and called again, it is gone "
                         "on with (default: JSON lines on stdout)")  # fmt: skip
    predict.add_argument("--format", choices=["jsonl", "csv"], help="(default: by the name of the output, or jsonl)")
    predict.add_argument(
        "--top_k", type=at_least_one, default=5, help="classes listed of a picture (default: %(default)s)"
    )
    add_classes(predict)
    predict.add_argument(
        "--scores", choices=["softmax", "sigmoid"], default="softmax", help="of the classes asked about together, or "
        "of SigLIP each class by itself: all low where the picture shows none of them (default: %(default)s)"
    )  # fmt: skip
    predict.add_argument(
        "--batch_size", type=at_least_one, default=32, help="pictures at a time (default: %(default)s)"
    )
    add_model(predict)

    demo = command("demo", "a web page that classifies the pictures dropped on it, beside zero-shot CLIP")
    demo.add_argument("adapter", help=ADAPTER)
    demo.add_argument("--host", default="127.0.0.1", help="the address it answers at (default: %(default)s)")
    demo.add_argument("--port", type=port, default=7860, help="(default: %(default)s; 0: any that is free)")
    add_model(demo)

    info = command("info", "what is in an adapter")
    info.add_argument("adapter", help=ADAPTER)
    add_json(info)

    export = command("export", "a model for programs without hf-tgpt, with its classes frozen")
    export.add_argument("adapter", help=ADAPTER)
    export.add_argument("output", help="a file that ends with .onnx; a folder for plain transformers")
    export.add_argument("--format", choices=["onnx", "transformers"], default="onnx", help="(default: %(default)s)")
    export.add_argument(
        "--int8", metavar="DATASET", help="also write NAME.int8.onnx, and compare both on the test pictures of this "
        "data set: a folder, a file, a Hub id or a known name, as in training"
    )  # fmt: skip
    add_classes(export)
    add_model(export)
    add_json(export)

    convert = command("convert", "an adapter of a research release's checkpoint")
    convert.add_argument("checkpoint", nargs="+", help="model.pth.tar-N; of TGP-T those of prompt_learner and cls_head")
    convert.add_argument("output", help="the folder of the adapter")
    convert.add_argument("--method", required=True, help="maple, tgpt, coop, cocoop or ivlp (also VPT)")
    convert.add_argument("--model", required=True, help="the CLIP it was trained on: a Hub id or folder")
    add_classes(convert, "in the order of the labels that it was trained with")
    add_json(convert)
    convert.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE",
        help='fields of the config that the tensors do not tell: initial_text="a photo of a", class_position=front'
    )  # fmt: skip

    base = command("convert-base", "open_clip's files of a plain CLIP as a base model of transformers")
    base.add_argument(
        "file", help=".safetensors, .bin, .pt or .pth, or its folder; open_clip_config.json there is read"
    )
    base.add_argument("--to", required=True, metavar="FOLDER", help="a new folder, to be named with --model")
    base.add_argument("--activation", choices=["quick_gelu", "gelu"], help="needed without open_clip_config.json")
    base.add_argument(
        "--heads", nargs=2, type=at_least_one, metavar=("VISION", "TEXT"),
        help="attention heads (default: as open_clip_config.json says; without it as in open_clip's models, of width "
        "64 each, and 16 in image towers wider than 1024)"
    )  # fmt: skip
    base.add_argument(
        "--tokenizer", help="a Hub id or folder (default: that beside the file, or else openai/clip-vit-base-patch32)"
    )
    add_json(base)
    return top, commands
