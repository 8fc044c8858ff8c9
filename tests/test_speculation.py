"""Drafts are accepted and replaced so that the text has exactly the target's distribution."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from refreshkv.policy.speculation import accept_greedy, accept_sampled

VOCAB, DRAFTS, ROWS = 4, 3, 60_000
# Seeds are fixed; a right implementation would fall below this once in ten thousand seeds.
ALPHA = 1e-4


def test_greedy_drafts_stand_up_to_the_first_wrong_one() -> None:
    drafts = torch.tensor([[5, 6, 7], [5, 9, 7], [9, 6, 7], [5, 6, 7], [5, 6, 7]])
    targets = torch.tensor([[5, 6, 7, 8]] * 5)
    accepted, after = accept_greedy(drafts, targets, torch.tensor([3, 3, 3, 2, 0]))
    assert accepted.tolist() == [3, 1, 0, 2, 0]
    assert after.tolist() == [8, 6, 5, 7, 5]


def test_no_drafts_at_all() -> None:
    none, counts = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    accepted, after = accept_greedy(none, torch.tensor([[3], [4]]), counts)
    assert accepted.tolist() == [0, 0] and after.tolist() == [3, 4]
    sure = torch.eye(VOCAB)[[3, 1]][:, None]
    accepted, after = accept_sampled(none, torch.zeros(2, 0, VOCAB), sure, counts)
    assert accepted.tolist() == [0, 0] and after.tolist() == [3, 1]


class Text:
    """Distributions of the next token after every text of up to three tokens, tables `[V, ..., V]`."""

    def __init__(self, seed: int, zeros: float = 0.0) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.tables = []
        for length in range(DRAFTS + 1):
            weights = torch.rand([VOCAB] * (length + 1), generator=gen) ** 2
            gone = torch.rand(weights.shape, generator=gen) < zeros
            gone[..., 0] &= ~gone.all(-1)  # something is left
            weights = weights.masked_fill(gone, 0.0)
            self.tables.append(weights / weights.sum(-1, keepdim=True))

    def after(self, tokens: Tensor) -> Tensor:
        """`[B, n]` -> `[B, V]`."""
        return self.tables[tokens.shape[1]][tuple(tokens.unbind(1))].expand(len(tokens), -1)


def spoken(target: Text, draft: Text, counts: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Texts of three tokens `[B, 3]`, the first of them drafted, and how many drafts stood."""
    gen = torch.Generator().manual_seed(seed)
    drafts = torch.zeros(ROWS, 0, dtype=torch.long)
    proposed, wanted = [], [target.after(drafts)]
    for _ in range(DRAFTS):
        proposed.append(draft.after(drafts))
        token = torch.multinomial(proposed[-1], 1, generator=gen)
        drafts = torch.cat([drafts, token], 1)
        wanted.append(target.after(drafts))
    accepted, after = accept_sampled(
        drafts, torch.stack(proposed, 1), torch.stack(wanted, 1), counts, gen
    )
    text = torch.nn.functional.pad(drafts, (0, 1)).scatter(1, accepted[:, None], after[:, None])
    for length in range(1, DRAFTS):  # the rest as an ordinary loop draws it
        drawn = torch.multinomial(target.after(text[:, :length]), 1, generator=gen)[:, 0]
        text[:, length] = torch.where(length > accepted, drawn, text[:, length])
    return text[:, :DRAFTS], accepted


def p_value(text: Tensor, target: Text) -> float:
    """Of the chi-square test of the texts against the target, rare texts together."""
    one, two, three = target.tables[:DRAFTS]
    expected = (one[:, None, None] * two[..., None] * three).flatten() * len(text)
    code = (text * torch.tensor([VOCAB**2, VOCAB, 1])).sum(1)
    observed = torch.bincount(code, minlength=VOCAB**DRAFTS).double()
    assert observed[expected == 0].sum() == 0
    rare = expected < 10
    cells = [torch.cat([x[~rare], x[rare].sum()[None]]).double() for x in (observed, expected)]
    cells = [cell[cells[1] > 0] for cell in cells]
    return float(chisquare(cells[0], cells[1] * cells[0].sum() / cells[1].sum()).pvalue)


COUNTS = {"all": lambda rows: rows * 0 + DRAFTS, "by row": lambda rows: rows % (DRAFTS + 1)}
ZEROS = {"none": (0.0, 0.0), "q": (0.0, 0.5), "p": (0.5, 0.0), "both": (0.5, 0.5)}


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("counts", COUNTS)
def test_the_text_has_the_distribution_of_the_target(counts: str, zeros: str) -> None:
    of_target, of_draft = ZEROS[zeros]
    target, draft = Text(1, of_target), Text(2, of_draft)
    drafted = COUNTS[counts](torch.arange(ROWS))
    text, accepted = spoken(target, draft, drafted, seed=3)
    assert (accepted <= drafted).all() and 0.05 < accepted.float().mean() < 2.9
    assert p_value(text, target) > ALPHA
    assert p_value(text, Text(4)) < 1e-9  # the test tells distributions apart


def test_the_share_of_drafts_that_stand() -> None:
    """Leviathan et al., theorem 3.5: the sum of min(p, q)."""
    target, draft = Text(1), Text(2)
    _, accepted = spoken(target, draft, torch.ones(ROWS, dtype=torch.long), seed=3)
    expected = torch.minimum(target.tables[0], draft.tables[0]).sum()
    assert abs(accepted.float().mean() - expected) < 4 * 0.5 / ROWS**0.5


@pytest.mark.parametrize("counts", COUNTS)
def test_drafts_of_the_target_itself_all_stand(counts: str) -> None:
    target = Text(1, zeros=0.3)
    drafted = COUNTS[counts](torch.arange(ROWS))
    text, accepted = spoken(target, target, drafted, seed=5)
    assert torch.equal(accepted, drafted)
    assert p_value(text, target) > ALPHA


def test_a_draft_that_the_target_never_says_is_refused() -> None:
    drafts = torch.zeros(200, 1, dtype=torch.long)
    never, always = torch.tensor([0.0, 0.5, 0.5, 0.0]), torch.tensor([1.0, 0.0, 0.0, 0.0])
    accepted, after = accept_sampled(
        drafts,
        always.expand(200, 1, VOCAB),
        never.expand(200, 2, VOCAB),
        torch.ones(200, dtype=torch.long),
        torch.Generator().manual_seed(0),
    )
    assert not accepted.any() and set(after.tolist()) == {1, 2}


def test_the_generator_decides() -> None:
    target, draft, counts = Text(1), Text(2), torch.full((ROWS,), DRAFTS)
    first, again, other = (spoken(target, draft, counts, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
