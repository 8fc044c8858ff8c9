"""Our half of the cross-check: writes the job that both halves answer, and our answer.

    python tests/crosscheck/ours.py JOB RESULT

A *case* fixes one definition on both sides. Papers leave open how votes are pooled and shared, and what happens while
decoding; kvpress and we decided differently (docs/methods.md), so each side has what it takes to be the other:

scores    "kvpress": average-pooling, mean over the query heads of a GQA group; "ours": max-pooling, maximum
decode    "append": the cache grows by every new token; "fixed": it stays at K, the lowest leaves
"own"     each side as it is shipped
agree     both sides have one definition, so kept positions and tokens must be equal; else the row is for information

A job: model, prompts (name -> token ids), cases (name -> the above and a method), and the numbers below. A result:
versions, and runs: "case|prompt" -> tokens, and kept `[layer][head]`: which positions of the prompt the first decode
step attends to, sorted.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from refreshkv import Session, __version__, demo
from refreshkv.demo.prompts import TASKS, make_prompt
from refreshkv.methods import Method, find
from refreshkv.methods.pyramidkv import PyramidKV
from refreshkv.methods.snapkv import SnapKV
from refreshkv.methods.streaming_llm import StreamingLLM

LENGTH, SEEDS = 768, (0, 1)
JOB = {"budget": 96, "window": 32, "kernel": 7, "sinks": 4, "beta": 20, "new_tokens": 48}
# Neighbours of a strong token have equal averages but for rounding, and kvpress breaks ties as `topk` happens to. With
# its scores, both sides let a token score this much more, relatively, than the one before it.
JOB["ramp"] = 1e-4
CLASSES = {"snapkv": SnapKV, "pyramidkv": PyramidKV, "streaming-llm": StreamingLLM}


def case(method: str, scores: str = "ours", decode: str = "fixed", agree: bool = True) -> dict:
    """One case; see the module's docstring."""
    return {"method": method, "scores": scores, "decode": decode, "agree": agree}


CASES = {
    "full": case("full"),
    "streaming-llm, K fixed": case("streaming-llm"),
    "streaming-llm, appending": case("streaming-llm", decode="append"),
    "snapkv, kvpress's scores, appending": case("snapkv", "kvpress", "append"),
    "snapkv, our scores, appending": case("snapkv", "ours", "append"),
    "pyramidkv, kvpress's scores, appending": case("pyramidkv", "kvpress", "append"),
    "pyramidkv, our scores, appending": case("pyramidkv", "ours", "append"),
    "streaming-llm": case("streaming-llm", "own", "own", agree=False),
    "snapkv": case("snapkv", "own", "own", agree=False),
    "pyramidkv": case("pyramidkv", "own", "own", agree=False),
}


def variant(wanted: dict[str, Any], kept: list[list[list[int]]]) -> Method:
    """Our method under the definitions of a case; what it keeps of the prompt goes to `kept`, layer by layer."""
    if wanted["method"] == "full":
        return find("full")
    theirs = wanted["scores"] == "kvpress"

    class Variant(CLASSES[wanted["method"]]):
        def score_prompt(self, *arguments: Any) -> Tensor:
            scores = super().score_prompt(*arguments)
            if not theirs:
                return scores
            last = self.settings.window
            votes, window = scores.split([scores.shape[-1] - last, last], -1)
            kernel = JOB["kernel"]
            pooled = F.avg_pool1d(votes, kernel, 1, kernel // 2)
            pooled = pooled * (1 + JOB["ramp"] * torch.arange(pooled.shape[-1]))
            return torch.cat([pooled, window], -1)

        def choose(self, *arguments: Any) -> Tensor:
            before = self.kept
            after = super().choose(*arguments)
            if wanted["decode"] == "append":
                self.kept = after = F.pad(before, (0, 1), value=True)
            if len(kept) == self.layer:  # the first step of this layer
                kept.append([head[:-1].nonzero()[:, 0].tolist() for head in after[0]])
            return after

    method = find(wanted["method"])
    pooling = {"pool_kernel": 1, "group_reduction": "mean"} if theirs else {}
    ours = {name: value for name, value in pooling.items() if name in method.names}
    return replace(method, fixed=ours, make=Variant)


@torch.inference_mode()
def run(model: Any, method: Method, kept: list, ids: list[int]) -> dict[str, Any]:
    """Greedy tokens, whatever the end-of-sequence token, and the kept positions of one prompt."""
    with Session(model, method.config(budget=JOB["budget"]), method=method) as session:
        cache = session.new_cache()
        logits = model(torch.tensor([ids]), past_key_values=cache).logits
        tokens = [int(logits[0, -1].argmax())]
        for _ in range(JOB["new_tokens"] - 1):
            logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache).logits
            tokens.append(int(logits[0, -1].argmax()))
    return {"tokens": tokens, "kept": kept}


def main(job_file: str, result_file: str) -> None:
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # one order of summation on every machine
    model, tokenizer = demo.load()
    prompts = {
        f"{task} {seed}": tokenizer(make_prompt(task, seed, LENGTH).prompt).input_ids
        for task in TASKS
        for seed in SEEDS
    }
    job = {**JOB, "model": str(demo.MODEL_PATH), "prompts": prompts, "cases": CASES}
    Path(job_file).write_text(json.dumps(job), "utf-8")
    runs = {}
    for prompt, ids in prompts.items():
        for name, wanted in CASES.items():
            kept: list[list[list[int]]] = []
            runs[f"{name}|{prompt}"] = run(model, variant(wanted, kept), kept, ids)
    versions = {"refreshkv": __version__} | {n: version(n) for n in ("transformers", "torch")}
    Path(result_file).write_text(json.dumps({"versions": versions, "runs": runs}), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
