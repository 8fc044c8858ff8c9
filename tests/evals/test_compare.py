"""The comparison itself, on the bundled model: the yardstick, fed and free runs, rounds, memory."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import refreshkv
from refreshkv import demo
from refreshkv.config import RefreshConfig
from refreshkv.demo.prompts import make_prompt
from refreshkv.evals import decoding
from refreshkv.evals.candidates import (
    LOSSLESS,
    MIXED,
    MODES,
    PARTIAL,
    Candidate,
    parse_candidate,
    variants,
)
from refreshkv.evals.compare import (
    Comparison,
    difference,
    gap,
    held_bytes,
    rate,
)
from refreshkv.evals.decoding import Continued, feed
from refreshkv.stats import RowStats
from tests.tape import Tape

NEW = 10
PROMPTS = {name: make_prompt("key-value", i, 220).prompt for i, name in enumerate(("one", "two"))}
POOR = "snapkv:budget=4"  # loses the thread at once
NAMES = ["exact", "fast", POOR]


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return demo.load()


@pytest.fixture(scope="module", autouse=True)
def clock() -> Iterator[list[str]]:
    """Seconds by the number of tokens: what is measured depends on no clock. Also says who ran."""
    ran: list[str] = []
    original = decoding.continue_rows

    def continue_rows(model: Any, rows: Any, caps: Any, **settings: Any) -> Continued:
        done = original(model, rows, caps, **settings)
        ran.append("theirs" if settings.get("start") is None else "ours")
        return dataclasses.replace(done, prefill_s=1.0, decode_s=len(done.tokens[0]) - 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "continue_rows", continue_rows)
        yield ran


@pytest.fixture(scope="module")
def compared(loaded: tuple[Any, Any], clock: list[str]) -> Comparison:
    made = Comparison(*loaded, PROMPTS, [parse_candidate(name) for name in NAMES], new_tokens=NEW)
    made.run()
    return made


def test_free_runs_by_graphs_where_they_can_be(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tape = Tape()
    module = sys.modules["refreshkv.hosts.transformers.attach"]
    monkeypatch.setattr(module, "recorder_for", lambda device: tape)
    made = Comparison(*loaded, PROMPTS, [parse_candidate(name) for name in NAMES], new_tokens=NEW)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="decoding without CUDA graphs")
        made.run()
    rows = {row.name: row for row in made.rows()}
    assert tape.replayed > 0
    assert rows["exact"].same == 2 and rows["fast"].cache_bytes > rows["full"].cache_bytes


def test_rows(compared: Comparison, loaded: tuple[Any, Any]) -> None:
    rows = {row.name: row for row in compared.rows()}
    assert list(rows) == ["transformers", "full", *NAMES]
    for name in ("transformers", "full", "exact"):
        row = rows[name]
        assert (row.lossless, row.same) == (True, 2)
        assert [text.difference for text in row.texts] == [None, None]
    assert [text.prompt for text in rows["full"].texts] == list(PROMPTS)
    assert compared.written == {text.prompt: text.new_tokens for text in rows["full"].texts}
    for name in ("full", "exact"):
        assert rows[name].agreement is rows[name].perplexity_ratio is None
    assert rows["transformers"].agreement == 1
    assert rows["transformers"].perplexity_ratio == pytest.approx(1, abs=1e-3)
    poor = rows[POOR]
    assert not poor.lossless
    assert poor.same < 2
    assert 0 <= poor.agreement < 1 < poor.perplexity_ratio
    assert rows["fast"].agreement > poor.agreement
    assert rows["full"].kv_read_share == 1
    assert rows["transformers"].kv_read_share is rows["transformers"].stats is None
    assert rows["exact"].stats["tokens_per_full_pass"] > 1
    for row in rows.values():
        assert row.rates == [1.0] * 3  # by the clock above
        assert all(0.5 < one < 1 + 1 / NEW for one in row.rates_with_prompt)


def test_fed_figures_are_those_of_the_yardstick(
    compared: Comparison, loaded: tuple[Any, Any]
) -> None:
    """Agreement and perplexity once more, from single runs over the tokens that full attention wrote."""
    model, tokenizer = loaded
    found = {}
    golds = [one.tokens[0] for one in compared._seen["full"].free]
    for arguments in ({"mode": "full"}, {"method": "snapkv", "budget": 4}):
        with refreshkv.attach(model, stats=RowStats(), **arguments) as session:
            found[len(found)] = [
                feed(model, tokenizer, session, [prompt], [gold])[0]
                for prompt, gold in zip(PROMPTS.values(), golds, strict=True)
            ]
    full, own = found.values()
    assert all(all(one.right) for one in full)
    right = [ok for one in own for ok in one.right[1:]]
    lost = [
        a - b
        for theirs, ours in zip(full, own, strict=True)
        for a, b in zip(theirs.logprobs[1:], ours.logprobs[1:], strict=True)
    ]
    row = next(row for row in compared.rows() if row.name == POOR)
    assert row.agreement == pytest.approx(sum(right) / len(right))
    assert math.log(row.perplexity_ratio) == pytest.approx(sum(lost) / len(lost), abs=1e-3)
    for text, one in zip(row.texts, own, strict=True):
        assert text.agreement == pytest.approx(sum(one.right[1:]) / len(one.right[1:]))


def test_runs_are_counted_and_take_turns(loaded: tuple[Any, Any], clock: list[str]) -> None:
    candidates = [parse_candidate("fast")]
    made = Comparison(*loaded, PROMPTS, candidates, new_tokens=2, repeats=2)
    told: list[str] = []
    clock.clear()
    made.run(told.append)
    assert len(told) == made.runs
    first = ["full", "transformers", "fast", "transformers, fed", "full, fed", "fast, fed"]
    turn = [f"{name}, timed" for name in ("full", "transformers", "fast")]
    assert told == first * 2 + turn * 4
    assert clock == ["ours", "theirs", "ours"] * 6


def test_it_may_be_stopped_anywhere(loaded: tuple[Any, Any]) -> None:
    """What is measured stays; a round that was not finished does not count."""
    for stop in (0, 5, 6, 16, 22):
        made = Comparison(*loaded, PROMPTS, [parse_candidate("fast")], new_tokens=4, repeats=2)
        steps = itertools.count()

        def tick(name: str, stop: int = stop, steps: Iterator[int] = steps) -> None:
            if next(steps) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            made.run(tick)
        rows = {row.name: row for row in made.rows()}
        # Six runs a prompt, then three a prompt in a round.
        assert len(made.written) == len(rows["full"].texts) == min(2, (stop + 5) // 6)
        assert (rows["fast"].agreement is not None) is (stop >= 6)
        assert len(rows["fast"].rates) == max(0, stop - 12) // 6


def test_the_cache_is_measured_whole(compared: Comparison, loaded: tuple[Any, Any]) -> None:
    rows = {row.name: row for row in compared.rows()}
    config = loaded[0].config
    tokens = max(len(tokens) for tokens in compared.tokens.values()) + NEW - 1
    entry = 2 * 4 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    assert tokens * entry <= rows["full"].cache_bytes < (tokens + 400) * entry  # and spare room
    for name in NAMES:
        assert rows[name].cache_bytes > rows["full"].cache_bytes
    assert rows["transformers"].cache_bytes is None


def test_held_bytes_counts_a_storage_once() -> None:
    numbers = torch.zeros(10, dtype=torch.float32)
    assert held_bytes([numbers, {"view": numbers[:3]}, (numbers.view(2, 5), None, 3)]) == 40
    assert held_bytes([numbers, torch.zeros(1, dtype=torch.int64)]) == 48
    loop: list[Any] = [numbers]
    loop.append(loop)
    assert held_bytes(loop) == 40
    counts = RowStats()
    counts.layers[0].full = torch.zeros(100)
    assert held_bytes([counts, numbers]) == 40


def test_where_texts_part(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    full = tokenizer("one:two\nsix:ten\n", add_special_tokens=False)["input_ids"]
    assert difference(tokenizer, full, list(full)) is None
    own = [*full[:3], *full[:2]]
    found = difference(tokenizer, full, own)
    assert found is not None
    assert found.token == 4
    assert found.before == tokenizer.decode(full[:3])
    assert found.own == tokenizer.decode(full[:2])
    assert (found.before + found.full).startswith("one:two")
    ended = difference(tokenizer, full, full[:2])
    assert ended is not None and (ended.token, ended.own) == (3, "")
    longer = difference(tokenizer, full[:2], full)
    assert longer is not None and (longer.token, longer.full) == (3, "")


def test_how_near_a_difference_is() -> None:
    """By the likelihood of both tokens where the texts part, after what they share."""
    logits = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.5, -0.5], [0.0, -9.0, -9.0]])
    assert gap(logits, [0, 1, 0], [0, 1, 2]) == 9
    assert gap(logits, [0, 1, 0], [0, 2, 0]) == -1
    assert gap(logits, [0, 1, 0], [1]) == 1
    assert gap(logits, [0, 1, 0], [0, 1, 0]) is gap(logits, [0, 1, 0], [0]) is None


def test_gaps_are_those_of_a_pass_of_the_model(
    compared: Comparison, loaded: tuple[Any, Any]
) -> None:
    row = next(row for row in compared.rows() if row.name == POOR)
    found = next(text for text in row.texts if text.difference is not None)
    at, free = found.difference.token - 1, compared._seen
    place = list(PROMPTS).index(found.prompt)
    full, own = (free[name].free[place].tokens[0] for name in ("full", POOR))
    with torch.no_grad():
        tokens = torch.tensor([[*compared.tokens[found.prompt], *full[:at]]])
        last = loaded[0](tokens).logits[0, -1].log_softmax(-1)
    assert found.difference.nats == pytest.approx(float(last[full[at]] - last[own[at]]), abs=1e-3)
    assert found.difference.nats > 0


def test_rates() -> None:
    runs = [Continued([[1, 2, 3]], 1.0, 0.5), Continued([[1, 2, 3, 4]], 2.0, 0.5)]
    assert rate(runs) == 5
    assert rate(runs, prompt=True) == 7 / 4
    assert rate([Continued([[1]], 1.0, 0.0)]) is None
    assert rate([Continued([[1]], 2.0, 0.0)], prompt=True) == 0.5


def test_candidates() -> None:
    exact, fast = parse_candidate("exact:draft=8"), parse_candidate("fast")
    assert exact.arguments == {"mode": "exact", "draft": 8}
    assert exact.lossless and not fast.lossless
    assert fast.config == refreshkv.make_config("fast")
    assert fast.preset == fast.config
    assert parse_candidate("snapkv").preset is None
    assert parse_candidate("no-reselection").preset is None
    assert parse_candidate("full").preset is None
    assert parse_candidate("refreshkv-paper").preset == RefreshConfig()
    for wrong in ("fats", "exact:drift=8", "exact:draft=0", "fast:draft=3", "exact:draft"):
        with pytest.raises(ValueError, match=r"."):
            parse_candidate(wrong)


def test_full_attention_is_there_once(loaded: tuple[Any, Any]) -> None:
    made = Comparison(*loaded, PROMPTS, [parse_candidate("full"), parse_candidate("fast")])
    assert [row.name for row in made.rows()] == ["transformers", "full", "fast"]


def test_no_prompts(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="no prompts"):
        Comparison(*loaded, {}, [])


def test_tuning_varies_what_was_not_asked_for() -> None:
    found = variants(parse_candidate("exact"))
    assert len(found) == math.prod(map(len, LOSSLESS.values()))
    assert found[0].name == "exact:drafter=partial:confidence=0.9"
    assert {(v.config.drafter, v.config.confidence) for v in found} == set(
        itertools.product(*LOSSLESS.values())
    )
    assert refreshkv.make_config() in [v.config for v in found]
    fixed = variants(parse_candidate("exact:confidence=0.7"))
    assert [v.config.drafter for v in fixed] == list(LOSSLESS["drafter"])
    assert {v.config.confidence for v in fixed} == {0.7}
    # With the other drafter nothing would read what was asked for.
    for asked, drafter in (("recent=4", "partial"), ("drafter=mixed:key_bits=3", "mixed")):
        own = variants(parse_candidate(f"exact:{asked}"))
        assert len(own) == len(LOSSLESS["confidence"])
        assert {v.config.drafter for v in own} == {drafter}
    lossy = [v.config for v in variants(parse_candidate("fast"))]
    assert [(c.budget, c.value_bits) for c in lossy] == list(itertools.product(*MIXED.values()))
    assert refreshkv.make_config("fast") in lossy
    published = variants(parse_candidate("refreshkv-paper"))
    assert [v.config.budget for v in published] == list(PARTIAL["budget"])
    for name in ("snapkv", "full"):
        assert variants(parse_candidate(name)) == [parse_candidate(name)]
    own = Candidate("own.json", {"preset": {"mode": "exact", "budget": 0.25}})
    assert {v.config.budget for v in variants(own)} == {0.25}


def test_every_mode_of_people_is_one_of_attach() -> None:
    for name, (method, arguments) in MODES.items():
        assert parse_candidate(name).config == parse_candidate(method).config
        assert parse_candidate(name).arguments == arguments
