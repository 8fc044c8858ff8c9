"""How an operation becomes a `torch.library` operator: schemas take tensors and numbers, each by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from refreshkv.kernels.backend import backend_for
from refreshkv.kernels.codes import Codes
from refreshkv.kernels.options import AttendOptions, Entries

# The fields of `Entries` and `AttendOptions`, in their order.
INDICES = "Tensor? blocks, Tensor? positions, Tensor? rows"
ENTRIES = f"Tensor keys, Tensor? values, {INDICES}"
OPTIONS = (
    "float scale, float? softcap, Tensor? sinks, str reduction, Tensor? visible, Tensor? lengths,"
    " Tensor? heads"
)
CODES = "Tensor code_keys, Tensor key_grids, Tensor code_values, Tensor value_grids, Tensor? code_blocks"
ATTEND = f"Tensor query, {ENTRIES}, {OPTIONS}"
_ENTRY_FIELDS = tuple(field.name for field in fields(Entries))
_CODE_FIELDS = tuple(argument.split()[-1] for argument in CODES.split(", "))
_OPTION_FIELDS = tuple(field.name for field in fields(AttendOptions))


def operator(
    name: str,
    schema: str,
    results: int,
    shapes: Callable[..., Any],
    writes: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """Define `refreshkv::name`, which takes every field and argument by itself, in the order of `schema`.

    Args:
        name: of an operation in `Backend`.
        schema: its arguments.
        results: how many tensors come back.
        shapes: empty results, from the arguments by name.
        writes: the arguments that the kernel writes into.
    """
    names = [argument.split()[-1] for argument in schema.split(", ")]
    grouped = {*_ENTRY_FIELDS, *_CODE_FIELDS, *_OPTION_FIELDS}

    def run(*flat: Any) -> Any:
        every = dict(zip(names, flat, strict=True))
        arguments = [every.pop(names[0])] if names[0] not in grouped else []
        if "keys" in every:
            arguments.append(Entries(*(every.pop(field) for field in _ENTRY_FIELDS)))
        if "key_grids" in every:
            arguments.append(Codes(*(every.pop(field) for field in _CODE_FIELDS)))
        if "scale" in every:
            options = {field: every.pop(field) for field in _OPTION_FIELDS}
            arguments.append(AttendOptions(**options))
        written = [flat[names.index(argument)] for argument in writes]
        result = getattr(backend_for(flat[0].device), name)(*arguments, **every)
        if results == 0:
            return None
        tensors = _distinct(result)
        assert len(tensors) == results, f"{name} gave {len(tensors)} tensors"  # torch would crash
        # What an operator writes into it may not return; whoever called it has that.
        tensors = [x.new_empty(0) if any(x is into for into in written) else x for x in tensors]
        return tensors[0] if results == 1 else tuple(tensors)

    made = torch.library.custom_op(
        f"refreshkv::{name}",
        run,
        mutates_args=writes,
        schema=f"({schema}) -> ({', '.join(['Tensor'] * results)})",
    )
    made.register_fake(lambda *flat: shapes(**dict(zip(names, flat, strict=True))))
    return made


def _distinct(result: Any) -> list[Tensor]:
    """The tensors of nested results, each once, contiguous."""
    if isinstance(result, Tensor):
        return [result.contiguous()]
    tensors: list[Tensor] = []
    for part in result:
        tensors += [new for new in _distinct(part) if not any(new is old for old in tensors)]
    return tensors


def entries_of(entries: Entries) -> tuple[Any, ...]:
    """The fields of `Entries`, in the order of `ENTRIES`."""
    return entries.keys, entries.values, entries.blocks, entries.positions, entries.rows


def options_of(options: AttendOptions) -> tuple[Any, ...]:
    """The fields of `AttendOptions`, in the order of `OPTIONS`."""
    return (
        options.scale,
        options.softcap,
        options.sinks,
        options.reduction,
        options.visible,
        options.lengths,
        options.heads,
    )
