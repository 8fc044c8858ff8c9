"""`generate --explain`: bytes of the best case, as a bound; no promise of a speed."""

from __future__ import annotations

import re

import pytest
import torch

from refreshkv.bench.roofline import Load, Reads
from refreshkv.bench.shapes import config_of, outline
from refreshkv.cli.explain import least, lines
from refreshkv.config import make_config


def test_the_best_case_of_the_presets() -> None:
    found = least(2048)
    assert found["full"] == Reads(1, 2048)
    drafts = make_config("default").draft
    # Every draft stands: as many passes as tokens, and one of them over everything.
    assert found["exact"] == Reads(1, (drafts * 128 + 2048) / (drafts + 1))
    # The codes of all tokens: `policy.rounding` says that no entry has to be exact.
    assert found["fast"] == Reads(1, 0, 2048)


@pytest.mark.parametrize("acceptance", [0.0, 0.35, 0.93, 1.0])
@pytest.mark.parametrize("draft", [1, 8, 16])
def test_no_run_reads_less(draft: int, acceptance: float) -> None:
    """Drafts that fall cost passes and reads; shorter drafts read the cache more often."""
    bound = least(4096)
    load = Load(context=4096, budget=256, draft=draft, acceptance=acceptance)
    assert load.modes()["exact"].passes >= bound["exact"].passes
    assert load.modes()["exact"].entries >= bound["exact"].entries
    mixed = Load(context=4096).modes()["mixed"]
    assert mixed.codes >= bound["fast"].codes and mixed.entries > bound["fast"].entries


def test_it_bounds_and_names_what_measures() -> None:
    said = lines(outline(config_of("llama-3.2-1b"), torch.bfloat16), 1 << 17)
    weights, entry = 1_235_814_400 * 2, 32768
    code = entry * 4.5 / 32
    full = weights + (1 << 17) * entry
    for line, mode in zip(said[2:4], ("exact", "fast"), strict=True):
        reads = least(1 << 17)[mode]
        ratio = full / (reads.passes * weights + reads.entries * entry + reads.codes * code)
        assert line.split()[0] == mode
        assert f": at most {ratio:.2f}x full attention" in line
    assert "upper bound" in said[-1] and "'refreshkv compare' measures" in said[-1]
    assert not re.search("fastest|ahead|estimate", "\n".join(said))
