"""Engines for these tests: ours in this process, one at a time; stock vLLM, without the plugin, in another one."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from refreshkv.demo import MODEL_PATH, load
from refreshkv.demo.prompts import TASKS, make_prompt
from tests.hosts.vllm.fakes import Row, describe

Prompt = list[int]
T = TypeVar("T")
BLOCK = 64
LENGTHS = (
    37,
    63,
    64,
    65,
    128,
    191,
    700,
    1025,
)  # of prompts: around multiples of a block, and longer ones
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    "max_num_seqs": 8,
    "block_size": BLOCK,
    "num_gpu_blocks_override": 256,
    "skip_tokenizer_init": True,
}


@dataclass(frozen=True)
class Answer:
    """What came of a prompt: new tokens, the log-probability of each, and prompt tokens that a prefix hit saved."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached: int


class Engine:
    """An in-process engine: `settings` are those of RefreshKV, `options` those of vLLM. Close it before the next."""

    def __init__(
        self, settings: Mapping[str, Any] | None, model: Path = MODEL_PATH, **options: Any
    ) -> None:
        from vllm import LLM

        given = (
            OPTIONS | {"additional_config": {"refreshkv": settings}}
            if settings is not None
            else OPTIONS
        )
        self.llm = LLM(str(model), **given | options)
        self.core = self.llm.llm_engine
        self._ids = itertools.count()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.core.engine_core.shutdown()
        del self.llm, self.core
        cleanup_dist_env_and_memory()
        gc.collect()

    def generate(self, prompts: Sequence[Prompt], new: int = 40) -> list[Answer]:
        """Greedy answers of `new` tokens to all of them at once."""
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [answer(out) for out in self.llm.generate(given, greedy(new), use_tqdm=False)]

    def alone(self, prompts: Sequence[Prompt], new: int = 40) -> list[Answer]:
        """As `generate`, one after the other."""
        return [self.generate([prompt], new)[0] for prompt in prompts]

    def begin(self, prompt: Prompt, new: int) -> str:
        """A request that `step` works on; its name."""
        name = f"request-{next(self._ids)}"
        self.core.add_request(name, {"prompt_token_ids": prompt}, greedy(new))
        return name

    def step(self, times: int = 1) -> list[Any]:
        """What finished in so many steps of the engine."""
        return [out for _ in range(times) for out in self.core.step() if out.finished]

    def come_and_go(self, prompts: Sequence[Prompt], new: Sequence[int]) -> list[Answer]:
        """Greedy answers of `new` tokens each to requests that begin three steps apart."""
        names, answers = [], {}
        for prompt, count in zip(prompts, new, strict=True):
            names.append(self.begin(prompt, count))
            answers |= {out.request_id: answer(out) for out in self.step(3)}
        while self.core.has_unfinished_requests():
            answers |= {out.request_id: answer(out) for out in self.step()}
        return [answers[name] for name in names]

    def abort(self, *names: str) -> None:
        self.core.abort_request(list(names))

    @property
    def scheduler(self) -> Any:
        return self.core.engine_core.engine_core.scheduler

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def counts(self) -> Any:
        """Our counters since the last call, those of the first worker."""
        return self.llm.collective_rpc(_collect)[0]

    def hold(self, rows: int = 8) -> None:
        """From here on steps of decode rows are told as to a CUDA graph, which was captured for so many rows."""
        self.llm.collective_rpc(_capture, args=(rows,))


def _builder(worker: Any) -> Any:
    ((group,),) = getattr(worker, "worker", worker).model_runner.attn_groups
    return group.get_metadata_builder()


def _collect(worker: Any) -> Any:
    return _builder(worker).counter.collect()


def _capture(worker: Any, rows: int) -> None:
    _builder(worker).build_for_cudagraph_capture(describe([Row(1, 1)] * rows, BLOCK))


def greedy(new: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=new,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def answer(out: Any) -> Answer:
    (found,) = out.outputs
    tokens = tuple(found.token_ids)
    chosen = (
        float(step[token].logprob) for step, token in zip(found.logprobs, tokens, strict=True)
    )
    return Answer(tokens, tuple(chosen), out.num_cached_tokens or 0)


def counted(
    settings: Mapping[str, Any], prompts: Sequence[Prompt], new: int = 40, **options: Any
) -> tuple[list[Answer], Any]:
    """Answers of a new engine to all prompts at once, and its counters."""
    with Engine(settings, **options) as engine:
        return engine.generate(prompts, new), engine.counts()


class Elsewhere:
    """Another process, with these environment variables beside those of all engines."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        given = ENVIRONMENT | dict(environment)
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _set, (given,))

    def __enter__(self) -> Elsewhere:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """What the function returns there."""
        return self._pool.submit(function, *args, **options).result(timeout=180)


def _set(environment: Mapping[str, str]) -> None:
    os.environ.update(environment)


class Stock:
    """vLLM without the plugin, in a process of its own; answers are kept."""

    def __init__(self) -> None:
        self._elsewhere = Elsewhere({"VLLM_PLUGINS": "", "REFRESHKV_VLLM_CPU": "0"})
        self._known: dict[str, list[Answer]] = {}

    def generate(self, prompts: Sequence[Prompt], new: int = 40, **options: Any) -> list[Answer]:
        """As `Engine.generate` of such an engine."""
        key = repr((prompts, new, options))
        if key not in self._known:
            self._known[key] = self._elsewhere.run(_generate, prompts, new, options)
        return self._known[key]

    def close(self) -> None:
        self._elsewhere.__exit__()


_engines: dict[str, Engine] = {}


def _generate(prompts: Sequence[Prompt], new: int, options: dict[str, Any]) -> list[Answer]:
    """By the engine of these options, which stays."""
    key = repr(options)
    if key not in _engines:
        while _engines:
            _engines.popitem()[1].close()
        _engines[key] = Engine(None, enable_prefix_caching=False, **options)
    return _engines[key].generate(prompts, new)


@lru_cache
def _tokenizer() -> Any:
    return load()[1]


def prompt(length: int, seed: int = 0) -> Prompt:
    """The end of a task that the bundled model has learned, `length` tokens that begin a text."""
    task = TASKS[seed % len(TASKS)]
    ids = _tokenizer()(make_prompt(task, seed, max(512, length + length // 2)).prompt).input_ids
    seed += 1000
    while len(ids) < length:
        ids = _tokenizer()(make_prompt(task, seed, 2 * length).prompt).input_ids + ids[1:]
        seed += 1
    return [ids[0], *ids[len(ids) - length + 1 :]]


def ragged(lengths: Sequence[int] = LENGTHS) -> list[Prompt]:
    return [prompt(length, seed) for seed, length in enumerate(lengths)]


def assert_same(found: Sequence[Answer], expected: Sequence[Answer], within: float = 1e-4) -> None:
    """The same tokens, and log-probabilities that are no further apart than sums in another order make them."""
    assert len(found) == len(expected)
    for row, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.tokens == other.tokens, f"row {row}"
        assert distance(one, other) < within, f"row {row}"


def distance(one: Answer, other: Answer) -> float:
    """The largest difference of log-probabilities."""
    return max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True))
