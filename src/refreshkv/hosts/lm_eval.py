"""lm-evaluation-harness: `refreshkv` as a model type, an `hf` model whose generations run under a method.

    python -m refreshkv.hosts.lm_eval --model_args pretrained=demo,budget=0.125,stride=5 --tasks ...

The command is lm-eval's own with our model registered and chosen by default. lm-eval 0.4 finds models by import only,
it reads no entry points: in a program of yours, import this module and then ask for `model="refreshkv"`.

Log-likelihoods come from one pass over prompt and answer together. There is no decode step in it, so nothing for a
method to do: they are those of full attention, whatever the method.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error.name} is missing; install lm-evaluation-harness: pip install '.[lm-eval]' in a checkout of refreshkv"
    ) from error

import refreshkv
from refreshkv import models, weights
from refreshkv.config import Budgeted, names_of, unknown
from refreshkv.methods import METHODS, find
from refreshkv.stats import Stats
from refreshkv.text import one_line, setting_of

MODEL_TYPE = "refreshkv"
DEFAULT_METHOD = "refreshkv"
# Below lm-eval's logger, because that is the one it gives a handler and a level.
logger = logging.getLogger(f"lm_eval.models.{MODEL_TYPE}")

_FIELDS = {name for method in METHODS.values() for name in names_of(method.settings)}
_OURS = (*_FIELDS, "method", "preset")
# What the model's loader and its config take through `hf`'s **kwargs; its signature does not name them.
_LOADER = (
    "attn_implementation",
    "device_map",
    "experts_implementation",
    "load_in_4bit",
    "load_in_8bit",
    "local_files_only",
    "max_memory",
    "max_position_embeddings",
    "quantization_config",
    "rope_parameters",
    "token",
    "use_safetensors",
    "variant",
)


def parse_settings(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split lm-eval's model arguments into ours (settings of a method, `method`, `preset`) and those of `hf`.

    Text is read as `text.setting_of` says.

    Raises:
        ValueError: an argument that neither of the two knows, with the nearest that one does.
    """
    theirs = [name for name in inspect.signature(HFLM.__init__).parameters if name != "self"]
    valid = {*_OURS, *theirs, *_LOADER} - {"kwargs"}
    for name in arguments:
        if name not in valid:
            raise ValueError(unknown("model argument", name, valid))
    ours = {
        name: setting_of(value) if name in _FIELDS and isinstance(value, str) else value
        for name, value in arguments.items()
        if name in _OURS
    }
    return ours, {name: value for name, value in arguments.items() if name not in _OURS}


def config_of(settings: Mapping[str, Any]) -> Budgeted:
    """What `refreshkv.attach` will make of the settings; needs no model.

    Raises:
        ValueError: an unknown method or preset, a setting that the method does not have, or a value out of range.
    """
    fields = {name: settings[name] for name in settings if name in _FIELDS}
    return find(settings.get("method", DEFAULT_METHOD)).config(settings.get("preset"), **fields)


@functools.cache  # once per process
def _warn_dense() -> None:
    logger.warning(
        "log-likelihoods are computed in one pass with full attention: multiple-choice and perplexity tasks do not"
        " exercise the method; use generate_until tasks, or `refreshkv eval --tasks perplexity`"
    )


@register_model(MODEL_TYPE)
class RefreshLM(HFLM):
    """lm-eval's `hf` model, generating under a method.

    Args:
        pretrained: as for `hf`, or a name of `refreshkv.models`; "demo" is in float32 unless `dtype` says otherwise.
        arguments: settings of the method, `method`, `preset`; all others go to `hf`.

    Attributes:
        method: its name in `refreshkv.methods`.
        settings: what `refreshkv.attach` is given; `refresh_config` is what it makes of them.
        stats: counts of all generations so far.

    Raises:
        ValueError: an unknown argument, method or preset, or a value out of range; before any weight is read.
        ModelFilesError: files that do not load, or not all of whose weights are there.
        UnsupportedModelError: an architecture that cannot be served, with the reason.
    """

    def __init__(self, pretrained: Any, **arguments: Any) -> None:
        self.settings, theirs = parse_settings(arguments)
        self.refresh_config = config_of(self.settings)
        self.method = self.settings.get("method", DEFAULT_METHOD)
        self.stats = Stats()
        if pretrained == "demo":
            # As everywhere in this package: half precision only makes its file small.
            theirs.setdefault("dtype", "float32")
        if isinstance(pretrained, str) and pretrained in models.MODELS:
            pretrained = str(models.path(pretrained))
        theirs.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, **theirs)
        with weights.reading(f"the tokenizer of model {pretrained!r}"):
            weights.check_tokens(self.tokenizer, self.model)
        self._attach().detach()  # an unsupported model must not wait for the first request

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """See `LM.generate_until`. Ends with one line of statistics in lm-eval's log."""
        texts = super().generate_until(requests, disable_tqdm=disable_tqdm)
        logger.info("%s: %s", self.method, self.stats)
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """See `HFLM.get_model_info`: what lm-eval writes into its results, with our settings and counts."""
        ours = {
            "method": self.method,
            "settings": dataclasses.asdict(self.refresh_config),
            "stats": self.stats.as_dict(),
        }
        return {**super().get_model_info(), MODEL_TYPE: ours}

    def _get_config(self, pretrained: str, **arguments: Any) -> None:
        with weights.reading(f"the config of model {pretrained!r}"):
            super()._get_config(pretrained, **arguments)
            weights.check_config(self.config)

    def _create_model(self, pretrained: str, **arguments: Any) -> None:
        """As `hf`, with a loader that takes no model for whole that is not."""
        loader = self.AUTO_MODEL_CLASS

        def from_pretrained(source: str, **options: Any) -> Any:
            with weights.reading(f"the weights of model {source!r}"):
                return weights.load(loader, source, **options)

        self.AUTO_MODEL_CLASS = SimpleNamespace(from_pretrained=from_pretrained)
        try:
            super()._create_model(pretrained, **arguments)
        finally:
            self.AUTO_MODEL_CLASS = loader

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **arguments: Any) -> None:
        with weights.reading(f"the tokenizer of model {tokenizer or pretrained!r}"):
            super()._create_tokenizer(pretrained, tokenizer, **arguments)

    def _model_generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._attach():
            return super()._model_generate(*args, **kwargs)

    def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        _warn_dense()
        return super()._loglikelihood_tokens(*args, **kwargs)

    def _attach(self) -> refreshkv.Session:
        return refreshkv.attach(self.model, **self.settings, stats=self.stats)


def main() -> None:
    """lm-eval's command line, where `--model` is `refreshkv` unless the line or its `--config` file says otherwise."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import setup_logging

    setup_logging()
    command = HarnessCLI()
    arguments = command.parse_args()
    if getattr(arguments, "command", None) == "run":
        config = EvaluatorConfig.load_yaml_config(arguments.config) if arguments.config else {}
        arguments.model = arguments.model or config.get("model", MODEL_TYPE)
        given = arguments.model_args or {}
        if arguments.model == MODEL_TYPE:
            try:
                config_of(parse_settings(given)[0])
                if given.get("pretrained") in models.MODELS:
                    # Tasks that size their own prompts, such as RULER's, load the tokenizer by themselves.
                    folder = str(models.path(given["pretrained"]))
                    arguments.metadata = {"tokenizer": folder, **(arguments.metadata or {})}
            except ValueError as error:
                print(f"error: --model_args: {one_line(str(error))}", file=sys.stderr)
                sys.exit(2)
    try:
        command.execute(arguments)
    except weights.ModelFilesError as error:
        print(f"error: --model_args: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
