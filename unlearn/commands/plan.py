"""`unlearn plan`: the memory of a step at a context length, which measures make it fit, and how long it would take."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from unlearn.commands.common import loading, positive, quiet_transformers
from unlearn.config import BY_NEED, TrainConfig
from unlearn.engage import limits_of, options_of, wanted_of
from unlearn.measures import GIB, IN_BACKWARD, MEASURES, STATE_BYTES, Load
from unlearn.plan import MOMENTS, MOST, OPTIMIZERS, PARTS, Budget, Plan, choose, longest_context, remedies
from unlearn.rates import RATES, rates_for
from unlearn.saturation import saturation
from unlearn.shapes import SHAPES, Shape, shape_of_config

_TITLES = {
    "layer": "one layer's backward",
    "optimizer": "optimizer states",
    "update": "optimizer's slices",
    "batch": "ids, rotary table",
    "head": "last norm and head",
}


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="memory and time of a step at a context length, without a GPU",
        description="What a step at a context length holds on the GPU and on the host, which measures make it fit, and "
        "how long it would take. Computed from the model's shape; nothing is loaded or run.",
        ending=_ending,
    )
    parser.add_argument("--model", required=True, help="a folder, a config.json, a name below, or one on the model hub")
    parser.add_argument(
        "--context", type=_tokens, metavar="N", help="tokens of a document, 131072 or 128k (default: the longest)"
    )
    parser.add_argument(
        "--gpu-memory", required=True, metavar="SIZE", help="24, 80GB (10**9 bytes), 141GiB; a number is GiB"
    )
    parser.add_argument(
        "--host-memory", metavar="SIZE", help="for checkpoints and optimizer states (default: not limited)"
    )
    optimizers = [BY_NEED, *(name + suffix for name in STATE_BYTES for suffix in ("", IN_BACKWARD))]
    parser.add_argument(
        "--optimizer", choices=optimizers, default=BY_NEED, help=f"default, by need: {', '.join(OPTIMIZERS)}"
    )
    both = argparse.BooleanOptionalAction
    parser.add_argument("--optimizer-in-backward", action="store_true", help=f"what {IN_BACKWARD} says too")
    parser.add_argument("--gradient-checkpointing", action=both, default=None, help="default, of these four: by need")
    parser.add_argument("--tile-tokens", type=int, metavar="N", help="as in train; 0 for no tiles")
    parser.add_argument("--save-attention", action=both, default=None, help="with --tile-tokens")
    parser.add_argument("--offload-checkpoints", metavar="N", help="layers, all or auto; 0 for none")
    parser.add_argument("--lora", type=positive, metavar="R", help="adapters of rank R, the model frozen")
    parser.add_argument("--qlora", type=positive, metavar="R", help="the same, the layers' matrices in 4 bits")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: %(default)s")
    parser.add_argument(
        "--documents",
        type=positive,
        default=2,
        metavar="D",
        help="of one step: one to forget and one to keep (%(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=_tokens,
        metavar="T",
        help="budget of one forward, as in train (default: a document at a time)",
    )
    parser.add_argument("--rates", choices=list(RATES), help="of which GPU (default: the usual one of that memory)")
    parser.add_argument("--beta", type=float, default=0.1, help="of NPO, for the warning (default: %(default)s)")
    parser.add_argument(
        "--drift",
        type=float,
        default=1e-3,
        help="nats a token's log-probability moves in a step (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object, in bytes")
    parser.set_defaults(run=_plan)


def _ending() -> str:
    lines = ["models known by name:"]
    lines += [f"  {name:14} {shape.params / 1e9:6.2f} G weights, {shape.source}" for name, shape in SHAPES.items()]
    lines.append("measures:")
    lines += [f"  {name:22} {summary}" for name, summary in MEASURES.items()]
    lines.append("rates, TFLOP/s of linear layers and of attention forward and backward:")
    lines += [
        f"  {r.name:14} {r.linear:g}, {r.attention_forward:g}, {r.attention_backward:g}: {r.source}"
        for r in RATES.values()
    ]
    return "\n".join(lines)


def _tokens(text: str) -> int:
    found = re.fullmatch(r"(\d+)([kKmM]?)", text)
    value = int(found[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[found[2].lower()] if found else 0
    if not 0 < value <= 1 << 30:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; a number of tokens such as 131072 or 128k is")
    return value


def find_shape(name: str) -> Shape:
    """A folder's or file's configuration, a known model by its own name or a repository's, or the hub's."""
    path = Path(name)
    if not path.exists():
        short = path.name.lower().removeprefix("meta-")
        for shape in SHAPES.values():
            repository = shape.source.rpartition("/")[2].lower()
            if short in (shape.name, repository) or re.fullmatch(
                rf"({re.escape(shape.name)}|{re.escape(repository)})-(hf|chat-hf|chat|instruct|base)", short
            ):
                return shape
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise ValueError(f"model: no file or folder {name!r}; known by name are {', '.join(SHAPES)}")
    from unlearn.model import load_config

    quiet_transformers()
    with loading(name):
        return shape_of_config(load_config(name), path.name if path.exists() else name)


def _settings(args: argparse.Namespace) -> TrainConfig:
    """The run that has these options; of what else a run needs nothing reaches its memory."""
    optimizer = args.optimizer.removesuffix(IN_BACKWARD)
    return TrainConfig(
        model=args.model,
        output="OUTPUT",
        method="npo",
        lr=1e-5,
        epochs=1,
        batch_size=1,
        seed=0,
        dtype=args.dtype,
        lora=args.lora or args.qlora,
        lora_4bit=args.qlora is not None,
        optimizer="adamw" if args.dtype == "float32" else optimizer,
        optimizer_in_backward=args.optimizer_in_backward or optimizer != args.optimizer,
        gradient_checkpointing=args.gradient_checkpointing,
        tile_tokens=args.tile_tokens,
        save_attention=args.save_attention,
        offload_checkpoints=args.offload_checkpoints,
        gpu_memory=args.gpu_memory,
        host_memory=args.host_memory,
    )


def _plan(args: argparse.Namespace) -> int:
    if args.lora and args.qlora:
        raise ValueError(f"qlora: {args.qlora} and lora {args.lora}; one of them is accepted")
    for name in ("beta", "drift"):
        if not getattr(args, name) > 0:
            raise ValueError(f"{name}: {getattr(args, name)} is not accepted; a number above 0 is")
    if args.dtype == "float32" and (args.qlora or args.optimizer not in (BY_NEED, "adamw")):
        raise ValueError("dtype: float32 is planned with adamw alone; bfloat16 is accepted with everything")
    if args.context and args.max_tokens and args.max_tokens < args.context:
        raise ValueError(
            f"max-tokens: {args.max_tokens} is below the context of {args.context}; a document is never cut"
        )
    config = _settings(args)
    shape = find_shape(args.model)
    gpu, host = limits_of(config)
    assert gpu is not None
    budget = Budget(gpu, host, rates=RATES[args.rates] if args.rates else rates_for(gpu))
    wanted = wanted_of(config, shape)
    if (wanted.host_layers or 0) > shape.layers:
        raise ValueError(f"offload_checkpoints: {wanted.host_layers} is not accepted; 0 to {shape.layers} layers are")

    def load(context: int) -> Load:
        together = max(1, min(args.documents, (args.max_tokens or context) // context))
        return Load((context,) * together, -(-args.documents // together), fixed=args.max_tokens is not None)

    longest = longest_context(shape, load, budget, wanted)
    plan = choose(shape, load(args.context or longest or 1024), budget, wanted)
    warning = saturation(beta=args.beta, tokens=plan.load.lengths[0], drift=args.drift)
    mended = [] if plan.fits else remedies(plan, load, wanted)
    if args.json:
        extra = {"longest_context": longest, "would_fit": mended, "warning": warning}
        extra["options"] = options_of(plan)
        print(json.dumps(plan.to_dict() | extra, allow_nan=False))
        return 0
    print("\n".join(describe(plan)))
    print(f"longest context that fits: {_limit(longest)}")
    if mended:
        print(f"would fit: {'; '.join(mended)}")
    if warning:
        print(f"warning: {warning}")
    return 0


def describe(plan: Plan) -> list[str]:
    """The plan as lines: what is planned, the table of moments in GiB, and what it means."""
    shape, load, on, rates = plan.shape, plan.load, plan.on, plan.budget.rates
    one = f"{len(load.lengths)} x {load.lengths[0]}"
    lines = [
        f"{shape.name}: {shape.params / 1e6:,.0f} M weights, {shape.layers} layers ({shape.source})",
        f"a step: {load.packs} pack{'s' * (load.packs > 1)} of {one} tokens; gradients "
        + ("dropped as they come" if on.in_backward else "kept until the update"),
        "",
        f"{'GiB on the GPU':22}" + "".join(f"{moment:>14}" for moment in MOMENTS),
    ]
    for part in PARTS:
        cells = [plan.moments[moment].get(part, 0.0) for moment in MOMENTS]
        if any(cells):
            lines.append(f"{_TITLES.get(part, part):22}" + "".join(f"{_gib(cell):>14}" for cell in cells))
    lines.append(f"{'sum':22}" + "".join(f"{_gib(plan.moment_total(moment)):>14}" for moment in MOMENTS))
    lines += ["", f"peak: {_gib(plan.total)} GiB ({plan.peak_moment}); with a reserve of {_gib(plan.reserve)}"]
    if plan.budget.gpu is not None:
        verdict = (
            f"headroom {_gib(plan.headroom)}"
            if plan.headroom >= 0
            else f"does not fit: {_gib(-plan.headroom)} too much"
        )
        lines[-1] += f", of {_gib(plan.budget.gpu)}: {verdict}"
    if plan.host:
        limit = f" of {_gib(plan.budget.host)}" if plan.budget.host is not None else ""
        short = "" if plan.budget.host is None or plan.host <= plan.budget.host else ": does not fit"
        kept = [f"the checkpoints of {on.host_layers} of {shape.layers} layers"] if on.host_layers else []
        kept += [f"optimizer states {_gib(plan.host_states)}"] if plan.host_states else []
        lines.append(f"on the host: {_gib(plan.host)} GiB{limit}, {' and '.join(kept)}{short}")
    lines.append(f"measures: {', '.join(on.names())}")
    lines.append(f"as options of `unlearn train`: {' '.join(options_of(plan))}")
    lines.append(f"predicted: {plan.seconds:.3g} s a step on {rates.name} ({rates.source})")
    return lines


def _limit(context: int) -> str:
    return f"{context}{' or more' * (context >= MOST)}" if context else "none"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
