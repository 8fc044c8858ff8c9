"""The methods of a comparison, by name, all at the same K.

A method is one file, with its record and, where it is not RefreshKV, its algorithm; and one line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from refreshkv.config import unknown
from refreshkv.methods import (
    cascading,
    citrus,
    critiprefill,
    h2o,
    hip,
    kascade,
    kivi,
    oracle,
    pyramidkv,
    quest,
    refreshkv,
    rounded_keys,
    snapkv,
    squeezed,
    streaming_llm,
    subgen,
    token_select,
    tova,
)
from refreshkv.methods.method import Method

# In the order of tables.
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            refreshkv.FULL,
            streaming_llm.METHOD,
            h2o.METHOD,
            snapkv.SNAPKV,
            snapkv.SNAPKV_1,
            pyramidkv.METHOD,
            tova.METHOD,
            citrus.METHOD,
            cascading.METHOD,
            subgen.METHOD,
            quest.METHOD,
            token_select.METHOD,
            kascade.METHOD,
            squeezed.METHOD,
            hip.METHOD,
            rounded_keys.INT4,
            rounded_keys.INT2,
            rounded_keys.TWILIGHT,
            kivi.KIVI_4,
            kivi.KIVI_2,
            critiprefill.METHOD,
            oracle.METHOD,
            refreshkv.REFRESHKV,
            refreshkv.FAST,
            refreshkv.LSE_DROP,
            refreshkv.FIXED,
            refreshkv.AS_IN_PAPER,
            refreshkv.NO_REFRESH,
            refreshkv.NO_FULL_ATTENTION,
            refreshkv.NO_RESELECTION,
        )
    }
)


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(unknown("method", name, METHODS))
    return METHODS[name]


__all__ = ["METHODS", "Method", "find"]
