"""The definition of the mixed mode: between full attention and attention to what the codes say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from refreshkv.kernels import reference
from refreshkv.kernels.codes import Codes, restored_keys, restored_values
from refreshkv.kernels.options import Entries
from refreshkv.policy.rounding import BLOCK
from tests.helpers import relative_rms
from tests.kernels.mixed import MixedCase, check_mixed, counted

CASES = [MixedCase(), MixedCase(rows=3, hidden="holes", softcap=3.0, sinks=True, value_dim=48)]
GROUP = CASES[0].group


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_budget_of_everything_is_full_attention(case: MixedCase) -> None:
    (query, entries, codes, options), given = replace(case, budget=999).mixed()
    ours, exact = counted(reference.attend_mixed)(query, entries, codes, options, **given)
    full = reference.attend(query, entries, options)
    torch.testing.assert_close(ours.output, full.output)
    torch.testing.assert_close(ours.lse, full.lse)
    assert bool((exact[..., 0] > 0).all()) and not exact[..., 1].any()


@pytest.mark.parametrize("case", CASES[:1], ids=str)
def test_without_a_budget_it_is_attention_to_what_codes_say(case: MixedCase) -> None:
    (query, entries, codes, options), given = replace(case, budget=0).mixed()
    ours, exact = counted(reference.attend_mixed)(query, entries, codes, options, **given)
    keys, values = entries.keys.clone(), entries.values.clone()
    for row in range(case.rows):
        begin, count = int(given["first"][row]), BLOCK * int(given["finished"][row])
        keys[row, :, begin : begin + count] = restored_keys(codes)[row, :, :count]
        values[row, :, begin : begin + count] = restored_values(codes)[row, :, :count]
    rounded = reference.attend(query, Entries(keys, values), options)
    torch.testing.assert_close(ours.output, rounded.output)
    assert not exact[..., 0].any()
    assert torch.equal(exact[..., 1], given["finished"][:, None].expand_as(exact[..., 1]))
    full = reference.attend(query, entries, options)
    assert relative_rms(ours.output, full.output) > 0.01


def test_more_exact_entries_come_closer() -> None:
    errors = []
    for budget in (0, 20, 80, 250):
        (query, entries, codes, options), given = replace(CASES[0], budget=budget).mixed()
        query = query * 3
        ours, _ = counted(reference.attend_mixed)(query, entries, codes, options, **given)
        errors.append(relative_rms(ours.output, reference.attend(query, entries, options).output))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 2


@pytest.mark.parametrize("layout", ["rows", "pages", "pages rows"])
@pytest.mark.parametrize("code_pages", [False, True])
def test_where_entries_and_codes_lie_changes_nothing(layout: str, code_pages: bool) -> None:
    """But that what a missing page would hold is exact."""
    for case in CASES:
        dense = replace(case, code_pages=code_pages)
        (query, entries, codes, options), given = dense.mixed()
        expected, exact = counted(reference.attend_mixed)(query, entries, codes, options, **given)
        moved = replace(dense, layout=layout)
        (query, entries, codes, options), given = moved.mixed()
        ours, of_ours = counted(reference.attend_mixed)(query, entries, codes, options, **given)
        assert torch.equal(ours.output, expected.output) and torch.equal(of_ours, exact)


def test_dims_are_padded_with_what_has_no_weight() -> None:
    codes = Codes.room(torch.zeros(1, 1), (24, 7), 1, 3, 2)
    keys = torch.randn(1, 1, BLOCK, 24)
    entries = Entries(keys, torch.randn(1, 1, BLOCK, 7))
    none, one = torch.tensor([0]), torch.tensor([1])
    reference.encode(entries, codes, first=none, begin=none, end=one, most=1)
    assert restored_keys(codes).shape == keys.shape
    assert bool(((restored_keys(codes) - keys).abs() < 0.6).all())


@pytest.mark.parametrize("what", ["keys", "values"])
def test_a_broken_number_breaks_its_block_and_no_other(what: str) -> None:
    (query, entries, codes, options), given = CASES[0].mixed()
    part: Tensor = getattr(entries, what)
    part[0, 0, 100, 3] = torch.nan
    every = {"first": given["first"], "begin": given["finished"] * 0, "end": given["finished"]}
    reference.encode(entries, codes, **every, most=5)
    found = restored_keys(codes) if what == "keys" else restored_values(codes)
    broken = found.isnan()
    assert bool(broken[0, 0, BLOCK : 2 * BLOCK, 3].all()) and int(broken.sum()) == BLOCK
    ours, _ = counted(reference.attend_mixed)(query, entries, codes, options, **given)
    assert bool(ours.output[0, :GROUP].isnan().any(-1).all())
    assert not ours.output[0, GROUP:].isnan().any() and not ours.output[1].isnan().any()


def test_the_check_notices_a_step_that_is_not_mixed() -> None:
    def full(query: Tensor, entries: Entries, codes: Codes, options, **given):  # type: ignore[no-untyped-def]
        reference.attend_mixed(query, entries, codes, options, **given)
        return reference.attend(query, entries, options)

    check_mixed(reference.attend_mixed, CASES[0])
    with pytest.raises(AssertionError, match="output is off"):
        check_mixed(full, CASES[0])
