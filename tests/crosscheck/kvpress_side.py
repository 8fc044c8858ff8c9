"""kvpress's half of the cross-check; runs in its own environment and imports nothing of ours.

    python tests/crosscheck/kvpress_side.py JOB RESULT

Reads the job that `ours.py` wrote and answers it in the same form: see there for the cases. Whole prompts are
prefilled; kvpress compresses at their end.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from kvpress import (
    BasePress,
    DecodingPress,
    PrefillDecodingPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache


class WithTieRule:
    """kvpress's own scores, and the job's tie rule: a later token scores a little more."""

    ramp: float

    def score(self, module, hidden_states, keys, values, attentions, kwargs) -> Tensor:
        scores = super().score(module, hidden_states, keys, values, attentions, kwargs)
        return scores * (1 + self.ramp * torch.arange(scores.shape[-1]))


class OurScores:
    """Our pooling over kvpress's attention weights: sum over the window, maximum over the group, max-pooling.

    Max-pooling makes ties, so the scores become ranks in which a tie goes to the later token.
    """

    def score(self, module, hidden_states, keys, values, attentions, kwargs) -> Tensor:
        votes = self.compute_window_attention(
            module, hidden_states, keys, self.window_size, kwargs["position_embeddings"]
        ).sum(-2)
        votes = votes.unflatten(1, (keys.shape[1], -1)).amax(2)
        votes = F.max_pool1d(votes, self.kernel_size, 1, self.kernel_size // 2)
        scores = F.pad(votes, (0, self.window_size), value=float("inf"))
        places = torch.arange(scores.shape[-1], dtype=scores.dtype).expand_as(scores)
        return scores.scatter(-1, scores.argsort(dim=-1, stable=True), places)


class StreamingLLMInOrder(StreamingLLMPress):
    """StreamingLLM whose entries stay in the order of the text.

    kvpress leaves them in the order in which `topk` returns equal scores (its issue 173), and from the second
    eviction on the places of the sinks and of the oldest entry hold others.
    """

    def score(self, module, hidden_states, keys, values, attentions, kwargs) -> Tensor:
        scores = super().score(module, hidden_states, keys, values, attentions, kwargs)
        length = scores.shape[-1]
        return scores - torch.arange(length) / length


def press_for(case: dict[str, Any], job: dict[str, Any], length: int) -> BasePress | None:
    """kvpress's object for a case, keeping `job["budget"]` of `length` tokens."""
    method, budget, window, kernel = case["method"], job["budget"], job["window"], job["kernel"]
    if method == "full":
        return None
    if method == "streaming-llm":
        if case["decode"] == "append":
            return StreamingLLMPress(ratio(budget, length), n_sink=job["sinks"])
        streaming = StreamingLLMPress if case["scores"] == "own" else StreamingLLMInOrder
        # kvpress evicts after attention, we before: its K - 1 entries and the new token are our K.
        return PrefillDecodingPress(
            streaming(ratio(budget - 1, length), n_sink=job["sinks"]),
            DecodingPress(
                streaming(n_sink=job["sinks"]),
                compression_interval=1,
                target_size=budget - 1,
                hidden_states_buffer_size=0,
            ),
        )
    kind = {"kvpress": (WithTieRule,), "ours": (OurScores,), "own": ()}[case["scores"]]
    if method == "snapkv":
        press = press_class(*kind, SnapKVPress)(ratio(budget, length), window, kernel)
    else:
        beta = job["beta"]
        if kind:
            # Its formula spreads the whole budget over the layers, ours what the window leaves; another slope turns
            # the one into the other.
            beta = budget / (window + (budget - window) / beta)
        press = press_class(*kind, PyramidKVPress)(1 - budget / length, window, kernel, beta=beta)
    press.ramp = job["ramp"]
    return press


def press_class(*bases: type) -> type:
    """A press whose first base may replace the score of the last."""
    return type("Press", bases, {})


def ratio(keep: int, length: int) -> float:
    """kvpress rounds `length * (1 - ratio)` down; half a token more keeps float noise away from the integer."""
    return 1 - (keep + 0.5) / length


def note_kept(press: BasePress, kept: list[list[list[int]]]) -> None:
    """Let `press` note the positions it keeps, `[layer][head]`: it is shown them in place of the values."""
    compress = press.compress

    def compress_and_note(module, hidden_states, keys, values, attentions, kwargs):
        places = torch.arange(values.shape[2], dtype=values.dtype)[:, None].expand_as(values)
        _, chosen = compress(module, hidden_states, keys, places, attentions, kwargs)
        kept.append(chosen[0, :, :, 0].long().sort().values.tolist())
        return compress(module, hidden_states, keys, values, attentions, kwargs)

    press.compress = compress_and_note


@torch.inference_mode()
def run(model: Any, press: BasePress | None, ids: list[int], new_tokens: int) -> dict[str, Any]:
    """Greedy tokens, whatever the end-of-sequence token, and the kept positions of one prompt."""
    kept: list[list[list[int]]] = []
    if press is not None:
        note_kept(getattr(press, "prefilling_press", press), kept)
    cache = DynamicCache()
    with nullcontext() if press is None else press(model):
        logits = model(torch.tensor([ids]), past_key_values=cache).logits
        tokens = [int(logits[0, -1].argmax())]
        # Left alone, the model would count positions from the compressed cache; these are the true ones.
        for position in range(len(ids), len(ids) + new_tokens - 1):
            logits = model(
                torch.tensor([tokens[-1:]]),
                past_key_values=cache,
                position_ids=torch.tensor([[position]]),
            ).logits
            tokens.append(int(logits[0, -1].argmax()))
    return {"tokens": tokens, "kept": kept}


def main(job_file: str, result_file: str) -> None:
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # one order of summation on every machine
    job = json.loads(Path(job_file).read_text("utf-8"))
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, local_files_only=True
    ).eval()
    runs = {
        f"{name}|{prompt}": run(model, press_for(case, job, len(ids)), ids, job["new_tokens"])
        for prompt, ids in job["prompts"].items()
        for name, case in job["cases"].items()
    }
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    Path(result_file).write_text(json.dumps({"versions": versions, "runs": runs}), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
