"""Decode throughput of vLLM, stock against RefreshKV: random weights, distinct random prompts. On a GPU not run yet.

    python benchmarks/vllm_decode.py --context 16384 --requests 4 --new 32

runs in an environment with vLLM and refreshkv (docs/vllm.md). Every variant is an engine of its own; all are alive at
once and take turns, so that a slow minute of the machine hits each of them. What is timed is a batch of requests whose
prompts are in the prefix cache, less the same batch with one new token each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# What each variant is told; `None`: the plugin is off.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "mixed": {"preset": "fast"},
    "full": {"mode": "full"},
    "published": {"budget": 1024, "stride": 10, "threshold": None},
}
_BLOCK = 64  # tokens, whole blocks of prompts are cached


def engine(asked: Connection, variant: str, folder: str, options: argparse.Namespace) -> None:
    """The process of one engine."""
    try:
        answer(asked, variant, folder, options)
    except BaseException:
        traceback.print_exc()
    os._exit(0)  # joining vLLM's threads may take for ever


def answer(asked: Connection, variant: str, folder: str, options: argparse.Namespace) -> None:
    """Answer with the seconds of a batch of so many new tokens, until told 0."""
    told = VARIANTS[variant]
    more: dict[str, Any] = {}
    if told is not None:
        os.environ["REFRESHKV_VLLM_CPU"] = "1"
        more["additional_config"] = {"refreshkv": {**told, "log_interval": 0}}
    if device() == "gpu":
        more["gpu_memory_utilization"] = 0.9 / len(options.variants.split(","))
        if told is not None:
            more["attention_config"] = {"backend_per_kind": {"full_attention": "CUSTOM"}}
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype=options.dtype,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=options.context + options.new + _BLOCK,
        max_num_seqs=options.requests,
        max_num_batched_tokens=2048,
        block_size=options.block,
        **more,
    )
    tokens = range(options.requests * options.context)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    prompts = [
        {
            "prompt_token_ids": [
                (at * 7919 + at // 97) % vocabulary
                for at in tokens[i * options.context : (i + 1) * options.context]
            ]
        }
        for i in range(options.requests)
    ]
    asked.send("ready")
    while new := wanted(asked):
        sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        asked.send(time.perf_counter() - begin)
    llm.llm_engine.engine_core.shutdown()


def wanted(asked: Connection) -> int:
    """New tokens of the next batch; 0 to end, also where whoever asked is gone."""
    try:
        return int(asked.recv())
    except EOFError:
        return 0


def device() -> str:
    """Where vLLM will run, in the name of the file."""
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Time the variants and append a row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="llama-3.2-1b", help="as in `refreshkv bench`")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--context", type=int, default=16384, help="tokens of a prompt")
    parser.add_argument("--requests", type=int, default=4, help="at once")
    parser.add_argument("--new", type=int, default=32, help="tokens a request that are timed")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--block", type=int, default=128, help="tokens of a block of the KV cache")
    parser.add_argument("--variants", default="stock,mixed", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--no-record", action="store_true", help="write no rows")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    cores = sorted(os.sched_getaffinity(0))  # vLLM by itself leaves out what may be a hyper-thread
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    from refreshkv.bench.shapes import config_of

    config = config_of(options.shape)
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    config.architectures = ["LlamaForCausalLM"]
    variants = options.variants.split(",")
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        seconds = take_turns(variants, folder, options)
    rows = [row(options, config.num_hidden_layers, name, seconds) for name in variants]
    for one in rows:
        print(json.dumps(one))
    if not options.no_record:
        from refreshkv.bench import record

        record.append(RESULTS / f"vllm-{device()}.csv", rows)


def take_turns(
    variants: list[str], folder: str, options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of the timed tokens, by variant and turn."""
    context = multiprocessing.get_context("spawn")
    engines: dict[str, Connection] = {}
    for name in variants:
        mine, its = context.Pipe()
        context.Process(target=engine, args=(its, name, folder, options)).start()
        its.close()  # so that its end is seen
        try:
            mine.recv()
        except EOFError:
            raise SystemExit(
                f"The engine of {name!r} did not start, the reason is above. If it is memory: fewer --layers or"
                " --variants, or VLLM_CPU_KVCACHE_SPACE=2 (GiB of each engine)."
            ) from None
        engines[name] = mine
        begin = time.perf_counter()
        ask(mine, 1)
        print(f"{name}: prompts took {time.perf_counter() - begin:.0f} s", flush=True)
    found: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(options.turns):
        for name in variants if turn % 2 == 0 else variants[::-1]:
            first = ask(engines[name], 1)
            found[name].append(ask(engines[name], 1 + options.new) - first)
            print(
                f"turn {turn + 1}, {name}: {found[name][-1] / options.new * 1e3:.1f} ms a step",
                flush=True,
            )
    for mine in engines.values():
        mine.send(0)
    return found


def ask(engine_of: Connection, new: int) -> float:
    """Seconds of a batch."""
    engine_of.send(new)
    return float(engine_of.recv())


def row(
    options: argparse.Namespace, layers: int, name: str, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """A line of the file."""
    from datetime import UTC, datetime

    import torch

    import refreshkv
    from refreshkv.bench.record import device_name
    from refreshkv.hosts.vllm import surface
    from refreshkv.kernels.backend import language

    own, stock = seconds[name], seconds.get("stock")
    ratio = (
        None if stock is None else statistics.median(s / o for s, o in zip(stock, own, strict=True))
    )
    used = torch.device("cuda" if device() == "gpu" else "cpu")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": options.shape,
        "layers": layers,
        "context": options.context,
        "requests": options.requests,
        "new": options.new,
        "block": options.block,
        "variant": name,
        "device": device_name(used),
        "dtype": options.dtype,
        "threads": len(os.environ["VLLM_CPU_OMP_THREADS_BIND"].split(",")),
        "versions.refreshkv": refreshkv.__version__,
        "versions.torch": torch.__version__,
        "versions.vllm": surface.version(),
        "versions.kernels": language(used),
        "step_ms": round(statistics.median(own) / options.new * 1e3, 1),
        "tokens_per_s": round(options.requests * options.new / statistics.median(own), 2),
        "over_stock": None if ratio is None else round(ratio, 3),
        "turns": options.turns,
    }


if __name__ == "__main__":
    main()
