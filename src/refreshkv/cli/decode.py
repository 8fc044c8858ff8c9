"""One timed generation under a session: what `generate` and `demo` have in common."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refreshkv.cli.loading import Loaded


class Ticker:
    """A streamer that takes the time of the first and the last token, and passes everything on.

    `generate` calls `put` once with the prompt, then once per token (each waits for its token to reach the host, so
    the times are right on a GPU too), and `end` at the end.
    """

    def __init__(self, bar: Any = None, inner: Any = None) -> None:
        self.bar, self.inner = bar, inner
        self.puts = 0
        self.start = self.first = self.last = time.perf_counter()

    def put(self, value: Any) -> None:
        """The prompt, then a token."""
        self.puts += 1
        self.last = time.perf_counter()
        if self.puts == 2:
            self.first = self.last
        if self.puts > 1 and self.bar is not None:
            self.bar.update()
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        """No more tokens."""
        if self.inner is not None:
            self.inner.end()


@dataclass(frozen=True)
class Output:
    """What one generation gave."""

    text: str
    new_tokens: int
    prefill_s: float  # until the first token, the first selection not included
    decode_s: float  # all tokens after the first


def decode(
    loaded: Loaded, inputs: dict[str, Any], *, inner: Any = None, bar: Any = None, **settings: Any
) -> Output:
    """Run `model.generate` and time it. Special tokens count as tokens but are left out of the text."""
    prompt_tokens = inputs["input_ids"].shape[1]
    ticker = Ticker(bar, inner)
    with threads_for(loaded):
        # A checkpoint may ask for beams, which cannot be streamed.
        sequences = loaded.model.generate(**inputs, streamer=ticker, num_beams=1, **settings)
        ids = sequences[0, prompt_tokens:]
    text = loaded.tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return Output(text, len(ids), ticker.first - ticker.start, ticker.last - ticker.first)


@contextlib.contextmanager
def threads_for(loaded: Loaded) -> Iterator[None]:
    """One thread for the bundled model: it gains nothing from a second, and waits for it on a busy machine.

    Measured: 10 ms a token with one thread, 55 with two on two cores of which another program held one.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if loaded.source.label == "demo" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
