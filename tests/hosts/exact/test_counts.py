"""The statistics of drafts and reads."""

from __future__ import annotations

from transformers import PreTrainedModel

import refreshkv
from refreshkv import RefreshConfig
from refreshkv.stats import RowStats

from .driver import LARGE, ONE_ROW, lengths_of, run, same


def test_the_counts_add_up(llama: PreTrainedModel, config: RefreshConfig) -> None:
    stats = same(llama, config)
    counts = stats.drafts
    assert counts.yielded == 3 * 10 == counts.accepted + counts.full
    assert counts.all == counts.drafted + counts.full
    assert 0 <= counts.accepted <= counts.drafted
    assert stats.acceptance == counts.accepted / counts.drafted
    assert stats.tokens_per_full_pass == counts.yielded / counts.full
    assert stats.passes_per_token == counts.all / counts.yielded
    heads = llama.config.num_key_value_heads
    for layer in stats.layers.values():
        assert int(layer.steps) == counts.yielded * heads
        assert int(layer.full) == counts.full * heads
        # Full attention reads all visible tokens of the prompt and the n-th new one with n.
        assert int(layer.available) == heads * sum(
            prompt + n for prompt in (34, 21, 27) for n in range(1, 11)
        )
        assert int(layer.read) > 0


def test_what_is_read_where_every_draft_stands(llama: PreTrainedModel) -> None:
    """One row, a prompt of 30."""
    with refreshkv.attach(llama, RefreshConfig(mode="exact", budget=1.0)) as session:
        run(llama, ONE_ROW, max_new_tokens=2)
    # No room for a draft: one full pass over the prompt and its token.
    assert session.stats.kv_read_share == 1.0 and session.stats.drafts.drafted == 0
    with refreshkv.attach(llama, RefreshConfig(mode="exact", budget=1.0, draft=1)) as session:
        run(llama, ONE_ROW, max_new_tokens=3)
    # One draft over K = 30, and a full pass over 32; a second one over 32, if the draft was wrong.
    right = session.stats.drafts.accepted
    assert session.stats.kv_read_share == (30 + 32 + (0 if right else 32)) / (31 + 32)
    with refreshkv.attach(llama, LARGE) as session:
        run(llama, ONE_ROW, max_new_tokens=13)
    # Twelve tokens in two cycles: five drafts that read everything so far, and a full pass that reads as much as the
    # token after them would.
    assert session.stats.drafts.full == 2
    assert session.stats.kv_read_share == 1.0


def test_rows_add_up_and_an_ended_row_is_not_charged(
    llama: PreTrainedModel, config: RefreshConfig
) -> None:
    options = {"eos_token_id": int(run(llama)[0, 34 + 2])}
    lengths = lengths_of(run(llama, **options)[:, 34:], [options["eos_token_id"]])
    assert lengths[0] == 3 < max(lengths)
    stats = RowStats()
    with refreshkv.attach(llama, config, stats=stats):
        run(llama, **options)
    rows = [stats.row(row) for row in range(3)]
    for name, count in vars(stats.drafts).items():
        assert sum(getattr(row.drafts, name) for row in rows) == count
    for index, layer in stats.layers.items():
        for name in ("full", "steps", "read", "available"):
            assert sum(int(getattr(row.layers[index], name)) for row in rows) == int(
                getattr(layer, name)
            )
    assert [row.drafts.yielded for row in rows] == [length - 1 for length in lengths]
    assert int(rows[0].layers[0].available) == 2 * (35 + 36)
