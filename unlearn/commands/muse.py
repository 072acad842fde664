"""`unlearn muse`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
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

# what decides the numbers beside the model and the rows
_STORED_OPTIONS = ("gold", "data", "max_rows", "prompt_tokens", "dtype", "device", "load_in_4bit")
_SETS = ("forget", "verbmem", "holdout", "forget_qa", "forget_shots", "retain_qa", "retain_shots")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "muse",
        help="what a model still recites, knows and gives away of documents: VerbMem, KnowMem, PrivLeak",
        description="Measure a model as MUSE does: VerbMem (greedy continuations of the forget documents), KnowMem "
        "(questions on them and on what is kept, after answered ones), PrivLeak (forget set against holdout). Each is "
        "there when its files are.",
    )
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--data", help="muse:news or muse:books: all sets from the hub, where no option names another")
    for flag, text in (
        ("--forget", "documents to forget, for VerbMem and, with --holdout, membership inference"),
        ("--verbmem", "documents, or prompt + completion rows, for VerbMem alone (default: --forget's)"),
        ("--holdout", "documents like the forget set's that no model has seen"),
        ("--forget-qa", "questions that only the forget documents answer"),
        ("--forget-shots", "answered questions to put before each of --forget-qa"),
        ("--retain-qa", "questions that the model should still answer"),
        ("--retain-shots", "answered questions to put before each of --retain-qa"),
    ):
        parser.add_argument(flag, metavar="FILE", help=text)
    parser.add_argument(
        "--gold",
        help="model retrained without the forget set, for PrivLeak (default with --data: the AUC that muse_bench has "
        "of its own)",
    )
    add_output_option(parser, "muse.json", "metrics")
    parser.add_argument("--max-rows", type=positive, help="use the first rows (or windows) of each set alone")
    add_measuring_options(
        parser,
        ("--prompt-tokens", 128, "tokens of a document that VerbMem shows; half of a document shorter than twice that"),
    )
    parser.set_defaults(run=_muse)


def _muse(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from unlearn import muse
    from unlearn.evaluate import gold_min_k_auc, score_sets
    from unlearn.files import check_writable
    from unlearn.model import resolve_device
    from unlearn.runfiles import provenance
    from unlearn.runs import MUSE_FILE, evaluation_folder, stored_form, write_evaluation

    where = muse.sources(args.data, {name: getattr(args, name) for name in _SETS})
    _check(where, args.gold)
    quiet_transformers()
    resolve_device(args.device)  # before anything is read
    folder = evaluation_folder(args.model, args.output)
    tokenizer, sets = _load_sets(args, where, args.model)
    if folder is not None:
        check_writable("output", folder)
    gold_auc = None
    if args.data and not (args.forget or args.holdout or args.max_rows):  # the constants are of MUSE's own sets, whole
        gold_auc = muse.GOLD_AUC[args.data.removeprefix("muse:")]
    if args.gold:
        only = {name: where[name] for name in ("forget", "holdout")}
        _, gold_sets = _load_sets(args, only, args.gold)
        # one model is resident at a time
        gold_auc = gold_min_k_auc(
            score_sets(load_model(args, args.gold), gold_sets.privleak, max_tokens=args.max_tokens)
        )
    model = load_model(args, args.model)
    with tqdm(total=sets.num_pieces, desc="muse", unit="text", leave=False) as bar:
        values = muse.evaluate_muse(
            model,
            tokenizer,
            sets,
            gold_min_k_auc=gold_auc,
            max_tokens=args.max_tokens,
            batch_size=args.generation_batch,
            progress=bar.update,
        )
    try:
        if folder is not None:
            options = {name: getattr(args, name) for name in _STORED_OPTIONS}
            found = _described(sets, where)
            stored = stored_form(args.model, values, found, options=options, provenance=provenance(model))
            print(f"stored in {write_evaluation(folder, stored, name=MUSE_FILE)}", file=sys.stderr)
    finally:  # a full disk costs the file and not the numbers
        print_metrics(values, as_json=args.json)
    return 0


def _described(sets: Any, where: dict[str, str]) -> dict[str, dict[str, Any]]:
    from unlearn.runs import described_set, text_of

    prompts = {"verbmem": sets.verbmem, "forget_qa": sets.forget_qa, "retain_qa": sets.retain_qa}
    found = {
        name: described_set("generated", where[name], ([one.key, one.ids, one.truth] for one in those))
        for name, those in prompts.items()
        if those
    }
    return found | {one.name: described_set(one.kind, where[one.name], text_of(one)) for one in sets.privleak}


def _check(where: dict[str, str], gold: str | None) -> None:
    """The mistakes that need no file to be seen."""
    if not where.keys() & {"verbmem", "forget_qa", "retain_qa"}:
        raise ValueError("forget: missing; --forget, --verbmem, --forget-qa, --retain-qa or --data say what to measure")
    for shots, questions in (("forget_shots", "forget_qa"), ("retain_shots", "retain_qa")):
        if shots in where and questions not in where:
            raise ValueError(f"{shots}: given, but without --{questions.replace('_', '-')} nothing would read it")
    if "holdout" in where and "forget" not in where:
        raise ValueError("holdout: given, but without --forget there is nothing to compare it with")
    if gold and "holdout" not in where:
        raise ValueError("gold: PrivLeak compares the forget documents with a --holdout, and none is given")


def _load_sets(args: argparse.Namespace, where: dict[str, str], name: str) -> tuple[Any, Any]:
    """(tokenizer of the model `name`, the sets in its tokens)."""
    from unlearn import muse
    from unlearn.data import Row, load_rows
    from unlearn.evaluate import Kind, load_set

    tokenizer, longest = load_tokenizer(name, trust_remote_code=args.trust_remote_code)

    def rows(group: str) -> list[Row]:
        if group not in where:
            return []
        # the option that was given, for messages and --fields
        role = "forget" if group == "verbmem" and args.verbmem is None and args.data is None else group
        return load_rows(where[group], role=role, fields=args.fields)

    def first(many: tuple[Any, ...]) -> tuple[Any, ...]:
        return many[: args.max_rows]

    privleak = []
    if "holdout" in where:
        kinds: dict[str, Kind] = {"forget": "forget", "holdout": "holdout"}
        for group, kind in kinds.items():
            found = load_set(
                group, kind, where[group], tokenizer, max_length=longest, fields=args.fields, window=args.window
            )
            privleak.append(dataclasses.replace(found, rows=first(found.rows)))
    sets = muse.MuseSets(
        verbmem=first(
            muse.verbmem_prompts(rows("verbmem"), tokenizer, prompt_tokens=args.prompt_tokens, window=args.window)
        ),
        forget_qa=first(muse.knowmem_prompts(rows("forget_qa"), rows("forget_shots"), tokenizer)),
        retain_qa=first(muse.knowmem_prompts(rows("retain_qa"), rows("retain_shots"), tokenizer)),
        privleak=tuple(privleak),
    )
    muse.check_lengths(sets, longest)
    return tokenizer, sets
