"""`unlearn eval`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unlearn.commands.common import (
    MODEL_HELP,
    add_measuring_options,
    add_output_option,
    load_model,
    load_tokenizer,
    positive,
    print_metrics,
    quiet_transformers,
)

# what decides an evaluation's numbers beside the model and the rows
_STORED_OPTIONS = ("gold", "reference_model", "max_rows", "max_new_tokens", "dtype", "device", "load_in_4bit")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="probability, truth ratio, ROUGE-L, forget quality and model utility of a model",
        description="Evaluate a model on TOFU-shaped files (question, answer, perturbed_answer, paraphrased_answer), "
        "or on documents (.txt files, a text column), from which nothing is generated; `unlearn muse` does.",
    )
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--forget", required=True, help="forget set: a file, a folder of .txt files, tofu:SPLIT, ...")
    parser.add_argument("--retain", help="retain set, for model utility")
    parser.add_argument("--real-authors", help="real authors set, for model utility")
    parser.add_argument("--world-facts", help="world facts set, for model utility")
    parser.add_argument("--holdout", help="text like the forget set's that no model has seen, for membership inference")
    parser.add_argument("--gold", help="model retrained without the forget set, for forget quality and PrivLeak")
    parser.add_argument("--reference-model", help="model that has not seen the forget set, for membership inference")
    add_output_option(parser, "eval.json", "metrics and sample answers")
    parser.add_argument("--log", metavar="FILE", help="write a log in TOFU's format too (`unlearn metrics` reads it)")
    parser.add_argument("--max-rows", type=positive, help="use the first rows of each set alone (TOFU's tables: 300)")
    add_measuring_options(parser, ("--max-new-tokens", 200, "length of generated answers"))
    parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from unlearn import tofu_log
    from unlearn.evaluate import evaluate, num_pieces, to_log
    from unlearn.files import check_writable
    from unlearn.model import resolve_device
    from unlearn.runfiles import provenance
    from unlearn.runs import described_set, evaluation_folder, sample_answers, stored_form, text_of, write_evaluation

    quiet_transformers()
    resolve_device(args.device)  # before anything is read
    folder = evaluation_folder(args.model, args.output)
    tokenizer, sets = _load_sets(args, args.model)
    if args.log and not all(group.rows[0].wrong for group in sets if group.name in tofu_log.SETS):
        raise ValueError("log: TOFU's logs hold truth ratios, and a set has no perturbed_answer")
    if args.gold and not sets[0].rows[0].wrong and not args.holdout:
        raise ValueError(
            "gold: forget quality compares truth ratios, and the forget rows have no perturbed_answer;"
            " PrivLeak needs a --holdout"
        )
    if args.reference_model and not args.holdout:
        raise ValueError("reference-model: its losses tell forget rows from --holdout rows, and there is no --holdout")
    if args.log:
        check_writable("log", Path(args.log).parent)
    if folder is not None:
        check_writable("output", folder)
    yardsticks = _yardsticks(args)
    model = load_model(args, args.model)
    with tqdm(total=num_pieces(sets), desc="eval", unit="answer", leave=False) as bar:
        result = evaluate(
            model,
            tokenizer,
            sets,
            yardsticks=yardsticks,
            max_tokens=args.max_tokens,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.generation_batch,
            progress=bar.update,
        )
    try:
        if args.log:
            tofu_log.write(args.log, to_log(sets, result.sets))
        if folder is not None:
            stored = stored_form(
                args.model,
                result.metrics,
                {one.name: described_set(one.kind, getattr(args, one.name), text_of(one)) for one in sets},
                options={name: getattr(args, name) for name in _STORED_OPTIONS},
                provenance=provenance(model),
                samples=sample_answers(result, sets),
            )
            print(f"stored in {write_evaluation(folder, stored)}", file=sys.stderr)
    finally:  # a full disk costs the files and not the numbers
        print_metrics(result.metrics, as_json=args.json)
    return 0


def _yardsticks(args: argparse.Namespace) -> Any:
    """What --gold and --reference-model say of the sets in their own tokens; one model is resident at a time."""
    from unlearn.evaluate import Yardsticks, answer_nll, gold_min_k_auc, score_sets

    found: dict[str, Any] = {}
    if args.gold:
        _, sets = _load_sets(args, args.gold, only=("holdout",))
        gold = score_sets(load_model(args, args.gold), sets, max_tokens=args.max_tokens)
        if sets[0].rows[0].wrong:
            found["log_truth_ratio"] = gold["forget"].log_truth_ratio
        if "holdout" in gold:
            found["min_k_auc"] = gold_min_k_auc(gold)
    if args.reference_model:
        _, sets = _load_sets(args, args.reference_model, only=("holdout",))
        model = load_model(args, args.reference_model)
        found["answer_nll"] = answer_nll(model, sets, max_tokens=args.max_tokens)
    return Yardsticks(**found)


def _load_sets(args: argparse.Namespace, name: str, *, only: Sequence[str] | None = None) -> tuple[Any, list[Any]]:
    """(tokenizer of the model `name`, the sets in its tokens): the forget set and the others, or `only` these."""
    from unlearn.evaluate import Kind, load_set

    tokenizer, longest = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    options: dict[str, Any] = {"max_length": longest, "fields": args.fields, "window": args.window}
    sets = [load_set("forget", "forget", args.forget, tokenizer, **options)]
    kinds: dict[str, Kind] = {
        "retain": "retain", "real_authors": "other", "world_facts": "other", "holdout": "holdout",
    }  # fmt: skip
    for set_name, kind in kinds.items():
        source = getattr(args, set_name)
        if source and (only is None or set_name in only):
            sets.append(load_set(set_name, kind, source, tokenizer, **options))
    return tokenizer, [dataclasses.replace(s, rows=s.rows[: args.max_rows]) for s in sets]
