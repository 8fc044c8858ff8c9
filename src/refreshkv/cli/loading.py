"""Load a model and its tokenizer for a command: safetensors or GGUF, no remote code unless asked for."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from refreshkv import models, weights
from refreshkv.cli.common import BadInput
from refreshkv.cli.locate import Source, locate
from refreshkv.text import one_line

if TYPE_CHECKING:
    import torch

    from refreshkv import Support

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")

dtype_option = click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
device_option = click.option(
    "--device", type=click.Choice(DEVICES), default="auto", show_default=True
)
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run code that comes with the model."
)


@dataclass(frozen=True)
class Loaded:
    """A model ready to generate."""

    source: Source
    model: Any
    tokenizer: Any

    @property
    def positions(self) -> int | None:
        """The longest sequence the model was made for, where its config says."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


def load_config(source: Source, trust_remote_code: bool = False) -> tuple[Any, Support]:
    """The config of a model, without its weights, and whether it is supported.

    Raises:
        ModelFilesError: a config that does not load, or that makes no sense.
    """
    from transformers import AutoConfig

    import refreshkv

    quiet()
    with reading(source, "config"):
        config = AutoConfig.from_pretrained(
            source.location, trust_remote_code=trust_remote_code, **source.options
        )
        weights.check_config(config)
        return config, refreshkv.supported(config)


def load(
    name: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> Loaded:
    """Find, check and load a model.

    Raises:
        BadInput: whatever `locate` raises, an architecture that RefreshKV does not support (before any weight is
            read), or a device that is not there.
        ModelFilesError: files that do not load.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = pick_device(device)
    source = locate(name)
    config, support = load_config(source, trust_remote_code)
    # The class of a model with code of its own is known only once that code has run; `attach` looks at the class.
    own_code = trust_remote_code and bool(getattr(config, "auto_map", None))
    if not support.ok and not own_code:
        raise BadInput(f"model {name!r} is not supported: {support.reason}")
    if name == "demo" and dtype == "auto":
        dtype = "float32"  # as `refreshkv.demo.load` does: its file is in half precision only to be small
    common = {"trust_remote_code": trust_remote_code, **source.options}
    with reading(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source.location, **common)
    with reading(source, "weights"):
        model = weights.load(
            AutoModelForCausalLM, source.location, dtype=dtype, use_safetensors=True, **common
        )
    with reading(source, "tokenizer"):
        weights.check_tokens(tokenizer, model, gguf=source.gguf is not None)
    model.generation_config.use_cache = True  # checkpoints fresh from training often say False
    return Loaded(source, model.to(target).eval(), tokenizer)


def pick_device(name: str) -> torch.device:
    """The device that `--device` means here. "auto" is the GPU where there is one."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise BadInput(
            "device 'cuda' is not available here; use --device cpu, or install a CUDA build of torch"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def quiet() -> None:
    """Keep transformers and the Hub client from writing notes and bars between our lines; their errors stay."""
    import huggingface_hub
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()
    for name in ("transformers", "huggingface_hub"):
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(OneLine())


class OneLine(logging.Formatter):
    """What a library logs, as our own notes are: it may quote a model's files."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        return f"refreshkv: note: {one_line(super().format(record))}"


def reading(source: Source, part: str) -> AbstractContextManager[None]:
    """Errors of the loaders come from the files that the user named: one line, with a remedy."""
    remedy = weights.REMEDY
    if source.label in models.MODELS:
        remedy = models.remedy(source.label)
    elif not source.local and not source.hub_answers:
        remedy = (
            "the Hub did not answer and the local cache lacks it: check the name and the network"
        )
    return weights.reading(f"the {part} of model {source.label!r}", remedy)
