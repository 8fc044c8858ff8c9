"""`generate --explain`: the byte model of the benchmarks, for a model and a prompt."""

from __future__ import annotations

import torch

from refreshkv.bench import roofline
from refreshkv.bench.roofline import Reads
from refreshkv.bench.shapes import config_of, outline
from refreshkv.cli.explain import estimates, lines


def test_the_settings_are_those_of_the_presets() -> None:
    found = estimates(2048)
    assert found["full"] == Reads(1, 2048)
    drafts, tokens = roofline.DRAFT, 1 + roofline.DRAFT * roofline.ACCEPTANCE
    assert found["exact"] == Reads((drafts + 1) / tokens, (drafts * 128 + 2048) / tokens)
    assert found["fast"] == Reads(1, 256 + roofline.FAST_FULL_SHARE * (1024 + 256))


def test_a_long_prompt_asks_for_the_lossless_mode_and_a_short_one_for_none() -> None:
    model = outline(config_of("llama-3.2-1b"), torch.bfloat16)
    long = lines(model, 1 << 17)
    assert len(long) == 5 and "fastest: exact" in long[-1]
    weights = 1_235_814_400 * 2
    full = weights + (1 << 17) * 32768
    reads = estimates(1 << 17)["exact"]
    exact = reads.passes * weights + reads.entries * 32768
    assert f"{full / exact:.2f}x full attention" in long[2]
    # The line that it names is where both modes move the same bytes.
    even = int(long[-1].split("from ")[1].split(" tokens")[0].replace(",", ""))
    ratio = lines(model, even)[2].split(": ")[1]
    assert ratio.startswith("1.00x")
