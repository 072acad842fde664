"""Where the decoder layers' inputs wait between forward and backward: on the device, or in one slab of host memory.

A recomputing layer keeps its input and nothing else: N x H values, u = 2*N*H bytes in bf16 (N tokens, width H). Of L
layers the first K are offloaded; the last ones stay, since the backward wants them first and frees them at once:

    device    (L - K) u, and u for the copy under way: the input that leaves in the forward, in the backward the one
              that is fetched a layer ahead
    host      K u, one slab of exactly that size. Torch's own pinned allocator rounds every block up to a power of two,
              so the slab is ordinary memory that is registered with CUDA afterwards
    transfer  K u down and K u up per forward and backward, on a stream of its own

The slab is made for the longest pack and viewed at the size of the present one. It holds one forward at a time: a
backward that comes after another forward is refused, never served with that forward's values. On a CPU the same copies
are made without streams, so that tests of the slab are tests of the real thing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_LESS = "fewer layers or a shorter context"


@dataclass(frozen=True)
class Ticket:
    """One layer's input in one forward. offloaded: it is in the slab; otherwise the caller keeps the tensor itself."""

    forward: int
    index: int
    offloaded: bool
    shape: torch.Size
    dtype: torch.dtype


class CheckpointStore:
    """The inputs of `num_layers` layers, the first `offload` of them on the host. longest: tokens of the longest pack
    to come, so that the slab is made once: pinning it takes a second per few GiB."""

    def __init__(
        self, num_layers: int, offload: int, *, longest: int = 0, say: Callable[[str], None] | None = None
    ) -> None:
        if not 0 <= offload <= num_layers:
            raise ValueError(f"offload_checkpoints: {offload} is not accepted; 0 to {num_layers} layers are")
        self.num_layers, self.num_offloaded = num_layers, offload
        self._longest, self._say = longest, say
        self._slab: Tensor | None = None  # bytes
        self._slot_bytes = 0  # the largest layer input seen
        self._forward, self._last_index = 0, num_layers
        self._stream: Any = None
        self._fetched: tuple[Ticket, Tensor, Any] | None = None
        self._tickets: dict[int, Ticket] = {}

    def put(self, index: int, x: Tensor) -> Ticket:
        """Store layer `index`'s input, if this layer is offloaded. Layers come in rising order; a lower one begins a
        new forward, and what the slab held of an earlier one is gone."""
        if index <= self._last_index:
            self._begin(x)
        self._last_index = index
        ticket = Ticket(self._forward, index, index < self.num_offloaded, x.shape, x.dtype)
        self._tickets[index] = ticket
        if ticket.offloaded:
            slot = self._slot(ticket)
            if self._stream is None:
                slot.copy_(x)
            else:
                self._stream.wait_stream(torch.cuda.current_stream(x.device))
                with torch.cuda.stream(self._stream):
                    slot.copy_(x, non_blocking=True)
                x.record_stream(self._stream)  # its memory is not handed out again before the copy is done
        return ticket

    def restore(self, ticket: Ticket, kept: Tensor | None, device: torch.device) -> Tensor:
        """The input that `ticket` stands for: `kept`, or the slab's copy; the layer below is fetched meanwhile."""
        if not ticket.offloaded:
            assert kept is not None
            x = kept
        else:
            if ticket.forward != self._forward:
                raise RuntimeError(
                    "offload_checkpoints: this backward belongs to an earlier forward, whose layer inputs have been"
                    " overwritten; one forward and its backward at a time are accepted"
                )
            fetched, self._fetched = self._fetched, None
            if fetched is None or fetched[0] is not ticket:
                self._wait(fetched)
                fetched = self._fetch(ticket, device)
            self._wait(fetched)
            x = fetched[1]
        below = self._tickets.get(ticket.index - 1)
        if below is not None and below.offloaded and below.forward == ticket.forward == self._forward:
            self._wait(self._fetched)
            self._fetched = self._fetch(below, device)
        return x

    def close(self) -> None:
        """Give the slab back; tickets that are still out are refused from then on."""
        self._forward += 1
        self._tickets.clear()
        self._wait(self._fetched)
        self._fetched = None
        self._free()

    def _begin(self, x: Tensor) -> None:
        self._forward += 1
        self._tickets.clear()
        self._wait(self._fetched)
        self._fetched = None
        num_bytes = max(x.shape[1], self._longest) * x.shape[2] * x.element_size()
        if num_bytes <= self._slot_bytes:
            return
        self._free()  # before the larger one is asked for
        self._slot_bytes = num_bytes
        if self.num_offloaded == 0:
            return
        if x.device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        self._slab = host_bytes(self.num_offloaded * num_bytes, x.device, "offload_checkpoints", _LESS)
        if self._say is not None:
            self._say(
                f"layer inputs: {self.num_offloaded} of {self.num_layers} layers on the host,"
                f" {self._slab.numel() / 2**30:.3g} GiB"
            )

    def _slot(self, ticket: Ticket) -> Tensor:
        assert self._slab is not None
        num_bytes = ticket.shape.numel() * ticket.dtype.itemsize
        start = ticket.index * num_bytes
        return self._slab[start : start + num_bytes].view(ticket.dtype).view(ticket.shape)

    def _fetch(self, ticket: Ticket, device: torch.device) -> tuple[Ticket, Tensor, Any]:
        x = torch.empty(ticket.shape, dtype=ticket.dtype, device=device)
        if self._stream is None:
            x.copy_(self._slot(ticket))
            return ticket, x, None
        # x may lie where a tensor lay that queued kernels still read
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            x.copy_(self._slot(ticket), non_blocking=True)
        return ticket, x, self._stream.record_event()

    @staticmethod
    def _wait(fetched: tuple[Ticket, Tensor, Any] | None) -> None:
        """Before its tensor is read, and before it is dropped: the copy may still be writing to it."""
        if fetched is not None and fetched[2] is not None:
            torch.cuda.current_stream(fetched[1].device).wait_event(fetched[2])

    def _free(self) -> None:
        if self._slab is not None and self._stream is not None:
            self._stream.synchronize()
            unpin(self._slab)
        self._slab, self._slot_bytes = None, 0


def host_bytes(num_bytes: int, device: torch.device, setting: str, less: str) -> Tensor:
    """Exactly num_bytes of host memory, pinned where CUDA copies from it; `unpin` them before they are given back.

    Raises ValueError naming the setting that asked for them, and what would need less.
    """
    wanted = f"{setting}: {num_bytes / 2**30:.3g} GiB of host memory"
    try:
        slab = torch.empty(num_bytes, dtype=torch.uint8)
    except RuntimeError:
        raise ValueError(f"{wanted} could not be had; {less} would need less") from None
    if device.type == "cuda":
        status = int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), num_bytes, 0))
        if status != 0:
            raise ValueError(f"{wanted} could not be pinned (CUDA error {status}); {less} would need less")
    return slab


def unpin(slab: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())


def offloading_checkpoint(store: CheckpointStore, index: int, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """torch's non-reentrant `checkpoint` of layer `index`, whose saved input goes through the store."""

    def run(function: Callable[..., Any], x: Tensor, *args: Any) -> Any:
        def pack(saved: Tensor) -> tuple[Ticket, Tensor | None] | Tensor:
            if (saved.data_ptr(), saved.shape) != wanted:
                return saved
            ticket = store.put(index, saved)
            return ticket, None if ticket.offloaded else saved

        def unpack(packed: tuple[Ticket, Tensor | None] | Tensor) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            ticket, kept = packed
            return store.restore(ticket, kept, device)

        device, wanted = x.device, (x.data_ptr(), x.shape)  # not x: what is saved holds on to these functions
        # What the layer saves inside is recomputed by checkpoint's own hooks, which come after these.
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return checkpoint(function, x, *args)

    return run


@contextlib.contextmanager
def offloaded_checkpoints(layers: list[nn.Module], store: CheckpointStore) -> Iterator[None]:
    """Layers that transformers checkpoints already: their inputs go through the store, until the context ends."""
    own = [layer._gradient_checkpointing_func for layer in layers]
    for index, (layer, checkpoint) in enumerate(zip(layers, own, strict=True)):
        layer._gradient_checkpointing_func = offloading_checkpoint(store, index, checkpoint)
    try:
        yield
    finally:
        for layer, checkpoint in zip(layers, own, strict=True):
            layer._gradient_checkpointing_func = checkpoint
        store.close()
