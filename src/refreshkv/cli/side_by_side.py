"""The comparison behind `refreshkv demo`: the same prompts under each method, free-running, greedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from refreshkv.cli.common import BadInput
from refreshkv.cli.decode import decode
from refreshkv.cli.loading import Loaded, load, load_config
from refreshkv.cli.locate import locate
from refreshkv.config import PRESETS

if TYPE_CHECKING:
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


def run(asked: Sequence[Asked], budget: int | float, bar: Any) -> Report:
    """Answer every prompt under every method; `bar` is advanced once per answer."""
    loaded = load("demo", device="cpu")
    for prompt in asked:
        check_length(loaded, prompt)
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


def check_room(length: int) -> None:
    """Raise `BadInput` before prompts are made that are longer than the model's positions."""
    positions = load_config(locate("demo"))[0].max_position_embeddings
    if length > positions:
        raise BadInput(
            f"--length makes a prompt of {length} tokens, but the bundled model has {positions} positions; pass a"
            " smaller length"
        )


def check_length(loaded: Loaded, asked: Asked) -> None:
    """Raise `BadInput` where a prompt and its answer do not fit the model."""
    example = asked.example
    tokens = len(loaded.tokenizer(example.prompt)["input_ids"]) + example.max_new_tokens
    if loaded.positions is not None and tokens > loaded.positions:
        raise BadInput(
            f"--length makes a prompt of {tokens} tokens with the answer, but the bundled model has"
            f" {loaded.positions} positions; pass a smaller length"
        )


def answer(
    loaded: Loaded, asked: Sequence[Asked], method: Compared, budget: int | float, bar: Any
) -> tuple[Row, list[str]]:
    """One method's answers to all prompts of one task."""
    import refreshkv
    from refreshkv.cli.prompt import encode

    outputs, right, total = [], 0.0, 0
    settings = {"budget": budget, **method.settings}
    with refreshkv.attach(loaded.model, method=method.name, **settings) as session:
        for prompt in asked:
            inputs = encode(loaded, prompt.example.prompt, chat=False)
            room = prompt.example.max_new_tokens
            output = decode(loaded, inputs, max_new_tokens=room, do_sample=False)
            parts = prompt.task.score(prompt.example, output.text).parts
            right, total = right + sum(parts), total + len(parts)
            outputs.append(output)
            bar.update()
        stats = session.stats
    row = Row(
        task=asked[0].task.name,
        method=method.name,
        lines_right=int(right),
        lines_total=total,
        output_tokens=sum(output.new_tokens for output in outputs),
        full_share=stats.full_share,
        kv_read_share=stats.kv_read_share,
        effective_stride=stats.effective_stride,
        prefill_s=sum(output.prefill_s for output in outputs),
        decode_s=sum(output.decode_s for output in outputs),
    )
    return row, [output.text for output in outputs]


def pick(asked: Sequence[Asked], texts: Mapping[str, Sequence[str]]) -> Excerpt:
    """The most telling example: full attention solves it if it solves any, and SnapKV misses most lines."""

    def right(method: str, index: int) -> float:
        prompt = asked[index]
        return sum(prompt.task.score(prompt.example, texts[method][index]).parts)

    def telling(index: int) -> tuple[bool, float]:
        full = asked[index].task.score(asked[index].example, texts["full"][index])
        return full.value == 1, right("full", index) - right("snapkv", index)

    index = max(range(len(asked)), key=telling)  # the first of equals
    chosen = asked[index]
    outputs = {name: own[index] for name, own in texts.items()}
    return Excerpt(chosen.task.name, chosen.seed, chosen.example.answer or "", outputs)
