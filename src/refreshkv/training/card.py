"""The model card of a trained model: the recipe, what it was trained on, and the losses. No claim beyond those."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

import refreshkv

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {model}, continued with a partial KV cache

Continued pre-training after RefreshKV (Xu, Goyal and Choi, ACL 2025, section 6): the first {length} tokens of each
sequence attend causally, the {tail} after them to what token {length} selects, per layer and KV head, and to each
other.
It is the same architecture as before and runs anywhere; what it was trained for is

    refreshkv.attach(model, {call})

## Recipe

| setting | value |
|---|---|
{settings}

Data: `{data}`; {long_enough} of {read} documents were long enough, {sequences} sequences for training, validation and
test. Made with refreshkv {version}, torch {torch}, transformers {transformers}. The licence is that of the model it
was made from.

## Losses, nats a token

| step | part | first {length} | last {tail} |
|---|---|---|---|
{losses}
"""
_LEFT_OUT = ("model", "data", "config")


def card(
    facts: Mapping[str, Any], data: Mapping[str, Any], logs: Sequence[Mapping[str, Any]]
) -> str:
    """The text of the card.

    Args:
        facts: the recipe and how it was run.
        data: what became of the documents.
        logs: of the trainer, in the order of the steps.
    """
    config = facts["config"]
    if config["mode"] == "mixed":
        call = f'mode="mixed", budget={config["budget"]!r}'
        names = ("budget", "key_bits", "value_bits", "skip")
    else:
        stride = (
            "stride=10"
            if config["stride"] is None
            else f"stride={config['stride']}, threshold=None"
        )
        call = f"budget={config['budget']!r}, {stride}"
        names = ("budget", "stride", "pool_kernel", "recent", "window", "group_reduction")
    settings = {"mode": config["mode"], **{name: config[name] for name in names}}
    settings |= {name: value for name, value in facts.items() if name not in _LEFT_OUT}
    losses = []
    for line in logs:
        for prefix, part in (("", "training"), ("eval_", "validation")):
            if f"{prefix}first_loss" in line:
                first, tail = line[f"{prefix}first_loss"], line[f"{prefix}tail_loss"]
                losses.append(f"| {line['step']} | {part} | {first:.4f} | {tail:.4f} |")
    return _CARD.format(
        model=facts["model"],
        length=facts["length"],
        tail=facts["tail"],
        call=call,
        settings="\n".join(f"| {name} | {json.dumps(value)} |" for name, value in settings.items()),
        data=facts["data"],
        read=data["read"],
        long_enough=data["long_enough"],
        sequences=", ".join(str(count) for count in data["sequences"].values()),
        version=refreshkv.__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        losses="\n".join(losses[:1] + losses[1:][-20:]),
    )
