"""`python -m experiments NAME [options]`: what docs/ reports, made again."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, get_args, get_type_hints

from experiments import (
    anchors,
    continued,
    documents,
    grids,
    real,
    recall,
    tables,
    text_model,
    train,
)
from refreshkv.text import one_line

EXPERIMENTS: dict[str, Callable[..., None]] = {
    "report": grids.report,
    "fidelity": grids.fidelity,
    "fidelity-wide": grids.fidelity_wide,
    "fidelity-text": grids.fidelity_text,
    "fidelity-real": real.fidelity,
    "tables": tables.show,
    "documents": documents.show,
    "recall": recall.show,
    "anchors": anchors.show,
    "perplexity": real.perplexity,
    "continuation": real.continuation,
    "continued": continued.show,
    "train": train.run,
    "train-text": text_model.run,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one experiment; what it cannot work with is one line on stderr, exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, function in EXPERIMENTS.items():
        says = inspect.getdoc(function) or ""
        own = names.add_parser(name, help=says.splitlines()[0], description=says.split("\n\n")[0])
        _add_options(own, function, says)
    given = vars(parser.parse_args(arguments))
    try:
        EXPERIMENTS[given.pop("name")](**given)
    except ValueError as error:
        parser.exit(2, f"error: {one_line(str(error))}\n")


def _add_options(parser: argparse.ArgumentParser, function: Callable[..., None], says: str) -> None:
    """An option for each parameter, which its docstring describes; a tuple takes several values."""
    hints = get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        kinds = [kind for kind in get_args(hints[name]) or (hints[name],) if kind is not NoneType]
        options: dict[str, Any] = {"type": kinds[0]}
        if ... in kinds:
            options["nargs"] = "+"
        if parameter.default is parameter.empty:
            options["required"] = True
        else:
            options["default"] = parameter.default
        described = re.search(rf"^ +{name}: (.*)$", says, re.MULTILINE)
        parser.add_argument(
            f"--{name.replace('_', '-')}", help=described and described[1], **options
        )


if __name__ == "__main__":
    main()
