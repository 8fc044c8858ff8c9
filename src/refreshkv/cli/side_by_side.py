"""The comparison behind `refreshkv demo`: the same prompts under each method, free-running, greedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import refreshkv
from refreshkv.cli.common import BadInput
from refreshkv.cli.loading import Loaded, load, load_config
from refreshkv.cli.locate import locate
from refreshkv.config import PRESETS
from refreshkv.evals.decoding import GREEDY, continue_rows
from refreshkv.evals.encoding import encode, text_of
from refreshkv.methods import find
from refreshkv.tasks.task import Example, Task


@dataclass(frozen=True)
class Compared:
    """One row of the table: a method of the registry, its name for people here, and what is set."""

    name: str
    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)


METHODS = (
    Compared("full", "full attention"),
    Compared("streaming-llm", "StreamingLLM"),
    Compared("snapkv", "SnapKV (window 32)"),
    Compared("refreshkv-paper", "RefreshKV (S 5, s .85)"),
    Compared("refreshkv-fast", "RefreshKV (fast)"),
    # Half of the others' budget: drafts may be wrong.
    Compared("refreshkv", "RefreshKV (exact)", {"budget": PRESETS["default"]["budget"]}),
)


@dataclass(frozen=True)
class Asked:
    """A prompt, the task that scores its answers, and the seed it was made of."""

    task: Task
    seed: int
    example: Example


@dataclass(frozen=True)
class Row:
    """One method on one task, summed over its prompts."""

    task: str
    method: str
    lines_right: int
    lines_total: int
    output_tokens: int  # a method that breaks off early looks cheap
    full_share: float | None
    kv_read_share: float | None
    effective_stride: float | None  # None: no step was full
    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class Excerpt:
    """One prompt of a task with what each method made of it."""

    task: str
    seed: int
    expected: str
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """Everything `demo` prints."""

    rows: tuple[Row, ...]
    shown: tuple[Excerpt, ...]


def check_room(tokens: int, says: str = "") -> None:
    """Raise `BadInput` where the bundled model has fewer positions; what the tokens are besides a prompt, `says`."""
    positions = load_config(locate("demo"))[0].max_position_embeddings
    if tokens > positions:
        raise BadInput(
            f"--length makes a prompt of {tokens} tokens{says}, but the bundled model has {positions} positions; pass a"
            " smaller length"
        )


def run(asked: Sequence[Asked], budget: int | float, bar: Any) -> Report:
    """Answer every prompt under every method; `bar` is advanced once per answer."""
    loaded = load("demo", device="cpu")
    room = [
        len(encode(loaded.tokenizer, a.example.prompt)) + a.example.max_new_tokens for a in asked
    ]
    check_room(max(room), " with the answer")
    rows: list[Row] = []
    shown: list[Excerpt] = []
    for task in dict.fromkeys(prompt.task.name for prompt in asked):
        own = [prompt for prompt in asked if prompt.task.name == task]
        texts: dict[str, list[str]] = {}
        for method in METHODS:
            bar.set_description(f"{task}, {method.name}")
            row, texts[method.name] = answer(loaded, own, method, budget, bar)
            rows.append(row)
        shown.append(pick(own, texts))
    return Report(tuple(rows), tuple(shown))


def answer(
    loaded: Loaded, asked: Sequence[Asked], method: Compared, budget: int | float, bar: Any
) -> tuple[Row, list[str]]:
    """One method's answers to all prompts of one task."""
    made, texts, parts = [], [], []
    settings = {"budget": budget, **method.settings}
    graphs = find(method.name).make is None  # the others have no form for them
    with refreshkv.attach(loaded.model, method=method.name, graphs=graphs, **settings) as session:
        for one in asked:
            tokens = encode(loaded.tokenizer, one.example.prompt)
            made.append(
                continue_rows(loaded.model, [tokens], [one.example.max_new_tokens], **GREEDY)
            )
            texts.append(text_of(loaded.tokenizer, made[-1].tokens[0]))
            parts += one.task.score(one.example, texts[-1]).parts
            bar.update()
        stats = session.stats
    row = Row(
        task=asked[0].task.name,
        method=method.name,
        lines_right=int(sum(parts)),
        lines_total=len(parts),
        output_tokens=sum(len(one.tokens[0]) for one in made),
        full_share=stats.full_share,
        kv_read_share=stats.kv_read_share,
        effective_stride=stats.effective_stride,
        prefill_s=sum(one.prefill_s for one in made),
        decode_s=sum(one.decode_s for one in made),
    )
    return row, texts


def pick(asked: Sequence[Asked], texts: Mapping[str, Sequence[str]]) -> Excerpt:
    """The most telling example: full attention solves it if it solves any, and SnapKV misses most lines."""

    def telling(index: int) -> tuple[bool, float]:
        one = asked[index]
        full, cut = (one.task.score(one.example, texts[name][index]) for name in ("full", "snapkv"))
        return full.value == 1, sum(full.parts) - sum(cut.parts)

    index = max(range(len(asked)), key=telling)  # the first of equals
    chosen = asked[index]
    outputs = {name: own[index] for name, own in texts.items()}
    return Excerpt(chosen.task.name, chosen.seed, chosen.example.answer or "", outputs)
