"""`refreshkv info`: what is installed, what works here, and whether a model is supported."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from importlib import metadata
from typing import Any

import click

from refreshkv.cli import common, loading
from refreshkv.text import visible

PACKAGES = ("torch", "transformers", "huggingface-hub", "tokenizers")
# Those that decide which CPU kernels are fast: vector width, bfloat16 and tile arithmetic.
CPU_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "amx_tile", "amx_bf16", "sve", "bf16")


@click.command("info", short_help="Versions, devices, backends; is a model supported?")
@click.option(
    "--model", help=f"Say whether it is supported (its config is enough): {common.MODEL_HELP}"
)
@loading.trust_option
@common.json_option
def command(model: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """Versions, devices, kernel backends, C++ compiler, presets; with --model, whether that model is supported.

    A bug report wants the line of `refreshkv info --json`.
    """
    record = collect()
    if model is not None:
        record["model"] = about_model(model, trust_remote_code)
    if as_json:
        common.emit_json(record)
        return
    for title, value in record.items():
        click.echo(f"{title.replace('_', ' ')}:")
        for line in lines(value):
            click.echo(f"  {visible(line)}")


def collect() -> dict[str, Any]:
    """Everything that does not depend on a model."""
    import refreshkv
    from refreshkv.kernels import backend

    return {
        "versions": {
            "refreshkv": refreshkv.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
        "os": {
            "name": platform.system(),
            "release": platform.release(),
            "machine": platform.machine(),
        },
        "devices": devices(),
        "cpu": cpu(),
        "kernels": dict(backend.available()),
        "native": native(),
        "architectures": list(refreshkv.PROVEN_ARCHITECTURES),
        "presets": {name: dict(settings) for name, settings in refreshkv.PRESETS.items()},
    }


def devices() -> list[str]:
    """Names, the CPU first."""
    import torch

    names = [f"cpu ({torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"cuda:{index} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)")
    return names


def cpu() -> dict[str, Any]:
    """What torch knows of this CPU."""
    import torch

    # `get_capabilities` is younger than the oldest torch we support.
    features = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "name": features.get("cpu_name") or platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": [name for name in CPU_FEATURES if features.get(name)],
    }


def native() -> dict[str, str | None]:
    """The C++ compiler of the CPU kernels and its version, `None` for none; the folder of the compiled library."""
    from refreshkv import safe_folder
    from refreshkv.kernels.native import build

    try:
        compiler = shlex.join(build.compiler()) or None
    except build.BuildError:  # CXX is no command
        compiler = os.environ["CXX"]
    folder = safe_folder.kept()  # `None` where none is safe, and each process makes its own
    return {
        "compiler": compiler,
        "compiler_version": compiler and compiler_version(compiler),
        "cache": None if folder is None else str(folder),
    }


def compiler_version(compiler: str) -> str | None:
    """The first line of `--version`; `None` where the command does not run."""
    try:
        command = [*shlex.split(compiler), "--version"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def about_model(model: str, trust_remote_code: bool) -> dict[str, Any]:
    """Whether RefreshKV supports the model, from its config alone."""
    from refreshkv.cli.locate import locate

    config, support = loading.load_config(locate(model, need_weights=False), trust_remote_code)
    return {
        "name": model,
        "architecture": ", ".join(map(str, config.architectures or [])) or config.model_type,
        "supported": support.ok,
        "reason": support.reason,
        "max_positions": getattr(config.get_text_config(), "max_position_embeddings", None),
    }


def lines(value: Any) -> list[str]:
    """A mapping or a list as indented lines of text."""
    if not isinstance(value, dict):
        return [str(item) for item in value]
    width = max(map(len, value), default=0)
    shown = {key: spelled(item) for key, item in value.items()}
    return [f"{key:<{width}}  {text}".rstrip() for key, text in shown.items()]


def spelled(item: Any) -> str:
    """A value the way a person writes it."""
    if isinstance(item, dict):
        return ", ".join(f"{key} {spelled(value)}" for key, value in item.items())
    if isinstance(item, list):
        return ", ".join(map(str, item)) or "-"
    if isinstance(item, bool):
        return "yes" if item else "no"
    return "-" if item in (None, "") else str(item)
