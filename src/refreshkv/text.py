"""Text from elsewhere, for people: nothing stays in it that a terminal or a browser would obey instead of show."""

from __future__ import annotations

import contextlib
import re

# C0, DEL and C1; marks that turn the direction of what follows; line and paragraph separators; half a surrogate pair.
_OBEYED = re.compile(r"[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")
_LONGEST = 400  # characters of a reason; some libraries add their stack


def visible(text: str, keep: str = "") -> str:
    r"""Escapes such as `\x1b` in the place of control characters, those of `keep` excepted."""
    return _OBEYED.sub(lambda found: found[0] if found[0] in keep else repr(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """The text with every run of white space as one blank, and visible."""
    return visible(" ".join(text.split()))


def reason(error: BaseException) -> str:
    """What an exception says, in one line, with its class where the message alone says little."""
    if isinstance(error, OSError) and error.strerror:
        said = error.strerror + (f": {error.filename!r}" if error.filename else "")
    elif isinstance(error, OSError) or type(error) in (Exception, ValueError):
        said = str(error)
    else:
        of_python = type(error).__module__ == "builtins"
        said = f"{type(error).__name__}: {error}" if of_python else str(error)
    said = one_line(said).rstrip(".:; ") or type(error).__name__
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."


def setting_of(text: str) -> str | int | float | bool | None:
    """A setting that was given as text: "none" and "never" are `None`; what is no number stays, for others to judge."""
    words = {"none": None, "never": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
