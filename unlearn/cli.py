"""The command line: `unlearn demo | train | reference | alternates | eval | metrics`.

Errors are one line; --help is meant to be read.

Only what a command needs is imported, inside it: `unlearn --help` answers before torch could be loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from unlearn import __version__
from unlearn.config import TrainConfig, build, field_types, read_file
from unlearn.recipes import RECIPES

_EXAMPLES = """examples:
  unlearn demo                                     the whole story on an invented corpus, no download
  unlearn train --recipe tofu-npo-rt --model ./my-model --output out \\
                --forget forget.jsonl --retain retain.jsonl
  unlearn eval --model out/model --forget forget_perturbed.json --retain retain_perturbed.json"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for a run that failed, 2 for wrong input, 130 for Ctrl-C."""
    try:
        args = _parser().parse_args(argv)
        # One tokenizer thread pool beside torch's threads, and no warning about forks, on two cores.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        return int(args.run(args) or 0)
    except ValueError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        where = "of train from the last checkpoint (--save-every), of alternates from the last batch"
        return _fail(f"stopped by Ctrl-C; --resume goes on: {where}", 130)
    except BrokenPipeError:  # `unlearn eval | head`: nobody reads on, and the exit's flush must not complain either
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        return _fail(f"{error.filename}: {reason}" if error.filename else reason, 1)
    except Exception as error:
        from safetensors import SafetensorError  # a full disk, for one

        if _is_out_of_memory(error):
            return _fail(f"{error}; a smaller --max-tokens or (train) --gradient-checkpointing needs less", 1)
        if isinstance(error, (RuntimeError, SafetensorError)):  # NonFiniteError, InvariantError, what torch raises
            return _fail(f"{type(error).__name__}: {error}", 1)
        raise


def _fail(message: str, status: int) -> int:
    """One line, whatever the message was."""
    print("unlearn: error:", " ".join(message.split()), file=sys.stderr)
    return status


def _is_out_of_memory(error: Exception) -> bool:
    """torch raises OutOfMemoryError on a GPU, a plain RuntimeError on a CPU."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


class _Parser(argparse.ArgumentParser):
    """Raises ValueError instead of printing the usage; `ending` is called when --help is asked for, not before."""

    def __init__(self, *, ending: Callable[[], str] = str, **kwargs: Any) -> None:
        # no abbreviations: half an option's name must not become another one's value with the next version
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.ending = ending

    def format_help(self) -> str:
        self.epilog = self.ending()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} ({self.prog} --help lists what is accepted)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="unlearn",
        description="Make a language model forget: NPO, SimNPO, AltPO and relatives, exactly, on one GPU or a CPU.",
        ending=lambda: _EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"unlearn {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_train(commands, "train", "forget some rows, keep others, save the model", _train)
    _add_train(commands, "reference", "compute and store a run's reference log-likelihoods, no training", _reference)
    _add_alternates(commands)
    _add_eval(commands)
    _add_metrics(commands)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not accepted; a number above 0 is")
    return value


def _quiet_transformers() -> None:
    """Loading bars and advice would drown our own lines; TRANSFORMERS_VERBOSITY brings them back."""
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Whatever a library raises at a folder that is damaged becomes one line that names it."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        raise ValueError(f"model: could not load {name!r} ({type(error).__name__}: {error})") from None


# ------------------------------------------------------------------------------------------------------------- demo


def _add_demo(commands: Any) -> None:
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
    parser.add_argument("--methods", help="comma-separated subset of the methods")
    parser.add_argument("--reuse-models", action="store_true", help="take OUT's finished full and gold models")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (default: %(default)s)")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    from unlearn.demo import run_demo

    _quiet_transformers()
    run_demo(
        Path(args.out),
        data=Path(args.data) if args.data else None,
        seed=args.seed,
        methods=args.methods.split(",") if args.methods else None,
        reuse_models=args.reuse_models,
        device=args.device,
    )
    return 0


# ------------------------------------------------------------------------------------------------ train and reference


def _add_train(commands: Any, name: str, summary: str, run: Any) -> None:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ". Settings come from --recipe, then --config, then the options "
        "below; the later wins.",
        ending=_methods_and_recipes,
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of the settings below (names with _)")
    if name == "train":
        parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
        parser.add_argument("--list-methods", action="store_true", help="print the methods and recipes, and stop")
    settings = parser.add_argument_group("settings")
    for field in dataclasses.fields(TrainConfig):
        plain, _ = field_types()[field.name]
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if field.default is not dataclasses.MISSING and field.default is not None and plain is not bool:
            text += f" (default: {field.default})"
        text = text.replace("%", "%%")
        if plain is bool:
            settings.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            settings.add_argument(flag, type=plain, default=None, metavar=plain.__name__.upper(), help=text)
    parser.set_defaults(run=run)


def _methods_and_recipes() -> str:
    # imports torch: this --help can wait for the truth rather than show a second list
    from unlearn.methods import METHODS

    lines = ["methods:"]
    for method_name, method in METHODS.items():
        options = [*method.parameters, *(["alternates"] if method.pairs or method.baseline else [])]
        needs = f" [{', '.join('--' + name for name in options)}]" if options else ""
        lines.append(f"  {method_name:10} {method.summary}{needs}")
    lines.append("recipes:")
    lines += [f"  {name:22} {recipe.source}" for name, recipe in RECIPES.items()]
    return "\n".join(lines)


def _config(args: argparse.Namespace) -> TrainConfig:
    values = {name: getattr(args, name) for name in field_types() if getattr(args, name) is not None}
    file_values = read_file(args.config) if args.config else {}
    return build(recipe=None, file_values=file_values, overrides=values)


def _load(config: TrainConfig) -> tuple[Any, Any, Any]:
    """(model, tokenizer, training set): the cheap checks first, the weights last."""
    from unlearn.batches import load_training_set
    from unlearn.methods import check_config
    from unlearn.model import load_model, load_tokenizer, max_positions, resolve_device

    check_config(config)
    _quiet_transformers()
    device = resolve_device(config.device)
    trust = config.trust_remote_code
    with _loading(config.model):
        tokenizer = load_tokenizer(config.model, trust_remote_code=trust)
        longest = max_positions(config.model, trust_remote_code=trust)
    data = load_training_set(config, tokenizer, max_length=config.max_length or longest)
    with _loading(config.model):
        model = load_model(config.model, dtype=config.dtype, device=device, trust_remote_code=trust)
    return model, tokenizer, data


def _train(args: argparse.Namespace) -> int:
    if args.list_methods:
        print(_methods_and_recipes())
        return 0
    from unlearn.runfiles import is_finished
    from unlearn.train import MODEL_FOLDER, train

    config = _config(args)
    if args.resume and is_finished(Path(config.output), config.to_dict()):
        print(f"the run in {config.output} is finished; its model is in {Path(config.output) / MODEL_FOLDER}")
        return 0
    model, tokenizer, data = _load(config)
    result = train(config, model, tokenizer, data, resume=args.resume)
    print(
        f"{result.num_steps} steps in {result.seconds:.1f} s (reference {result.reference_seconds:.1f} s), "
        f"peak memory {result.peak_memory_mib:.0f} MiB; the model is in {Path(config.output) / MODEL_FOLDER}"
    )
    return 0


def _reference(args: argparse.Namespace) -> int:
    from unlearn.batches import epoch_steps
    from unlearn.methods import check_config
    from unlearn.train import compute_reference

    config = _config(args)
    if not check_config(config).reference and config.retain_term != "kl":
        raise ValueError(f"method: {config.method} with retain_term {config.retain_term} needs no reference")
    model, tokenizer, data = _load(config)
    plan = [step for epoch in range(config.epochs) for step in epoch_steps(data, config, epoch)]
    ref = compute_reference(config, model, tokenizer, plan, say=print, progress=True)
    print(f"stored in {config.reference_dir} after {ref.seconds:.1f} s")
    return 0


# ------------------------------------------------------------------------------------------------------- alternates


def _add_alternates(commands: Any) -> None:
    parser = commands.add_parser(
        "alternates",
        help="sample alternate answers to the forget rows from the model itself, for altpo and simpo",
        description="Write JSON lines of the forget rows with `alternates`, which `unlearn train --alternates` reads.",
    )
    parser.add_argument("--model", required=True, help="folder, or a name on the model hub: the model to unlearn")
    parser.add_argument("--forget", required=True, help="forget set: a file or tofu:SPLIT")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines, written batch by batch")
    parser.add_argument("--resume", action="store_true", help="go on with an --output of the same settings")
    for flag, default, text in (
        ("--count", 5, "alternates of each row"),
        ("--max-new-tokens", 200, "length of an alternate"),
        ("--batch-size", 8, "rows generated at a time, each --count times"),
    ):
        parser.add_argument(flag, type=_positive, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="above 0 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    _add_model_options(parser)
    parser.set_defaults(run=_alternates)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="bfloat16", choices=dtypes, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def _alternates(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from unlearn.alternates import write_alternates
    from unlearn.data import load_rows
    from unlearn.model import load_model, load_tokenizer, max_positions, resolve_device

    output = Path(args.output)
    if not args.temperature > 0:
        raise ValueError(f"temperature is {args.temperature}; a number above 0 is accepted")
    if output.exists() and not args.resume:
        raise ValueError(f"output: {output} exists; --resume goes on with it")
    _quiet_transformers()
    device = resolve_device(args.device)
    rows = load_rows(args.forget, role="forget")
    with _loading(args.model):
        tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
        longest = max_positions(args.model, trust_remote_code=args.trust_remote_code)
        model = load_model(args.model, dtype=args.dtype, device=device, trust_remote_code=args.trust_remote_code)
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


# ------------------------------------------------------------------------------------------------------------- eval


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="probability, truth ratio, ROUGE-L, forget quality and model utility of a model",
        description="Evaluate a model on TOFU-shaped files (question, answer, perturbed_answer, paraphrased_answer).",
    )
    parser.add_argument("--model", required=True, help="folder, or a name on the model hub")
    parser.add_argument("--forget", required=True, help="forget set: a file or tofu:SPLIT")
    parser.add_argument("--retain", help="retain set, for model utility")
    parser.add_argument("--real-authors", help="real authors set, for model utility")
    parser.add_argument("--world-facts", help="world facts set, for model utility")
    parser.add_argument("--holdout", help="text like the forget set's that no model has seen, for membership inference")
    parser.add_argument("--gold", help="model retrained without the forget set, for forget quality and PrivLeak")
    parser.add_argument("--log", metavar="FILE", help="write a log in TOFU's format too (`unlearn metrics` reads it)")
    parser.add_argument("--max-rows", type=_positive, help="use the first rows of each set alone (TOFU's tables: 300)")
    for flag, default, text in (
        ("--max-new-tokens", 200, "length of generated answers"),
        ("--generation-batch", 32, "rows generated at a time"),
        ("--max-tokens", 16384, "token budget of one forward"),
    ):
        parser.add_argument(flag, type=_positive, default=default, help=f"{text} (default: %(default)s)")
    _add_model_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON alone on standard output")
    parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from unlearn import tofu_log
    from unlearn.evaluate import evaluate, membership_aucs, num_pieces, score_sets, to_log
    from unlearn.model import load_model, resolve_device

    _quiet_transformers()
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
        with _loading(args.gold):
            gold_model = load_model(args.gold, **options)
        gold = score_sets(gold_model, gold_sets, max_tokens=args.max_tokens)
        del gold_model  # one model is resident at a time
        gold_ratio = gold["forget"].log_truth_ratio
        if "holdout" in gold:
            gold_auc = membership_aucs(gold["forget"], gold["holdout"])["min_k"]
    with _loading(args.model):
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
    _print_metrics(result.metrics, as_json=args.json)
    return 0


def _print_metrics(values: dict[str, float], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, allow_nan=False))
        return
    width = max(len(name) for name in values)
    for name, value in values.items():
        print(f"{name:{width}}  {value:.6g}")


def _load_sets(args: argparse.Namespace, name: str, *, only: Sequence[str] | None = None) -> tuple[Any, list[Any]]:
    """(tokenizer of the model `name`, the sets in its tokens): a gold model is scored in its own."""
    from unlearn.evaluate import Kind, load_set
    from unlearn.model import load_tokenizer, max_positions

    with _loading(name):
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


# ---------------------------------------------------------------------------------------------------------- metrics


def _add_metrics(commands: Any) -> None:
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
    _print_metrics(tofu_log.summary(log, retain, mean=args.mean), as_json=args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
