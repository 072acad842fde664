"""One unlearning step of a whole model, two ways, same weights and rows: `python -m bench.gpu_train`.

NPO on the forget rows and NLL on the retain rows, TOFU's sizes: 32 + 32 questions of about 70 tokens, of which a share
carries labels. `unlearn` is this project's step: one packed forward without prompt or padding in the head, the
reference as one stored number per row. `padded` is the step as open-unlearning computes it: forget and retain rows
padded apart, full logits, a second resident model as the reference. The model is a random Llama; the reference is the
same with 1 % of noise, so that the ratio is not zero. Forward and backward are timed, from token ids on the host to
gradients; the optimizer's step, the same for both, has a row of its own.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor, nn

from bench import part as parts
from bench.part import Part
from bench.rows import first_line
from bench.steps import BETA, sequence_nll
from bench.timing import Interleaved, Stopwatch, peak_mib, quartiles, release

SHARES = (0.6, 0.15)
# bf16 sums of log-likelihoods near -500 are 2 apart, which moves the padded slope of a sequence by up to a tenth.
LOSS_BOUND, GRADIENT_BOUND = 5e-2, 2e-1
Fields = dict[str, Any]


def main() -> int:
    parser = parts.parser_of(__doc__, seconds=60)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--rows", type=int, default=32, help="forget rows; as many retain rows")
    parser.add_argument("--length", type=int, default=70, help="tokens of a row, on average")
    parser.add_argument("--tied", action="store_true", help="head and embedding share their weight")
    parser.add_argument("--rounds", type=int, default=20)
    return parts.run("train-e", parser, measure)


def measure(part: Part) -> None:
    args = part.args
    if part.tiny:
        args.layers, args.hidden, args.vocab, args.rows, args.length, args.rounds = 1, 32, 130, 3, 12, 2
    policy = make_model(args, part.device)
    frozen = copy.deepcopy(policy).requires_grad_(False)
    perturb(frozen)
    resident = sum(parameter.numel() * parameter.element_size() for parameter in policy.parameters()) / 2**20
    shape = {key: getattr(args, key) for key in ("layers", "hidden", "vocab", "rows", "length", "tied")}
    for index, share in enumerate(SHARES):
        what = {"model": shape, "labelled": share}
        if part.budget.spent:
            part.leave_out(what)
            continue
        seconds = part.budget.left / (len(SHARES) - index) * 0.7
        steps = Steps(policy, frozen, make_rows(args, share), part.device)
        measure_steps(part, steps, what, resident, seconds)
        release(part.device)
    measure_optimizer(part, policy, shape)


def make_model(args: Any, device: torch.device) -> nn.Module:
    """A random Llama in bf16 (float32 on a CPU, whose bf16 attention is slow), in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from unlearn.model import prepare

    heads = max(2, args.hidden // 64)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=2048,
        tie_word_embeddings=args.tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    return prepare(model)


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    generator = torch.Generator(next(model.parameters()).device).manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
        parameter.addcmul_(noise, parameter, value=0.01)


def make_rows(args: Any, share: float) -> tuple[list[Any], list[Any]]:
    """Forget and retain sequences whose lengths spread by a third around the mean, `share` of each in the answer."""
    from unlearn.data import Sequence

    generator = torch.Generator().manual_seed(2)

    def row(number: int) -> Any:
        spread = int(torch.randint(-args.length // 3, args.length // 3 + 1, (), generator=generator))
        length = args.length + spread
        ids = torch.randint(2, args.vocab, (length,), generator=generator).tolist()
        return Sequence(f"row {number}", tuple(ids), length - max(1, round(share * length)))

    return [row(number) for number in range(args.rows)], [row(args.rows + number) for number in range(args.rows)]


class Steps:
    """Both ways to the gradients of one step. Each leaves them in the policy and returns the loss."""

    def __init__(
        self, policy: nn.Module, frozen: nn.Module, rows: tuple[list[Any], list[Any]], device: torch.device
    ) -> None:
        from unlearn import reference
        from unlearn.config import TrainConfig
        from unlearn.methods import StepTotals

        self.policy, self.frozen, self.device = policy, frozen, device
        self.forget, self.retain = rows
        self.config = TrainConfig(
            model="random", output="none", method="npo", lr=1e-5, epochs=1, batch_size=len(self.forget), seed=0,
            forget="forget", retain="retain", retain_term="nll", beta=BETA,
        )  # fmt: skip
        self.totals = StepTotals(
            num_forget=len(self.forget),
            num_forget_tokens=sum(row.num_answer_tokens for row in self.forget),
            num_retain_tokens=sum(row.num_answer_tokens for row in self.retain),
        )
        self.packed_attention(frozen)
        with torch.no_grad():
            self.ref = reference.score(frozen, self.forget, max_tokens=1 << 16)
        self.padded_attention(frozen)

    @staticmethod
    def packed_attention(model: nn.Module) -> None:
        from unlearn.attention import ATTENTION

        model.set_attn_implementation(ATTENTION)

    @staticmethod
    def padded_attention(model: nn.Module) -> None:
        model.set_attn_implementation("sdpa")

    def prepare(self, name: str) -> None:
        """Outside the clock: the attention that this way uses, and no gradients."""
        (self.packed_attention if name == "unlearn" else self.padded_attention)(self.policy)
        self.policy.zero_grad(set_to_none=True)

    def unlearn(self) -> Tensor:
        from unlearn.data import Item, Role, collate
        from unlearn.methods import batch_loss
        from unlearn.model import head_of, hidden_states

        items = [Item(row, Role.FORGET, ref) for row, ref in zip(self.forget, self.ref, strict=True)]
        batch = collate(items + [Item(row, Role.RETAIN) for row in self.retain]).to(self.device)
        hidden = hidden_states(self.policy, batch)
        loss = batch_loss(hidden, head_of(self.policy), batch, self.config, self.totals).loss
        loss.backward()
        return loss.detach()

    def padded(self) -> Tensor:
        inputs = self._padded_inputs(self.forget)
        nll = sequence_nll(self.policy, inputs)
        with torch.no_grad():
            ref_nll = sequence_nll(self.frozen, inputs)
        forget = (-2 / BETA * torch.nn.functional.logsigmoid(BETA * (nll - ref_nll))).mean()
        loss = forget + self.policy(**self._padded_inputs(self.retain)).loss
        loss.backward()
        return loss.detach()

    def _padded_inputs(self, rows: Seq[Any]) -> dict[str, Tensor]:
        """Padded to the longest of the batch, on the right."""
        longest = max(len(row.input_ids) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for at, row in enumerate(rows):
            ids[at, : len(row.input_ids)] = torch.tensor(row.input_ids)
            labels[at, row.answer_start : len(row.input_ids)] = torch.tensor(row.input_ids[row.answer_start :])
            mask[at, : len(row.input_ids)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}


def measure_steps(part: Part, steps: Steps, what: Fields, resident_mib: float, seconds: float) -> None:
    ways: dict[str, Callable[[], Tensor]] = {"unlearn": steps.unlearn, "padded": steps.padded}
    stopwatch = Stopwatch(part.device)
    found = {name: result_of(steps, name, way) for name, way in ways.items()}
    both = all("loss" in one for one in found.values())
    agreement: Fields = {}
    if both:
        mine, theirs = found["unlearn"], found["padded"]
        agreement["loss_relative"] = abs(mine["loss"] - theirs["loss"]) / abs(theirs["loss"])
        agreement["gradient_relative"] = float(
            (mine["gradient"].double() - theirs["gradient"].double()).norm() / theirs["gradient"].double().norm()
        )
    agree = both and agreement["loss_relative"] <= LOSS_BOUND and agreement["gradient_relative"] <= GRADIENT_BOUND
    gradients = [one.pop("gradient", None) for one in found.values()]
    del gradients
    timed = Interleaved(stopwatch)
    for name, way in ways.items():
        if "loss" in found[name]:
            timed.add(name, way, lambda name=name: steps.prepare(name))
    timed.rounds(seconds, least=2 if part.tiny else 3, most=part.args.rounds)
    tokens = sum(row.num_tokens for row in (*steps.forget, *steps.retain))
    labels = steps.totals.num_forget_tokens + steps.totals.num_retain_tokens
    for name, way in ways.items():
        models = 1 if name == "unlearn" else 2
        row = {"case": "train_step", "provider": name, **what, **found[name], **agreement, "tokens": tokens,
               "labels": labels, "resident_mib": models * resident_mib}  # fmt: skip
        if name in timed.failed:
            row["failed"] = timed.failed[name]
        elif "failed" not in row and not agree:
            row["refused"] = True
        elif "failed" not in row:
            lower, middle, upper = quartiles(timed.times[name])
            steps.prepare(name)
            row |= {
                "ms": middle,
                "ms_quartiles": [lower, upper],
                "tokens_per_second": tokens / middle * 1e3,
                "rounds": len(timed.times[name]),
                "peak_mib": peak_mib(way, part.device),
            }
        part.rows.write(row, failed=bool({"failed", "refused"} & set(row)))
        outcome = row.get("failed") or ("REFUSED" if "refused" in row else f"{row['ms']:.1f} ms")
        print(f"train step, {what['labelled']:.0%} labelled, {name}: {outcome} {agreement}", flush=True)
    steps.policy.zero_grad(set_to_none=True)


def result_of(steps: Steps, name: str, way: Callable[[], Tensor]) -> Fields:
    """Loss and the head's gradient of one step."""
    try:
        steps.prepare(name)
        loss = float(way())
        return {"loss": loss, "gradient": steps.policy.get_output_embeddings().weight.grad.clone()}
    except Exception as error:
        return {"failed": first_line(error)}


def measure_optimizer(part: Part, policy: nn.Module, shape: Fields) -> None:
    """This project's AdamW with stochastic rounding; a rate of 0 leaves the weights where they are."""
    from unlearn.optim import AdamWSR

    if part.budget.spent:
        part.leave_out({"optimizer": "AdamWSR"})
        return
    for parameter in policy.parameters():
        parameter.grad = torch.full_like(parameter, 1e-4)
    optimizer = AdamWSR(policy.parameters(), lr=0.0, weight_decay=0.0, seed=0)
    stopwatch = Stopwatch(part.device)
    times = [stopwatch(optimizer.step) for _ in range(2 if part.tiny else 5)][1:]
    part.rows.write({"case": "optimizer", "provider": "AdamWSR", "model": shape, "ms": quartiles(times)[1]})


if __name__ == "__main__":
    sys.exit(main())
