"""`unlearn train` and `unlearn reference`: both take the settings of a run."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from unlearn.commands.common import loading, quiet_transformers
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
    quiet_transformers()
    device = resolve_device(config.device)
    trust = config.trust_remote_code
    with loading(config.model):
        tokenizer = load_tokenizer(config.model, trust_remote_code=trust)
        longest = max_positions(config.model, trust_remote_code=trust)
    data = load_training_set(config, tokenizer, max_length=config.max_length or longest)
    with loading(config.model):
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
    from unlearn.longcontext import long_context
    from unlearn.methods import check_config
    from unlearn.train import compute_reference

    config = _config(args)
    if not check_config(config).reference and config.retain_term != "kl":
        raise ValueError(f"method: {config.method} with retain_term {config.retain_term} needs no reference")
    model, tokenizer, data = _load(config)
    plan = [step for epoch in range(config.epochs) for step in epoch_steps(data, config, epoch)]
    if not config.tile_tokens:  # without a backward there is nothing to recompute or offload
        config = dataclasses.replace(config, offload_checkpoints=None)
    with long_context(model, config, say=print):
        ref = compute_reference(config, model, tokenizer, plan, say=print, progress=True)
    print(f"stored in {config.reference_dir} after {ref.seconds:.1f} s")
    return 0
