"""Every way of calling `generate` that transformers offers for a decoder works under `attach`.

With a budget above the total length each must give exactly the vanilla tokens; with a small budget it must run, differ
from full attention in what it reads, and be reproducible.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TextStreamer
from transformers.generation.streamers import BaseStreamer

import refreshkv
from refreshkv import RefreshConfig

from ..conftest import build
from .prompts import NEW, greedy, left_padded, logits, tokens

EVERYTHING = RefreshConfig(budget=1000, stride=3, threshold=None)
SMALL = RefreshConfig(budget=10, stride=3, threshold=0.9)

CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several return sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams, several return sequences": {"num_beams": 4, "num_return_sequences": 2},
    "repetition penalty": {"repetition_penalty": 1.3},
    "chunked prefill": {"prefill_chunk_size": 16},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}
ONE_ROW_ONLY = {"prompt lookup"}  # transformers' own limit


def call(model: PreTrainedModel, options: dict[str, Any], rows: int) -> torch.Tensor:
    torch.manual_seed(7)
    ids = tokens(rows, 40) % 7 + 1  # few distinct tokens, so that prompt lookup finds candidates
    defaults = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**defaults, **options})


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_large_budget_gives_the_vanilla_tokens(models: Any, architecture: str, name: str) -> None:
    model, rows = models(architecture), 1 if name in ONE_ROW_ONLY else 2
    vanilla = call(model, CALLS[name], rows)
    with refreshkv.attach(model, EVERYTHING):
        assert torch.equal(call(model, CALLS[name], rows), vanilla)


@pytest.mark.parametrize("name", CALLS)
def test_a_small_budget_runs_and_is_reproducible(llama: PreTrainedModel, name: str) -> None:
    rows = 1 if name in ONE_ROW_ONLY else 2
    with refreshkv.attach(llama, SMALL) as session:
        first = call(llama, CALLS[name], rows)
        assert torch.equal(call(llama, CALLS[name], rows), first)
    if name != "prompt lookup":  # its passes verify several tokens and are full attention
        assert 0 < session.stats.kv_read_share < 0.7


@pytest.mark.parametrize(
    "config", [EVERYTHING, RefreshConfig(budget=5, stride=1, threshold=1.0)], ids=["all", "S=1"]
)
def test_a_draft_model(llama: PreTrainedModel, config: RefreshConfig) -> None:
    draft = build(
        "llama", seed=0, num_hidden_layers=1
    )  # shares the first layer, so some drafts are accepted
    ids = tokens(1, 30)
    vanilla = greedy(llama, ids)
    with refreshkv.attach(llama, config):
        assert torch.equal(greedy(llama, ids, assistant_model=draft), vanilla)


def test_an_attached_draft_model(llama: PreTrainedModel) -> None:
    draft, ids = build("llama", seed=0, num_hidden_layers=1), tokens(1, 30)
    vanilla = greedy(llama, ids)
    with refreshkv.attach(draft, SMALL):
        assert torch.equal(greedy(llama, ids, assistant_model=draft), vanilla)


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None: ...


def test_streamers_see_every_token(llama: PreTrainedModel) -> None:
    streamer, ids = Collect(), tokens(1, 30)
    with refreshkv.attach(llama, SMALL):
        new = greedy(llama, ids, streamer=streamer)
    assert streamer.seen == ids[0].tolist() + new[0].tolist()
    assert issubclass(TextStreamer, BaseStreamer)


@pytest.mark.parametrize(
    "config", [EVERYTHING, RefreshConfig(budget=5, stride=1, threshold=1.0)], ids=["all", "S=1"]
)
def test_several_turns_on_one_cache(model: PreTrainedModel, config: RefreshConfig) -> None:
    first, second = left_padded([30, 22]), tokens(2, 9, seed=5)

    def chat(cache: Any) -> torch.Tensor:
        out = model.generate(
            **first, past_key_values=cache, max_new_tokens=8, min_new_tokens=8, do_sample=False
        )
        ids = torch.cat([out, second], 1)
        mask = torch.cat(
            [first["attention_mask"], torch.ones(2, ids.shape[1] - 30, dtype=torch.long)], 1
        )
        out = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
        )
        return out[:, -8:]

    from transformers import DynamicCache

    vanilla = chat(DynamicCache(config=model.config.get_text_config()))
    with refreshkv.attach(model, config) as session:
        assert torch.equal(chat(session.new_cache()), vanilla)


@pytest.mark.parametrize("config", [EVERYTHING, SMALL], ids=["all", "small"])
def test_a_prefix_is_reused_by_copying_its_cache(
    llama: PreTrainedModel, config: RefreshConfig
) -> None:
    prefix, questions = tokens(1, 30), [tokens(1, 6, seed=seed) for seed in (1, 2)]
    with torch.no_grad(), refreshkv.attach(llama, config) as session:
        cache = session.new_cache()
        llama(prefix, past_key_values=cache)
        for question in questions:
            ids = torch.cat([prefix, question], 1)
            steps = session.stats.partial_steps
            reused = greedy(llama, ids, past_key_values=copy.deepcopy(cache))
            assert session.stats.partial_steps > steps
            assert torch.equal(reused, greedy(llama, ids))
        assert cache.get_seq_length() == 30


def test_a_turn_selects_again_with_its_own_budget(llama: PreTrainedModel) -> None:
    with torch.no_grad(), refreshkv.attach(llama, budget=0.5, stride=None) as session:
        cache = session.new_cache()
        for turn, tokens_so_far in ((tokens(1, 20), 20), (tokens(1, 30, seed=2), 51)):
            llama(turn, past_key_values=cache)
            llama(tokens(1, 1), past_key_values=cache)
            assert cache.layers[0].inner.budget.tolist() == [-(-tokens_so_far // 2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt-oss"])
def test_dtypes(architecture: str, dtype: torch.dtype) -> None:
    # All experts of a token: a choice of two would turn on the last bit of bfloat16, here and there.
    experts = {"num_experts_per_tok": 4} if architecture == "gpt-oss" else {}
    model = build(architecture, initializer_range=0.05, **experts).to(dtype)
    inputs = left_padded([40, 23])
    text = model.generate(**inputs, max_new_tokens=6, do_sample=False)  # a tie may go either way
    vanilla = logits(model, inputs, 6, text)
    with refreshkv.attach(model, EVERYTHING):
        ours = logits(model, inputs, 6, text)
    error = (ours.float() - vanilla.float()).norm() / vanilla.float().norm()
    # Measured at most 2.9e-7, 9.3e-4 and 7.5e-3 of the logits' size: the rounding of each dtype.
    assert error < {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    with refreshkv.attach(model, SMALL):
        assert torch.isfinite(logits(model, inputs, 6)).all()


def test_embeddings_as_input(llama: PreTrainedModel) -> None:
    embeddings = llama.get_input_embeddings()(tokens(2, 30))
    vanilla = llama.generate(inputs_embeds=embeddings, max_new_tokens=6, do_sample=False)
    with refreshkv.attach(llama, EVERYTHING):
        assert torch.equal(
            llama.generate(inputs_embeds=embeddings, max_new_tokens=6, do_sample=False), vanilla
        )


def test_a_prompt_of_one_token(llama: PreTrainedModel) -> None:
    ids = tokens(1, 1)
    vanilla = greedy(llama, ids)
    with refreshkv.attach(llama, EVERYTHING):
        assert torch.equal(greedy(llama, ids), vanilla)


@pytest.mark.parametrize("signs", ["positive", "negative"])
def test_crop_takes_both_signs_and_the_next_step_is_full(
    llama: PreTrainedModel, signs: str
) -> None:
    ids = tokens(1, 30)
    with torch.no_grad(), refreshkv.attach(llama, budget=5, stride=None) as session:
        cache = session.new_cache()
        llama(ids, past_key_values=cache)
        llama(ids[:, :1], past_key_values=cache)
        cache.crop(0)
        assert cache.get_seq_length() == 31 and cache.layers[0].inner.ring is not None
        cache.crop(20 if signs == "positive" else -11)
        assert cache.get_seq_length() == 20 and not cache.layers[0].inner.ring.used.any()
        session.stats.reset()
        ours = llama(ids[:, 20:21], past_key_values=cache).logits
        assert session.stats.full_share == 1.0
        torch.testing.assert_close(
            ours[:, -1], llama(ids[:, :21]).logits[:, -1], atol=2e-4, rtol=1e-4
        )
        llama(ids[:, 21:22], past_key_values=cache)
        assert session.stats.full_share == 0.5


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("settings", [{"stride": 4, "threshold": None}, {"preset": "lse-drop"}, {}])
@pytest.mark.parametrize("architecture", ["llama", "gpt-oss"])
def test_a_partial_cache_of_positions_is_one_of_copies(
    architecture: str, settings: dict[str, Any], implementation: str | None
) -> None:
    model, inputs, outputs = build(architecture), left_padded([40, 23]), []
    for ring in ("copied", "indexed"):
        with refreshkv.attach(model, budget=8, ring=ring, **settings):
            outputs.append(
                model.generate(
                    **inputs,
                    max_new_tokens=20,
                    do_sample=False,
                    cache_implementation=implementation,
                )
            )
    assert torch.equal(*outputs)
