"""One mixed step of one layer: a copy of all entries in few bits, and exactly the few that have weight in it (ours).

Nothing of it is stale: which entries are exact is decided in every step, by the weights that the copy gives. At most K
of a KV head are, whatever the queries (`policy.rounding.worth_reading`), so a step reads no more than the copy, K
entries of a KV head, and those of the newest, incomplete block.
"""

from __future__ import annotations

from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.kernels.options import AttendOptions, over_heads
from refreshkv.policy.rounding import BLOCK


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
    cache.copy.follow(cache.store, lengths - 1, visible, most=1 if cache.fixed else None)
    output, counts = attend_to_copy(cache, query, options, visible)
    heads = cache.kv_heads
    cache.count(
        full=0,
        steps=cache.rows * heads,
        read=entries_read(cache, counts, lengths),
        rounded=bytes_of_codes(cache, counts),
        available=(lengths - cache.hidden) * heads,
    )
    return output


def attend_to_copy(
    cache: LayerCache,
    query: Tensor,
    options: AttendOptions,
    visible: Tensor | None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query a row over the copy as it is, and exactly over what it does not cover.

    `ends` `[B]`: over the first so many positions; `None`: those that a row has. Returns `[B, Hq, D]`, and counts as
    `reference.attend_mixed` does.
    """
    copy = cache.copy
    assert copy is not None and copy.codes is not None and cache.budget is not None
    assert copy.first is not None and copy.finished is not None
    attended, counts = cache.store.attend_mixed(
        query,
        copy.codes,
        options.over(over_heads(visible)),
        ends=ends,
        first=copy.first,
        finished=copy.finished,
        budget=cache.budget,
        skip=cache.config.skip,
    )
    return attended.output, counts


def entries_read(cache: LayerCache, counts: Tensor, ends: Tensor) -> Tensor:
    """`[B]`: entries that a step read exactly, those that no code covers among the first `ends` positions with them."""
    copy = cache.copy
    assert copy is not None and copy.first is not None and copy.finished is not None
    uncovered = ends - copy.first - BLOCK * copy.finished
    return counts[..., 0].sum(-1) + uncovered * cache.kv_heads


def bytes_of_codes(cache: LayerCache, counts: Tensor) -> Tensor:
    """`[B]`: bytes of the codes that a step read, the keys of all blocks and the values of some."""
    copy = cache.copy
    assert copy is not None and copy.codes is not None and copy.finished is not None
    keys, values = copy.codes.block_bytes
    return copy.finished * cache.kv_heads * keys + counts[..., 1].sum(-1) * values
