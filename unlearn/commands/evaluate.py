"""`unlearn eval`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from unlearn.commands.common import MODEL_HELP, add_model_options, loading, positive, print_metrics, quiet_transformers


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="probability, truth ratio, ROUGE-L, forget quality and model utility of a model",
        description="Evaluate a model on TOFU-shaped files (question, answer, perturbed_answer, paraphrased_answer).",
    )
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--forget", required=True, help="forget set: a file or tofu:SPLIT")
    parser.add_argument("--retain", help="retain set, for model utility")
    parser.add_argument("--real-authors", help="real authors set, for model utility")
    parser.add_argument("--world-facts", help="world facts set, for model utility")
    parser.add_argument("--holdout", help="text like the forget set's that no model has seen, for membership inference")
    parser.add_argument("--gold", help="model retrained without the forget set, for forget quality and PrivLeak")
    parser.add_argument("--log", metavar="FILE", help="write a log in TOFU's format too (`unlearn metrics` reads it)")
    parser.add_argument("--max-rows", type=positive, help="use the first rows of each set alone (TOFU's tables: 300)")
    for flag, default, text in (
        ("--max-new-tokens", 200, "length of generated answers"),
        ("--generation-batch", 32, "rows generated at a time"),
        ("--max-tokens", 16384, "token budget of one forward"),
    ):
        parser.add_argument(flag, type=positive, default=default, help=f"{text} (default: %(default)s)")
    add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from unlearn import tofu_log
    from unlearn.evaluate import evaluate, membership_aucs, num_pieces, score_sets, to_log
    from unlearn.model import load_model, resolve_device

    quiet_transformers()
    device = resolve_device(args.device)
    options: dict[str, Any] = {"dtype": args.dtype, "device": device, "trust_remote_code": args.trust_remote_code}
    tokenizer, sets = _load_sets(args, args.model)
    gold_ratio = gold_auc = None
    if args.log and not all(group.rows[0].wrong for group in sets if group.name in tofu_log.SETS):
        raise ValueError("log: TOFU's logs hold truth ratios, and a set has no perturbed_answer")
    if args.gold:
        if not sets[0].rows[0].wrong:
            raise ValueError("gold: forget quality compares truth ratios, and the forget rows have no perturbed_answer")
        _, gold_sets = _load_sets(args, args.gold, only=("forget", "holdout"))
        with loading(args.gold):
            gold_model = load_model(args.gold, **options)
        gold = score_sets(gold_model, gold_sets, max_tokens=args.max_tokens)
        del gold_model  # one model is resident at a time
        gold_ratio = gold["forget"].log_truth_ratio
        if "holdout" in gold:
            gold_auc = membership_aucs(gold["forget"], gold["holdout"])["min_k"]
    with loading(args.model):
        model = load_model(args.model, **options)
    with tqdm(total=num_pieces(sets), desc="eval", unit="answer", leave=False) as bar:
        result = evaluate(
            model,
            tokenizer,
            sets,
            gold_log_truth_ratio=gold_ratio,
            gold_min_k_auc=gold_auc,
            max_tokens=args.max_tokens,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.generation_batch,
            progress=bar.update,
        )
    if args.log:
        tofu_log.write(args.log, to_log(sets, result.sets))
    print_metrics(result.metrics, as_json=args.json)
    return 0


def _load_sets(args: argparse.Namespace, name: str, *, only: Sequence[str] | None = None) -> tuple[Any, list[Any]]:
    """(tokenizer of the model `name`, the sets in its tokens): a gold model is scored in its own."""
    from unlearn.evaluate import Kind, load_set
    from unlearn.model import load_tokenizer, max_positions

    with loading(name):
        tokenizer = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
        longest = max_positions(name, trust_remote_code=args.trust_remote_code)
    sets = [load_set("forget", "forget", args.forget, tokenizer, max_length=longest)]
    kinds: dict[str, Kind] = {
        "retain": "retain", "real_authors": "other", "world_facts": "other", "holdout": "holdout",
    }  # fmt: skip
    for set_name, kind in kinds.items():
        source = getattr(args, set_name)
        if source and (only is None or set_name in only):
            sets.append(load_set(set_name, kind, source, tokenizer, max_length=longest))
    return tokenizer, [dataclasses.replace(s, rows=s.rows[: args.max_rows]) for s in sets]
