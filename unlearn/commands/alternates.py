"""`unlearn alternates`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from unlearn.commands.common import (
    MODEL_HELP,
    add_model_options,
    load_model,
    load_tokenizer,
    positive,
    quiet_transformers,
)


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "alternates",
        help="sample alternate answers to the forget rows from the model itself, for altpo and simpo",
        description="Write JSON lines of the forget rows with `alternates`, which `unlearn train --alternates` reads.",
    )
    parser.add_argument("--model", required=True, help=f"the model to unlearn: {MODEL_HELP}")
    parser.add_argument("--forget", required=True, help="forget set: a file of questions with answers, tofu:SPLIT, ...")
    parser.add_argument("--fields", metavar="NAME=COLUMN,...", help="your own column names: question=ask,answer=reply")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines, written batch by batch")
    parser.add_argument("--resume", action="store_true", help="go on with an --output of the same settings")
    for flag, default, text in (
        ("--count", 5, "alternates of each row"),
        ("--max-new-tokens", 200, "length of an alternate"),
        ("--batch-size", 8, "rows generated at a time, each --count times"),
    ):
        parser.add_argument(flag, type=positive, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of the sampling, above 0 (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    add_model_options(parser)
    parser.set_defaults(run=_alternates)


def _alternates(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from unlearn.alternates import write_alternates
    from unlearn.data import load_rows
    from unlearn.files import check_writable
    from unlearn.model import resolve_device

    output = Path(args.output)
    if not 0 < args.temperature < math.inf:
        raise ValueError(f"temperature is {args.temperature}; a number above 0 is accepted")
    if output.is_dir():
        raise ValueError(f"output: {output} is a folder; a file is accepted")
    if output.exists() and not args.resume:
        raise ValueError(f"output: {output} exists; --resume goes on with it")
    quiet_transformers()
    resolve_device(args.device)  # before anything is read
    rows = load_rows(args.forget, role="forget", fields=args.fields)
    document = next((row.key for row in rows if row.document), None)
    if document is not None:
        raise ValueError(f"forget: {document} is a document, and an alternate answers a question")
    tokenizer, longest = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    if longest is not None and args.max_new_tokens >= longest:
        raise ValueError(f"max-new-tokens is {args.max_new_tokens}; the model has {longest} positions in all")
    check_writable("output", output.parent)
    model = load_model(args, args.model)
    with tqdm(total=len(rows), desc="alternates", unit="row", leave=False) as bar:
        done = write_alternates(
            model,
            tokenizer,
            rows,
            output,
            count=args.count,
            temperature=args.temperature,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            seed=args.seed,
            max_length=None if longest is None else longest - args.max_new_tokens,
            progress=bar.update,
        )
    there = f", {done} of them before" if done else ""
    print(f"{args.count} alternates to each of {len(rows)} rows{there}: {output}")
    return 0
