"""`unlearn report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="runs side by side as one HTML page: metrics, curves, settings, sample answers",
        description="Read folders of `unlearn train --output` with the evaluations that `unlearn eval` and "
        "`unlearn muse` stored in them, and write one page that needs no other file. Runs without an evaluation are "
        "shown with their curves.",
    )
    parser.add_argument("runs", nargs="+", metavar="OUT", help="folder of a run, or of an evaluation alone")
    parser.add_argument("--before", metavar="OUT", help="the original model's: unlearn eval --model ... --output OUT")
    parser.add_argument("--gold", metavar="OUT", help="that of the model retrained without the forget set")
    parser.add_argument("--output", metavar="FILE", default="report.html", help="the page (default: %(default)s)")
    parser.add_argument("--title", default="Unlearning report", help="its heading (default: %(default)s)")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from unlearn.page import write_page
    from unlearn.runs import read_run

    output = Path(args.output)
    if output.is_dir():
        raise ValueError(f"output: {output} is a folder; a file is accepted")
    runs = [read_run(Path(folder)) for folder in args.runs]
    others = {name: read_run(Path(value)) for name in ("before", "gold") if (value := getattr(args, name))}
    for name, run in others.items():
        if not run.evaluations:
            raise ValueError(f"{name}: {run.folder} holds no evaluation; --output of `unlearn eval` makes one")
    write_page(output, runs, before=others.get("before"), gold=others.get("gold"), title=args.title)
    for run in runs:
        print(f"{run.folder}: {run.status}")
    print(f"report: {output}")
    return 0
