"""What a terminal would obey is shown instead; everything else stays as it is."""

from __future__ import annotations

import errno
import os

import pytest

from refreshkv.text import one_line, reason, visible

OBEYED = [
    *map(chr, (*range(0x20), *range(0x7F, 0xA0))),
    *("\u061c", "\u200e", "\u200f", *map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A)))),
    *("\u2028", "\u2029", "\ud800", "\udfff"),
]


@pytest.mark.parametrize("char", OBEYED, ids=ascii)
def test_what_is_obeyed_is_shown(char: str) -> None:
    shown = visible(f"a{char}b")
    assert shown.isprintable() and shown.isascii()
    assert shown == f"a{ascii(char)[1:-1]}b"
    assert visible(f"a{char}b", keep=char) == f"a{char}b"
    assert one_line(f"a{char}b").isprintable()


def test_text_stays_as_it_is() -> None:
    """Other languages, joined emoji, blanks of all widths, and backslashes."""
    for text in (
        r"a\x1b",
        "naïve Straße",
        "中文 العربية עברית",
        "👩\u200d👩\u200d👧",
        "a\u00a0b\u3000c",
    ):
        assert visible(text) == text


def test_a_reason_is_one_complete_line() -> None:
    assert (
        reason(ValueError("field 'x':\n    TypeError: no int\n")) == "field 'x': TypeError: no int"
    )
    assert reason(KeyError("x")) == "KeyError: 'x'"
    assert reason(RuntimeError()) == "RuntimeError"
    assert reason(Exception("plain.")) == "plain"
    missing = OSError(errno.ENOENT, os.strerror(errno.ENOENT), "a\x1b")
    assert reason(missing) == r"No such file or directory: 'a\x1b'"
    assert reason(OSError("gone")) == "gone"
    assert len(reason(ValueError("x" * 5000))) < 500
