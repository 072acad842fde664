"""`unlearn metrics`."""

from __future__ import annotations

import argparse
from typing import Any

from unlearn.commands.common import print_metrics


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "metrics",
        help="forget quality and model utility from evaluation logs in TOFU's format, no model",
        description="Read a log that `unlearn eval --log` or the TOFU code wrote, and print what tables show of it.",
    )
    parser.add_argument("log", metavar="LOG", help="the unlearned model's log")
    parser.add_argument("--retain", metavar="LOG", help="log of the model retrained without the forget set")
    parser.add_argument(
        "--mean",
        choices=("geometric", "arithmetic"),
        default="geometric",
        help="mean over wrong answers in the truth ratio: geometric as published numbers have it, arithmetic as the "
        "TOFU paper writes it (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    parser.set_defaults(run=_metrics)


def _metrics(args: argparse.Namespace) -> int:
    from unlearn import tofu_log

    log = tofu_log.read(args.log)
    retain = tofu_log.read(args.retain) if args.retain else None
    print_metrics(tofu_log.summary(log, retain, mean=args.mean), as_json=args.json)
    return 0
