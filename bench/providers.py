"""Who is measured: this project's kernels, plain torch, and the peers, behind one small interface.

A provider says whether it can run on a device (`missing`: the reason, or None), gives per-token log-probabilities
(`tokens`), and from them the NPO loss (`loss`), the same from a padded batch as its users hold it (`padded`) and the
mean cross entropy (`mean_ce`). Every peer is called as its own documentation calls it; what it cannot do it leaves
None. Nothing but torch is imported before a provider is asked: a machine without a peer reports it and goes on.

Peers and the calls they stand on (read in the named releases):
    torch.compile             the plain version, mode default, dynamic=False
    torch.linear_cross_entropy  torch 2.13, nn.functional.linear_cross_entropy(options=LinearCrossEntropyOptions())
    liger                     liger-kernel 0.8.5, liger_fused_linear_cross_entropy(reduction="none" | "mean")
    liger-scaled              the same release's LigerFusedLinearScaledCrossEntropyFunction (CuTe on Hopper)
    liger-chunked             the same release's LigerFusedLinearUnpairedPreferenceBase with NPO as its loss; CPUs
    cut-cross-entropy         25.1.1, linear_cross_entropy(reduction="none"); [exact] is filter_eps=None, and on a CPU
                              [torch_compile] is impl="torch_compile"
    quack                     quack-kernels 0.6.5, chunked_linear_cross_entropy: mean or sum alone, so no NPO
    trl                       1.16.0, trl.kernels.ChunkedLogProbFunction
liger's chunked preference losses (DPO, KTO, ...) are not here, none of them is NPO; their base class is.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import unlearn_kernels as uk
from bench.inputs import BETA, IGNORE, Case, Padded, matrix_core_error, npo
from bench.rows import first_line
from unlearn_kernels import Options

# rms nats on peaked rows: what is aimed at everywhere, and what is refused on a CPU, whose sums round to nearest.
ERROR_TARGET = 1e-5


class Provider:
    """Defaults for whoever gives per-token log-probabilities, with targets of -100 ignored.

    error_bound, gradient_bound: rms error of token log-probabilities on peaked rows (nats) and relative error of
    gradients, both against float64, above which a measurement is refused (refused_above: on which device). kinds: what
    can be measured. slow_to_start: compiles for every shape, so it is measured on few.
    """

    error_bound = 1e-1  # logits rounded to bf16 cost 2e-2 on peaked rows
    gradient_bound = 1e-1  # and up to 2e-2 in the gradients, relative
    kinds: tuple[str, ...] = ("forward", "full", "frozen", "mean_ce")
    slow_to_start = False
    has_tokens = True

    def __init__(self, name: str) -> None:
        self.name = name

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here, None if it can."""
        return None

    def context(self) -> AbstractContextManager[Any]:
        """Surrounds whole calls, their backward included."""
        return contextlib.nullcontext()

    def refused_above(self, device: torch.device, width: int, logsumexp: Tensor) -> float:
        """error_bound, for rows with these normalisers on this device."""
        return self.error_bound

    def begin(self) -> None:
        """Called before the first call of a new shape."""

    def tokens(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """log p(target) of each row [N]; where a target is -100 the value is not read."""
        raise NotImplementedError

    def forward(self, case: Case) -> Tensor:
        return self.tokens(case.hidden, case.weight, case.targets)

    def loss(self, case: Case) -> Tensor:
        """The NPO loss, float64."""
        logprob = self.forward(case).double()
        return npo(logprob.reshape(-1, case.length).sum(1), case.ref)

    def mean_ce(self, case: Case) -> Tensor:
        return -self.forward(case).mean()

    def padded(self, batch: Padded) -> Tensor:
        """The NPO loss of a padded batch, over all positions as this provider's users run it."""
        targets = batch.labels[:, 1:].contiguous()
        hidden = batch.hidden[:, :-1].reshape(-1, batch.hidden.shape[-1])
        logprob = self.tokens(hidden, batch.weight, targets.flatten()).double().reshape(targets.shape)
        return npo(torch.where(targets != IGNORE, logprob, 0.0).sum(1), batch.ref)


class Ours(Provider):
    """unlearn_kernels: a backend forced by name, a forced plan of the Triton backend, a workspace holding all of E, or
    the path that a CUDA graph captures."""

    error_bound = ERROR_TARGET
    gradient_bound = 2e-2  # bf16 results

    def __init__(
        self,
        name: str,
        *,
        backend: str | None = None,
        plan: str | None = None,
        whole_e: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(name)
        self.backend, self.plan, self.whole_e, self.capturable = backend, plan, whole_e, capturable
        if whole_e:
            self.kinds = ("full", "frozen")  # the forward alone stores no E

    def missing(self, device: torch.device) -> str | None:
        from unlearn_kernels import backends

        if self.backend == "triton":
            if device.type != "cuda":  # interpreted on a CPU it is a test and no measurement
                return "needs a GPU"
            load = getattr(backends, "load_triton", lambda: "this version has no Triton backend")
            return load() or None
        if self.backend is not None and self.backend not in backends.BACKENDS:
            return f"no backend {self.backend!r} here"
        return None

    def refused_above(self, device: torch.device, width: int, logsumexp: Tensor) -> float:
        """The target, and on a GPU what a library product's own sums are off besides."""
        return ERROR_TARGET + (matrix_core_error(width, logsumexp) if device.type == "cuda" else 0.0)

    def context(self) -> AbstractContextManager[Any]:
        tuning = _triton_tuning()
        if self.plan is None or tuning is None:
            return contextlib.nullcontext()
        return tuning.force(self.plan)

    def options(self, num_rows: int, vocab: int) -> Options:
        if not self.whole_e:
            return Options(backend=self.backend, capturable=self.capturable)
        workspace = 2 * num_rows * vocab + (512 << 20)
        return Options(backend=self.backend, workspace_bytes=workspace, capturable=self.capturable)

    def tokens(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return uk.token_logprobs(hidden, weight, targets, options=self.options(len(hidden), len(weight)))

    def forward(self, case: Case) -> Tensor:
        options = self.options(len(case.hidden), len(case.weight))
        return uk.sequence_logprobs(case.hidden, case.weight, case.targets, case.cu_seqlens, options=options)

    def loss(self, case: Case) -> Tensor:
        options = self.options(len(case.hidden), len(case.weight))
        return uk.npo_loss(
            case.hidden, case.weight, case.targets, case.cu_seqlens, case.ref, beta=BETA, options=options
        )

    def mean_ce(self, case: Case) -> Tensor:
        """Token-mean negative log-likelihood as a sequence objective."""
        num_tokens = len(case.hidden)
        options = self.options(num_tokens, len(case.weight))
        inputs = (case.hidden, case.weight, case.targets, case.cu_seqlens)
        return uk.sequence_loss(*inputs, lambda logprobs, lengths, index: -logprobs / num_tokens, options=options).loss

    def padded(self, batch: Padded) -> Tensor:
        """pack_labels and its synchronisation included."""
        packed = uk.pack_labels(batch.hidden, batch.labels)
        options = self.options(len(packed.hidden), len(batch.weight))
        inputs = (packed.hidden, batch.weight, packed.targets, packed.cu_seqlens)
        return uk.npo_loss(*inputs, batch.ref[packed.kept], beta=BETA, options=options)


class PlainTorch(Provider):
    """What trainers do: full logits in the model's dtype (exact: in float32), log-softmax in float32."""

    def __init__(self, name: str, *, compiled: bool = False, exact: bool = False) -> None:
        super().__init__(name)
        self.slow_to_start = compiled
        self._call = exact_logprobs if exact else plain_logprobs

    def missing(self, device: torch.device) -> str | None:
        return "compiled on GPUs alone" if self.slow_to_start and device.type != "cuda" else None

    def begin(self) -> None:
        if self.slow_to_start:
            torch._dynamo.reset()  # past eight shapes dynamo would fall back to eager without a word
            self._call = torch.compile(plain_logprobs, dynamic=False)

    def tokens(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return self._call(hidden, weight, targets)


def plain_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]


def exact_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return plain_logprobs(hidden.float(), weight.float(), targets)


class TorchLinearCrossEntropy(Provider):
    """torch 2.13's own; policy None is its reference path with full logits, "auto" what its documentation offers."""

    def __init__(self, name: str, policy: str) -> None:
        super().__init__(name)
        self.policy = policy

    def missing(self, device: torch.device) -> str | None:
        return None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__}: it came with 2.13"

    def _nll(self, hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions(acc_policy=self.policy)
        return F.linear_cross_entropy(
            hidden, weight, targets, reduction=reduction, ignore_index=IGNORE, options=options
        )

    def tokens(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -self._nll(hidden, weight, targets, "none")

    def mean_ce(self, case: Case) -> Tensor:
        return self._nll(case.hidden, case.weight, case.targets, "mean")


class Peer(Provider):
    """A provider from another package: missing where `modules` do not import or the device is no GPU."""

    modules: ClassVar[tuple[str, ...]] = ()

    def missing(self, device: torch.device) -> str | None:
        package = self.modules[0].partition(".")[0]
        if importlib.util.find_spec(package) is None:
            return "not installed"
        if device.type != "cuda" and not self.runs_on_cpu:
            return "needs a GPU"
        try:
            for module in self.modules:
                importlib.import_module(module)
        except Exception as error:  # importing a peer may run anything
            return first_line(error)
        return self.unsupported(device)

    runs_on_cpu = False

    def unsupported(self, device: torch.device) -> str | None:
        return None


class Liger(Peer):
    """reduction="none" defers: the backward recomputes the logits with the upstream gradient at hand (4 units)."""

    modules = ("liger_kernel.transformers.functional",)

    def _nll(self, hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORE, reduction=reduction)

    def tokens(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -self._nll(hidden, weight, targets, "none")

    def mean_ce(self, case: Case) -> Tensor:
        return self._nll(case.hidden, case.weight, case.targets, "mean")


class LigerScaled(Peer):
    """Per-token negative log-likelihoods under any upstream; a CuTe kernel on Hopper, torch in chunks elsewhere."""

    modules = ("liger_kernel.ops.fused_linear_scaled_cross_entropy",)
    runs_on_cpu = True

    def unsupported(self, device: torch.device) -> str | None:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
            return None
        try:  # what the op imports at its first call on Hopper: it needs nvidia-cutlass-dsl
            importlib.import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
        except Exception as error:
            return f"its Hopper kernel does not import ({first_line(error)})"
        return None

    def tokens(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

        return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets, 1.0, IGNORE)


class LigerChunked(Peer):
    """NPO by its base class for losses of unpaired sequences, which forms gradients in its forward, a few sequences at
    a time. The base hands a loss nothing of its own but the labels, so they carry each sequence's place in `ref`; its
    metrics, sums over chosen and rejected ones, mean nothing here."""

    modules = ("liger_kernel.chunked_loss.fused_linear_unpaired_preference",)
    runs_on_cpu = True
    kinds = ("full", "frozen")
    has_tokens = False

    def unsupported(self, device: torch.device) -> str | None:
        return "measured on CPUs alone" if device.type != "cpu" else None

    def loss(self, case: Case) -> Tensor:
        from liger_kernel.chunked_loss.fused_linear_unpaired_preference import LigerFusedLinearUnpairedPreferenceBase

        class Chunked(LigerFusedLinearUnpairedPreferenceBase):
            @staticmethod
            def preference_loss_fn(log_prob_chunk, places, full_target):
                picked = case.ref[places].float()
                return npo(log_prob_chunk, picked) * len(places) / len(case.ref)

            @classmethod
            def forward(cls, ctx, hidden, weight, targets, places):
                return LigerFusedLinearUnpairedPreferenceBase.forward(
                    cls, ctx, hidden, weight, targets, places, chunk_size=1, compiled=False
                )

            @staticmethod
            def backward(ctx, *upstream):
                return LigerFusedLinearUnpairedPreferenceBase.backward(ctx, upstream)[:4]

        num_sequences = len(case.ref)
        hidden = case.hidden.reshape(num_sequences, case.length, -1)
        places = torch.arange(num_sequences, device=hidden.device)
        loss: Tensor = Chunked.apply(hidden, case.weight, case.targets.reshape(num_sequences, -1), places)[0]
        return loss


class CutCrossEntropy(Peer):
    """exact: without the gradient filter that skips blocks of small probabilities. compiled: its torch_compile
    implementation, which runs on CPUs."""

    modules = ("cut_cross_entropy",)

    def __init__(self, name: str, *, exact: bool = False, compiled: bool = False) -> None:
        super().__init__(name)
        self.exact, self.runs_on_cpu = exact, compiled
        self.impl = "torch_compile" if compiled else "cce"

    def _nll(self, hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        filtering = {"filter_eps": None} if self.exact else {}
        return linear_cross_entropy(
            hidden, weight, targets, ignore_index=IGNORE, reduction=reduction, impl=self.impl, **filtering
        )

    def tokens(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -self._nll(hidden, weight, targets, "none")

    def mean_ce(self, case: Case) -> Tensor:
        return self._nll(case.hidden, case.weight, case.targets, "mean")


class Quack(Peer):
    """Mean or sum with one scalar upstream: no per-sequence weights, so the mean cross entropy is what is compared."""

    modules = ("quack.linear_cross_entropy",)
    kinds = ("mean_ce",)
    has_tokens = False

    def mean_ce(self, case: Case) -> Tensor:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return chunked_linear_cross_entropy(case.hidden, case.weight, case.targets)


class TRL(Peer):
    """The op behind its KTO, DPO and GRPO losses. Its trainers hand it the labelled rows alone."""

    # its backward imports the second one, which wants most of trl's requirements
    modules = ("trl.kernels", "trl.trainer.utils")
    runs_on_cpu = True
    chunk = 32768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def tokens(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from trl.kernels import ChunkedLogProbFunction

        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, self.chunk, None, 1.0, ())[0]

    def padded(self, batch: Padded) -> Tensor:
        labels = batch.labels[:, 1:]
        mask = labels != IGNORE
        logprob = self.tokens(batch.hidden[:, :-1][mask], batch.weight, labels[mask]).double()
        return npo(logprob.new_zeros(mask.shape).masked_scatter(mask, logprob).sum(1), batch.ref)


def ours(*backends: str) -> list[Provider]:
    """unlearn_kernels as a user gets it, and with each of these backends forced."""
    return [Ours("unlearn_kernels"), *(Ours(f"unlearn_kernels[{name}]", backend=name) for name in backends)]


def variants(every: torch.device | None = None) -> list[Provider]:
    """The ways in which the Triton backend forms logits, each forced; none where it does not name any.

    every: all the plans that are autotuned over on this device instead of the fused one's first.
    """
    tuning = _triton_tuning()
    plans: Any = getattr(tuning, "PLANS", ())
    if every is not None and plans:
        candidates = tuning.candidates(every, torch.bfloat16, torch.bfloat16)
        plans = [tuning.plan_name(plan) for plan in candidates]
    return [Ours(f"unlearn_kernels[{plan}]", backend="triton", plan=plan) for plan in plans]


def whole_e() -> Provider:
    """A workspace that holds all of E: the fastest schedule, at the price of its memory."""
    return Ours("unlearn_kernels[workspace=E]", whole_e=True)


def autotuned() -> dict[str, str]:
    """The plans that were chosen on this machine, by head; empty where nothing is known."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return dict(json.loads(_triton_tuning().cache_file().read_text()))
    return {}


def _triton_tuning() -> Any:
    try:
        from unlearn_kernels import triton_tuning
    except ImportError:
        return None
    return triton_tuning


def peers() -> list[Provider]:
    return [
        PlainTorch("torch"),
        PlainTorch("torch.compile", compiled=True),
        TorchLinearCrossEntropy("torch.linear_cross_entropy", "auto"),
        TorchLinearCrossEntropy("torch.linear_cross_entropy[accurate]", "accurate"),
        Liger("liger"),
        LigerScaled("liger-scaled"),
        CutCrossEntropy("cut-cross-entropy"),
        CutCrossEntropy("cut-cross-entropy[exact]", exact=True),
        Quack("quack"),
        TRL("trl"),
    ]


def cpu_peers() -> list[Provider]:
    """Those that a CPU runs, and what else it has."""
    return [
        PlainTorch("torch"),
        PlainTorch("torch[float32]", exact=True),
        *(
            TorchLinearCrossEntropy(f"torch.linear_cross_entropy[{policy}]", policy)
            for policy in ("auto", "accurate", "balanced", "compact")
        ),
        LigerScaled("liger-scaled"),
        LigerChunked("liger-chunked"),
        CutCrossEntropy("cut-cross-entropy[torch_compile]", compiled=True),
        TRL("trl"),
    ]


def split(providers: list[Provider], device: torch.device) -> tuple[list[Provider], dict[str, str]]:
    """Those that can run on the device, and why the others cannot."""
    reasons = {provider.name: provider.missing(device) for provider in providers}
    there = [provider for provider in providers if reasons[provider.name] is None]
    return there, {name: reason for name, reason in reasons.items() if reason is not None}


def work_of(provider: Provider, kind: str, case: Case) -> Any:
    """One call of this kind: forward without gradients, or a loss and its backward. Leaves gradients in the case."""

    def forward() -> Tensor:
        case.ask(hidden=False, weight=False)  # peers look at requires_grad even without gradients
        with torch.no_grad(), provider.context():
            return provider.forward(case)

    def step() -> None:
        case.ask(hidden=True, weight=kind != "frozen")
        with provider.context():
            (provider.mean_ce if kind == "mean_ce" else provider.loss)(case).backward()

    return forward if kind == "forward" else step
