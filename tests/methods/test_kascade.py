"""Kascade: which layers are anchor layers, what each reads, and what follows a crop."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from refreshkv.methods.kascade import KascadeSettings, anchor_layers
from tests.helpers import random_tokens

from .driver import Driver
from .test_sets import LENGTH, PROMPT


def test_the_layers_of_kascade() -> None:
    """The first is dense, an anchor layer reads the keys, half of an entry, and the others read nothing to choose."""
    tokens = random_tokens(rows=2, pads=(0, 21), length=LENGTH)
    drivers = [
        Driver(tokens, "kascade", PROMPT, budget=16, layer=layer, layers=32) for layer in range(32)
    ]
    for driver, below in itertools.pairwise(reversed(drivers)):
        driver.algorithm.below = below.algorithm
    for _ in range(2):
        for driver in drivers:
            driver.step()
    read = [
        [driver.stats.row(row).layers[layer].read for row in (0, 1)]
        for layer, driver in enumerate(drivers)
    ]
    assert read[0] == [2 * (61 + 62), 2 * (40 + 41)]
    for layer in range(1, 32):
        keys = [31 + 31, 20 + 21] if layer in (6, 12, 19, 25) else [0, 0]
        assert read[layer] == [2 * (32 + more) for more in keys]


@pytest.mark.parametrize(
    ("layers", "given", "expected"),
    [
        *((1, None, [0]), (2, None, [0, 1]), (4, None, [0, 2]), (32, None, [0, 6, 12, 19, 25])),
        *((32, "2-8-13-14", [0, 2, 8, 13, 14]), (4, 1, [0, 1])),
    ],
)
def test_the_anchor_layers(layers: int, given: Any, expected: list[int]) -> None:
    assert anchor_layers(KascadeSettings(anchors=given), layers) == expected


def test_an_anchor_layer_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"names layer 4, but 4 layers are served; .* 1 to 3"):
        anchor_layers(KascadeSettings(anchors="1-4"), 4)


def test_kascade_goes_on_after_a_crop_that_leaves_no_prompt_to_learn_from() -> None:
    tokens = random_tokens(rows=2, pads=(0, 9), length=LENGTH)
    driver = Driver(tokens, "kascade", PROMPT, budget=20)
    driver.crop(PROMPT - 5)
    assert driver.below is not None
    for _ in range(2):
        driver.step()
        assert torch.equal(driver.chosen, driver.below.algorithm.chosen)
