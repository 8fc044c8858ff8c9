"""What a table costs before anything is loaded: tokens, memory, and a rough time, from the config of a model.

Prompts are bound by arithmetic, decoding by the byte model of `refreshkv.bench.plan`. The methods of a run share the
prompt's pass, but for those that look at all its queries. It is an estimate: a step of the evaluation is launched from
Python, which `fixed_ms` stands for, and methods that are compared with are written for their quality.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from refreshkv.bench import plan
from refreshkv.bench.plan import Device
from refreshkv.bench.roofline import Load, sizes_of
from refreshkv.config import RefreshConfig
from refreshkv.evals.grid import MethodSpec
from refreshkv.methods import find
from refreshkv.reproduce.jobs import Job, Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

USED = 0.4  # share of the arithmetic of the data sheet that a prompt's pass is taken to reach
# Beside the bytes of a step. With it the paper's full attention comes out: 7.50 s for 256 tokens on an A100.
FIXED_MS = 20.0


@dataclass(frozen=True)
class Cost:
    """Of one measure.

    Attributes:
        examples: of all its tasks; `None` where the data decide.
        prompt, new: most tokens of a prompt, and about how many follow it.
        methods: how many decode them.
        decoded: examples * new * methods.
        weights, cache, memory: bytes: the model, keys and values of a batch, and all with what a method adds.
        fits: whether the device has that.
        hours: in all.
    """

    name: str
    examples: int | None
    prompt: int
    new: int
    methods: int
    decoded: int | None
    weights: int
    cache: int
    memory: int
    fits: bool
    hours: float | None


def costs(
    model: PreTrainedModel, jobs: Sequence[Job], request: Request, device: Device, fixed_ms: float
) -> list[Cost]:
    """A cost for each job; `model` may lie on the meta device."""
    return [_cost(model, job, request, device, fixed_ms) for job in jobs]


def _cost(
    model: PreTrainedModel, job: Job, request: Request, device: Device, fixed_ms: float
) -> Cost:
    form, grid, sizes = job.measure.form(request.small), job.grid, sizes_of(model)
    new = request.max_new_tokens or form.new
    specs = [*grid.methods, *(_TWIN for row in request.table.rows_of(job.column) if row.like)]
    examples = None if grid.limit is None else grid.limit * len(grid.tasks)
    batches = math.ceil((examples or 1) / grid.batch)
    seconds, beside, memory = 0.0, 0, {}
    for spec in specs:
        config = spec.config(grid.budget)
        own = config if isinstance(config, RefreshConfig) else None
        stride = None if own is None else own.stride
        load = Load(form.prompt + new, grid.batch, config.budget, stride)
        found = plan.plan(sizes, load, device, fixed_ms)
        # What is compared with keeps K entries, whatever it does to choose them.
        mode = {"full": "full", "exact": "exact", "mixed": "mixed", "refresh": "mix"}.get(
            "" if own is None else own.mode, "snapkv"
        )
        seconds += batches * new * found["modes"][mode]["ms"] / 1e3
        memory = found["memory"]
        beside = max(beside, memory["codes"] if mode == "mixed" else memory["partial"])
    passes = 1 + sum(spec.name == "h2o" for spec in specs)
    seconds += passes * (examples or 1) * prompt_flops(model, form.prompt) / (USED * device.flops)
    total = memory["weights"] + memory["cache"] + beside
    return Cost(
        job.measure.name,
        examples,
        form.prompt,
        new,
        len(specs),
        None if examples is None else examples * new * len(specs),
        memory["weights"],
        memory["cache"],
        total,
        total <= device.memory,
        None if examples is None else seconds / 3600,
    )


_TWIN = MethodSpec("refreshkv-fixed", find("refreshkv-fixed").name)


def prompt_flops(model: PreTrainedModel, tokens: int) -> float:
    """Operations of a prompt's pass: two for each weight and token, and the causal half of all pairs in each layer."""
    config = model.config.get_text_config(decoder=True)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    table = model.get_input_embeddings().weight.numel()
    weights = sum(parameter.numel() for parameter in model.parameters()) - table
    return 2.0 * weights * tokens + 2.0 * config.num_hidden_layers * width * tokens**2
