"""Every kernel against the reference: the cases, the tolerances and the comparisons, for any backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refreshkv.kernels import reference
from refreshkv.policy.selection import FREE
from tests.helpers import left_padding, relative_rms

# Relative RMS error against float32 on the same inputs: twice the worst that was measured over `CASES`, which was
# (output, scores, lse) float32 7.7e-7, 7.2e-7, 2.0e-7: the order of the sums; bfloat16 7.3e-3, 6.7e-3, 2.2e-3 and
# float16 8.0e-4, 7.5e-4, 3.1e-4: the rounding of scaled query, logits, weights and output to 8 and 11 bits.
TOLERANCE = {
    torch.float32: {"output": 1.5e-6, "scores": 1.5e-6, "lse": 4e-7},
    torch.bfloat16: {"output": 1.5e-2, "scores": 1.4e-2, "lse": 4.5e-3},
    torch.float16: {"output": 1.6e-3, "scores": 1.5e-3, "lse": 6e-4},
}


QUERIES = 5  # of a row, where an operation takes several


@dataclass(frozen=True)
class Case:
    """Inputs of an attention; `hidden` is the mask: none, left padding, holes, or holes that differ by KV head."""

    rows: int = 2
    kv_heads: int = 2
    group: int = 4
    length: int = 65
    dim: int = 64
    value_dim: int | None = None
    softcap: float | None = None
    sinks: bool = False
    hidden: str = ""
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(Case, k)}
        return "-".join(f"{k}={v}" for k, v in changed.items()) or "plain"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Query, keys, values and the options of `attend`."""
        gen = torch.Generator().manual_seed(self.length)
        heads = self.kv_heads * self.group
        query = torch.randn(self.rows, heads, self.dim, generator=gen).to(self.dtype)
        keys, values = (
            self.with_spare(torch.randn(self.rows, self.kv_heads, self.length, dim, generator=gen))
            for dim in (self.dim, self.value_dim or self.dim)
        )
        options = {
            "scale": 1.2 * self.dim**-0.5,  # not the default of torch's own attention
            "softcap": self.softcap,
            "sinks": (torch.randn(heads, generator=gen) + 3).to(self.dtype) if self.sinks else None,
            "visible": self.visible(gen),
        }
        return query, keys, values, options

    def several(self) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """As `inputs`, with T queries `[B, Hq, T, D]` and where they start: at the end, and earlier from row to row."""
        _, keys, values, options = self.inputs()
        gen = torch.Generator().manual_seed(self.length + 1)
        queries = min(QUERIES, self.length)
        shape = (self.rows, self.kv_heads * self.group, queries, self.dim)
        query = torch.randn(*shape, generator=gen).to(self.dtype)
        latest = self.length - queries
        options["starts"] = torch.tensor([latest // (row + 1) for row in range(self.rows)])
        return query, keys, values, options

    def with_spare(self, content: Tensor) -> Tensor:
        """The view that a store gives out: what lies behind it must never be read."""
        rows, heads, length, dim = content.shape
        buffer = torch.full((rows, heads, length + 33, dim), torch.nan, dtype=self.dtype)
        buffer[:, :, :length] = content.to(self.dtype)
        return buffer[:, :, :length]

    def visible(self, gen: torch.Generator) -> Tensor | None:
        if not self.hidden:
            return None
        if self.hidden == "left":
            return left_padding([0, self.length * 2 // 3], self.length)[:, None]
        heads = self.kv_heads if self.hidden == "per head" else 1
        shown = torch.rand(self.rows, heads, self.length, generator=gen) < 0.7
        shown[..., self.length // 2] = True
        return shown


PLAIN = Case()
CASES = [
    PLAIN,
    *[Case(group=group) for group in (1, 2, 3, 8)],
    *[Case(length=length) for length in (1, 2, 63, 64, 1000, 5000)],
    *[Case(dim=dim) for dim in (80, 128, 256)],
    *[Case(value_dim=48, length=length) for length in (65, 5000)],
    *[Case(softcap=2.0, length=length) for length in (65, 5000)],  # 4096 divides two ways to cap
    *[Case(sinks=True, length=length) for length in (1, 65, 5000)],
    *[Case(hidden="left", length=length) for length in (65, 1000, 5000)],
    *[Case(hidden="holes", length=length) for length in (65, 5000)],
    Case(softcap=2.0, sinks=True, hidden="holes", value_dim=80),
    Case(softcap=2.0, sinks=True, hidden="left", length=5000),
    Case(sinks=True, hidden="left", group=1, kv_heads=1),
]
# What a ring asks for; a full step masks all heads of a row alike.
PER_HEAD = [Case(hidden="per head", softcap=c, length=n) for c in (None, 2.0) for n in (65, 5000)]
EVERYTHING = Case(softcap=2.0, sinks=True, hidden="holes")


def close(actual: Tensor, expected: Tensor, case: Case, what: str) -> None:
    assert actual.shape == expected.shape
    error = relative_rms(actual, expected)
    assert error <= TOLERANCE[case.dtype][what], f"{what} is off by {error:.1e}"


def in_float32(case: Case) -> tuple[Tensor, ...]:
    return tuple(tensor.float() for tensor in case.inputs()[:3])


def check_attend(attend: Callable[..., Any], case: Case) -> None:
    query, keys, values, options = case.inputs()
    actual = attend(query, keys, values, **options)
    expected = reference.attend(*in_float32(case), **options)
    assert actual.output.dtype == case.dtype
    assert actual.lse.dtype == torch.float32
    close(actual.output, expected.output, case, "output")
    close(actual.lse, expected.lse, case, "lse")


def check_scored(actual: Any, expected: Any, case: Case) -> None:
    assert actual.scores.dtype == actual.lse.dtype == torch.float32
    close(actual.scores, expected.scores, case, "scores")
    close(actual.lse, expected.lse, case, "lse")


def check_score(score: Callable[..., Any], case: Case) -> None:
    query, keys, _, options = case.inputs()
    for reduction in ("max", "mean"):
        options["reduction"] = reduction
        expected = reference.score(*in_float32(case)[:2], **options)
        check_scored(score(query, keys, **options), expected, case)


def check_attend_and_score(attend_and_score: Callable[..., Any], case: Case) -> None:
    query, keys, values, options = case.inputs()
    for reduction in ("max", "mean"):
        options["reduction"] = reduction
        attended, scored = attend_and_score(query, keys, values, **options)
        expected, expected_scored = reference.attend_and_score(*in_float32(case), **options)
        assert attended.output.dtype == case.dtype
        assert torch.equal(attended.lse, scored.lse)
        close(attended.output, expected.output, case, "output")
        check_scored(scored, expected_scored, case)


def check_attend_and_rank(attend_and_rank: Callable[..., Any], case: Case) -> None:
    """The most attended entry is the newest. In 16 bits a rank may swap with one that is nearly as good."""
    query, keys, values, options = case.inputs()
    attended = reference.attend(*in_float32(case), **options)
    for reduction in ("max", "mean"):
        scores = reference.score(*in_float32(case)[:2], **options, reduction=reduction).scores
        newest = scores.argmax(-1)
        count = max(1, min(8, case.length - 1))
        actual, best = attend_and_rank(
            query, keys, values, **options, reduction=reduction, newest=newest, count=count
        )
        close(actual.output, attended.output, case, "output")
        close(actual.lse, attended.lse, case, "lse")
        assert best.dtype == torch.int64 and best.shape == (*newest.shape, count)
        if case.length == 1:
            assert bool((best == 0).all())
            continue
        assert bool((best.sort(-1).values.diff(dim=-1) > 0).all())
        left = scores.scatter(-1, newest[..., None], -1.0)
        close(left.gather(-1, best), left.topk(count).values, case, "scores")


def textbook(case: Case, counts: Tensor, reduction: str, window: int | None) -> tuple[Any, Any]:
    """`verify` one query after the other: each attends to what lies before it, and to itself."""
    query, keys, values, options = case.several()
    starts, visible = options.pop("starts"), options.pop("visible")
    places = torch.arange(case.length)
    shape = (case.rows, case.kv_heads, case.length)
    shown = torch.ones(shape, dtype=torch.bool) if visible is None else visible.expand(shape)
    outputs, lses, votes = [], [], torch.zeros(shape, dtype=torch.float32)
    for index in range(query.shape[2]):
        own = (starts + index)[:, None, None]
        seen = shown & (places <= own)
        if window is not None:
            seen = seen & (places > own - window)
        options["visible"] = seen
        one, all_keys = query[:, :, index].float(), keys.float()
        attended = reference.attend(one, all_keys, values.float(), **options)
        given = reference.score(one, all_keys, **options, reduction=reduction).scores
        votes += torch.where((index < counts)[:, None, None], given, 0.0)
        outputs.append(attended.output)
        lses.append(attended.lse)
    votes /= counts.clamp(min=1)[:, None, None]
    lse = torch.stack(lses, 2)
    return reference.Attended(torch.stack(outputs, 2), lse), reference.Scored(votes, lse)


def check_votes(actual: Any, expected: Any, case: Case, counts: Tensor) -> None:
    """As `check_scored`; a query may see nothing, and a row without votes may have any log-sum-exp."""
    voting = counts > 0
    assert not actual.scores[~voting].any(), (
        "scores of a row without votes is off by more than nothing"
    )
    actual, expected = (type(s)(s.scores[voting], s.lse[voting]) for s in (actual, expected))
    seen = expected.lse.isfinite()
    assert torch.equal(actual.lse.isneginf(), ~seen)
    check_scored(
        actual._replace(lse=actual.lse[seen]), expected._replace(lse=expected.lse[seen]), case
    )


def counted(case: Case) -> tuple[Tensor, Tensor]:
    """Every query votes, and some do: in one row none."""
    everyone = torch.full((case.rows,), min(QUERIES, case.length))
    return everyone, torch.tensor([3, 0, 1])[: case.rows].clamp(max=int(everyone[0]))


def check_vote(vote: Callable[..., Any], case: Case) -> None:
    query, keys, _, options = case.several()
    everyone, some = counted(case)
    for reduction, counts in (("max", everyone), ("mean", some)):
        given = None if counts is everyone else counts
        actual = vote(query, keys, **options, counts=given, reduction=reduction)
        check_votes(actual, textbook(case, counts, reduction, None)[1], case, counts)


def check_verify(verify: Callable[..., Any], case: Case) -> None:
    query, keys, values, options = case.several()
    everyone, some = counted(case)
    for reduction, counts, window in (
        ("max", everyone, None),
        ("mean", some, None),
        ("max", some, 7),
        ("mean", everyone, 1),
    ):
        given = None if counts is everyone else counts
        attended, scored = verify(
            query, keys, values, **options, counts=given, reduction=reduction, window=window
        )
        expected, expected_scored = textbook(case, counts, reduction, window)
        assert attended.output.dtype == case.dtype
        assert torch.equal(attended.lse, scored.lse)
        voting = counts > 0
        close(attended.output[voting], expected.output[voting], case, "output")
        check_votes(scored, expected_scored, case, counts)


ATTENTION_CHECKS = {
    "attend": check_attend,
    "score": check_score,
    "attend_and_score": check_attend_and_score,
    "attend_and_rank": check_attend_and_rank,
    "vote": check_vote,
    "verify": check_verify,
}


def check_lengths(backend: Any, case: Case) -> None:
    """Entries beyond a length count for nothing: the same as hiding them. One row is empty, one whole."""
    query, keys, values, options = case.inputs()
    gen = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, case.length + 1, (case.rows, case.kv_heads), generator=gen)
    lengths[0, 0], lengths[-1, -1] = 0, case.length
    for given in (lengths, lengths[:1], lengths[:, :1], lengths[-1:, -1:]):
        hidden = {**options, "visible": reference.within(given, options["visible"], case.length)}
        attended, scored = reference.attend_and_score(*in_float32(case), **hidden)
        seen = attended.lse.isfinite()
        for actual in (
            backend.attend(query, keys, values, lengths=given, **options),
            backend.attend_and_score(query, keys, values, lengths=given, **options)[0],
        ):
            close(actual.output, attended.output, case, "output")
            assert torch.equal(actual.lse.isneginf(), ~seen)
            close(actual.lse[seen], attended.lse[seen], case, "lse")
        scores = backend.score(query, keys, lengths=given, **options).scores
        close(scores, scored.scores, case, "scores")
        newest = torch.zeros(case.rows, case.kv_heads, dtype=torch.int64)
        count = max(1, min(3, case.length - 1))
        rank = {"newest": newest, "count": count, **options, "lengths": given}
        actual, best = backend.attend_and_rank(query, keys, values, **rank)
        close(actual.output, attended.output, case, "output")
        left = scored.scores.scatter(-1, newest[..., None], -1.0)
        close(left.gather(-1, best), left.topk(count).values, case, "scores")


def check_attend_at(attend_at: Callable[..., Any], case: Case) -> None:
    """The same as copying the entries out first; and from pages in any order, the same as from one piece."""
    query, keys, values, options = case.inputs()
    del options["visible"]
    gen = torch.Generator().manual_seed(4)
    places = torch.rand(case.rows, case.kv_heads, case.length, generator=gen).argsort(-1)
    positions = places[..., : max(1, case.length // 2)].clone()
    positions[0, 0, 1:] = FREE
    positions[-1, -1] = FREE
    at = positions.clamp(min=0)[..., None]
    copied = [x.gather(2, at.expand(-1, -1, -1, x.shape[-1])) for x in (keys, values)]
    newest = torch.zeros(case.rows, case.kv_heads, dtype=torch.int64)
    count = max(1, min(3, positions.shape[-1] - 1))
    rank = {"newest": newest, "count": count}
    shown = {**options, "visible": positions >= 0}
    expected, _ = reference.attend_and_rank(
        query.float(), *(x.float() for x in copied), **shown, **rank
    )
    scores = reference.score(query.float(), copied[0].float(), **shown).scores
    seen = expected.lse.isfinite()
    for blocks, stored in ((None, (keys, values)), paged(keys, values, page=16)):
        actual, best = attend_at(query, *stored, positions, blocks=blocks, **options, **rank)
        close(actual.output, expected.output, case, "output")
        assert torch.equal(actual.lse.isneginf(), ~seen)
        close(actual.lse[seen], expected.lse[seen], case, "lse")
        left = scores.scatter(-1, newest[..., None], -1.0)
        close(left.gather(-1, best), left.topk(count).values, case, "scores")
        plain, none = attend_at(query, *stored, positions, blocks=blocks, **options)
        assert torch.equal(plain.output, actual.output) and none.shape[-1] == 0


def paged(keys: Tensor, values: Tensor, page: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The block table and the pages `[N, Hkv, page, D]` of a cache as vLLM keeps it: K beside V, pages shuffled."""
    rows, heads, length, _ = keys.shape
    each = -(-length // page)
    blocks = torch.randperm(rows * each, generator=torch.Generator().manual_seed(5)).view(rows, -1)
    both = torch.cat([keys, values], -1)
    both = torch.nn.functional.pad(both, (0, 0, 0, each * page - length), value=torch.nan)
    pages = both.new_empty(rows * each, heads, page, both.shape[-1])
    pages[blocks] = both.unflatten(2, (each, page)).transpose(1, 2)
    return blocks.int(), (pages[..., : keys.shape[-1]], pages[..., keys.shape[-1] :])


def check_gather(gather: Callable[..., None]) -> None:
    gen = torch.Generator().manual_seed(0)
    source = PLAIN.with_spare(torch.randn(2, 2, 30, 8, generator=gen))
    positions = torch.tensor([[[3, 29, 0], [7, 7, FREE]], [[1, FREE, FREE], [FREE] * 3]])
    for heads in (None, torch.tensor([[True, False], [True, True]])):
        out = torch.full((2, 2, 5, 8), torch.nan)
        gather(source, positions, out, heads)
        written = torch.zeros(2, 2, 5, dtype=torch.bool)
        for row, head, slot in (positions != FREE).nonzero().tolist():
            if heads is None or heads[row, head]:
                expected = source[row, head, positions[row, head, slot]]
                assert torch.equal(out[row, head, slot], expected)
                written[row, head, slot] = True
        assert bool(out[~written].isnan().all())


def check_select(select: Callable[..., Any]) -> None:
    """One plateau over a hole: slow and exhaustive is tests/test_selection.py."""
    scores = torch.tensor([[[0.1, 0.5, 0.5, 0.9, 0.5, 0.2, 0.7]]])
    visible = torch.tensor([[True, True, True, False, True, True, True]])
    chosen = select(scores, torch.tensor([4]), pool_kernel=1, visible=visible)
    assert chosen.positions.tolist() == [[[1, 2, 4, 6]]]
    chosen = select(scores, torch.tensor([4]), pool_kernel=3, visible=visible)
    assert chosen.positions.tolist() == [[[2, 4, 5, 6]]]
    rules = {"recent": 1, "anchors": torch.tensor([[[2, FREE]]]), "ends": torch.tensor([6])}
    chosen = select(scores, torch.tensor([4]), pool_kernel=1, visible=visible, **rules)
    assert chosen.positions.tolist() == [[[1, 4, 2, 5]]]
