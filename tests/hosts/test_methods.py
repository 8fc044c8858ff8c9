"""Every method through an unmodified `generate`, on real architectures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import refreshkv
from refreshkv.methods import METHODS
from refreshkv.stats import RowStats, Stats

from .prompts import greedy, left_padded, logits, tokens
from .test_attach import appearance

RAGGED = [50, 37, 21]
# Plain; softcap with sliding layers; sinks with sliding layers.
ARCHITECTURES = ["llama", "gemma2", "gpt-oss"]
WITHOUT_K = ["twilight", "kivi-4", "kivi-2"]  # which take one, so that a comparison can name it
ONE_PASS = [name for name in METHODS if name != "critiprefill"]  # is the same as several
EVICTING = [
    "streaming-llm",
    "h2o",
    "snapkv",
    "snapkv-1",
    "pyramidkv",
    "tova",
    "citrus",
    "cascading",
    "subgen",
]


def under(model: PreTrainedModel, method: str, inputs: Any, new: int = 12, **options: Any) -> Any:
    """Greedy tokens under a method, at a quarter of the prompt unless told otherwise."""
    budget = options.pop("budget", 0.25)
    with refreshkv.attach(model, method=method, budget=budget):
        return greedy(model, inputs, new=new, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", [name for name in METHODS if name not in WITHOUT_K])
def test_a_budget_for_everything_gives_the_vanilla_tokens(
    models: Any, name: str, architecture: str
) -> None:
    model, inputs = models(architecture), left_padded(RAGGED)
    assert torch.equal(under(model, name, inputs, budget=1000), greedy(model, inputs, new=12))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_equals_its_rows_alone(models: Any, name: str, architecture: str) -> None:
    model, inputs = models(architecture), left_padded(RAGGED)
    batch = under(model, name, inputs)
    for row, length in enumerate(RAGGED):
        alone = under(model, name, inputs["input_ids"][row : row + 1, -length:])
        assert torch.equal(batch[row], alone[0]), f"row {row}"


@pytest.mark.parametrize("chunk", [1, 13])
@pytest.mark.parametrize("name", ONE_PASS)
def test_the_chunk_size_of_prefill_changes_nothing(
    llama: PreTrainedModel, name: str, chunk: int
) -> None:
    inputs = left_padded([40, 27])  # 13 leaves a last chunk of one token
    chunked = under(llama, name, inputs, prefill_chunk_size=chunk)
    assert torch.equal(chunked, under(llama, name, inputs))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("full", "refreshkv")])
def test_a_small_budget_is_another_method(llama: PreTrainedModel, name: str) -> None:
    """The equalities above could hold because everything is ordinary attention, or RefreshKV.

    "refreshkv" has the output of full attention at any budget; `exact/` is about that.
    """
    ids = tokens(2, 150)  # more than a block of codes
    with refreshkv.attach(llama, method=name, budget=6) as session:
        ours = logits(llama, ids, 4)
    assert (ours[1:] - logits(llama, ids, 4)[1:]).abs().max() > 0.01
    assert session.stats.layers.keys() == {0, 1, 2}
    if METHODS[name].make is not None:
        with refreshkv.attach(llama, method="refreshkv", budget=6, stride=2):
            refreshed = logits(llama, ids, 4)
        assert name == "snapkv-1" or (ours[1:] - refreshed[1:]).abs().max() > 0.01


def test_snapkv_of_window_one_never_refreshes(model: PreTrainedModel) -> None:
    inputs = left_padded(RAGGED)
    found = []
    for name in ("snapkv-1", "no-refresh"):
        with refreshkv.attach(model, method=name, budget=0.25) as session:
            found.append((greedy(model, inputs, new=30), logits(model, inputs, 30), session.stats))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=2e-4)
    assert found[0][2].as_dict() == found[1][2].as_dict()


@pytest.mark.parametrize("name", METHODS)
def test_leaving_restores_the_model(llama: PreTrainedModel, name: str) -> None:
    before = appearance(llama)
    with refreshkv.attach(llama, method=name, budget=8) as session:
        greedy(llama, tokens(1, 20), new=3)
        assert session.method is METHODS[name]
    assert appearance(llama) == before


@pytest.mark.parametrize("name", METHODS)
def test_the_counts_of_the_rows(llama: PreTrainedModel, name: str) -> None:
    inputs = left_padded(RAGGED)
    with refreshkv.attach(llama, method=name, budget=0.25, stats=RowStats()) as session:
        greedy(llama, inputs, new=12)
        rows = [session.stats.row(row) for row in range(3)]
        total = session.stats.as_dict()
    assert isinstance(session.stats, RowStats)
    for key in ("kv_bytes_read", "kv_bytes_full", "full_steps", "partial_steps"):
        assert sum(row.as_dict()[key] for row in rows) == total[key]
    for row, length in enumerate(RAGGED):
        with refreshkv.attach(llama, method=name, budget=0.25, stats=Stats()) as alone:
            greedy(llama, inputs["input_ids"][row : row + 1, -length:], new=12)
        assert rows[row].as_dict() == alone.stats.as_dict()
        if name in EVICTING or name == "oracle-topk":
            read = 11 * 3 * 2 * -(-length // 4)  # steps, layers, KV heads, K
            assert sum(int(c.read) for c in rows[row].layers.values()) == read
            assert rows[row].full_steps == 0
    if name == "refreshkv":  # counts cycles, which hold several steps
        return
    with refreshkv.attach(llama, method=name, budget=0.25, stats=RowStats()) as short:
        greedy(llama, inputs, new=6)
    assert session.stats.row(1, steps=5).as_dict() == short.stats.row(1).as_dict()


@pytest.mark.parametrize("name", METHODS)
def test_beams(llama: PreTrainedModel, name: str) -> None:
    inputs = left_padded([40, 27])
    options = {"num_beams": 3, "num_return_sequences": 2}
    vanilla = greedy(llama, inputs, new=10, **options)
    if name not in WITHOUT_K:
        assert torch.equal(under(llama, name, inputs, new=10, budget=1000, **options), vanilla)
    small = under(llama, name, inputs, new=10, **options)
    alone = under(llama, name, inputs["input_ids"][1:, -27:], new=10, **options)
    assert torch.equal(small[2:], alone)


@pytest.mark.parametrize("name", ONE_PASS)
def test_a_prefix_is_reused_by_copying_its_cache(llama: PreTrainedModel, name: str) -> None:
    prefix, questions = tokens(1, 30), [tokens(1, 6, seed=seed) for seed in (1, 2)]
    with torch.no_grad(), refreshkv.attach(llama, method=name, budget=0.25) as session:
        cache = session.new_cache()
        llama(prefix, past_key_values=cache)
        for question in questions:
            ids = torch.cat([prefix, question], 1)
            reused = greedy(llama, ids, new=12, past_key_values=copy.deepcopy(cache))
            assert torch.equal(reused, greedy(llama, ids, new=12))


@pytest.mark.parametrize("name", EVICTING)
def test_a_cache_with_evicted_entries_takes_no_second_prompt(
    llama: PreTrainedModel, name: str
) -> None:
    with refreshkv.attach(llama, method=name, budget=8) as session:
        cache = session.new_cache()
        out = llama.generate(tokens(1, 30), past_key_values=cache, max_new_tokens=4)
        with pytest.raises(RuntimeError, match="new cache for every prompt"):
            llama.generate(
                torch.cat([out, tokens(1, 5)], 1), past_key_values=cache, max_new_tokens=4
            )
        with pytest.raises(RuntimeError, match="cannot take tokens back"):
            cache.crop(-1)
        cache.reset()
        assert torch.equal(
            llama.generate(tokens(1, 30), past_key_values=cache, max_new_tokens=4), out
        )


@pytest.mark.parametrize("name", [name for name in METHODS if name not in EVICTING])
def test_a_method_that_evicts_nothing_takes_several_turns(
    llama: PreTrainedModel, name: str
) -> None:
    def chat(cache: Any) -> torch.Tensor:
        ids = llama.generate(tokens(1, 30), past_key_values=cache, max_new_tokens=4)
        ids = torch.cat([ids, tokens(1, 16, seed=5)], 1)
        return llama.generate(ids, past_key_values=cache, max_new_tokens=8)

    vanilla = chat(DynamicCache(config=llama.config))
    with refreshkv.attach(llama, method=name, budget=1000) as session:
        assert torch.equal(chat(session.new_cache()), vanilla) or name in WITHOUT_K
    with refreshkv.attach(llama, method=name, budget=0.2) as session:
        cache = session.new_cache()
        chat(cache)
        if name != "full" and not name.startswith("kivi"):
            assert cache.layers[0].inner.budget.tolist() == [
                10
            ]  # of the 50 tokens before the last answer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", METHODS)
def test_sixteen_bits(models: Any, name: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(models("llama")).to(dtype)
    with refreshkv.attach(model, method=name, budget=8):
        assert torch.isfinite(logits(model, left_padded([40, 23]), 6)).all()


def test_what_attach_refuses(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="did you mean 'h2o'"):
        refreshkv.attach(llama, method="h20")
    with pytest.raises(ValueError, match="unknown setting of tova: 'stride'"):
        refreshkv.attach(llama, method="tova", stride=3)
    with pytest.raises(ValueError, match="not both"):
        refreshkv.attach(llama, refreshkv.RefreshConfig(), method="tova")
    with pytest.raises(ValueError, match="drop preset"):
        refreshkv.attach(llama, method="no-refresh", preset="paper-llama")


def test_the_mask_of_a_prompt_is_not_kept(llama: PreTrainedModel) -> None:
    with torch.no_grad(), refreshkv.attach(llama, method="h2o") as session:
        cache = session.new_cache()
        llama(**left_padded([40, 23]), past_key_values=cache)
        last = cache.layers[0]._last_mask
        assert last._mask is not None and last._mask() is None
        assert last._visible.shape == (2, 40)
