"""The one line of a comparison, from numbers: which row is used, and why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from refreshkv.evals.compare import Difference, Row, Text
from refreshkv.evals.verdict import BAR, GAIN, LEAST, ROUNDS, TIE, judge

PARTED = Difference(3, "a", "b", "c")


def row(name: str, *rates: float, **given: Any) -> Row:
    """A row with decoding speeds by round; with the prompt, half of them where nothing else is said."""
    tokens = given.pop("tokens", 100)
    parted = given.pop("parted", 0)
    texts = [
        Text(f"p{i}", tokens, PARTED if i < parted else None, given.get("agreement"))
        for i in range(2)
    ]
    made: dict[str, Any] = {
        "lossless": "agreement" not in given,
        "candidate": None,
        "texts": texts,
        "same": 2 - parted,
        "agreement": None,
        "perplexity_ratio": None,
        "rates": rates,
        "rates_with_prompt": [rate / 2 for rate in rates],
        "kv_read_share": None,
        "stats": None,
        "cache_bytes": None,
        "peak_bytes": None,
    }
    return Row(name=name, **{**made, **given})


def verdict(
    *rows: Row, theirs: Sequence[float] = (9.8, 9.8, 9.8), full: Sequence[float] = (10, 10, 10)
) -> Any:
    return judge([row("transformers", *theirs), row("full", *full), *rows])


def test_a_lossless_row_may_part_at_a_tie() -> None:
    tie, near = Difference(3, "a", "b", "c", TIE), Difference(3, "a", "b", "c", -0.25)
    texts = [Text("p", 100, tie, None), Text("q", 100, near, None), Text("r", 100, None, None)]
    found = verdict(row("exact", 12, 12, 12, texts=texts, same=1))
    assert found.text == (
        "use exact: 1.20x full attention, the same text in 1 of 3 (else a tie within 0.5 nats)"
    )
    texts[1] = Text("q", 100, dataclasses.replace(tie, nats=1.25), None)
    found = verdict(row("exact", 12, 12, 12, texts=texts, same=1))
    assert found.use is None
    assert found.text.endswith("exact is 1.20x, but leaves the text by 1.2 nats")
    texts[1] = Text("q", 100, PARTED, None)  # nobody knows by how much
    assert verdict(row("exact", 12, 12, 12, texts=texts, same=1)).use is None


def test_the_fastest_that_keeps_the_text_is_used() -> None:
    found = verdict(row("exact", 12, 12, 12), row("fast", 14, 14, 14, agreement=0.991, parted=1))
    assert found.use == "fast"
    assert found.text == "use fast: 1.40x full attention, 99.1% of the tokens"
    assert found.baseline == "full"
    assert found.speedups["transformers"].median == pytest.approx(0.98)


def test_speeds_are_over_the_faster_baseline() -> None:
    """1.4x our own full attention is a loss where transformers is faster still."""
    found = verdict(row("fast", 14, 14, 14, agreement=1.0), theirs=(15, 15, 15))
    assert (found.baseline, found.use) == ("transformers", None)
    assert found.text == "stay with full attention: fast is 0.93x"


def test_the_baseline_is_the_faster_within_rounds() -> None:
    """In the medians of the rates transformers is ahead, in two of three rounds it is not."""
    assert verdict(theirs=(12, 11, 5), full=(10, 12, 6)).baseline == "full"


def test_a_lossy_row_has_to_agree() -> None:
    below = verdict(row("fast", 14, 14, 14, agreement=BAR - 0.001))
    assert below.use is None
    assert "fast is 1.40x, but has 94.9% of the tokens (the bar is 95.0%)" in below.text
    assert verdict(row("fast", 14, 14, 14, agreement=BAR)).use == "fast"
    rows = [
        row("transformers", 9, 9, 9),
        row("full", 10, 10, 10),
        row("fast", 14, 14, 14, agreement=0.8),
    ]
    assert judge(rows, bar=0.8).use == "fast"


def test_no_row_has_to_agree_more_than_rounding_does() -> None:
    rows = [row("full", 10, 10, 10), row("fast", 14, 14, 14, agreement=0.9)]
    for floor, used in ((0.9, "fast"), (0.91, None), (None, None)):
        theirs = dataclasses.replace(row("transformers", 9.8, 9.8, 9.8), agreement=floor)
        assert judge([theirs, *rows]).use == used


def test_a_lossy_row_that_was_not_fed_is_not_used() -> None:
    assert verdict(row("fast", 14, 14, 14, lossless=False)).use is None


def test_a_lossless_row_is_preferred_where_the_lossy_one_gains_little() -> None:
    lossless = row("exact", 12, 12, 12)
    near = verdict(lossless, row("fast", 12.5, 12.5, 12.5, agreement=1.0))
    assert near.use == "exact"
    assert near.text == "use exact: 1.20x full attention, the same text in 2 of 2"
    assert verdict(lossless, row("fast", 12.7, 12.7, 12.7, agreement=1.0)).use == "fast"


@pytest.mark.parametrize(
    ("rates", "used"),
    [
        ((10 * GAIN + 0.01,) * 3, True),
        ((10 * GAIN - 0.01,) * 3, False),
        ((20, 20, 10.1), True),
        ((20, 20, 9.9), False),  # slower in one round
        ((20, 9, 9), False),
    ],
)
def test_a_gain_is_measurable(rates: tuple[float, ...], used: bool) -> None:
    found = verdict(row("exact", *rates))
    assert (found.use == "exact") is used
    if not used:
        assert found.text.startswith("stay with full attention: exact is ")


def test_rounds_are_compared_with_their_own() -> None:
    """The machine halves its speed in the second round: every ratio is 1.2 all the same."""
    found = verdict(row("exact", 12, 6, 12), theirs=(1, 1, 1), full=(10, 5, 10))
    assert found.speedups["exact"].least == pytest.approx(1.2)
    assert found.use == "exact"


def test_the_prompt_counts() -> None:
    found = verdict(row("exact", 12, 12, 12, rates_with_prompt=[4.9, 4.9, 4.9]))
    assert found.use is None
    assert found.text.endswith("exact is 1.20x without the prompt, 0.98x with it")


def test_our_full_attention_may_be_what_helps() -> None:
    found = verdict(row("exact", 10, 10, 10), theirs=(7, 7, 7))
    assert found.use == "full"
    assert found.text == (
        "use full: 1.43x transformers' own cache, the same attention; exact is 1.00x"
    )
    assert verdict(theirs=(7, 7, 7)).text == (
        "use full: 1.43x transformers' own cache, the same attention"
    )


def test_reasons_are_few_and_begin_with_the_fastest() -> None:
    rows = [
        row(name, speed, speed, speed) for name, speed in zip("abcde", range(1, 6), strict=True)
    ]
    assert verdict(*rows).text == (
        "stay with full attention: e is 0.50x; d is 0.40x; c is 0.30x; 2 more are slower"
    )


def test_no_verdict_on_too_little() -> None:
    fast = row("exact", 20, 20, 20)
    few = judge(
        [row("transformers", 9, 9, 9), row("full", 10, 10, 10, tokens=LEAST // 2 - 1), fast]
    )
    assert few.use is None and f"{LEAST - 2} tokens are too few" in few.text
    short = judge([row("transformers", 9, 9), row("full", 10, 10), row("exact", 20, 20)])
    assert short.use is None
    assert short.text == f"no verdict: 2 of at least {ROUNDS} rounds of timing"
    assert short.speedups["exact"].median == 2
    stopped = judge([row("transformers", *[9] * 3), row("full", *[10] * 3), row("exact", 20, 20)])
    assert stopped.text == short.text
    untimed = judge([row("transformers"), row("full"), row("exact")])
    assert untimed.text == "no verdict: the speed was not measured"
    assert untimed.baseline is None and not untimed.speedups
    one = {"rates_with_prompt": [3.0, 3.0, 3.0], "tokens": 1}
    ended = judge([row("transformers", **one), row("full", **one)])
    assert ended.text == "no verdict: no token to time"
