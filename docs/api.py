"""Writes docs/api.md from the docstrings: `python docs/api.py`. A test fails when the page is not up to date."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import refreshkv
from refreshkv import demo, methods, models
from refreshkv.config import Settings
from refreshkv.config import described as described_settings
from refreshkv.demo import prompts
from refreshkv.hosts.transformers import Support
from refreshkv.stats import RowStats, Stats

PAGE = Path(__file__).with_name("api.md")
HEAD = """# Python API

Written from the docstrings by `python docs/api.py`; do not edit. Letters in shapes: B batch (rows), Hq query heads, Hkv
KV heads, D head dim, T tokens of one pass, L tokens so far, K budget (slots of a partial cache).
"""
TOP = (
    *("attach", "detach", "Session", "make_config", "RefreshConfig", "PRESETS", "load_preset"),
    *("supported", "UnsupportedModelError", "PROVEN_ARCHITECTURES", "RefreshCache"),
)
PUBLIC: dict[str, Any] = {
    **{f"refreshkv.{name}": getattr(refreshkv, name) for name in TOP},
    "refreshkv.hosts.transformers.Support": Support,
    "refreshkv.stats.Stats": Stats,
    "refreshkv.stats.RowStats": RowStats,
    "refreshkv.methods.METHODS": methods.METHODS,
    "refreshkv.methods.Method": methods.Method,
    "refreshkv.methods.find": methods.find,
    "refreshkv.demo.load": demo.load,
    "refreshkv.demo.prompts.make_prompt": prompts.make_prompt,
    "refreshkv.models.MODELS": models.MODELS,
    "refreshkv.models.path": models.path,
    "refreshkv.models.fetch": models.fetch,
    "refreshkv.models.is_fetched": models.is_fetched,
}
VALUES = {  # what has no docstring
    "refreshkv.PRESETS": "The named settings: a mapping of preset to settings of `RefreshConfig`.",
    "refreshkv.PROVEN_ARCHITECTURES": "Architectures whose results the tests prove, on tiny random configurations.",
    "refreshkv.models.MODELS": "The models by name, and what is known of them before they are fetched:",
    "refreshkv.methods.METHODS": "The methods by name, in the order of tables (`docs/methods.md`).",
}
# What layers and `generate` call, not a user.
INTERNAL = ("_", "on_", "follow", "record", "prompt", "update", "is_for", "for_cache", "unread")
WIDTH = 100
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")
ITEM = re.compile(r"    (\w[\w*, ]*): (.*)")


def page() -> str:
    """The whole page."""
    parts = [HEAD, *(part for name, what in PUBLIC.items() for part in entry(name, what))]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts))


def entry(name: str, what: Any) -> Iterator[str]:
    """A name with its signature and docstring; of a class also its own public properties and methods."""
    yield f"## {name}\n"
    if name in VALUES:
        yield f"{VALUES[name]} {', '.join(f'`{one}`' for one in what)}.\n"
        return
    short = name.rpartition(".")[2]
    yield from described(short, what)
    if not inspect.isclass(what):
        return
    own = {
        member: value
        for base in (what.__mro__ if issubclass(what, Settings) else (what,))
        for member, value in vars(base).items()
        if not member.startswith(INTERNAL) and value.__doc__
    }
    properties = {member: value for member, value in own.items() if isinstance(value, property)}
    if properties:
        yield "Properties:\n"
    for member, value in properties.items():
        yield f"- `{member}`: {' '.join(inspect.cleandoc(value.__doc__ or '').split())}"
    yield ""
    for member, value in own.items():
        if inspect.isfunction(value):
            yield f"### {short}.{member}\n"
            yield from described(member, value)


def described(name: str, what: Any) -> Iterator[str]:
    """Signature and docstring."""
    yield f"```python\n{signature(name, what)}\n```\n"
    yield text(what)


def signature(name: str, what: Callable[..., Any]) -> str:
    """`name(a: int, b: str = 'x') -> bool`; a parameter a line where one line would be too long."""
    if inspect.isclass(what) and issubclass(what, Exception):
        return f"class {name}({what.__base__.__name__})"
    found = inspect.signature(what)
    parts = [parameter(one) for one in found.parameters.values()]
    kinds = [one.kind for one in found.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parts.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    parts = [part for part in parts if part != "self"]
    result = found.return_annotation
    after = (
        "" if result is inspect.Signature.empty or inspect.isclass(what) else f" -> {plain(result)}"
    )
    line = f"{name}({', '.join(parts)}){after}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){after}"


def parameter(one: inspect.Parameter) -> str:
    """As in the source."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    made = stars.get(one.kind, "") + one.name
    if one.annotation is not inspect.Parameter.empty:
        made += f": {plain(one.annotation)}"
    if one.default is not inspect.Parameter.empty:
        default = repr(one.default)
        if "factory" in default or len(default) > WIDTH // 2:
            default = "..."
        made += f" = {default}"
    return made


def plain(annotation: Any) -> str:
    """An annotation without quotes and modules."""
    if isinstance(annotation, str):
        return annotation
    return getattr(annotation, "__forward_arg__", None) or annotation.__name__


def text(what: Any) -> str:
    """A docstring as Markdown: sections become lists, indented code stays."""
    lines: list[str] = []
    section = False
    doc = inspect.cleandoc(what.__doc__ or "")
    if inspect.isclass(what) and issubclass(
        what, Settings
    ):  # its settings are described by its themes
        items = (f"    {name}: {said}" for name, said in described_settings(what).items())
        doc = "\n".join([doc.partition("Attributes:")[0] + "Attributes:", *items])
    for line in doc.splitlines():
        if match := SECTION.match(line):
            section = True
            lines += [f"{match[1]}:", ""]
        elif section and (match := ITEM.match(line)):
            lines.append(f"- `{match[1]}`: {match[2]}")
        elif section and line.startswith("     ") and lines[-1]:
            lines[-1] += f" {line.strip()}"
        else:
            section = section and not line
            lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
