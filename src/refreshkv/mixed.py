"""One mixed step of one layer: a copy of all entries in few bits, and exactly the few that have weight in it (ours).

Nothing of it is stale: which entries are exact is decided in every step, by the weights that the copy gives. At most K
of a KV head are, whatever the queries (`policy.rounding.worth_reading`), so a step reads no more than the copy, K
entries of a KV head, and those of the newest, incomplete block.
"""

from __future__ import annotations

from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.kernels.options import AttendOptions, over_heads
from refreshkv.stats import COUNTS

# Of a tally, what a step over the copy adds to: "read" and "rounded".
COPY_COUNTS = slice(COUNTS.index("read"), COUNTS.index("rounded") + 1)


def learn_prompt(cache: LayerCache, visible: Tensor | None) -> None:
    """The prompt is over, or some of it was cropped: K follows from it, and where each row begins."""
    if cache.waiting is not None:
        assert cache.prompt is not None
        cache.resolve_budget(visible, cache.prompt, cache.waiting)
        cache.waiting = None
    elif cache.hidden is None and cache.budget is None:
        cache.resolve_budget(visible, cache.store.lengths)
    elif cache.hidden is None:
        cache.count_padding(visible)


def begin_mixed(cache: LayerCache, visible: Tensor | None) -> None:
    """No step shall have to look at the prompt: its whole blocks get their codes."""
    learn_prompt(cache, visible)
    assert cache.copy is not None
    cache.copy.follow(cache.store, cache.store.lengths - 1, visible)


def mixed_step(
    cache: LayerCache, query: Tensor, options: AttendOptions, visible: Tensor | None
) -> Tensor:
    """Attention of one new token, `[B, Hq, D]` -> `[B, Hq, D]`; arguments as for `step.decode_step`.

    The new token is exact, and with it the block that it completes.
    """
    learn_prompt(cache, visible)
    lengths = cache.store.lengths
    assert cache.copy is not None and cache.hidden is not None
    if cache.due != "partial":  # the host does not know that no block is complete
        cache.copy.follow(cache.store, lengths - 1, visible, most=1 if cache.fixed else None)
    if cache.tally is not None:
        read = cache.tally[..., COPY_COUNTS]
        return attend_to_copy(cache, query, options, visible, read)
    heads = cache.kv_heads
    tally = lengths.new_zeros(cache.rows, heads, 2)
    output = attend_to_copy(cache, query, options, visible, tally)
    read, rounded = tally.sum(1).unbind(-1)
    cache.stats.record(
        cache.index,
        kv_heads=heads,
        entry_bytes=cache.store.entry_bytes,
        full=0,
        steps=cache.rows * heads,
        read=read,
        rounded=rounded,
        available=(lengths - cache.hidden) * heads,
    )
    return output


def attend_to_copy(
    cache: LayerCache,
    query: Tensor,
    options: AttendOptions,
    visible: Tensor | None,
    tally: Tensor,
    ends: Tensor | None = None,
) -> Tensor:
    """Attention of one query a row over the copy as it is, and exactly over what it does not cover; `[B, Hq, D]`.

    `tally`: see `reference.attend_mixed`. `ends` `[B]`: over the first so many positions; `None`: those that a row has.
    """
    copy = cache.copy
    assert copy is not None and copy.codes is not None and cache.budget is not None
    assert copy.first is not None and copy.finished is not None
    return cache.store.attend_mixed(
        query,
        copy.codes,
        options.over(over_heads(visible)),
        ends=ends,
        first=copy.first,
        finished=copy.finished,
        budget=cache.budget,
        skip=cache.config.skip,
        tally=tally,
    ).output
