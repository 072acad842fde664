"""`unlearn train` and `unlearn reference`: both take the settings of a run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from unlearn.commands.common import load_tokenizer, loading, quiet_transformers
from unlearn.config import TrainConfig, build, field_types, read_file
from unlearn.recipes import RECIPES


def add(commands: Any) -> None:
    _add(commands, "train", "forget some rows, keep others, save the model", _train)
    _add(commands, "reference", "compute and store a run's reference log-likelihoods, no training", _reference)


def _add(commands: Any, name: str, summary: str, run: Any) -> None:
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
        parser.add_argument(
            "--dry-run", action="store_true", help="show what the run would do, read no weights, write nothing"
        )
        parser.add_argument("--json", action="store_true", help="with --dry-run: print JSON alone on standard output")
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


def _load_data(config: TrainConfig) -> tuple[Any, Any]:
    """(tokenizer, training set): everything but the weights."""
    from unlearn.batches import load_training_set
    from unlearn.methods import check_config
    from unlearn.quantized import bitsandbytes

    check_config(config)
    if config.lora_4bit:
        bitsandbytes("lora_4bit")
    quiet_transformers()
    tokenizer, longest = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    return tokenizer, load_training_set(config, tokenizer, max_length=config.max_length or longest)


def _load(config: TrainConfig) -> tuple[Any, Any, Any]:
    """(model, tokenizer, training set): the cheap checks first, the weights last."""
    from unlearn import adapters
    from unlearn.methods import check_config
    from unlearn.model import load_model, resolve_device

    check_config(config)
    device = resolve_device(config.device)
    tokenizer, data = _load_data(config)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "in_4bit": config.lora_4bit}
    with loading(config.model):
        model = load_model(config.model, dtype=config.dtype, device=device, **options)
    if config.lora is None and adapters.layers(model):
        print(adapters.merge_line(adapters.merge(model), config.dtype))
    return model, tokenizer, data


def _train(args: argparse.Namespace) -> int:
    if args.list_methods:
        print(_methods_and_recipes())
        return 0
    config = _config(args)
    if args.dry_run:
        return _dry_run(config, args)
    if args.json:
        raise ValueError("json: given, but without --dry-run nothing would read it")
    from unlearn.runfiles import as_begun, is_finished, tidy
    from unlearn.train import MODEL_FOLDER, train

    if args.resume:
        config = as_begun(config)
    if args.resume and is_finished(Path(config.output), config.to_dict()):
        with contextlib.suppress(ValueError):
            tidy(Path(config.output))
        print(f"the run in {config.output} is finished; its model is in {Path(config.output) / MODEL_FOLDER}")
        return 0
    model, tokenizer, data = _load(config)
    result = train(config, model, tokenizer, data, resume=args.resume)
    print(
        f"{result.num_steps} steps in {result.seconds:.1f} s (reference {result.reference_seconds:.1f} s), "
        f"peak memory {result.peak_memory_mib:.0f} MiB; the model is in {Path(config.output) / MODEL_FOLDER}"
    )
    return 0


def _dry_run(config: TrainConfig, args: argparse.Namespace) -> int:
    from unlearn import adapters
    from unlearn.dryrun import dry_run, lines
    from unlearn.model import load_skeleton

    if args.resume:
        raise ValueError("resume: given, but a dry run does nothing that could be resumed")
    tokenizer, data = _load_data(config)
    with loading(config.model):
        skeleton = load_skeleton(config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    if config.lora is not None:
        adapters.attach(skeleton, config)
    elif adapters.layers(skeleton):
        adapters.check_mergeable(skeleton, "model")
        adapters.strip(skeleton)
    found = dry_run(config, skeleton, tokenizer, data)
    print(json.dumps(found, allow_nan=False) if args.json else "\n".join(lines(found)))
    return 0


def _reference(args: argparse.Namespace) -> int:
    from unlearn import adapters
    from unlearn.batches import all_steps
    from unlearn.longcontext import long_context
    from unlearn.methods import check_config
    from unlearn.train import compute_reference

    config = _config(args)
    if not check_config(config).reference and config.retain_term != "kl":
        raise ValueError(f"method: {config.method} with retain_term {config.retain_term} needs no reference")
    model, tokenizer, data = _load(config)
    if config.lora is not None:
        adapters.attach(model, config)
    if not config.tile_tokens:  # without a backward there is nothing to recompute or offload
        config = dataclasses.replace(config, offload_checkpoints="0")
    with long_context(model, config, say=print), adapters.as_reference(model):
        ref = compute_reference(config, model, tokenizer, all_steps(data, config), say=print, progress=True)
    print(f"stored in {config.reference_dir} after {ref.seconds:.1f} s")
    return 0
