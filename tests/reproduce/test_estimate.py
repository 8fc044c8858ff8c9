"""A plan by hand, from a config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from refreshkv.bench.plan import device_of
from refreshkv.bench.shapes import config_of, outline
from refreshkv.reproduce import tables
from refreshkv.reproduce.estimate import FIXED_MS, USED, Cost, costs, prompt_flops
from refreshkv.reproduce.jobs import Request, make_jobs, placeholders
from refreshkv.reproduce.tables import Table

A100 = device_of("a100")


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return outline(config_of("llama-3.1-8b"), torch.bfloat16)


def planned(model: PreTrainedModel, table: Table, **given: Any) -> dict[str, Cost]:
    request = Request(table=table, out=Path("out"), model="m", **given)
    request = Request(**{**vars(request), "data": placeholders(request)})
    made = make_jobs(request)
    return {cost.name: cost for cost in costs(model, made, request, A100, FIXED_MS)}


def test_counts(llama: PreTrainedModel) -> None:
    found = planned(llama, tables.LANGUAGE)
    arxiv, ruler = found["arxiv"], found["ruler"]
    assert (arxiv.examples, arxiv.prompt, arxiv.new, arxiv.methods) == (100, 16_384, 256, 6)
    assert arxiv.decoded == 100 * 256 * 6 and ruler.examples == 1300
    assert arxiv.weights == pytest.approx(16.06e9, rel=0.01)
    # 32 layers, 8 heads of keys and values, 128 dims, 2 bytes
    assert arxiv.cache == (16_384 + 256) * 32 * 8 * 2 * 128 * 2
    assert arxiv.memory == arxiv.weights + arxiv.cache + 2048 * 32 * 8 * 2 * 128 * 2
    assert planned(llama, tables.LANGUAGE, batch=64)["arxiv"].cache == 64 * arxiv.cache
    assert not planned(llama, tables.LANGUAGE, batch=64)["arxiv"].fits and arxiv.fits
    assert planned(llama, tables.ABLATIONS)["html-0.5k"].methods == 7  # the fixed stride too


def test_the_papers_own_speed_comes_out(llama: PreTrainedModel) -> None:
    """Full attention over 16K tokens on an A100: 7.50 s for 256 tokens."""
    one = planned(llama, tables.LANGUAGE, limit=1)["arxiv"]
    assert one.hours is not None
    prompts = 2 * prompt_flops(llama, 16_384) / (USED * A100.flops)  # H2O runs its own
    assert (3600 * one.hours - prompts) / 6 == pytest.approx(7.5, rel=0.1)


def test_operations_of_a_prompt(llama: PreTrainedModel) -> None:
    short, long = prompt_flops(llama, 1), prompt_flops(llama, 100_000)
    assert short == pytest.approx(2 * 7.5e9, rel=0.01)
    assert long - 100_000 * short == pytest.approx(2 * 32 * 4096 * 1e10, rel=1e-3)


def test_what_the_data_decide_is_not_guessed(llama: PreTrainedModel) -> None:
    request = Request(table=tables.REASONING, out=Path("out"), model="m", data={"own": "p.jsonl"})
    *_, own = costs(llama, make_jobs(request), request, A100, FIXED_MS)
    assert (own.examples, own.decoded, own.hours) == (None, None, None)
