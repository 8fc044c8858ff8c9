"""KIVI: the whole cache in a few bits, nothing chosen, nothing exact but the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from refreshkv.cache.layer import LayerCache
from refreshkv.config import Budgeted, RefreshConfig, setting
from refreshkv.kernels.options import AttendOptions
from refreshkv.methods.method import Method
from refreshkv.mixed import learn_prompt, mixed_step
from refreshkv.step import Algorithm


@dataclass(frozen=True, kw_only=True)
class KiviSettings(Budgeted):
    """Settings of KIVI; `budget` is accepted, so that a comparison can name one for all.

    Attributes:
        bits: of a number of keys and values.
    """

    mode = "mixed"

    bits: int = setting(4, "is a number of bits from 1 to 6", lambda bits: 1 <= bits <= 6)

    def for_cache(self) -> RefreshConfig:
        """See `Budgeted.for_cache`."""
        return RefreshConfig(
            mode="mixed", budget=self.budget, key_bits=self.bits, value_bits=self.bits, skip=0.0
        )


class Kivi(Algorithm):
    """The mixed mode with a budget of nothing."""

    def __init__(self, settings: Budgeted, layer: int, layers: int) -> None:
        pass

    def step(
        self, cache: LayerCache, query: Tensor, options: AttendOptions, visible: Tensor | None
    ) -> Tensor:
        if cache.waiting is not None or cache.hidden is None:
            learn_prompt(cache, visible)
            assert cache.budget is not None
            cache.budget.zero_()
        return mixed_step(cache, query, options, visible)


def _method(bits: int) -> Method:
    return Method(
        name=f"kivi-{bits}",
        label=f"KIVI, {bits} bits",
        source=(
            'Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML 2024,'
            " arXiv 2402.02750"
        ),
        note=(
            f"All keys and values in {bits} bits, whatever K is, per channel over 64 tokens; the newest, at most 64,"
            " are exact (the paper: keys over 32 tokens, values per token, the newest 128). Counts codes and grids."
        ),
        settings=KiviSettings,
        fixed={"bits": bits},
        make=Kivi,
    )


KIVI_4 = _method(4)
KIVI_2 = _method(2)
