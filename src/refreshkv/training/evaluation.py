"""Perplexity of the last tokens, before and after a training: the form of the paper's Table 5.

By `refreshkv.evals`, on the documents that the run has kept for it; each goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from refreshkv.evals.grid import Grid, parse_methods
from refreshkv.evals.launch import Team
from refreshkv.evals.runner import Progress, run
from refreshkv.tasks.perplexity import Perplexity
from refreshkv.training.data import TEST
from refreshkv.training.recipe import Recipe
from refreshkv.training.run import DATA

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from refreshkv.evals.summary import Summary

LEAST = 32  # as `Perplexity` says
METHODS = (
    "full",
    "streaming-llm",
    "h2o",
    "snapkv-1",
    "refreshkv-fixed:stride=10",
    "refreshkv-fixed:stride=25",
    "refreshkv-fixed:stride=50",
)


def grid(recipe: Recipe, out: Path, methods: Sequence[str], limit: int) -> Grid:
    """What is measured: the last S tokens of test documents after L tokens, all methods with the K of the training.

    Raises:
        ValueError: an unknown method or setting, or a tail of fewer tokens than a perplexity takes.
    """
    if min(recipe.length, recipe.tail) < LEAST:
        raise ValueError(
            f"a perplexity takes {LEAST} tokens or more, before the tail and in it: pass --no-evaluate, or a longer"
            " --length and --tail"
        )
    budget = recipe.config.budget
    task = Perplexity(length=recipe.length, scored=recipe.tail, data=str(out / DATA / TEST))
    return Grid(
        model=recipe.model,
        tasks=(task,),
        methods=parse_methods(methods, budget),
        budget=budget,
        limit=limit,
    )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Grid,
    folder: Path,
    team: Team,
    progress: Progress | None = None,
) -> list[Summary]:
    """Run it in a folder of its own; empty in a process that is not the main one. Raises as `evals.runner.run`."""
    return run(model, tokenizer, asked, folder, team=team, progress=progress)
