"""What a step feeds, and the measures that make its context fit: their names, and which of them are on."""

from __future__ import annotations

from dataclasses import dataclass, replace

FLOAT32, GIB = 4, 1 << 30  # bytes


MEASURES = {
    "checkpointing": "each layer recomputed in the backward (--gradient-checkpointing)",
    "tiled layers": "everything but the attention in tiles of tokens (--tile-tokens)",
    "attention kept": "with tiles, attention outputs stay; only where asked for (--save-attention)",
    "checkpoints on host": "layers' inputs wait in pinned host memory (--offload-checkpoints)",
    "adamw": "AdamW, float32 states, bf16 weights rounded stochastically",
    "adamw-offload": "the same bits, its states in pinned host memory (--optimizer adamw-offload)",
    "adamw-bf16": "AdamW with bf16 states (--optimizer adamw-bf16)",
    "adamw8bit": "8-bit states in blocks of 256 (--optimizer adamw8bit)",
    "adafactor": "row and column sums for states (--optimizer adafactor); planned only where asked for",
    "step in backward": "a weight is stepped once its gradient is there (--optimizer-in-backward)",
    "lora": "float32 adapters of rank R on every linear layer; the model frozen (--lora R)",
    "qlora": "the same; the layers' matrices in 4 bits (--lora R --lora-4bit)",
}
# Bytes of optimizer states per trained weight; 8 bits: two states of one byte and a float32 scale for each 256.
STATE_BYTES = {
    "adamw": 2 * FLOAT32,
    "adamw-offload": 0,
    "adamw-bf16": 2 * 2,
    "adamw8bit": 2 * (1 + FLOAT32 / 256),
    "adafactor": 0,
}
HOST_STATE_BYTES = {"adamw-offload": 2 * FLOAT32}
IN_BACKWARD = "-in-backward"


@dataclass(frozen=True)
class Measures:
    """What is switched on. save_attention: with tiles; host_layers: how many layers' checkpoints wait on the host;
    adapter: None, lora or qlora of rank `rank`; itemsize: bytes of a weight and an activation."""

    checkpointing: bool = False
    tiled: bool = False
    host_layers: int = 0
    optimizer: str = "adamw"
    in_backward: bool = False
    adapter: str | None = None
    rank: int = 0
    itemsize: int = 2
    tile_tokens: int = 4096
    save_attention: bool = False

    def names(self) -> tuple[str, ...]:
        """The keys of MEASURES that are on."""
        on = {
            "checkpointing": self.checkpointing,
            "tiled layers": self.tiled,
            "attention kept": self.save_attention,
            "checkpoints on host": self.host_layers,
        }
        return (
            *(name for name, switched in on.items() if switched),
            self.optimizer,
            *(["step in backward"] if self.in_backward else []),
            *([self.adapter] if self.adapter else []),
        )


@dataclass(frozen=True)
class Load:
    """What one optimizer step feeds: the fed tokens of each sequence of its largest pack, how many packs (micro-batches
    whose gradients add up), the pack's answer tokens (None: every token), whether KL keeps a reference head, and
    whether a token budget fixes the packs, so that a step in the backward cannot have them in one."""

    lengths: tuple[int, ...]
    packs: int = 1
    answers: int | None = None
    reference_head: bool = False
    fixed: bool = False

    @property
    def tokens(self) -> int:
        """T, of the largest pack."""
        return sum(self.lengths)

    @property
    def mixed(self) -> bool:
        """Sequences of several lengths, which packed attention gathers by length and pads."""
        return len(set(self.lengths)) > 1

    @property
    def rows(self) -> int:
        """N, the rows that reach the head."""
        return self.tokens if self.answers is None else self.answers

    def in_one_pack(self) -> Load:
        """An optimizer that steps in the backward has to see the whole step in one."""
        answers = None if self.answers is None else self.answers * self.packs
        return replace(self, lengths=self.lengths * self.packs, packs=1, answers=answers)
