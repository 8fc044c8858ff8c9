"""CritiPrefill: a segment of the prompt attends to those blocks before it that its queries may weigh most."""

from __future__ import annotations

import torch
from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.config import Budgeted
from refreshkv.kernels.options import AttendOptions
from refreshkv.methods.kept import KeptEntries, Look
from refreshkv.methods.method import Method

# In the paper K is 1024, a segment 512 queries, a block 32 keys, and segments that begin within 4096 tokens are dense.
_SEGMENTS, _BLOCKS, _DENSE = 2, 32, 4


class CritiPrefill(KeptEntries):
    """The prompt attends to K tokens before each segment, and to the segment itself; decoding attends to everything."""

    sees_prompt = True

    def observe(
        self, cache: LayerCache, queries: Tensor, options: AttendOptions, visible: Tensor | None
    ) -> Tensor:
        super().observe(cache, queries, options, visible)
        keys, values = (part[:, :, : cache.length] for part in cache.store.dense())
        before = cache.length - queries.shape[2]
        output = queries.new_zeros(*queries.shape[:3], values.shape[-1])
        read, available = torch.zeros(2, len(queries), dtype=torch.int64)
        for row in range(len(queries)):
            columns = torch.arange(cache.length, device=queries.device)
            if visible is not None:
                columns = columns[visible[row]]
            own = columns[columns >= before] - before
            if not len(own):
                continue
            attended, pairs = self._row(
                queries[row][:, own], keys[row][:, columns], values[row][:, columns], options
            )
            output[row][:, own] = attended.to(output.dtype)
            first = len(columns) - len(own)
            read[row] = pairs
            available[row] = cache.kv_heads * sum(range(first + 1, len(columns) + 1))
        cache.stats.record_prompt(read, available)
        return output

    def choose(self, now: Look) -> Tensor:
        return now.seen[:, None].expand(-1, now.cache.kv_heads, -1)

    def _row(
        self, queries: Tensor, keys: Tensor, values: Tensor, options: AttendOptions
    ) -> tuple[Tensor, int]:
        """What the newest tokens get, whose queries these are, `[Hq, T, D]`, and the pairs that were read.

        Keys and values are `[Hkv, L, D]`, without padding. Every token is in the segment that its place in the text
        says.
        """
        length, first = keys.shape[1], keys.shape[1] - queries.shape[1]
        budget = self.settings.resolve_budget(length)
        size, block = max(1, budget // _SEGMENTS), max(1, budget // _BLOCKS)
        grouped = queries.float().unflatten(0, (keys.shape[0], -1))
        keys, values = keys.float(), values.float()
        outputs, pairs = [], 0
        for start in range(first // size * size, length, size):
            end = min(start + size, length)
            some = grouped[:, :, max(start, first) - first : end - first]
            place = torch.arange(end, device=keys.device)
            mask = (place <= place[max(start, first) :, None]).expand(len(keys), -1, -1)
            if start >= _DENSE * budget and end < length:
                complete = start // block
                bounds = keys[:, : complete * block].unflatten(1, (complete, block))
                weight = most_product(some, bounds).amax(1)
                best = weight.argsort(dim=-1, stable=True)[:, -(budget // block) :]
                kept = torch.zeros_like(weight, dtype=torch.bool).scatter(-1, best, True)
                read = torch.ones(len(keys), end, dtype=torch.bool, device=keys.device)
                read[:, : complete * block] = kept.repeat_interleave(block, -1)
                mask = mask & read[:, None]
            pairs += int(mask.sum())
            outputs.append(attention(some, keys[:, :end], values[:, :end], mask, options))
        return torch.cat(outputs, 1), pairs


def most_product(queries: Tensor, blocks: Tensor) -> Tensor:
    """No query `[Hkv, G, T, D]` has a greater product with a key of the blocks `[Hkv, N, n, D]`. `[Hkv, G, N]`.

    Both are known by the least and the greatest number of each dimension.
    """
    corners = [
        query[:, :, None] * key[:, None]
        for query in (queries.amin(2), queries.amax(2))
        for key in (blocks.amin(2), blocks.amax(2))
    ]
    return torch.stack(corners).amax(0).sum(-1)


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, options: AttendOptions
) -> Tensor:
    """`[Hq, T, D]` float32: queries `[Hkv, G, T, D]` over those entries `[Hkv, L, D]` that `mask` `[Hkv, T, L]` has."""
    logits = queries @ keys[:, None].mT * options.scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    logits = logits.masked_fill(~mask[:, None], -torch.inf)
    if options.sinks is not None:
        sinks = options.sinks.float().view(*logits.shape[:2], 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
    return (logits.softmax(-1)[..., : keys.shape[1]] @ values[:, None]).flatten(0, 1)


METHOD = Method(
    name="critiprefill",
    label="CritiPrefill",
    source=(
        'Lv et al., "CritiPrefill: A Segment-wise Criticality-based Approach for Prefilling Acceleration in LLMs",'
        " ICASSP 2025, arXiv 2409.12490"
    ),
    note=(
        "Of the prompt alone; decoding is dense, so that KV read is that of full attention, and prefill_read_share"
        " of the results says which share of the pairs of the prompt was read. Segments of queries and blocks of"
        " keys known by their least and greatest numbers; the first and the last segments dense: the paper. Sizes"
        " are in the paper's proportion to K: segments of K/2, blocks of K/32, dense up to 4K. Ours: the bound on"
        " any product, the maximum over a group's query heads, no fusion of layers. A prompt in several passes has a"
        " K and a last segment in each."
    ),
    settings=Budgeted,
    make=CritiPrefill,
)
