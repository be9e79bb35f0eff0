"""What a runner has done: hits and misses, bytes that came from disk, time that was lost."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from qmoe_lite.offload.sizes import show_size


@dataclass
class Statistics:
    """What a `Runner` has done since it was made.

    Attributes
    ----------
    passes, tokens : int
        Passes of the model, and positions that went through them.
    seconds : float
        Time in which a forward pass of the model was under way.
    hits, misses : int
        Experts that a layer asked for, each once a pass, and that were, or were not, where they are multiplied.
    ram_hits, ram_misses : int
        On a GPU: of its misses, those that were in memory, and those that had to come from disk.
    late : int
        Of the misses, those whose reading a guess had begun already.
    disk_bytes, copied_bytes : int
        Codes read from disk to memory; codes, starts of rows and levels copied from memory to GPUs.
    stall_seconds : float
        Time in which nothing could be multiplied because no expert had arrived in memory.
    copy_stall_seconds : float or None
        Time in which GPUs computed nothing because an expert had not arrived there; None where that is not known.
    predicted, predicted_right : int
        Experts that the next layer's router named beforehand, and those of them that the layer then asked for.
    prefetched, prefetch_hits : int
        Experts that were read because they were predicted, and those of them that were asked for.
    copied_ahead, copied_ahead_hits : int
        Experts that were copied to a GPU because they were predicted, and those of them that were asked for.
    cache_bytes, ram_bytes, index_bytes : int
        Memory set aside for experts where they are multiplied; on a GPU, in memory besides; for row lengths and levels.
    direct : bool
        Reads pass the page cache by; else what was read is dropped from it.
    notes : list of str
        What had to be done otherwise than asked for.
    """

    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    hits: int = 0
    misses: int = 0
    ram_hits: int = 0
    ram_misses: int = 0
    late: int = 0
    disk_bytes: int = 0
    copied_bytes: int = 0
    stall_seconds: float = 0.0
    copy_stall_seconds: float | None = None
    predicted: int = 0
    predicted_right: int = 0
    prefetched: int = 0
    prefetch_hits: int = 0
    copied_ahead: int = 0
    copied_ahead_hits: int = 0
    cache_bytes: int = 0
    ram_bytes: int = 0
    index_bytes: int = 0
    direct: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were there."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def tokens_per_second(self) -> float:
        """Positions, those of prompts among them, over time inside the model."""
        return self.tokens / max(self.seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"hit_rate": self.hit_rate, "tokens_per_second": self.tokens_per_second}

    def lines(self) -> list[str]:
        """Format it in a few lines."""
        way = "past the page cache" if self.direct else "through the page cache, dropped from it after"
        found = [
            f"{self.tokens} tokens, {self.passes} passes, {self.seconds:.2f} s: {self.tokens_per_second:.1f} tokens/s",
            f"experts: {self.hits} hits, {self.misses} misses ({self.hit_rate:.1%} hits); cache "
            f"{show_size(self.cache_bytes)}, row lengths and levels {show_size(self.index_bytes)}",
        ]
        if self.ram_bytes:
            found.append(
                f"memory: {self.ram_hits} of the misses were in its {show_size(self.ram_bytes)}, "
                f"{self.ram_misses} were not; {show_size(self.copied_bytes)} copied to the GPU"
            )
            if self.copy_stall_seconds is not None:
                found[-1] += f", which waited {self.copy_stall_seconds:.2f} s for copies"
        found.append(f"disk: {show_size(self.disk_bytes)} read {way}; waited {self.stall_seconds:.2f} s for experts")
        if self.predicted:
            found.append(
                f"next layer guessed: {self.predicted_right / self.predicted:.1%} of {self.predicted} right; "
                f"{self.prefetched} read ahead, {self.prefetch_hits} of them used"
            )
            if self.ram_bytes:
                found[-1] += f"; {self.copied_ahead} copied ahead, {self.copied_ahead_hits} used"
        return found + [f"note: {note}" for note in self.notes]
