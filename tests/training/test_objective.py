"""The tail of a pass is what decoding computes step by step; with everything kept it is ordinary training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import refreshkv
from refreshkv import RefreshConfig
from refreshkv.hosts.transformers.support import UnsupportedModelError
from refreshkv.hosts.transformers.versions import CACHE
from refreshkv.kernels.backend import REFERENCE
from refreshkv.kernels.options import AttendOptions
from refreshkv.training.objective import PartialTail, tail_losses
from refreshkv.training.tail import Tail
from tests.conftest import ARCHITECTURES, build
from tests.hosts import architectures
from tests.hosts.prompts import left_padded, tokens

S, T = 20, 170
NEVER = RefreshConfig(budget=12, stride=None)
CONFIGS = {
    "never": NEVER,
    "share": RefreshConfig(budget=0.11, stride=None, group_reduction="mean", pool_kernel=1),
    "stride": RefreshConfig(budget=16, stride=7, threshold=None, recent=4, window=4),
    "stride-that-ends-full": RefreshConfig(budget=16, stride=10, threshold=None),
    "every-step-full": RefreshConfig(budget=16, stride=1, threshold=None),
    "less-than-the-tail": RefreshConfig(budget=6, stride=None),
    "a-little-more-than-the-prompt": RefreshConfig(budget=T - S + 5, stride=None),
    "mixed": RefreshConfig(mode="mixed", budget=9),
    "mixed-all-read": RefreshConfig(mode="mixed", budget=3, key_bits=3, value_bits=1, skip=0.0),
}
WITH_FULL_LAYERS = [name for name in ARCHITECTURES if name != "mistral-window"]


def stepwise(model: PreTrainedModel, ids: Tensor, config: RefreshConfig, tail: int = S) -> Tensor:
    """`[B, T, V]`: logits of a prompt, and of `tail` decode steps after it."""
    first = ids.shape[1] - tail
    with torch.no_grad(), refreshkv.attach(model, config) as session:
        cache = session.new_cache()
        with cache.prompt():
            parts = [model(ids[:, :first], **{CACHE: cache}).logits]
        for i in range(first, ids.shape[1]):
            parts.append(model(ids[:, i : i + 1], **{CACHE: cache}).logits)
    return torch.cat(parts, 1)


def at_once(model: PreTrainedModel, ids: Tensor, tail: Tail) -> Tensor:
    with PartialTail(model, tail):
        return model(ids, use_cache=False).logits


def gradients(model: PreTrainedModel, ids: Tensor, tail: Tail | None) -> dict[str, Tensor]:
    """Of the loss over all tokens; and the loss."""
    model.zero_grad()
    if tail is None:
        loss = tail_losses(model(ids, use_cache=False).logits, ids, S).mean
        loss.backward()
    else:
        with PartialTail(model, tail) as objective:
            loss = objective.losses(model(ids, use_cache=False).logits, ids).mean
            loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {**found, "loss": loss.detach()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_the_tail_is_what_decoding_computes(
    models: Callable[[str], PreTrainedModel], name: str, config: RefreshConfig
) -> None:
    model, ids = models(name), tokens(2, T)
    ours = at_once(model, ids, Tail(S, config, keep="budget"))
    torch.testing.assert_close(ours, stepwise(model, ids, config), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", WITH_FULL_LAYERS)
def test_of_every_proven_architecture(models: Callable[[str], PreTrainedModel], name: str) -> None:
    model, ids = models(name), tokens(2, 60)
    ours = at_once(model, ids, Tail(S, NEVER, keep="budget"))
    torch.testing.assert_close(ours, stepwise(model, ids, NEVER), rtol=0, atol=1e-3)
    everything = at_once(model, ids, Tail(S, RefreshConfig(budget=60, stride=None)))
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    torch.testing.assert_close(everything, plain, rtol=0, atol=1e-3)
    assert not torch.allclose(ours, plain, atol=0.1), "the tail changes nothing"


@pytest.mark.slow
@pytest.mark.parametrize("config", ["never", "stride", "mixed"])
def test_of_a_real_model(smollm2: Path, config: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    readme = Path(__file__).parents[2] / "README.md"
    ids = tokenizer(readme.read_text(), return_tensors="pt")["input_ids"][:, :400]
    tail = Tail(S, CONFIGS[config], keep="budget")
    with torch.no_grad():
        ours, plain = at_once(model, ids, tail), model(ids, use_cache=False).logits
    torch.testing.assert_close(ours, stepwise(model, ids, CONFIGS[config]), rtol=0, atol=5e-3)
    assert not torch.allclose(ours, plain, atol=0.5), "the tail changes nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures.TYPES)
def test_of_every_architecture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Some of these models have weights of 1e-30, whose order is a matter of the last bit.
    monkeypatch.setattr("refreshkv.cache.store.backend_for", lambda device: REFERENCE)
    try:
        model = architectures.build(name)
        ids = tokens(2, 60)
        with torch.no_grad():
            plain = model(ids, use_cache=False).logits
    except Exception as error:
        pytest.skip(f"no tiny model that runs alone: {error}")
    try:
        objective = PartialTail(model, Tail(S, NEVER, keep="budget"))
    except UnsupportedModelError as error:
        pytest.skip(f"refused: {error}")
    with torch.no_grad(), objective:
        ours = model(ids, use_cache=False).logits
    assert not torch.equal(ours, plain), "the tail changes nothing"
    spread = plain.std()
    full = stepwise(model, ids, RefreshConfig(mode="full"))
    if float((full - plain).abs().max() / spread) > 1e-3:
        pytest.skip("one token at a time this model computes something else by itself")
    expected = stepwise(model, ids, NEVER)
    torch.testing.assert_close(ours / spread, expected / spread, rtol=0, atol=2e-3)


@pytest.mark.parametrize("keep", ["all", "budget"])
@pytest.mark.parametrize(
    ("implementation", "near"),
    [
        ("sdpa", 1e-10),
        ("eager", 1e-6),
    ],  # transformers' eager softmax is in float32 whatever it gets
)
def test_with_everything_kept_it_is_ordinary_training(
    implementation: str, near: float, keep: Any
) -> None:
    model, ids = build("qwen3").double(), tokens(2, 60)
    model.set_attn_implementation(implementation)
    budget = 60 if keep == "budget" else 40
    everything = Tail(S, RefreshConfig(budget=budget, stride=None), keep=keep)
    ours, plain = gradients(model, ids, everything), gradients(model, ids, None)
    assert ours.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-9, atol=near)


def test_the_papers_tail_keeps_its_selection() -> None:
    """Against a mask over everything: the K best of token L, and all after it."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 30, 8, generator=generator, dtype=torch.float64)
        for heads in (2, 1, 1)
    )
    scale, first = 0.5, 22
    tail = Tail(30 - first, RefreshConfig(budget=5, stride=None, pool_kernel=1))
    ours = tail.attend(query, key, value, AttendOptions(scale=scale))
    logits = query @ key.transpose(-1, -2) * scale
    best = logits[:, :, first - 1, :first].softmax(-1).amax(1).topk(5).indices[0]
    seen = torch.ones(30, 30, dtype=torch.bool).tril()
    seen[first:, :first] = False
    seen[first:, best] = True
    expected = logits.masked_fill(~seen, float("-inf")).softmax(-1) @ value
    torch.testing.assert_close(ours, expected[:, :, first:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", ["never", "stride"])
def test_a_step_along_the_gradient_changes_the_loss_as_it_says(config: str) -> None:
    model, ids = build("llama").double(), tokens(1, T)
    tail, step = Tail(S, CONFIGS[config]), 3e-6  # norms are in float32, so not a smaller one
    found = gradients(model, ids, tail)
    slope = sum(float(g.square().sum()) for name, g in found.items() if name != "loss")
    losses = []
    for steps in (1, -2):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight += steps * step * found[name]
        losses.append(float(gradients(model, ids, tail)["loss"]))
    assert losses[0] - losses[1] == pytest.approx(2 * step * slope, rel=1e-2)


@pytest.mark.parametrize("config", ["never", "stride", "mixed"])
def test_gradients_with_checkpoints(config: str) -> None:
    model, ids = build("llama").double(), tokens(1, T)
    tail = Tail(S, CONFIGS[config])
    found = gradients(model, ids, tail)
    model.train()
    older = model.gradient_checkpointing_enable  # its name before 5.23
    getattr(model, "activation_checkpointing_enable", older)()
    again = gradients(model, ids, tail)
    for name in found:
        torch.testing.assert_close(again[name], found[name], rtol=1e-9, atol=1e-10)


def test_rounding_has_the_gradient_of_what_it_rounds() -> None:
    """Where all that is rounded lies on its grid, the straight-through gradient is the plain one."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 70, 4, generator=generator)
    key, value = (torch.randint(0, 4, (1, 1, 70, 4), generator=generator).float() for _ in range(2))
    results = []
    for config in (RefreshConfig(mode="mixed", budget=1, skip=0.0), RefreshConfig(budget=70)):
        states = [state.clone().requires_grad_() for state in (query, key, value)]
        if config.mode == "refresh":
            config = RefreshConfig(budget=70, stride=None)
        output = Tail(5, config).attend(*states, AttendOptions(scale=0.3))
        output.square().sum().backward()
        results.append([output, *(state.grad for state in states)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


def test_in_half_precision_and_under_autocast(llama: PreTrainedModel) -> None:
    ids = tokens(2, 60)
    exact = at_once(llama, ids, Tail(S, NEVER))
    with torch.autocast("cpu", torch.bfloat16):
        cast = at_once(llama, ids, Tail(S, NEVER))
    half = copy.deepcopy(llama).bfloat16()
    for rough in (cast, at_once(half, ids, Tail(S, NEVER))):
        assert bool(rough.isfinite().all())
        # Selections may differ in a few places; the logits have a spread of about 10.
        assert float((rough.float() - exact).detach().abs().median()) < 0.25 * float(
            exact.detach().std()
        )
    found = gradients(half, ids, Tail(S, NEVER))
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())


def test_under_the_compiler_without_a_break(llama: PreTrainedModel) -> None:
    ids = tokens(1, 60)
    with PartialTail(llama, Tail(S, CONFIGS["stride"])) as objective:
        torch._dynamo.reset()
        compiled = torch.compile(llama, backend="aot_eager", fullgraph=True)
        ours = objective.losses(compiled(ids, use_cache=False).logits, ids).mean
        plain = objective.losses(llama(ids, use_cache=False).logits, ids).mean
    torch.testing.assert_close(ours, plain)


def test_the_losses_of_both_parts_add_up() -> None:
    logits = torch.randn(2, 9, 7, generator=torch.Generator().manual_seed(0))
    ids = tokens(2, 9, vocab=7)
    losses = tail_losses(logits, ids, 3)
    each = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert (losses.first_tokens, losses.tail_tokens) == (12, 4)
    torch.testing.assert_close(losses.first, each[:, :6].sum())
    torch.testing.assert_close(losses.tail, each[:, 6:].sum())
    torch.testing.assert_close(losses.mean, each.mean())


def test_the_model_is_left_as_it_was(llama: PreTrainedModel) -> None:
    before = [(name, set(vars(module))) for name, module in llama.named_modules()]
    implementation = llama.config._attn_implementation
    with PartialTail(llama, Tail(S, NEVER)):
        assert llama.config._attn_implementation != implementation
        assert "refreshkv" not in str(llama.config.to_dict())
    assert llama.config._attn_implementation == implementation
    assert [(name, set(vars(module))) for name, module in llama.named_modules()] == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 5}, "threshold"),
        ({"stride": None, "successor": 2}, "successor"),
        ({"stride": None, "anchor": 0.5}, "anchor"),
        ({"trigger": "lse-drop", "stride": None}, "trigger='query'"),
        ({"mode": "exact"}, "nothing to train"),
    ],
)
def test_settings_that_need_one_step_after_another(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tail(S, RefreshConfig(**settings))


def test_what_cannot_be_served_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="at least 1 token"):
        Tail(0, NEVER)
    with pytest.raises(UnsupportedModelError, match="no full-attention layer"):
        PartialTail(build("mistral-window"), Tail(S, NEVER))
    with PartialTail(llama, Tail(S, NEVER)):
        with pytest.raises(ValueError, match="has no tail of 20"):
            llama(tokens(1, S), use_cache=False)
        with pytest.raises(ValueError, match="leave out the padding"):
            llama(**left_padded([40, 50]), use_cache=False)
        with pytest.raises(RuntimeError, match="use_cache=False"):
            llama.generate(tokens(1, 40), max_new_tokens=3)
        with pytest.raises(RuntimeError, match="has a tail already"):
            PartialTail(llama, Tail(S, NEVER)).__enter__()
