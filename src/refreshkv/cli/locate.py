"""Where `--model` points: a name, a folder, a GGUF file or the Hub. Says in one line why it cannot be used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from refreshkv import models, weights
from refreshkv.cli.common import BadInput, path_of
from refreshkv.text import reason

HUB_TIMEOUT_S = 10.0
OBJECTS = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class Source:
    """What `from_pretrained` is to be given."""

    label: str  # as the user wrote it
    location: str  # a folder or a Hub id
    local: bool  # a folder
    hub_answers: bool = False  # else only what is in the Hub's local cache can be had
    gguf: str | None = None  # the file of the folder that holds config, tokenizer and weights

    @property
    def offline(self) -> bool:
        """Do not ask the Hub: it did not answer, or there is no need to."""
        return not self.hub_answers

    @property
    def options(self) -> dict[str, Any]:
        """What `from_pretrained` is to be given beside `location`."""
        more = {} if self.gguf is None else {"gguf_file": self.gguf}
        return {"local_files_only": self.offline, **more}


def locate(model: str, *, need_weights: bool = True) -> Source:
    """Find the model; nothing is loaded yet.

    Args:
        model: a name of `refreshkv.models`, a folder, a GGUF file or a Hub id. The name goes before a folder, which is
            reached as "./demo".
        need_weights: whether weights are needed (a folder with only a config is enough to tell its architecture).

    Raises:
        BadInput: no such folder, no config in it, weights only in a pickled format, several GGUF files and nothing
            else, GGUF where nothing reads it, a model that is not fetched, or a Hub id that does not answer.
    """
    if model in models.MODELS:
        try:
            folder = models.path(model)
        except ValueError as error:
            raise BadInput(str(error)) from error
        if not (folder / "config.json").is_file():
            raise click.ClickException(
                f"model {model!r} is missing from '{folder}'; {models.remedy(model)}"
            )
        return Source(model, str(folder), local=True)
    if not model.strip():
        raise BadInput("--model is empty; give 'demo', a folder, or a Hub id such as 'org/name'")
    try:
        path = path_of(model)
    except ValueError as error:
        raise BadInput(
            f"model {model!r} {error}; give 'demo', a folder, or a Hub id such as 'org/name'"
        ) from None
    if path.is_dir():
        return Source(model, str(path), local=True, gguf=check_folder(path, need_weights))
    if path.suffix == ".gguf" and path.is_file():
        check_gguf()
        return Source(model, str(path.parent), local=True, gguf=path.name)
    if path.exists():
        raise BadInput(
            f"model {model!r} is a file; give the folder that holds its config.json, or a *.gguf file"
        )
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        raise BadInput(
            f"model folder {model!r} does not exist; give a folder, a Hub id such as 'org/name', or 'demo'"
        )
    return Source(model, model, local=False, hub_answers=ask_hub(model))


def check_gguf() -> None:
    """Raise `BadInput` where nothing reads GGUF."""
    try:
        weights.need_gguf()
    except ModuleNotFoundError as error:
        raise BadInput(str(error)) from error


def check_folder(path: Path, need_weights: bool) -> str | None:
    """Raise `BadInput` unless `path` holds a config and, where they are needed, weights: safetensors or one GGUF file.

    A GGUF file holds a config too. Its name is the result where the model is to be read from it.
    """
    remedy = "give a folder written by save_pretrained, or a GGUF file"
    has_config = (path / "config.json").is_file()
    if has_config:
        for (
            name
        ) in OBJECTS:  # of some that are broken transformers says little, and others it ignores
            check_object(path / name)
        if not need_weights or any(path.glob("*.safetensors")):
            return None
    packed = sorted(file.name for file in path.glob("*.gguf"))
    if len(packed) > 1:
        raise BadInput(
            f"model folder '{path}' has several GGUF files ({', '.join(packed)}); give the one that is meant, for"
            f" example --model '{path / packed[0]}'"
        )
    if packed:
        check_gguf()
        return packed[0]
    if not has_config:
        raise BadInput(f"model folder '{path}' has no config.json; {remedy}")
    pickled = sorted(
        p.name for suffix in ("bin", "pt", "pth", "ckpt") for p in path.glob(f"*.{suffix}")
    )
    if pickled:
        raise BadInput(
            f"model folder '{path}' has only pickled weights ({pickled[0]}), which can run code when loaded;"
            " convert them: load the model where you trust it and call save_pretrained, which writes safetensors"
        )
    raise BadInput(f"model folder '{path}' has no *.safetensors weights; {remedy}")


def check_object(path: Path) -> None:
    """Raise `BadInput` where a file is there and is no JSON object."""
    try:
        read = json.loads(path.read_bytes())
        why = "" if isinstance(read, dict) else f"it is {type(read).__name__}"
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        why = reason(error)
    if why:
        raise BadInput(
            f"'{path}' is not a JSON object ({why}); give a folder written by save_pretrained"
        )


def ask_hub(model: str) -> bool:
    """Whether the Hub has the model and lets us in; False where it cannot be reached (a cached copy may do).

    One question with a time limit: without it every file of an unreachable model is retried for twenty seconds.
    """
    from huggingface_hub import HfApi, errors

    try:
        HfApi().model_info(model, timeout=HUB_TIMEOUT_S)
        return True
    except errors.HFValidationError as error:
        why = f"is neither a folder nor a Hub id: {error}"
    except errors.GatedRepoError:
        why = "is gated; accept its terms on the Hub, then run 'hf auth login'"
    except errors.RepositoryNotFoundError:
        why = "is neither a folder here nor on the Hub; check the name, or run 'hf auth login' if it is private"
    except Exception:  # no network, time-out, offline mode, a server error: httpx and the Hub have many classes for it
        return False
    raise BadInput(f"model {model!r} {why}")
