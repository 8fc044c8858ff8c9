"""One example under one method: decoded, scored, and written down with everything that is needed to re-make it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers

import refreshkv
from refreshkv.evals import decoding, encoding
from refreshkv.evals.decoding import Fed, Output
from refreshkv.evals.grid import Cell, Grid
from refreshkv.evals.store import Record, RunError
from refreshkv.evals.yardstick import Yardstick
from refreshkv.tasks.task import Example, Score, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from refreshkv import Session
    from refreshkv.evals.prefill import Prefills

FED_METRIC = "lines right, fed"
STATS = (
    *("full_share", "kv_read_share", "prefill_read_share", "effective_stride"),
    *("acceptance", "passes_per_token", "layers"),
)


def records_of(
    session: Session,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    cell: Cell,
    examples: Sequence[Example],
    prefills: Prefills | None = None,
    yardstick: Yardstick | None = None,
) -> Iterator[Record]:
    """Decode a batch of a cell under `session` and score it.

    Args:
        prefills: where the methods share the prompts' pass.
        yardstick: holds what full attention said, or is to keep it; needed for the KL of a perplexity.

    Raises:
        RunError: a score that is not finite.
    """
    model = session.model
    watch = None if yardstick is None else yardstick.watch(cell, examples)
    more = {"prefills": prefills} if watch is None else {"prefills": prefills, "watch": watch}
    outputs = _decode(session, tokenizer, grid.chat, cell, examples, more)
    for row, (example, output) in enumerate(zip(examples, outputs, strict=True)):
        score, metric = _score(tokenizer, cell, example, output)
        if not math.isfinite(score.value):
            raise RunError(
                f"the score of {cell.title(example)} under {cell.method.text} is {score.value}: the model gives no"
                " finite logits in this dtype; try another --dtype with another --out"
            )
        gold = example.answer
        yield {
            "key": cell.key(example),
            "task": cell.task.name,
            "task_settings": settings_of(cell.task),
            "example": example.id,
            "seed": grid.seed,
            "method": cell.method.text,
            "mode": cell.mode,
            "model": grid.model,
            "dtype": dtype_of(model),
            "device": model.device.type,
            "chat": grid.chat,
            "budget": session.config.budget,
            "settings": {name: written(value) for name, value in vars(session.config).items()},
            "versions": versions(),
            "score": score.value,
            "parts": list(score.parts),
            "metric": metric,
            "prompt_tokens": output.prompt_tokens,
            "output_tokens": output.output_tokens,
            "answer_tokens": None if gold is None else len(encoding.answer_tokens(tokenizer, gold)),
            "ended": isinstance(output, Fed) or output.ended,
            **{name: output.stats[name] for name in STATS},
            "said": output.said if isinstance(output, Fed) else None,
            "kl": None if watch is None else watch.kl(row, output.output_tokens),
            "output": output.text,
            "prompt_sha256": hash_of(example),
            "source": example.facts.get("source"),
            "seconds": output.seconds,
        }


def versions() -> dict[str, str]:
    """What decides the numbers besides the settings."""
    return {
        "python": platform.python_version(),
        "refreshkv": refreshkv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def written(setting: Any) -> Any:
    """A setting as JSON has it: infinity (`drop`, for never) is a word there."""
    return str(setting) if setting == math.inf else setting


def settings_of(task: Task) -> dict[str, Any]:
    """The settings of a task as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(task), default=str))


def dtype_of(model: PreTrainedModel) -> str:
    """As on the command line: `float32`."""
    return str(model.dtype).removeprefix("torch.")


def hash_of(example: Example) -> str:
    """SHA-256 of the prompt."""
    return hashlib.sha256(example.prompt.encode()).hexdigest()


def _decode(
    session: Session,
    tokenizer: PreTrainedTokenizerBase,
    chat: bool,
    cell: Cell,
    examples: Sequence[Example],
    more: dict[str, Any],
) -> Sequence[Output | Fed]:
    prompts = [example.prompt for example in examples]
    names = [cell.title(example) for example in examples]
    common: dict[str, Any] = {"chat": chat, "names": names, **more}
    if cell.mode == "free":
        caps = [example.max_new_tokens for example in examples]
        return decoding.generate(session.model, tokenizer, session, prompts, caps, **common)
    answers = [example.answer or "" for example in examples]
    return decoding.feed(session.model, tokenizer, session, prompts, answers, **common)


def _score(
    tokenizer: PreTrainedTokenizerBase, cell: Cell, example: Example, output: Output | Fed
) -> tuple[Score, str]:
    """The score and what it is. Fed, an output has no text of its own to score: the lines of the gold answer count."""
    if isinstance(output, Output):
        return cell.task.score(example, output.text), cell.task.metric
    if cell.task.kind == "perplexity":
        return Score(-sum(output.logprobs) / len(output.logprobs)), cell.task.metric
    assert example.answer is not None
    right = encoding.lines_right(tokenizer, example.answer, output.right)
    return Score(sum(right) / len(right), tuple(map(int, right))), FED_METRIC
