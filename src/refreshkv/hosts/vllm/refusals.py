"""What RefreshKV does not do in vLLM, each with one line that says so and what to do. Imports nothing of vLLM."""

from __future__ import annotations

from typing import Any, NoReturn

WIDEST = 512  # dims of a head that the C++ kernels take
_OPEN_CACHE = ("auto", "float16", "bfloat16", "float32")
# "ngram_gpu" is left out: with it the host does not know how long its rows are.
_DRAFTLESS = ("ngram", "suffix")


class Refused(ValueError):
    """A server cannot be started like this."""


def check(vllm_config: Any) -> None:
    """Look at what holds for the whole server.

    Raises:
        Refused: the first thing that is not served.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    model, speculative = vllm_config.model_config, vllm_config.speculative_config
    if getattr(model, "use_mla", False):
        refuse("models with multi-head latent attention (MLA)", "serve this one without RefreshKV")
    if getattr(model, "attention_chunk_size", None) or getattr(model, "rswa_window", None):
        refuse("attention in chunks, or a window for new tokens", "serve this model without it")
    for name, flag in (
        ("decode_context_parallel_size", "--decode-context-parallel-size"),
        ("prefill_context_parallel_size", "--prefill-context-parallel-size"),
    ):
        if getattr(parallel, name, 1) > 1:
            refuse(f"context parallelism ({flag})", "use tensor or pipeline parallelism")
    if getattr(parallel, "enable_dbo", False):
        refuse("dual-batch overlap", "leave out --enable-dbo")
    if cache.cache_dtype not in _OPEN_CACHE:
        refuse(f"a KV cache of {cache.cache_dtype}", "leave out --kv-cache-dtype")
    if getattr(cache, "kv_sharing_fast_prefill", False):
        refuse("fast prefill of shared KV", "leave out --kv-sharing-fast-prefill")
    if vllm_config.kv_transfer_config is not None:
        refuse("KV connectors, which bring blocks without codes", "leave out --kv-transfer-config")
    if speculative is not None and speculative.method not in _DRAFTLESS:
        refuse(
            f"speculative decoding by {speculative.method!r}",
            "use the method 'ngram' or 'suffix', or none",
        )


def check_layer(
    head_size: int, value_size: int | None = None, *, alibi: bool = False, widest: int = WIDEST
) -> None:
    """Look at one layer.

    Raises:
        Refused: what of it is not served.
    """
    if head_size > widest:
        refuse(f"heads of {head_size} dims (at most {widest})", "serve this model without it")
    if value_size not in (None, head_size):
        refuse(f"values of {value_size} dims beside keys of {head_size}", "serve it without")
    if alibi:
        refuse("ALiBi", "serve this model without it")


def check_group(queries: int, most: int | None) -> None:
    """Look at how many query heads a KV head of one layer has.

    Raises:
        Refused: more than `most`, of which codes are read.
    """
    if most is not None and queries > most:
        refuse(
            f"{queries} query heads for a KV head in mode 'mixed' (at most {most})",
            "use mode 'refresh', or spread them over more GPUs by --tensor-parallel-size",
        )


def refuse(what: str, remedy: str) -> NoReturn:
    """Raise."""
    raise Refused(f"RefreshKV does not serve {what}; {remedy}")
