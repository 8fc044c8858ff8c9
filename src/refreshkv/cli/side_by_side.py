"""The comparison behind `refreshkv demo`: the same prompts under each method, free-running, greedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from refreshkv.cli.common import BadInput
from refreshkv.cli.decode import decode
from refreshkv.cli.loading import Loaded, load

if TYPE_CHECKING:
    from refreshkv import RefreshConfig
    from refreshkv.demo.tasks import DemoPrompt


@dataclass(frozen=True)
class Method:
    """One row of the table: its name in machine output, its name for people, its settings."""

    name: str
    label: str
    settings: Mapping[str, Any]


METHODS = (
    Method("full", "full attention", MappingProxyType({"mode": "full"})),
    Method("snapkv-1", "SnapKV (window 1)", MappingProxyType({"stride": None, "threshold": None})),
    Method(
        "refreshkv-paper",
        "RefreshKV (S 5, s .85)",
        MappingProxyType({"stride": 5, "threshold": 0.85}),
    ),
    Method(
        "refreshkv-fixed", "RefreshKV (S 2)", MappingProxyType({"stride": 2, "threshold": None})
    ),
)


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
class Shown:
    """One prompt of a task with what each method made of it."""

    task: str
    seed: int
    expected: str
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """Everything `demo` prints."""

    rows: tuple[Row, ...]
    shown: tuple[Shown, ...]


def run(prompts: Sequence[DemoPrompt], configs: Mapping[str, RefreshConfig], bar: Any) -> Report:
    """Answer every prompt under every config; `bar` is advanced once per answer."""
    loaded = load("demo", device="cpu")
    for prompt in prompts:
        check_length(loaded, prompt)
    rows: list[Row] = []
    shown: list[Shown] = []
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        own = [prompt for prompt in prompts if prompt.task == task]
        texts: dict[str, list[str]] = {}
        for name, config in configs.items():
            bar.set_description(f"{task}, {name}")
            row, texts[name] = answer(loaded, own, name, config, bar)
            rows.append(row)
        shown.append(pick(own, texts))
    return Report(tuple(rows), tuple(shown))


def room(loaded: Loaded, prompt: DemoPrompt) -> int:
    """Tokens an answer may have: a wrong one may be longer than the right one, but must not run on for ever."""
    gold = len(loaded.tokenizer(prompt.answer, add_special_tokens=False)["input_ids"])
    return gold + gold // 4 + 4


def check_length(loaded: Loaded, prompt: DemoPrompt) -> None:
    """Raise `BadInput` where a prompt and its answer do not fit the model."""
    tokens = len(loaded.tokenizer(prompt.prompt)["input_ids"]) + room(loaded, prompt)
    if loaded.positions is not None and tokens > loaded.positions:
        raise BadInput(
            f"--length {prompt.length} makes {tokens} tokens with the answer, but the bundled model has"
            f" {loaded.positions} positions; pass a smaller length"
        )


def answer(
    loaded: Loaded, prompts: Sequence[DemoPrompt], name: str, config: RefreshConfig, bar: Any
) -> tuple[Row, list[str]]:
    """One method's answers to all prompts of one task."""
    import refreshkv
    from refreshkv.cli.prompt import encode
    from refreshkv.demo.tasks import score_lines

    outputs, right, total = [], 0, 0
    with refreshkv.attach(loaded.model, config) as session:
        for prompt in prompts:
            inputs = encode(loaded, prompt.prompt, chat=False)
            output = decode(loaded, inputs, max_new_tokens=room(loaded, prompt), do_sample=False)
            scored = score_lines(prompt.answer, output.text)
            right, total = right + scored[0], total + scored[1]
            outputs.append(output)
            bar.update()
        stats = session.stats
    row = Row(
        task=prompts[0].task,
        method=name,
        lines_right=right,
        lines_total=total,
        output_tokens=sum(output.new_tokens for output in outputs),
        full_share=stats.full_share,
        kv_read_share=stats.kv_read_share,
        effective_stride=stats.effective_stride,
        prefill_s=sum(output.prefill_s for output in outputs),
        decode_s=sum(output.decode_s for output in outputs),
    )
    return row, [output.text for output in outputs]


def pick(prompts: Sequence[DemoPrompt], texts: Mapping[str, Sequence[str]]) -> Shown:
    """The most telling example: full attention solves it if it solves any, and SnapKV misses most lines."""
    from refreshkv.demo.tasks import score_lines

    def telling(index: int) -> tuple[bool, int]:
        answer = prompts[index].answer
        right, total = score_lines(answer, texts["full"][index])
        return right == total, right - score_lines(answer, texts["snapkv-1"][index])[0]

    index = max(range(len(prompts)), key=telling)  # the first of equals
    chosen = prompts[index]
    outputs = {name: own[index] for name, own in texts.items()}
    return Shown(chosen.task, chosen.seed, chosen.answer, outputs)
