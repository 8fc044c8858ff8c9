"""The tables of docs/fidelity.md on natural text, for any model: perplexity, and what the lossless mode reads (ours).

Each is a run directory of `refreshkv eval`: started again, it goes on where it was stopped, and methods can be added.
"""

from __future__ import annotations

from pathlib import Path

from experiments import documents, grids, tables

MODELS = ("smollm2-135m", "gemma3-270m")


def perplexity(
    model: str,
    *,
    data: str | None = None,
    methods: tuple[str, ...] = grids.RUNS["text"]["methods"],
    length: int = 3584,
    scored: int = 512,
    limit: int = 24,
    batch: int = 6,
    out: Path = Path("out"),
    processes: int = 2,
) -> None:
    """Perplexity, agreement and KL beside full attention, and KV read: a row a method; ratios by kind of text.

    Args:
        model: a folder, a hub id or a name.
        data: a folder of texts; where not given those of `documents`.
        methods: full among them.
        length: tokens of context.
        scored: tokens that follow and are fed.
        limit: texts.
        batch: texts at once; each holds the distributions of full attention in memory.
        out: where run directory and texts are.
        processes: at once.

    Raises:
        ValueError: the run ended with an error, or no texts.
    """
    option = ("perplexity.scored", scored), ("perplexity.data", data or texts(out))
    _show("text", model, out, processes, option, methods, length, limit, batch)


def continuation(
    model: str,
    *,
    data: str | None = None,
    methods: tuple[str, ...] = grids.RUNS["continued"]["methods"],
    length: int = 2048,
    new_tokens: int = 96,
    limit: int = 24,
    batch: int = 4,
    out: Path = Path("out"),
    processes: int = 2,
) -> None:
    """Texts that go on as under full attention, KV read, its most, and passes a token, greedy and in float32.

    Args:
        model: a folder, a hub id or a name.
        data: a folder of texts; where not given those of `documents`.
        methods: full among them.
        length: tokens of a beginning.
        new_tokens: at most.
        limit: texts.
        batch: texts at once.
        out: where run directory and texts are.
        processes: at once.

    Raises:
        ValueError: the run ended with an error, or no texts.
    """
    option = ("continuation.scored", new_tokens), ("continuation.data", data or texts(out))
    _show("continued", model, out, processes, option, methods, length, limit, batch)


def fidelity(
    *,
    models: tuple[str, ...] = MODELS,
    limit: int = 24,
    out: Path = Path("out"),
    processes: int = 2,
) -> None:
    """Both tables for real pretrained models.

    Args:
        models: folders, hub ids or names.
        limit: texts.
        out: where run directories and texts are.
        processes: at once.

    Raises:
        ValueError: a run ended with an error, or no texts.
    """
    for model in models:
        perplexity(model, limit=limit, out=out, processes=processes)
        continuation(model, limit=limit, out=out, processes=processes)


def texts(out: Path) -> Path:
    """The folder of `documents`, made unless it is there."""
    folder = out / "documents"
    if not (folder / documents.MANIFEST).exists():
        documents.show(folder)
    return folder


def _show(
    run: str,
    model: str,
    out: Path,
    processes: int,
    option: tuple[tuple[str, object], ...],
    methods: tuple[str, ...],
    length: int,
    limit: int,
    batch: int,
) -> None:
    """Make or go on with a run, and print its table."""
    settings = {"methods": tuple(methods), "length": length, "limit": limit, "batch": batch}
    given = [f"{name}={value}" for name, value in option]
    name = f"{Path(model).name}-{length}-{run}"
    where = grids.evaluate(
        run, out, processes, name=name, model=model, task_option=given, **settings
    )
    tables.show((where,))
