"""`unlearn demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from unlearn.commands.common import quiet_transformers


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a small model on an invented corpus and make it forget a part, with five methods",
        description="Trains a small Llama from scratch, retrains one without the forget part (the gold standard), lets "
        "GA, NPO, NPO+RT, SimNPO+RT and AltPO each make the first forget, and writes report.md, results.json and two "
        "pictures. Under 5 minutes on 2 cores; needs no download and no GPU.",
    )
    parser.add_argument("--out", default="demo-out", help="folder for the report (default: %(default)s)")
    parser.add_argument("--data", metavar="DIR", help="TOFU's files instead of the invented corpus (up to an hour)")
    parser.add_argument("--seed", type=int, default=0, help="of corpus, weights and data order (default: %(default)s)")
    parser.add_argument("--methods", help="comma-separated subset of GA, NPO, NPO+RT, SimNPO+RT, AltPO")
    parser.add_argument("--reuse-models", action="store_true", help="take OUT's finished full and gold models")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: %(default)s)")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    from unlearn.demo import run_demo

    quiet_transformers()
    run_demo(
        Path(args.out),
        data=Path(args.data) if args.data else None,
        seed=args.seed,
        methods=args.methods.split(",") if args.methods else None,
        reuse_models=args.reuse_models,
        device=args.device,
    )
    return 0
