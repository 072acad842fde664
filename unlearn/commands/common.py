"""What several commands share: options, checks of values, errors in one line, printing."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

MODEL_HELP = "folder of a model or of a LoRA adapter, or a name on the model hub"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not accepted; a number above 0 is")
    return value


def add_model_options(parser: argparse.ArgumentParser) -> None:
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=dtypes, help="of weights and activations (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument(
        "--load-in-4bit",
        action="store_true",
        help="hold the layers' matrices in 4 bits, as train's --lora-4bit does (default: in --dtype, under an adapter "
        "that was trained so as well)",
    )


def add_output_option(parser: argparse.ArgumentParser, file: str, content: str) -> None:
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help=f"store {content} as FOLDER/{file}, for `unlearn report` (default: in the run whose OUT/model this is)",
    )


def add_measuring_options(parser: argparse.ArgumentParser, *numbers: tuple[str, int, str]) -> None:
    """What the commands that measure a model have in common. numbers: (flag, default, text) of their own."""
    for flag, default, text in (
        *numbers,
        ("--generation-batch", 32, "rows generated at a time"),
        ("--max-tokens", 16384, "token budget of one forward"),
    ):
        parser.add_argument(flag, type=positive, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument(
        "--fields",
        metavar="NAME=COLUMN,...",
        help="your own column names, as question=ask,answer=reply or text=body; forget.text=body of one set alone",
    )
    parser.add_argument(
        "--window",
        type=at_least_two,
        metavar="TOKENS",
        help="cut documents (.txt files, the text column) into windows of this many tokens (default: each is one)",
    )
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")


def at_least_two(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is not accepted; a number of 2 or more is")
    return int(text)


def quiet_transformers() -> None:
    """Loading bars and advice would drown our own lines; TRANSFORMERS_VERBOSITY brings them back."""
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Whatever a library raises at a folder that is damaged becomes one line that names it."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        from unlearn.memory import is_out_of_memory

        if is_out_of_memory(error):
            raise
        raise ValueError(f"model: could not load {name!r} ({type(error).__name__}: {error})") from None


def load_tokenizer(name: str, *, trust_remote_code: bool) -> tuple[Any, int | None]:
    """(the tokenizer of a model, the longest sequence that the model takes, None where it names none)."""
    from unlearn import model

    with loading(name):
        tokenizer = model.load_tokenizer(name, trust_remote_code=trust_remote_code)
        return tokenizer, model.max_positions(name, trust_remote_code=trust_remote_code)


def load_model(args: argparse.Namespace, name: str) -> Any:
    """The model `name` as the options of add_model_options say; standard error tells when an adapter's base is not
    what it was trained with."""
    from unlearn import adapters, model, quantized

    if args.load_in_4bit:
        quantized.bitsandbytes("load-in-4bit")
    options = {"trust_remote_code": args.trust_remote_code, "in_4bit": args.load_in_4bit}
    with loading(name):
        device = model.resolve_device(args.device)
        found = model.load_model(name, dtype=args.dtype, device=device, **options)
    before, now = adapters.trained_on(name), quantized.described(found)
    if adapters.layers(found) and before != now:
        trained = f"under a base in {before}" if before else "under an unquantized base"
        print(f"{name}: the adapter was trained {trained}; its base here is in {now or args.dtype}", file=sys.stderr)
    return found


def print_metrics(values: dict[str, float], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, allow_nan=False))
        return
    width = max(len(name) for name in values)
    for name, value in values.items():
        print(f"{name:{width}}  {value:.6g}")
