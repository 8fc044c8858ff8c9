"""Models from files, whole: every weight comes from them, and every token of the tokenizer has an embedding.

transformers fills what is missing with random numbers and goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreshkv.text import reason, visible

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REMEDY = "give a complete model written by save_pretrained, with its tokenizer"
_NAMED = 3  # keys in a message
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_NO_MEMORY = re.compile("out of memory|(allocate|enough) memory", re.IGNORECASE)
# A line of transformers' table.
_ROW = re.compile(r"^(\S.*?) +\| (?:\x1b\[\d+m)?CONVERSION", re.MULTILINE)


class ModelFilesError(ValueError):
    """Files that do not make a model. One line: what does not load, why, and the remedy."""


@contextlib.contextmanager
def reading(what: str, remedy: str = REMEDY) -> Iterator[None]:
    """What a loader raises comes from the files that it reads and becomes `ModelFilesError`, unless memory is short."""
    try:
        yield
    except Exception as error:  # many classes: tokenizers, for one, raises bare Exception
        if isinstance(error, MemoryError | ModelFilesError) or _NO_MEMORY.search(str(error)):
            raise
        if "trust_remote_code" in str(error):
            remedy = (
                "it needs code from its repository: read that code, then pass --trust-remote-code"
            )
        raise ModelFilesError(f"cannot load {what} ({reason(error)}); {remedy}") from error


def check_config(config: Any) -> None:
    """Raise `ValueError` where a size in a model's config is none; transformers checks their types only."""
    text = config.get_text_config()
    sizes = {name: getattr(text, name, None) for name in _SIZES}
    for name, size in sizes.items():
        if isinstance(size, int) and not 1 <= size < 2**31:
            raise ValueError(f"{name} is {size}, which is no size")
    heads, shared = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise ValueError(
            f"num_key_value_heads is {shared}, which does not divide num_attention_heads, {heads}"
        )


def load(loader: Any, place: str | Path, **options: Any) -> PreTrainedModel:
    """`loader.from_pretrained(place, **options)`, where all weights are there and fit; GGUF with `gguf_file`.

    Raises:
        ValueError: weights that are missing, that the model has no place for, or of another shape; the first of them
            are named. Other errors are the loader's own, with the name of a file that is damaged.
    """
    # What does not fit is refused below, with its name: transformers would only say that there is something.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with _report() as report, contextlib.ExitStack() as stack:
        if options.get("gguf_file"):
            stack.enter_context(
                contextlib.redirect_stderr(io.StringIO())
            )  # a bar that nothing turns off
            with contextlib.suppress(ImportError):  # a release that knows no other way
                from transformers import GgufConfig

                # Kept in its blocks, a model would take attention and kernels, which are code, from the Hub.
                options["quantization_config"] = GgufConfig(dequantize=True)
        try:
            model, found = loader.from_pretrained(place, **options)
        except Exception as error:
            if damaged := _damaged(Path(place)):
                raise ValueError(damaged) from error
            if keys := _ROW.findall("".join(report)):
                raise ValueError(f"weights that cannot be put together: {_named(keys)}") from error
            raise
    faults = [
        f"{fault}: {_named(found[kind])}"
        for kind, fault in (
            ("missing_keys", "its files lack weights of the model"),
            ("unexpected_keys", "its files hold weights that the model has no place for"),
        )
        if found[kind]
    ]
    if found["mismatched_keys"]:
        shapes = (
            f"{key} ({_shape(stored)} in the files, {_shape(wanted)} in the model)"
            for key, stored, wanted in found["mismatched_keys"]
        )
        faults.append(f"its files hold weights of another shape: {_named(shapes)}")
    if faults:
        raise ValueError("; ".join(faults))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(model.generation_config, name, None)
        if not all(
            one is None or isinstance(one, int)
            for one in (token if isinstance(token, list) else [token])
        ):
            raise ValueError(
                f"{name} in its generation_config.json is {token!r}, which is no token"
            )
    return model


def need_gguf() -> None:
    """Raise `ModuleNotFoundError`, with the remedy, where transformers lacks what it reads GGUF with."""
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f"reading GGUF needs {module}: pip install '.[gguf]' in a checkout of refreshkv",
                name=module,
            )


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file and its tokenizer into a folder: safetensors in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **named)
    model = load(AutoModelForCausalLM, file.parent, dtype=torch.bfloat16, **named)
    check_tokens(tokenizer, model)
    # transformers refuses to save what still calls itself GGUF.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_tokens(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, *, gguf: bool = False
) -> None:
    """Raise `ValueError` where the tokenizer has a token that the model has no embedding for.

    That of a `gguf` file may be GPT-2's end: transformers adds it to every vocabulary of bytes, Llama 3's for one.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = tokenizer.get_vocab()
    if gguf and tokens.get("<|endoftext|>") == rows:
        del tokens["<|endoftext|>"]
    token, largest = max(tokens.items(), key=lambda item: item[1], default=("", 0))
    if largest >= rows:
        raise ValueError(
            f"its tokens go up to number {largest}, {token!r}, but the model has {rows} embeddings: it belongs to"
            " another model"
        )


@contextlib.contextmanager
def _report() -> Iterator[list[str]]:
    """Collects transformers' table of what did not fit, in the place of which errors here are one line."""
    logger, found = logging.getLogger("transformers.modeling_utils"), list[str]()
    before, wanted = logger.level, logger.getEffectiveLevel()

    def keep(record: logging.LogRecord) -> bool:
        if "LOAD REPORT" not in record.getMessage():
            return record.levelno >= wanted
        found.append(record.getMessage())
        return False

    logger.addFilter(keep)
    if wanted > logging.WARNING:  # silenced, and then the table would not be made
        # Not to WARNING itself: that turns on a check of how layers are shared by GPUs.
        logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.setLevel(before)
        logger.removeFilter(keep)


def _damaged(folder: Path) -> str:
    """The first file of weights that does not open, and why."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except Exception as error:
            return f"{visible(path.name)}: {reason(error)}"
    return ""


def _named(keys: Iterable[str]) -> str:
    """The first keys, and how many there are."""
    names = sorted(visible(key) for key in keys)
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _shape(size: Iterable[int]) -> str:
    return "x".join(map(str, size))
