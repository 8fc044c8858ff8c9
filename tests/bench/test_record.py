"""Rows of a file: what is written is read again, and what cannot be written is found out beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from refreshkv.bench import decode, kernels, variants
from refreshkv.bench.record import append, flat, read
from refreshkv.bench.timing import copies_for, milliseconds, read_bandwidth

from .conftest import SMALL

KERNELS = {name: SMALL[name] for name in ("shape", "context", "device", "dtype", "progress")}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.csv"
    row = flat(
        {"shape": "demo", "ms": {"a": 1.5, "b": None}, "n": 3, "points": [1], "notes": {"x": 1}},
        ("notes",),
    )
    assert row == {"shape": "demo", "ms.a": 1.5, "ms.b": None, "n": 3}
    append(path, [row])
    append(path, [{"shape": "other", "n": 4}])  # fewer columns are fine
    assert read(path) == [row, {"shape": "other", "ms.a": None, "ms.b": None, "n": 4}]
    assert read(tmp_path / "none.csv") == []


@pytest.mark.parametrize("name", ["decode", "kernels"])
def test_a_foreign_file_is_found_before_timing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(*given: Any, **options: Any) -> None:
        raise AssertionError("something was built")

    monkeypatch.setattr(variants, "caches", timed)
    monkeypatch.setattr(decode, "build", timed)
    monkeypatch.setattr(kernels, "Operands", timed)
    path = tmp_path / "foreign.csv"
    path.write_text("a,b\n1,2\n")
    run, options = (decode.run, SMALL) if name == "decode" else (kernels.run, KERNELS)
    with pytest.raises(ValueError, match=r"foreign.csv has other columns"):
        run(**options, results=path)
    assert path.read_text() == "a,b\n1,2\n"
    in_the_way = path / "decode.csv"  # the folder is a file
    with pytest.raises(ValueError, match="cannot write"):
        run(**options, results=in_the_way)


def test_the_columns_do_not_depend_on_what_is_skipped(
    record: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "decode.csv"
    skip = tuple(name for name in variants.VARIANTS if name not in ("own_dense", "partial"))
    for skipped in ((), skip):
        decode.run(**SMALL, skip=skipped, results=path)
    first, second = read(path)
    assert first["ms.static"] > 0 and second["ms.static"] is None
    assert second["ms.own_dense"] > 0 and second["ratios.mix_over_own_dense"] is None
    assert {"device", "threads", "versions.torch", "bandwidth", "bytes.exact"} <= set(first)


def test_timing() -> None:
    cpu = torch.device("cpu")
    assert milliseconds(lambda: sum(range(1000)), cpu) > 0
    assert read_bandwidth(cpu, numbers=1 << 16) > 1e6
    # two more than fill a cache, few where each is large, and never one alone
    assert copies_for(1 << 40, 1 << 40, cpu) == 2
