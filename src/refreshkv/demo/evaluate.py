"""Score a model on the demo tasks: `python -m refreshkv.demo.evaluate --model DIR` (ours).

Free-running greedy decoding by transformers' own `generate` with full attention: the yardstick for
every method that reads less of the cache. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from refreshkv.demo import MODEL_PATH
from refreshkv.demo.tasks import TASKS, DemoPrompt, check_task, make_prompt, score_lines

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPARE_TOKENS = 16  # how far beyond the gold answer a model may run before it is cut off


@dataclass(frozen=True)
class Score:
    """Result on one task: shares of lines right in their place and of answers right to the end.

    `ended` is the share of answers that match the gold text and stop there, with end-of-sequence.
    """

    task: str
    length: int
    examples: int
    lines_right: float
    ended: float


def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[DemoPrompt]
) -> list[str]:
    """Greedy answers to `prompts` as one left-padded batch; `<eos>` and what follows is removed."""
    inputs = tokenizer([p.prompt for p in prompts], return_tensors="pt", padding=True)
    inputs = inputs.to(model.device)
    answers = tokenizer([p.answer for p in prompts], add_special_tokens=False).input_ids
    output = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=max(map(len, answers)) + SPARE_TOKENS,
        do_sample=False,
    )
    new = output[:, inputs.input_ids.shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    length: int,
    examples: int,
    batch: int = 8,
    first_seed: int = 0,
) -> Score:
    """Score `examples` prompts of `task` with seeds from `first_seed` on.

    Raises `ValueError` for an unknown task or fewer than one example.
    """
    check_task(task)
    if examples < 1:
        raise ValueError(f"examples must be at least 1, got {examples}")
    right = total = ended = 0
    seeds = range(first_seed, first_seed + examples)
    prompts = [make_prompt(task, seed, length) for seed in seeds]
    for start in range(0, examples, batch):
        group = prompts[start : start + batch]
        for prompt, text in zip(group, generate_answers(model, tokenizer, group), strict=True):
            good, lines = score_lines(prompt.answer, text)
            right, total, ended = right + good, total + lines, ended + (text == prompt.answer)
    return Score(task, length, examples, round(right / total, 4), round(ended / examples, 4))


def main(arguments: list[str] | None = None) -> None:
    """Command line of the module."""
    parser = argparse.ArgumentParser(description="Score a model on the demo tasks.")
    parser.add_argument("--model", type=Path, default=MODEL_PATH, help="folder, default: bundled")
    parser.add_argument("--length", type=int, default=1024, help="prompt length in tokens")
    parser.add_argument("--examples", type=int, default=40, help="prompts a task")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args(arguments)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), local_files_only=True
    ).eval()
    sizes = (options.length, options.examples, options.batch, options.first_seed)
    scores = []
    for task in TASKS:
        scores.append(evaluate(model, tokenizer, task, *sizes))
        print(f"{task:<14} lines right {scores[-1].lines_right:.3f}   ended {scores[-1].ended:.3f}")
    print(json.dumps([asdict(score) for score in scores]))


if __name__ == "__main__":
    main()
