"""One optimizer step of a long document to forget and one to keep, taken apart: seconds, memory and bytes by part.

The step is this project's: unlearn.model.hidden_states, unlearn.methods.batch_loss and the optimizers of
unlearn.optimizers under the measures of unlearn.longcontext, as unlearn.train strings them together. `Plain` is the
loop that everybody writes first: full logits and transformers' own attention, one document at a time. The learning
rate is 0: the optimizer does all its work, and every step starts from the same weights, so that policy and reference
stay equal and no gradient has vanished by the second step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.models import tensor_bytes
from unlearn import offload
from unlearn.attention import ATTENTION
from unlearn.config import TrainConfig
from unlearn.data import Item, Role, Sequence, collate
from unlearn.longcontext import long_context
from unlearn.memory import peak_mib, reset_peak
from unlearn.methods import StepTotals, batch_loss
from unlearn.model import head_of, hidden_states
from unlearn.optimizers import InBackward, gradient_norm, make_optimizer, set_lr, tensor_norm
from unlearn.scoring import score
from unlearn.train import repeatable

BETA = 0.1
MIB = 1 << 20
Fields = dict[str, Any]


def settings(**measures: Any) -> TrainConfig:
    """NPO with a retain term; measures: fields of TrainConfig."""
    return TrainConfig(
        model="random", output="none", method="npo", lr=1e-5, weight_decay=0.0, epochs=1, batch_size=1, seed=0,
        forget="forget", retain="retain", retain_term="nll", beta=BETA, **measures,
    )  # fmt: skip


@dataclass(frozen=True)
class Documents:
    """forget, and retain where the step has one; every token but the first is a label."""

    forget: Sequence
    retain: Sequence | None

    @property
    def lengths(self) -> list[int]:
        return [document.num_tokens for document in (self.forget, self.retain) if document is not None]

    @property
    def totals(self) -> StepTotals:
        retained = self.retain.num_answer_tokens if self.retain is not None else 0
        return StepTotals(1, self.forget.num_answer_tokens, retained)

    def packs(self, ref: float, *, together: bool) -> list[list[Item]]:
        """One document at a time, or both in one forward and backward."""
        items = [Item(self.forget, Role.FORGET, ref)]
        if self.retain is not None:
            items.append(Item(self.retain, Role.RETAIN))
        return [items] if together else [[item] for item in items]

    def shortened(self, num_tokens: int) -> Documents:
        return Documents(*(d and dataclasses.replace(d, input_ids=d.input_ids[: num_tokens + 1]) for d in self.pair))

    @property
    def pair(self) -> tuple[Sequence, Sequence | None]:
        return self.forget, self.retain


@dataclass
class Meter:
    """Seconds and peak memory by phase of one step. Phases are entered several times where there are several packs."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    allocated_mib: dict[str, float] = field(default_factory=dict)
    reserved_mib: float | None = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        synchronize(self.device)
        reset_peak(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.allocated_mib[name] = max(self.allocated_mib.get(name, 0.0), peak_mib(self.device))
        if self.device.type == "cuda":
            self.reserved_mib = max(self.reserved_mib or 0.0, torch.cuda.max_memory_reserved(self.device) / MIB)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Ours:
    """This project's step under `config`'s measures. A context manager: they are engaged inside."""

    def __init__(self, model: nn.Module, documents: Documents, config: TrainConfig) -> None:
        self.model, self.documents, self.config = model, documents, config
        self.device = next(model.parameters()).device
        self.pinning_seconds = self.slab_bytes = 0.0
        self._stack = contextlib.ExitStack()
        self._in_backward: InBackward | None = None

    def __enter__(self) -> Ours:
        self.model.set_attn_implementation(ATTENTION)
        together = self.config.optimizer_in_backward
        longest = sum(self.documents.lengths) if together else max(self.documents.lengths)
        recompute = bool(self.config.gradient_checkpointing) and not self.config.tile_tokens
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._pinning_timed())
            stack.enter_context(repeatable(self.model, recompute=recompute))
            stack.enter_context(long_context(self.model, self.config, longest=longest, say=print))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        self.model.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def _pinning_timed(self) -> Iterator[None]:
        """The slab of host memory is made in the first forward and takes seconds; they are booked apart."""
        make = offload.host_bytes

        def timed(num_bytes: int, *asked: Any) -> Tensor:
            start = time.perf_counter()
            slab = make(num_bytes, *asked)
            self.pinning_seconds += time.perf_counter() - start
            self.slab_bytes = max(self.slab_bytes, num_bytes)
            return slab

        offload.host_bytes = timed
        try:
            yield
        finally:
            offload.host_bytes = make

    def reference(self, documents: Documents) -> float:
        return score(self.model, [documents.forget], max_tokens=1)[0]

    def forward(self, items: list[Item], documents: Documents) -> tuple[Tensor, float]:
        """The loss, connected to its graph, and the forget document's distance from the reference in nats."""
        batch = collate(items).to(self.device)
        result = batch_loss(hidden_states(self.model, batch), head_of(self.model), batch, self.config, documents.totals)
        forget = [item.role == Role.FORGET for item in items]
        delta = (result.logprobs - batch.ref_logprob).abs()[forget]
        return result.loss, float(delta.max()) if any(forget) else 0.0

    def warm_head(self) -> None:
        """The head alone, at the documents' length: its kernels choose their sizes by the number of rows."""
        for items in self.documents.packs(0.0, together=self.config.optimizer_in_backward):
            batch, head = collate(items).to(self.device), head_of(self.model)
            size = (len(batch.targets), head.weight.shape[1])
            hidden = torch.randn(size, device=self.device, dtype=head.weight.dtype, requires_grad=True)
            batch_loss(hidden, head, batch, self.config, self.documents.totals).loss.backward()
            self.model.zero_grad(set_to_none=True)

    def step(self, optimizer: torch.optim.Optimizer, documents: Documents, ref: float, meter: Meter) -> Fields:
        """One whole step; what it found. Its gradients are gone after."""
        together = self.config.optimizer_in_backward
        loss, delta = 0.0, 0.0
        with InBackward(optimizer) if together else contextlib.nullcontext() as in_backward:
            for items in documents.packs(ref, together=together):
                with meter.phase("forward"):
                    part, distance = self.forward(items, documents)
                with meter.phase("backward"):
                    part.backward()
                loss, delta = loss + float(part.detach()), max(delta, distance)
                del part
            gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
            found = {"gradient_bytes": tensor_bytes(gradients), "loss": loss, "delta_nats": delta}
            with meter.phase("update"):
                if in_backward is None:
                    found["grad_norm"] = gradient_norm([tensor_norm(gradient) for gradient in gradients])
                    optimizer.step()
                else:
                    found["grad_norm"] = in_backward.pop_gradient_norm()
                del gradients
                optimizer.zero_grad(set_to_none=True)
        return found


class Plain(Ours):
    """Full logits of a whole document through transformers' own loop; the reference is one stored number here too."""

    def __enter__(self) -> Plain:
        self.model.set_attn_implementation("sdpa")
        return self

    def reference(self, documents: Documents) -> float:
        with torch.no_grad():
            return -float(sequence_nll(self.model, self._inputs(documents.forget)).sum())

    def forward(self, items: list[Item], documents: Documents) -> tuple[Tensor, float]:
        (item,) = items
        inputs = self._inputs(item.sequence)
        if item.role == Role.RETAIN:
            return self.model(**inputs).loss, 0.0
        nll = sequence_nll(self.model, inputs)
        loss = -2 / BETA * torch.nn.functional.logsigmoid(BETA * (nll + item.ref_logprob))
        return loss.sum(), float((nll.detach() + item.ref_logprob).abs().max())

    def warm_head(self) -> None:
        pass

    def _inputs(self, document: Sequence) -> dict[str, Any]:
        ids = torch.tensor([document.input_ids], device=self.device)
        labels = ids.clone()
        labels[:, : document.answer_start] = -100
        return {"input_ids": ids, "labels": labels, "use_cache": False}


def sequence_nll(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Summed over each row's labels, from full logits in the model's dtype; labels go in, as they do in
    open-unlearning, so that the model forms its own loss too."""
    logits = model(**inputs).logits[:, :-1].contiguous()
    token = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), inputs["labels"][:, 1:], ignore_index=-100, reduction="none"
    )
    return token.sum(1)


class Optimizers:
    """One optimizer at a time over a model's weights: its states are kept from case to case, and given up for the
    next one's."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = list(model.parameters())
        self.name: str | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def get(self, config: TrainConfig) -> torch.optim.Optimizer:
        if config.optimizer != self.name or self.optimizer is None:
            self.drop()  # before the next one's states are asked for
            self.optimizer, self.name = make_optimizer(config, self.weights), config.optimizer
            set_lr(self.optimizer, 0.0)
        return self.optimizer

    def drop(self) -> None:
        self.name = self.optimizer = None

    @property
    def state_bytes(self) -> int:
        """On the weights' device."""
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        held = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        here = tensor_bytes([tensor for tensor in held if tensor.device == self.weights[0].device])
        return here + getattr(self.optimizer, "staged_bytes", 0)


def measured(way: Ours, optimizers: Optimizers, *, warmup_tokens: int, another: Callable[[float], bool]) -> Fields:
    """A short step to warm up, the reference pass, then whole steps for as long as another(seconds of the last) says.

    The median step's seconds, the highest peaks of any; `refused` where a loss or a gradient is not finite.
    """
    optimizer, documents, device = optimizers.get(way.config), way.documents, way.device
    warm = documents.shortened(warmup_tokens)
    with Clock(device) as first:
        # a reference far off would leave no gradient to warm up with
        way.step(optimizer, warm, way.reference(warm), Meter(device))
        way.warm_head()
    with Clock(device) as reference:
        ref = way.reference(documents)
    steps: list[tuple[float, Meter, Fields]] = []
    while not steps or another(steps[-1][0]):
        meter = Meter(device)
        found = way.step(optimizer, documents, ref, meter)
        steps.append((sum(meter.seconds.values()), meter, found))
    seconds, meter, found = sorted(steps, key=lambda step: step[0])[len(steps) // 2]
    row = {
        "seconds": seconds,
        "steps": len(steps),
        **{f"{name}_seconds": value for name, value in meter.seconds.items()},
        "reference_seconds": reference.seconds,
        "warmup_seconds": first.seconds - way.pinning_seconds,
        "pinning_seconds": way.pinning_seconds,
        "allocated_mib": max(max(meter.allocated_mib.values()) for _, meter, _ in steps),
        "reserved_mib": max((meter.reserved_mib for _, meter, _ in steps if meter.reserved_mib), default=None),
        **{f"{name}_allocated_mib": value for name, value in meter.allocated_mib.items()},
        "weights_bytes": tensor_bytes(optimizers.weights),
        "optimizer_bytes": optimizers.state_bytes,
        "host_bytes": way.slab_bytes,
        **found,
    }
    if not all(math.isfinite(found[name]) for name in ("loss", "grad_norm")):
        row["refused"] = True
    return row


class Clock:
    """Seconds of what runs inside, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def __enter__(self) -> Clock:
        synchronize(self.device)
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self.start
