"""The paper's numbers, by model family, column and row; what we do not know of them is not here.

Perplexities as they are, all else in per cent. Chain of keys is of the larger models (70B and 72B). HTML to TSV of all
levels is the mean of the three. Source: RefreshKV (Xu, Goyal, Choi, ACL 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LLAMA, QWEN = "llama", "qwen"
# As the paper calls them, and as `bench.shapes.SHAPES` does.
MODELS: Mapping[str, str] = {LLAMA: "Llama-3.1-8B", QWEN: "Qwen2-7B"}
THRESHOLDS: Mapping[str, float] = {LLAMA: 0.85, QWEN: 0.95}

Numbers = Mapping[str, Mapping[str, float]]  # column -> row -> number

_ALL = ("full", "streaming-llm", "h2o", "snapkv-1", "stride-5", "stride-10")
_FEW = ("full", "snapkv-1", "stride-5")


def _of(rows: Sequence[str], *numbers: float) -> dict[str, float]:
    return dict(zip(rows, numbers, strict=True))


_LLAMA: Numbers = {
    "arxiv": {
        **_of(_ALL, 2.22, 2.62, 2.48, 2.54, 2.27, 2.32),
        **{"no-reselection": 2.50, "no-full-attention": 2.32},
    },
    "book": _of(_ALL, 7.07, 7.94, 7.60, 7.78, 7.31, 7.41),
    "ruler": _of(_ALL, 90, 22, 21, 79, 86, 80),
    "govreport": _of(_ALL, 34.11, 16.30, 27.41, 28.06, 32.56, 31.47),
    "novelsumm": _of(_ALL, 31.29, 24.66, 19.31, 29.23, 29.98, 29.37),
    "html-to-tsv": _of(_ALL, 33, 2, 0, 0, 17, 8),
    "chain-of-key": _of(_ALL, 56, 2, 10, 12, 25, 15),
    "html-0.5k": {
        **_of(_FEW, 43, 0, 31),
        **{"stride-10": 16, "no-reselection": 0, "no-full-attention": 16},
        **{"dynamic": 30, "fixed": 17},
    },
    "html-2k": _of(_FEW, 31, 0, 15),
    "html-8k": _of(_FEW, 23, 0, 4),
    "8k-before": {"full": 2.70, "fixed-10": 2.83, "fixed-50": 3.13},
    "8k-after": {"full": 2.70, "fixed-10": 2.79, "fixed-50": 3.05},
    "16k-before": {"full": 2.50, "fixed-10": 2.57, "fixed-50": 2.79},
    "16k-after": {"full": 2.50, "fixed-10": 2.56, "fixed-50": 2.72},
}
_QWEN: Numbers = {
    "arxiv": _of(_FEW, 2.33, 2.80, 2.39),
    "book": _of(_FEW, 8.26, 9.18, 8.55),
    "ruler": _of(_FEW, 79, 58, 75),
    "govreport": _of(_FEW, 33.38, 28.80, 31.40),
    "novelsumm": _of(_FEW, 19.91, 19.09, 19.70),
    "html-to-tsv": _of(_FEW, 24, 0, 10),
    "chain-of-key": _of(_FEW, 83, 13, 24),
}
NUMBERS: Mapping[str, Numbers] = {LLAMA: _LLAMA, QWEN: _QWEN}


def family_of(model_type: str) -> str | None:
    """The family of a model by the type in its config (`qwen2`, `qwen3`, ...); `None` for others."""
    return next((family for family in MODELS if model_type.startswith(family)), None)


def number(family: str, column: str, row: str) -> float | None:
    """What the paper has in a cell; `None` where we do not know it."""
    return NUMBERS[family].get(column, {}).get(row)
