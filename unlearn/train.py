"""The training loop: reference log-likelihoods, steps, checkpoints, the final model.

One optimizer step is one or more micro-batches whose gradients add up to the whole step's; see unlearn.methods for what
they add up to. A run killed at any moment and resumed ends with the same weights, optimizer, metrics and data order,
bit for bit on a CPU at a fixed number of threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from unlearn import adapters, quantized, reference
from unlearn.batches import (
    Packing,
    Step,
    TrainingSet,
    all_steps,
    num_steps_per_epoch,
    packing_of,
    with_reference,
)
from unlearn.config import TrainConfig
from unlearn.data import Item, PackedBatch, Role, Sequence, collate, pack
from unlearn.forecast import budget_of, forecast, saturated
from unlearn.longcontext import long_context
from unlearn.memory import peak_mib, reset_peak
from unlearn.methods import METHODS, BatchLoss, StepTotals, batch_loss, check_config
from unlearn.model import check_ids, head_of, hidden_states
from unlearn.optim import linear_schedule
from unlearn.optimizers import InBackward, gradient_norm, make_optimizer, set_lr, tensor_norm
from unlearn.runfiles import (
    METRICS_FILE,
    MODEL_FOLDER,
    alone_in,
    as_begun,
    load_checkpoint,
    open_output,
    provenance,
    save_broken_step,
    save_checkpoint,
    save_pretrained,
)
from unlearn.scoring import score, unique

__all__ = [
    "METRICS_FILE",
    "MODEL_FOLDER",
    "InvariantError",
    "NonFiniteError",
    "Reference",
    "TrainResult",
    "compute_reference",
    "provenance",
    "train",
]

Say = Callable[[str], None]
# Nats per token by which hidden states of other packs may diverge: the square of a dtype's rounding, with a margin.
KL_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
_ON_THE_BAR = ("forget_logprob_per_token", "retain_logprob_per_token")


class NonFiniteError(RuntimeError):
    """A loss or gradient that is NaN or infinite; the step was not applied."""


class InvariantError(RuntimeError):
    """Policy and reference are the same weights and yet their log-likelihoods differ."""


@dataclass(frozen=True)
class TrainResult:
    """num_steps: done by this call, fewer than the run's after a resume; seconds: of those steps alone;
    reference_seconds: of the reference pass, 0 where none was computed."""

    num_steps: int
    seconds: float
    reference_seconds: float
    peak_memory_mib: float


@dataclass(frozen=True)
class Reference:
    """What the frozen model said, as far as the method wants it."""

    logprobs: dict[str, float] = dataclasses.field(default_factory=dict)
    hidden: reference.ReferenceHidden | None = None
    seconds: float = 0.0


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _alone_in_its_output(
    function: Callable[Concatenate[TrainConfig, _P], _R],
) -> Callable[Concatenate[TrainConfig, _P], _R]:
    """From before metrics.jsonl until the model is saved, the run's folder is its own."""

    @functools.wraps(function)
    def alone(config: TrainConfig, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        with alone_in(Path(config.output)):
            return function(config, *args, **kwargs)

    return alone


@_alone_in_its_output
def train(
    config: TrainConfig,
    model: nn.Module,
    tokenizer: Any,
    data: TrainingSet,
    *,
    resume: bool = False,
    save_model: bool = True,
    after_step: Callable[[int], None] | None = None,
    say: Say = print,
    progress: bool = True,
) -> TrainResult:
    """Change `model` in place as `config` says and leave checkpoints, metrics.jsonl and the final model in its output.

    With config.lora the model gets adapters, or keeps those that it came with, and they alone are trained. Measures
    that config leaves open are those that the run began with, or are engaged by need (unlearn.forecast).

    after_step(k) is called when k optimizer steps are done, and with 0 before the first; its time and memory
    are not counted.
    Raises ValueError for what the user can mend, NonFiniteError and InvariantError as their names say.
    """
    method = check_config(config)
    if resume:
        config = as_begun(config)
    output, device = Path(config.output), next(model.parameters()).device
    plan = all_steps(data, config)
    rates = learning_rates(config, data, len(plan))
    if config.lora_4bit != bool(quantized.layers(model)):
        raise ValueError(f"lora_4bit: {config.lora_4bit}, and the model was loaded with in_4bit={not config.lora_4bit}")
    packing = packing_of(plan, config.max_tokens)
    check_packs(packing, config)
    if config.lora is not None:
        adapters.attach(model, config)
    expected = forecast(config, model, packing, budget=budget_of(config, device), device=device)
    config = expected.config
    header = {
        "config": config.to_dict(),
        "provenance": provenance(model),
        "data": fingerprint(plan),
        "num_steps": len(plan),
    }
    check_ids(model, unique(sequence for step in plan for sequence in step.sequences()))
    with contextlib.ExitStack() as stack:
        optimizer = make_optimizer(config, [p for p in model.parameters() if p.requires_grad])
        # tiled layers recompute themselves
        stack.enter_context(repeatable(model, recompute=bool(config.gradient_checkpointing) and not config.tile_tokens))
        longest = max(packing.tokens)
        stack.enter_context(long_context(model, config, longest=longest, say=partial(_beside_bars, say)))
        metrics = stack.enter_context(open_output(output, header, resume=resume, say=say))
        if config.lora is not None:
            say(adapters.line(model))
        if config.lora_4bit:
            say(quantized.line(model, config.dtype))
        for line in [f"warning: {text}" for text in saturated(config, plan)] + expected.lines():
            say(line)
        stack.enter_context(expected.beside_errors())
        with adapters.as_reference(model):
            ref = compute_reference(config, model, tokenizer, plan, say=say, progress=progress)
        broken = not_finite(model)
        in_backward = stack.enter_context(InBackward(optimizer)) if config.optimizer_in_backward else None
        done = load_checkpoint(output, model, optimizer, metrics) if resume else 0
        if done:
            say(f"resuming after step {done} of {len(plan)}")
        else:
            if resume:
                say("no checkpoint to resume from: starting over")
            if after_step is not None:
                after_step(0)
        reset_peak(device)
        seconds, peak = 0.0, 0.0
        bar = stack.enter_context(
            tqdm(total=len(plan), initial=done, desc=config.method, unit="step", disable=not progress, leave=False)
        )
        for step, lr in zip(plan[done:], rates[done:], strict=True):
            start = time.perf_counter()
            set_lr(optimizer, lr)
            totals = _with_baseline(step, config, model, ref) if method.baseline else step.totals
            packs = pack(with_reference(step.groups, ref.logprobs), config.max_tokens)
            tally = StepTally(config, totals)
            for items in ([item for group in packed for item in group] for packed in packs):
                batch = collate(items).to(device)
                rehearsal = None
                first = step.index == 0 and tally.num_packs == 0
                if first and method.reference:
                    with adapters.as_reference(model):
                        rehearsal = _forward(model, batch, items, config, totals, ref).logprobs
                result = _forward(model, batch, items, config, totals, ref)
                if rehearsal is not None:
                    bar.clear()
                    check_invariants(batch, rehearsal, result.logprobs, next(model.parameters()).dtype, say)
                if first and result.kl is not None:
                    check_kl(batch, result.kl.item(), next(model.parameters()).dtype, say)
                useful = config.skip_below == 0 or bool(result.active.any())
                # in the backward weights move: a broken loss must not reach them
                if useful and (in_backward is None or math.isfinite(result.loss.item())):
                    result.loss.backward()
                tally.add(batch, result)
            grad_norm = in_backward.pop_gradient_norm() if in_backward else _clip(model, config.max_grad_norm)
            row = tally.row() | {"grad_norm": grad_norm, "lr": lr}
            if math.isfinite(row["loss"]) and math.isfinite(grad_norm):
                if in_backward is None:
                    optimizer.step()
            else:
                bar.clear()
                moved = in_backward is not None and math.isfinite(row["loss"])
                _stop_or_skip(config, output, step, row, say, moved=moved)
                row["skipped"] = True
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # or the optimizer's time would be booked on the next step, or lost
            elapsed = time.perf_counter() - start
            seconds += elapsed
            metrics.write({"step": step.index + 1, "epoch": step.epoch + 1, **row, "seconds": round(elapsed, 4)})
            bar.set_postfix({k: f"{row[k]:.3f}" for k in _ON_THE_BAR if row[k] is not None}, refresh=False)
            bar.update()
            if config.save_every and (step.index + 1) % config.save_every == 0 and step.index + 1 < len(plan):
                check_weights(model, step.index + 1, broken)
                save_checkpoint(output, step.index + 1, model, optimizer, metrics)
            if after_step is not None:
                peak = max(peak, peak_mib(device))
                after_step(step.index + 1)
                reset_peak(device)
        found = TrainResult(len(plan) - done, seconds, ref.seconds, max(peak, peak_mib(device)))
    if comparison := expected.compare(found.peak_memory_mib):
        say(comparison)
    if save_model:
        check_weights(model, len(plan), broken)
        if config.lora_merge:
            say(adapters.merge_line(adapters.merge(model), config.dtype))
        save_pretrained(model, tokenizer, output / MODEL_FOLDER)
    return found


def learning_rates(config: TrainConfig, data: TrainingSet, num_steps: int) -> list[float]:
    """The rate of each step. Raises ValueError where all of them are zero."""
    warmup_steps = round(min(config.warmup_epochs, config.epochs) * num_steps_per_epoch(data, config))
    rates = [config.lr * linear_schedule(step, num_steps, warmup_steps) for step in range(num_steps)]
    if not any(rates):  # a warm-up starts at 0
        raise ValueError(f"warmup_epochs: {config.warmup_epochs} keeps the only step at a rate of 0; 0 is accepted")
    return rates


def _beside_bars(say: Say, text: str) -> None:
    """Where no bar is at hand to be cleared first."""
    with tqdm.external_write_mode():
        say(text)


def _forward(
    model: nn.Module, batch: PackedBatch, items: list[Item], config: TrainConfig, totals: StepTotals, ref: Reference
) -> BatchLoss:
    hidden = hidden_states(model, batch)
    retained = [item.sequence for item in items if item.role == Role.RETAIN]
    if ref.hidden is None or not retained:
        return batch_loss(hidden, head_of(model), batch, config, totals)
    return batch_loss(hidden, head_of(model), batch, config, totals, ref.hidden.rows(retained), ref.hidden.weight)


# -------------------------------------------------------------------------------------------------------- reference


def reference_sequences(config: TrainConfig, plan: list[Step]) -> tuple[list[Sequence], list[Sequence]]:
    """(what needs a reference log-likelihood, what needs reference states) of the sequences that the plan will use."""
    members = [member for step in plan for group in step.groups for member in group]
    scored: list[Sequence] = []
    if METHODS[config.method].reference:
        scored = [s for s, role in members if role != Role.RETAIN] + [s for step in plan for s in step.refusals]
    kept = [s for s, role in members if role == Role.RETAIN and config.retain_term == "kl"]
    return unique(scored), unique(kept)


def compute_reference(
    config: TrainConfig, model: nn.Module, tokenizer: Any, plan: list[Step], *, say: Say, progress: bool
) -> Reference:
    """What the method needs of the unchanged model, for just the sequences that the plan will use."""
    start = time.perf_counter()
    logprobs: dict[str, float] = {}
    hidden = None
    wanted, kept = reference_sequences(config, plan)
    if METHODS[config.method].reference:
        with tqdm(total=len(wanted), desc="reference", unit="seq", disable=not progress, leave=False) as bar:
            table = reference.load_or_compute(
                model, tokenizer, wanted, config.reference_dir, max_tokens=config.max_tokens, progress=bar.update
            )
        logprobs = table.logprobs
        say(f"reference log-likelihoods of {len(wanted)} sequences: {table.origin}")
    if config.retain_term == "kl":
        with tqdm(total=len(kept), desc="reference states", unit="seq", disable=not progress, leave=False) as bar:
            hidden = reference.ReferenceHidden.load_or_compute(
                model, tokenizer, kept, config.reference_dir, max_tokens=config.max_tokens, progress=bar.update
            )
        disk, resident = (size / 2**20 for size in hidden.cost())
        say(f"KL retain: reference states {disk:.1f} MiB on disk, reference head {resident:.1f} MiB resident")
    return Reference(logprobs, hidden, time.perf_counter() - start)


def check_invariants(batch: PackedBatch, rehearsal: Tensor, policy: Tensor, dtype: torch.dtype, say: Say) -> None:
    """Before the first update policy and reference are the same weights: their log-likelihoods must say so.

    The same micro-batch run twice has to agree to the last bit; the stored values, computed in packs of other
    composition, to the tolerance of the dtype. Raises InvariantError with the largest difference.
    """
    known = torch.tensor([role != Role.RETAIN for role in batch.roles], device=policy.device)
    if not bool(policy[known].isfinite().all()):
        return  # broken weights or rows: the step's own check names them
    again = (policy - rehearsal)[known].abs().max().item()
    if again != 0.0:
        raise InvariantError(f"the first micro-batch run twice differs by {again:.3g} nats: no repeatable forward")
    difference = (policy - batch.ref_logprob)[known].abs().cpu()
    allowed = reference.tolerance(batch.answer_lengths, dtype)[known.cpu()]
    say(
        f"policy against stored reference before the first step: {difference.max().item():.3g} nats at most "
        f"(allowed {allowed.max().item():.3g})"
    )
    if not bool((difference <= allowed).all()):
        raise InvariantError(
            f"stored reference log-likelihoods differ by {difference.max().item():.3g} nats from the same weights now"
        )


def check_kl(batch: PackedBatch, kl: float, dtype: torch.dtype, say: Say) -> None:
    """The same for KL retain: before the first update the divergence from the stored states is rounding alone.

    kl: summed over the batch's retain answer tokens, nats. Raises InvariantError with its mean.
    """
    tokens = sum(n for n, role in zip(batch.answer_lengths, batch.roles, strict=True) if role == Role.RETAIN)
    mean, allowed = kl / tokens, KL_TOLERANCE.get(dtype, 1e-9)
    say(f"KL from the stored reference before the first step: {mean:.3g} nats per token (allowed {allowed:.3g})")
    if math.isfinite(mean) and mean > allowed:  # broken weights or rows: the step's own check names them
        raise InvariantError(f"the stored reference states are {mean:.3g} nats per token from the same weights now")


@torch.no_grad()
def not_finite(model: nn.Module) -> list[str]:
    """Names of the weights that hold a NaN or an infinity."""
    return [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]


def check_weights(model: nn.Module, steps: int, given: list[str]) -> None:
    """Before weights are kept: a finite gradient can still carry them over the edge, with a rate that is too high.

    given: the names of those that came so, in rows that no text uses. Raises NonFiniteError naming the first others.
    """
    broken = [name for name in not_finite(model) if name not in given]
    if broken:
        raise NonFiniteError(
            f"step {steps}: {len(broken)} weights are not finite after it ({', '.join(broken[:3])}); not saved. "
            "A lower lr, or max_grad_norm, keeps them"
        )


@torch.no_grad()
def _with_baseline(step: Step, config: TrainConfig, model: nn.Module, ref: Reference) -> StepTotals:
    """KTO's constant: the mean over the step's refusals of logprob - ref."""
    refusals = list(step.refusals)
    values = score(model, refusals, max_tokens=config.max_tokens)
    margins = [value - ref.logprobs[s.content_key] for value, s in zip(values, refusals, strict=True)]
    return dataclasses.replace(step.totals, baseline=sum(margins) / len(margins))


# ------------------------------------------------------------------------------------------------------------ a step


class StepTally:
    """Adds up on the device what a step's micro-batches report; row() is the step's line of metrics.jsonl."""

    def __init__(self, config: TrainConfig, totals: StepTotals) -> None:
        self.config, self.totals = config, totals
        self.num_packs, self.num_tokens = 0, 0
        self._tokens = dict.fromkeys(Role, 0)
        self._sums: list[Tensor] = []  # per micro-batch: loss, KL, active sequences, then logprob by role

    def add(self, batch: PackedBatch, result: BatchLoss) -> None:
        self.num_packs += 1
        self.num_tokens += sum(batch.lengths)
        for role, length in zip(batch.roles, batch.answer_lengths, strict=True):
            self._tokens[role] += length
        loss = result.loss.detach().double()
        kl = torch.zeros_like(loss) if result.kl is None else result.kl
        # where, not indexing by role: a copy of indices to the device would wait for it
        by_role = [torch.where(batch.role == int(role), result.logprobs, 0.0).sum() for role in Role]
        self._sums.append(torch.stack([loss, kl, result.active.sum(dtype=loss.dtype), *by_role]))

    def row(self) -> dict[str, Any]:
        """Losses in nats as the objective defines them; *_logprob_per_token are means over the step's tokens."""
        loss, kl, active, *by_role = torch.stack(self._sums).sum(0).tolist()
        per_token: dict[Role, float | None] = {
            role: logprob / self._tokens[role] if self._tokens[role] else None
            for role, logprob in zip(Role, by_role, strict=True)
        }
        retain_logprob = per_token[Role.RETAIN]
        retain_loss = None if retain_logprob is None else -retain_logprob
        if self.config.retain_term == "kl":
            retain_loss, retain_logprob = kl / self.totals.num_retain_tokens, None
        weighted = self.config.retain_weight * (retain_loss or 0.0)
        forget = self.config.forget_weight if self.totals.num_forget else 0.0
        row = {
            "loss": loss,
            "forget_loss": (loss - weighted) / forget if forget else None,
            "retain_loss": retain_loss,
            "forget_logprob_per_token": per_token[Role.REJECTED if self._tokens[Role.REJECTED] else Role.FORGET],
            "retain_logprob_per_token": retain_logprob,
            "chosen_logprob_per_token": per_token[Role.CHOSEN],
            "tokens": self.num_tokens,
            "answer_tokens": sum(self._tokens.values()),
            "packs": self.num_packs,
        }
        if self.config.skip_below > 0:
            row["active_sequences"] = int(active)
        return row


def _clip(model: nn.Module, max_norm: float | None) -> float:
    """The whole step's gradient norm, in float32 whatever the gradients are, clipped to max_norm where one is set."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = gradient_norm([tensor_norm(grad) for grad in grads])  # 0 where every sequence of the step was skipped
    if max_norm is not None and max_norm < norm < math.inf:
        for grad in grads:
            grad.mul_(max_norm / norm)
    return norm


def _stop_or_skip(config: TrainConfig, output: Path, step: Step, row: dict[str, Any], say: Say, *, moved: bool) -> None:
    """Keep the batch that broke; stop unless asked to go on. The optimizer has not moved, unless in the backward."""
    path = save_broken_step(output, step, row)
    keys = [s.key for group in step.groups for s, _ in group]
    fate = "applied in the backward already; --resume starts from the last checkpoint" if moved else "not applied"
    text = (
        f"step {step.index + 1}: loss {row['loss']}, gradient norm {row['grad_norm']}; {fate}."
        f" Sequences: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}; the batch is in {path}"
    )
    if config.on_non_finite == "stop":
        raise NonFiniteError(text)
    say(text)


# ------------------------------------------------------------------------------------------------------------ the run


def check_packs(packing: Packing, config: TrainConfig) -> None:
    """Raises ValueError where a step in the backward, which takes its whole gradient from one micro-batch, would need
    several."""
    for index, count in enumerate(packing.counts):
        if config.optimizer_in_backward and count > 1:
            raise ValueError(
                f"optimizer_in_backward: step {index + 1} takes {count} micro-batches of max_tokens"
                f" {config.max_tokens}, and gradients are not accumulated; more max_tokens or a smaller batch_size is"
                " accepted"
            )


def fingerprint(plan: list[Step]) -> str:
    """Names the token ids and label spans of every step, in order: what a resumed run has to find again."""
    digest = hashlib.blake2b(digest_size=16)
    keys: dict[int, str] = {}  # by identity: a row's ids are read once, not once an epoch
    for step in plan:
        for sequence in step.sequences():
            if id(sequence) not in keys:
                keys[id(sequence)] = sequence.content_key
            digest.update(keys[id(sequence)].encode())
    return digest.hexdigest()


@contextlib.contextmanager
def repeatable(model: nn.Module, *, recompute: bool) -> Iterator[None]:
    """Policy and reference have to be the same function of the same weights: no dropout, no jitter.

    recompute: activation checkpointing, which transformers engages in training mode alone, so what is random there is
    switched off. The model comes back in evaluation mode, with its rates as they were.
    """
    if not recompute:
        model.eval()
        yield
        return
    rates = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and ("dropout" in name or "jitter" in name or name == "p")  # p: torch's own Dropout
    ]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    # transformers 5.23 renames these, 5.17 has the old names alone
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    # Nothing random is left to replay, and reading a CUDA generator would wait for the device once a layer.
    enable({"use_reentrant": False, "preserve_rng_state": False})
    model.train()
    try:
        yield
    finally:
        model.eval()
        disable()
        for module, name, value in rates:
            setattr(module, name, value)
