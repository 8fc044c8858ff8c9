"""Modes and methods side by side on prompts of somebody's own: the same text, the same tokens, measured speed.

Full attention writes first, and what it wrote is the yardstick. Every other row writes freely; a lossy one is then fed
the yardstick, so that one early difference does not make all that follows differ. These runs warm everything up. The
speed is measured after them, in rounds in which all rows take turns, so that a drift of the machine hits all alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import refreshkv
from refreshkv.evals import decoding
from refreshkv.evals.candidates import Candidate
from refreshkv.evals.decoding import GREEDY, Continued
from refreshkv.evals.encoding import encode, text_of
from refreshkv.evals.prefill import Prefills
from refreshkv.stats import RowStats, Stats

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from refreshkv import RefreshCache

TRANSFORMERS = "transformers"  # the row of a model that is not attached, over its own cache
FULL = "full"  # the row that is the yardstick
_AROUND = 8  # tokens shown before a difference, and from it on


@dataclass(frozen=True)
class Difference:
    """Where a text leaves the yardstick.

    Attributes:
        token: the number of the first new token that differs, from 1.
        before: the words before it, which both share.
        full, own: how full attention goes on, and how this row does; empty at an end.
        nats: by how much transformers' own pass over the yardstick finds the row's token less likely than the other
            one. In 16-bit dtypes it is small, or below 0, where two tokens are about as likely: rounding chose.
    """

    token: int
    before: str
    full: str
    own: str
    nats: float | None = None


@dataclass(frozen=True)
class Text:
    """What a row wrote after one prompt; `agreement` is the share of the fed tokens that it would have written too."""

    prompt: str
    new_tokens: int
    difference: Difference | None
    agreement: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of a candidate; `None` and empty for what was not.

    Attributes:
        candidate: `None` for transformers' own cache.
        texts: by prompt.
        same: how many texts are those of full attention.
        agreement: share of the fed tokens, over all prompts; the first one, which comes with the prompt, is left out.
            That of transformers' own pass is what rounding alone does, in this dtype.
        perplexity_ratio: of the same tokens, over that of full attention.
        rates: new tokens a second in each round, those after the first over the seconds of decoding.
        rates_with_prompt: all new tokens over all seconds.
        kv_read_share, stats: of the free runs, as `Stats`.
        cache_bytes: of all tensors in the cache when the longest run had ended.
        peak_bytes: what was allocated at most on a GPU, the model included.
    """

    name: str
    lossless: bool
    candidate: Candidate | None
    texts: Sequence[Text]
    same: int
    agreement: float | None
    perplexity_ratio: float | None
    rates: Sequence[float]
    rates_with_prompt: Sequence[float]
    kv_read_share: float | None
    stats: Mapping[str, Any] | None
    cache_bytes: int | None
    peak_bytes: int | None

    @property
    def tokens_per_s(self) -> float | None:
        """The median over rounds."""
        return statistics.median(self.rates) if self.rates else None


@dataclass(frozen=True)
class Scores:
    """Of each fed token, whether it was the most probable one, and its log-probability in nats."""

    right: Sequence[bool]
    logprobs: Sequence[float]


@dataclass
class _Seen:
    """What a row has so far. Lists have an entry a prompt; `rounds` has such a list a round."""

    candidate: Candidate | None
    free: list[Continued] = field(default_factory=list)
    fed: list[Scores] = field(default_factory=list)
    nats: list[float | None] = field(default_factory=list)
    rounds: list[list[Continued]] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    cache_bytes: int | None = None
    peak_bytes: int | None = None


class Comparison:
    """Runs candidates beside full attention and transformers' own cache. May be stopped, and asked, at any time.

    Args:
        prompts: name -> text.
        new_tokens: at most so many after each prompt.
        repeats: rounds of timing.
        chat: wrap each prompt in the tokenizer's chat template.

    Raises:
        ValueError: no prompt, a prompt without tokens, no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Mapping[str, str],
        candidates: Sequence[Candidate],
        *,
        new_tokens: int = 128,
        repeats: int = 3,
        chat: bool = False,
    ) -> None:
        if not prompts:
            raise ValueError("no prompts; give at least one")
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.new_tokens, self.repeats, self.chat = new_tokens, repeats, chat
        self.tokens = {name: encode(tokenizer, text, chat) for name, text in prompts.items()}
        self._seen = {TRANSFORMERS: _Seen(None), FULL: _Seen(Candidate(FULL, {"mode": "full"}))}
        for candidate in candidates:
            self._seen.setdefault(candidate.name, _Seen(candidate))
        # The yardstick is written first.
        self._order = [FULL, *(name for name in self._seen if name != FULL)]

    @property
    def runs(self) -> int:
        """How many runs there are in all."""
        feeds = 2 + len(self._fed_rows())
        return len(self.tokens) * (len(self._seen) * (1 + self.repeats) + feeds)

    def run(self, tick: Callable[[str], object] = lambda name: None) -> None:
        """Everything; `tick` is told the name of each run before it begins."""
        for prompt in self.tokens:
            for name in self._order:
                tick(name)
                self._write(self._seen[name], prompt)
            self._feed(prompt, tick)
        for _ in range(self.repeats):
            for seen in self._seen.values():
                seen.rounds.append([])
            for prompt in self.tokens:
                for name in self._order:
                    tick(f"{name}, timed")
                    self._seen[name].rounds[-1].append(self._continue(self._seen[name], prompt)[0])

    @property
    def written(self) -> Mapping[str, int]:
        """New tokens of full attention after each prompt so far."""
        free = self._seen[FULL].free
        return {name: len(one.tokens[0]) for name, one in zip(self.tokens, free, strict=False)}

    def rows(self) -> list[Row]:
        """What has been measured so far, in the order of tables. A round counts when it is complete."""
        return [self._row(name, seen) for name, seen in self._seen.items()]

    def _fed_rows(self) -> list[_Seen]:
        return [s for s in self._seen.values() if s.candidate and not s.candidate.lossless]

    def _continue(self, seen: _Seen, prompt: str) -> tuple[Continued, Stats, Cache | None]:
        """One free run."""
        rows, caps, stats = [self.tokens[prompt]], [self.new_tokens], Stats()
        if seen.candidate is None:
            return decoding.continue_rows(self.model, rows, caps, **GREEDY), stats, None
        made: list[RefreshCache] = []
        arguments = seen.candidate.arguments
        graphs = "method" not in arguments  # one that is compared has no form for them
        with refreshkv.attach(self.model, stats=stats, graphs=graphs, **arguments) as session:
            if session.captures:
                done = decoding.continue_rows(self.model, rows, caps, **GREEDY)
                return done, stats, session.kept

            def start(tokens: Tensor, mask: Tensor) -> RefreshCache:
                made.append(session.new_cache(reserve=tokens.shape[1] + self.new_tokens))
                made[0].is_kept = False  # only looked at afterwards
                return made[0]

            done = decoding.continue_rows(self.model, rows, caps, start=start, **GREEDY)
        return done, stats, made[0]

    def _write(self, seen: _Seen, prompt: str) -> None:
        """The free run that is looked at."""
        on_gpu = self.model.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.model.device)
        done, stats, cache = self._continue(seen, prompt)
        seen.free.append(done)
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(self.model.device)
            seen.peak_bytes = max(seen.peak_bytes or 0, peak)
        if cache is not None:
            seen.cache_bytes = max(seen.cache_bytes or 0, held_bytes(cache.layers))
            add(seen.stats, stats)

    def _feed(self, prompt: str, tick: Callable[[str], object]) -> None:
        """The yardstick through one plain pass, and token by token through full attention and every lossy row."""
        prefills, gold = Prefills(self.model), self._seen[FULL].free[-1].tokens[0]
        tick(f"{TRANSFORMERS}, fed")
        logits = plain_pass(self.model, self.tokens[prompt], gold)
        for seen in self._seen.values():
            seen.nats.append(gap(logits, gold, seen.free[-1].tokens[0]))
        self._seen[TRANSFORMERS].fed.append(scores(logits, gold))
        del logits  # a number for every word, at each token
        for seen in [self._seen[FULL], *self._fed_rows()]:
            assert seen.candidate is not None
            tick(f"{seen.candidate.name}, fed")
            arguments = seen.candidate.arguments
            with refreshkv.attach(self.model, stats=RowStats(), **arguments) as session:
                (fed,) = decoding.feed(
                    self.model,
                    self.tokenizer,
                    session,
                    [self.prompts[prompt]],
                    [gold],
                    chat=self.chat,
                    names=[prompt],
                    prefills=prefills,
                )
            seen.fed.append(Scores(fed.right, fed.logprobs))

    def _row(self, name: str, seen: _Seen) -> Row:
        yardstick, candidate = self._seen[FULL], seen.candidate
        fed = [] if seen is yardstick else seen.fed
        texts = []
        for i, (prompt, own) in enumerate(zip(self.tokens, seen.free, strict=False)):
            full, new = yardstick.free[i].tokens[0], own.tokens[0]
            right = fed[i].right[1:] if i < len(fed) else []
            nats = seen.nats[i] if i < len(seen.nats) else None
            found = difference(self.tokenizer, full, new, nats)
            texts.append(Text(prompt, len(new), found, statistics.fmean(right) if right else None))
        right = [one for row in fed for one in row.right[1:]]
        ratios = [
            of_full - own
            for theirs, ours in zip(yardstick.fed, fed, strict=False)
            for of_full, own in zip(theirs.logprobs[1:], ours.logprobs[1:], strict=True)
        ]
        rounds = [one for one in seen.rounds if len(one) == len(self.tokens)]
        counted = seen.stats if seen.stats.layers else None
        return Row(
            name=name,
            lossless=candidate is None or candidate.lossless,
            candidate=candidate,
            texts=texts,
            same=sum(text.difference is None for text in texts),
            agreement=statistics.fmean(right) if right else None,
            perplexity_ratio=math.exp(statistics.fmean(ratios)) if ratios else None,
            rates=[r for one in rounds if (r := rate(one)) is not None],
            rates_with_prompt=[r for one in rounds if (r := rate(one, prompt=True)) is not None],
            kv_read_share=None if counted is None else counted.kv_read_share,
            stats=None if counted is None else counted.as_dict(),
            cache_bytes=seen.cache_bytes,
            peak_bytes=seen.peak_bytes,
        )


def rate(runs: Sequence[Continued], prompt: bool = False) -> float | None:
    """New tokens a second: those after the first in the seconds of decoding, or all in all seconds; `None`: none."""
    tokens = sum(len(run.tokens[0]) - (not prompt) for run in runs)
    seconds = sum(run.decode_s + (run.prefill_s if prompt else 0) for run in runs)
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def difference(
    tokenizer: PreTrainedTokenizerBase,
    full: Sequence[int],
    own: Sequence[int],
    nats: float | None = None,
) -> Difference | None:
    """Where two continuations of one prompt part; `None` where they are the same."""
    if list(full) == list(own):
        return None
    at = parting(full, own)
    before = text_of(tokenizer, list(full[max(0, at - _AROUND) : at]))
    theirs, ours = (text_of(tokenizer, list(one[at : at + _AROUND])) for one in (full, own))
    return Difference(at + 1, before, theirs, ours, nats)


def parting(full: Sequence[int], own: Sequence[int]) -> int:
    """The index of the first token in which two texts differ; the length of the shorter where none does."""
    pairs = zip(full, own, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(full), len(own)))


def gap(logits: Tensor, full: Sequence[int], own: Sequence[int]) -> float | None:
    """`Difference.nats` by the logits `[n, V]` at each token of `full`; `None` where no token differs."""
    at = parting(full, own)
    if at == min(len(full), len(own)):
        return None
    return float(logits[at, full[at]]) - float(logits[at, own[at]])


@torch.no_grad()
def plain_pass(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Logits `[n, V]` at each of the n tokens of an answer: one pass of the model as it is."""
    tokens = torch.tensor([[*prompt, *answer[:-1]]], device=model.device)
    few = {"logits_to_keep": len(answer)} if decoding.last_logits_only(model) else {}
    return model(input_ids=tokens, use_cache=False, **few).logits[0, -len(answer) :]


def scores(logits: Tensor, answer: Sequence[int]) -> Scores:
    """Of the tokens of an answer, by the logits `[n, V]` at each."""
    places = zip(logits, answer, strict=True)  # singly: in float32 all may outgrow the model
    logprobs = [float(one.float().log_softmax(-1)[token]) for one, token in places]
    best = logits.argmax(-1).tolist()
    return Scores([a == b for a, b in zip(best, answer, strict=True)], logprobs)


def add(total: Stats, other: Stats) -> None:
    """Add the counts of another run of the same model."""
    for layer, counts in other.layers.items():
        sums = {name: int(getattr(counts, name)) for name in ("full", "steps", "read", "available")}
        total.record(layer, kv_heads=counts.kv_heads, entry_bytes=counts.entry_bytes, **sums)
    total.drafts.add(other.drafts)


def held_bytes(root: object) -> int:
    """Bytes of all tensors that objects of ours and of transformers' caches hold, each storage once; not of counts."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    todo = [root]
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, Stats):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            storage = one.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, Mapping):
            todo += one.values()
        elif isinstance(one, list | tuple | set):
            todo += one
        elif type(one).__module__.startswith(("refreshkv.", "transformers.cache_utils")):
            todo += vars(one).values() if hasattr(one, "__dict__") else ()
    return sum(sizes.values())
