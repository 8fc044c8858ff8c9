"""What happened: full and partial steps per layer, KV entries read, effective stride."""

from __future__ import annotations

import weakref
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A tensor stays on its device until somebody asks, so that counting never waits for a GPU.
Count = int | Tensor

# Stands beside every figure of KV read: in tables of the command line, in reports, in the documents (a test looks).
KV_READ_NOTE = (
    "KV read leaves out the copies of each new selection (K entries a refresh: 0.4 to 2.4 points with the presets on"
    " the bundled model) and what the CPU reads for heads that did not refresh."
)


@dataclass
class LayerCounts:
    """Sums over decode steps, rows and KV heads of one layer. One *entry* is the K and V of one token and KV head.

    `read` counts what the method needs: the partial read, the full read, or both where a head decided after its
    partial step. A backend may read more for heads that it serves together.
    """

    kv_heads: int = 1
    entry_bytes: int = 0
    full: Count = 0  # head-steps with full attention
    steps: Count = 0  # head-steps
    read: Count = 0  # entries read
    rounded: Count = 0  # bytes of codes and their grids that were read beside them
    available: Count = 0  # entries that full attention would have read


COUNTS = ("full", "steps", "read", "rounded", "available")  # of `LayerCounts`, those that grow


class _Followed(NamedTuple):
    """A tally that a layer adds to, and whose it is."""

    layer: int
    tally: Tensor
    kv_heads: int
    entry_bytes: int
    owner: weakref.ref[object]


@dataclass
class DraftCounts:
    """Sums over the cycles of the lossless mode and rows.

    `drafted` tokens, of which the full passes `accepted` some; `yielded` tokens, those that a full pass gives itself
    among them; `full` and `all` forward passes of the model, as many as the row needed. A batch takes those of its
    longest.
    """

    drafted: int = 0
    accepted: int = 0
    yielded: int = 0
    full: int = 0
    all: int = 0

    def add(self, other: DraftCounts) -> None:
        """Add the counts of another."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass
class PromptCounts:
    """Pairs of a query and an entry, over the prompts, layers and KV heads whose attention a method makes sparse."""

    read: Count = 0
    available: Count = 0  # that full attention would have read


@dataclass
class Stats:
    """Counts of the layers that RefreshKV serves, over all decode steps since creation or `reset`.

    A decode step is a pass over one token with a non-empty cache. Passes over several tokens (prefill, verification of
    another's draft) are ordinary full attention and are not counted, but for a method that makes prefill sparse, whose
    pairs are counted apart; nor is the first selection, which belongs to prefill. In the lossless mode a token is a
    step, the pass that verifies is its full one, and what drafting read is counted with it. Sliding-window layers are
    not served and not counted.

    KV read leaves out the copies of each new selection (K entries a refresh: 0.4 to 2.4 points with the presets on the
    bundled model) and what the CPU reads for heads that did not refresh.
    """

    drafts: DraftCounts = field(default_factory=DraftCounts)
    prompts: PromptCounts = field(default_factory=PromptCounts)
    _layers: dict[int, LayerCounts] = field(
        default_factory=lambda: defaultdict(LayerCounts), init=False
    )
    _followed: list[_Followed] = field(default_factory=list, init=False, compare=False)

    @property
    def layers(self) -> dict[int, LayerCounts]:
        """The counts of each layer; whoever looks waits for the devices of the tallies that are followed."""
        self._collect(self._followed)
        return self._layers

    def follow(
        self, layer: int, tally: Tensor, kv_heads: int, entry_bytes: int, owner: object
    ) -> None:
        """From here on what a layer counts is what is added to `tally`, while its `owner` lives.

        Args:
            layer: which layer.
            tally: `[B, Hkv, 5]` int64, the `COUNTS`, on any device. A CUDA graph may add to it for ever: it is emptied
                whenever its counts are collected, and never replaced.
            kv_heads, entry_bytes: as in `LayerCounts`.
        """
        self._collect([one for one in self._followed if one.owner() is None])
        self._followed.append(_Followed(layer, tally, kv_heads, entry_bytes, weakref.ref(owner)))

    def _collect(self, tallies: list[_Followed]) -> None:
        """The counts of these tallies move here; one whose owner is gone is followed no longer."""
        ended = [one for one in tallies if one.owner() is None]
        for one in tallies:
            sums = one.tally.sum((0, 1)).tolist()
            if any(sums):
                counts = self._layers[one.layer]
                counts.kv_heads, counts.entry_bytes = one.kv_heads, one.entry_bytes
                for name, count in zip(COUNTS, sums, strict=True):
                    setattr(counts, name, getattr(counts, name) + count)
                one.tally.zero_()
        self._followed = [one for one in self._followed if all(one is not gone for gone in ended)]

    def record(
        self,
        layer: int,
        *,
        kv_heads: int,
        entry_bytes: int,
        full: Count,
        steps: Count,
        read: Count,
        available: Count,
        rounded: Count = 0,
    ) -> None:
        """Add one decode step of one layer.

        Each count is a sum over KV heads: `[B]`, one for each row, or a number, their sum over the rows too.
        """
        counts = self._layers[layer]
        counts.kv_heads = kv_heads
        counts.entry_bytes = entry_bytes
        counts.full += _over_rows(full)
        counts.steps += _over_rows(steps)
        counts.read += _over_rows(read)
        counts.available += _over_rows(available)
        counts.rounded += _over_rows(rounded)

    def record_drafts(self, rows: list[DraftCounts]) -> None:
        """Add one cycle of the lossless mode, the counts of each row."""
        for counts in rows:
            self.drafts.add(counts)

    def record_prompt(self, read: Tensor, available: Tensor) -> None:
        """Add a pass over a prompt of one layer, `[B]` each, as `PromptCounts`."""
        self.prompts.read += read.sum()
        self.prompts.available += available.sum()

    def reset(self) -> None:
        """Forget everything."""
        self.layers.clear()  # what the tallies hold with it
        self.drafts = DraftCounts()
        self.prompts = PromptCounts()

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that stood; `None` outside of the lossless mode."""
        return _ratio(self.drafts.accepted, self.drafts.drafted)

    @property
    def tokens_per_full_pass(self) -> float | None:
        """New tokens for each verification; `None` outside of the lossless mode."""
        return _ratio(self.drafts.yielded, self.drafts.full)

    @property
    def passes_per_token(self) -> float | None:
        """Forward passes of the model for each new token; `None` outside of the lossless mode."""
        return _ratio(self.drafts.all, self.drafts.yielded)

    @property
    def full_steps(self) -> float:
        """Full steps, summed over layers and rows; a step in which h of Hkv heads were full counts h / Hkv."""
        return sum(int(c.full) / c.kv_heads for c in self.layers.values())

    @property
    def partial_steps(self) -> float:
        """Steps that stayed partial, summed over layers and rows."""
        return sum((int(c.steps) - int(c.full)) / c.kv_heads for c in self.layers.values())

    @property
    def full_share(self) -> float | None:
        """Full steps / all steps; `None` before the first decode step."""
        return _ratio(self.full_steps, self.full_steps + self.partial_steps)

    @property
    def kv_bytes_read(self) -> int:
        """KV bytes that the decode steps read."""
        return sum(int(c.read) * c.entry_bytes + int(c.rounded) for c in self.layers.values())

    @property
    def kv_bytes_full(self) -> int:
        """KV bytes that full attention would have read in the same steps."""
        return sum(int(c.available) * c.entry_bytes for c in self.layers.values())

    @property
    def kv_read_share(self) -> float | None:
        """`kv_bytes_read / kv_bytes_full`, KV read in tables; what it leaves out: see the class."""
        return _ratio(self.kv_bytes_read, self.kv_bytes_full)

    @property
    def prefill_read_share(self) -> float | None:
        """Share of the pairs that full attention reads in prompts; `None` where prefill is full attention."""
        return _ratio(int(self.prompts.read), int(self.prompts.available))

    @property
    def effective_stride(self) -> float | None:
        """Steps per full step over all layers; `None` when no step was full."""
        return _ratio(self.full_steps + self.partial_steps, self.full_steps)

    def effective_strides(self) -> dict[int, float | None]:
        """Steps per full step of each layer."""
        return {
            layer: _ratio(int(c.steps), int(c.full)) for layer, c in sorted(self.layers.items())
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything above as plain numbers, ready for JSON. Whole counts are ints."""
        return {
            "full_steps": _whole(self.full_steps),
            "partial_steps": _whole(self.partial_steps),
            "full_share": self.full_share,
            "kv_read_share": self.kv_read_share,
            "prefill_read_share": self.prefill_read_share,
            "effective_stride": self.effective_stride,
            "acceptance": self.acceptance,
            "tokens_per_full_pass": self.tokens_per_full_pass,
            "passes_per_token": self.passes_per_token,
            "kv_bytes_read": self.kv_bytes_read,
            "kv_bytes_full": self.kv_bytes_full,
            "layers": {
                str(layer): {
                    "full_steps": _whole(int(c.full) / c.kv_heads),
                    "steps": _whole(int(c.steps) / c.kv_heads),
                }
                for layer, c in sorted(self.layers.items())
                if int(c.steps)  # a row that ended at once has none, whoever decoded beside it
            },
        }

    def __str__(self) -> str:
        if not self.layers:
            return "no decode step yet"
        if self.drafts.full:
            return (
                f"{self.tokens_per_full_pass:.1f} tokens per full pass, {self.passes_per_token:.2f} passes per token"
                f" ({_percent(self.acceptance)} of the drafts stood),"
                f" KV read {_percent(self.kv_read_share)} of full attention"
            )
        stride = self.effective_stride
        return (
            f"full steps {self.full_share:.1%} of {_whole(self.full_steps + self.partial_steps)} layer steps"
            f" (effective stride {'-' if stride is None else f'{stride:.1f}'}),"
            f" KV read {self.kv_read_share:.1%} of full attention"
        )


class RowStats(Stats):
    """Counts of every decode step, layer and row, so that a row that ended early is not charged for the rest.

    For one batch at a time: `reset` before the next, whose rows are others. Where rows are reordered (beams), row i is
    whatever stood there.
    """

    def __init__(self) -> None:
        super().__init__()
        # Layer -> blocks `[n, 5, B]` of n steps, the `COUNTS`. Reading joins them.
        self._blocks: dict[int, list[Tensor]] = defaultdict(list)
        self._drafts: list[DraftCounts] = []
        self._prompts: list[PromptCounts] = []

    def follow(self, *_: Any) -> None:
        """Raises `NotImplementedError`: what grows with every step is nothing for a fixed place."""
        raise NotImplementedError("RowStats counts every step by itself, the static cache cannot")

    def record(self, layer: int, **counts: Any) -> None:
        """See `Stats.record`. A number is shared evenly by the rows.

        Raises:
            RuntimeError: another number of rows than in the steps before.
        """
        given = [counts.get(name, 0) for name in COUNTS]
        per_row = next((count for count in given if _is_per_row(count)), torch.zeros(1))
        rows, blocks = per_row.shape[0], self._blocks[layer]
        if blocks and blocks[0].shape[2] != rows:
            raise RuntimeError(
                f"RowStats holds steps of {blocks[0].shape[2]} rows, this one has {rows}: reset() between batches"
            )
        super().record(layer, **counts)
        step = [
            count
            if _is_per_row(count)
            else torch.full((rows,), count // rows, device=per_row.device)
            for count in given
        ]
        blocks.append(torch.stack(step)[None])

    def record_drafts(self, rows: list[DraftCounts]) -> None:
        """See `Stats.record_drafts`."""
        super().record_drafts(rows)
        self._drafts = self._drafts or [DraftCounts() for _ in rows]
        for total, counts in zip(self._drafts, rows, strict=True):
            total.add(counts)

    def record_prompt(self, read: Tensor, available: Tensor) -> None:
        """See `Stats.record_prompt`."""
        super().record_prompt(read, available)
        self._prompts = self._prompts or [PromptCounts() for _ in read]
        for counts, *more in zip(self._prompts, read, available, strict=True):
            counts.read += more[0]
            counts.available += more[1]

    def row(self, row: int, steps: int | None = None) -> Stats:
        """The counts of one row over its first `steps` decode steps (`None`: all of them).

        In the lossless mode a block is a cycle of one token or more, and a row that has ended adds nothing.
        """
        alone = Stats()
        if self._drafts:
            alone.drafts.add(self._drafts[row])
        if self._prompts:
            alone.prompts = self._prompts[row]
        for layer, blocks in self._blocks.items():
            blocks[:] = [torch.cat(blocks)]
            sums = dict(zip(COUNTS, blocks[0][:steps, :, row].sum(0).tolist(), strict=True))
            whole = self.layers[layer]
            alone.layers[layer] = LayerCounts(whole.kv_heads, whole.entry_bytes, **sums)
        return alone

    def reset(self) -> None:
        super().reset()
        self._blocks.clear()
        self._drafts.clear()
        self._prompts.clear()


def _is_per_row(count: Count) -> bool:
    return isinstance(count, Tensor) and count.dim() > 0


def _over_rows(count: Count) -> Count:
    return count.sum() if isinstance(count, Tensor) and count.dim() > 0 else count


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number
