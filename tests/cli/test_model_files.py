"""Folders that only look like a model: one complete line that names the file, the key or the setting, exit code 2."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from experiments import __main__ as experiments
from refreshkv import demo, weights
from refreshkv.cli.loading import load
from tests.cli.gguf_files import write_gguf

Weights = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj.weight"
GENERATE = ("--prompt", "hi", "--max-new-tokens", 2, "--json")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def put(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite(folder: Path, change: Callable[[Weights], object]) -> None:
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    change(stored)
    save_file(stored, file, metadata={"format": "pt"})


def refused(result: Any, said: str) -> None:
    assert result.exit_code == 2, (result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.isprintable() or result.stderr[:-1].isprintable()
    assert re.search(said, result.stderr), (said, result.stderr)


BROKEN_WEIGHTS: dict[str, tuple[Callable[[Weights], object], str]] = {
    "one missing": (lambda w: w.pop(UP), rf"\(its files lack weights of the model: {UP}\); give a"),
    "many missing": (
        lambda w: [w.pop(key) for key in list(w) if "layers.1" in key],
        r"lack weights of the model: model\.layers\.1\.\S+, \S+, \S+ and 6 more\); give",
    ),
    "no head": (lambda w: w.pop("lm_head.weight"), r"lack weights of the model: lm_head\.weight\)"),
    "one too many": (
        lambda w: w.update({"model.layers.0.\x1b[31m\u202e": torch.ones(1)}),
        r"hold weights that the model has no place for: model\.layers\.0\.\\x1b\[31m\\u202e\)",
    ),
    "other names": (
        lambda w: [w.update({f"x.{key}": w.pop(key)}) for key in list(w)],
        r"lack weights .* and 18 more; its files hold weights .*: x\.lm_head\.weight, .* 18 more\)",
    ),
    "another shape": (
        lambda w: w.update({UP: torch.ones(4, 5)}),
        rf"another shape: {UP} \(4x5 in the files, 64x32 in the model\)\); give",
    ),
    "nothing": (lambda w: w.clear(), "lack weights of the model: .* and 18 more"),
}


@pytest.mark.parametrize("name", BROKEN_WEIGHTS)
def test_weights_that_are_not_those_of_the_model(
    name: str, folder: Path, run: Callable[..., Any]
) -> None:
    change, said = BROKEN_WEIGHTS[name]
    rewrite(folder, change)
    line = f"cannot load the weights of model '.*model' .*{said}"
    refused(run("generate", "--model", folder, *GENERATE), line)
    out = folder.parent / "out"
    asked = ("--tasks", "key-value", "--methods", "full", "--out", out)
    refused(run("eval", "--model", folder, *asked), line)
    assert not out.exists()


def shards(folder: Path) -> list[Path]:
    """The weights of the folder in several files."""
    model = LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    return sorted(folder.glob("model-*.safetensors"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


BROKEN_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (
        lambda f: cut(f / "model.safetensors"),
        r"weights .*\(model\.safetensors: .*incomp",
    ),
    "empty": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        r"\(model\.safetensors: .*small",
    ),
    "no shard": (lambda f: shards(f)[1].unlink(), "weights .*model-00002-of-00007.safetensors"),
    "shard cut off": (
        lambda f: cut(shards(f)[2]),
        r"weights .*\(model-00003-of-00007.safetensors: ",
    ),
    "no index": (
        lambda f: [shards(f), (f / "model.safetensors.index.json").unlink()],
        r"weights .*no file named model\.safetensors",
    ),
    "index of nothing": (
        lambda f: [shards(f), (f / "model.safetensors.index.json").write_text("{}")],
        "weights .*KeyError: 'weight_map'",
    ),
    **{
        f"{file}: {text[:9]}": (
            lambda f, file=file, text=text: (f / file).write_text(text),
            rf"{file}' is not a JSON object \({said}",
        )
        for file in ("config.json", "generation_config.json", "tokenizer_config.json")
        for text, said in (
            ("{", "Expecting property name"),
            ("", "Expecting value"),
            ("[1]", r"it is list\)"),
            ("5", r"it is int\)"),
            ("null", r"it is NoneType\)"),
            ("[" * 100_000, "RecursionError: "),
            ("\0\0", "Expecting value"),
        )
    },
    "no tokenizer": (
        lambda f: [file.unlink() for file in f.glob("tokenizer*")],
        "the tokenizer of model .*Couldn't instantiate the backend tokenizer from one of: .* give",
    ),
    "tokenizer of nothing": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "the tokenizer of model .*KeyError",
    ),
    "end that is no token": (
        lambda f: put(f / "generation_config.json", eos_token_id="x"),
        r"eos_token_id in its generation_config\.json is 'x', which is no token\)",
    ),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_files_that_are_broken(name: str, folder: Path, run: Callable[..., Any]) -> None:
    change, said = BROKEN_FILES[name]
    change(folder)
    refused(run("generate", "--model", folder, *GENERATE), said)


ODD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"hidden_size": "32"}, r"'hidden_size' expected int, got str \(value: '32'\)\); give"),
    "none": ({"num_hidden_layers": None}, "'num_hidden_layers' expected int, got NoneType"),
    "fraction": ({"hidden_size": 32.5}, "expected int, got float"),
    "negative": ({"num_hidden_layers": -1}, "num_hidden_layers is -1, which is no size"),
    "zero": ({"hidden_size": 0}, "hidden_size is 0, which is no size"),
    "huge": ({"vocab_size": 10**20}, "vocab_size is 1(0{20}), which is no size"),
    "no context": ({"max_position_embeddings": -5}, "max_position_embeddings is -5"),
    "heads": ({"num_attention_heads": 5}, "is not a multiple of the number of attention heads"),
    "KV heads": (
        {"num_key_value_heads": 3},
        "num_key_value_heads is 3, which does not divide num_attention_heads, 4",
    ),
    "unknown type": ({"model_type": "lama"}, "model type `lama` but Transformers does not"),
    "type that shouts": ({"model_type": "\x1b[31mx\u202e\r\n"}, r"`\\x1b\[31mx\\u202e ` but"),
    "type that is a list": ({"model_type": ["llama"]}, "TypeError: unhashable"),
    "unknown dtype": ({"dtype": "float33"}, "has no attribute 'float33'"),
    "head of odd width": ({"head_dim": 7}, "an even rotary dimension, but got `head_dim`=7"),
    "inner config": ({"text_config": 5}, "AttributeError: 'int'"),
}


@pytest.mark.parametrize("name", ODD_CONFIGS)
def test_configs_that_make_no_sense(name: str, folder: Path, run: Callable[..., Any]) -> None:
    if name == "head of odd width" and transformers.__version__.startswith("5.16."):
        pytest.skip("this transformers finds nothing odd in it")
    changes, said = ODD_CONFIGS[name]
    put(folder / "config.json", **changes)
    line = f"cannot load the config of model '.*model' .*{said}"
    refused(run("generate", "--model", folder, *GENERATE), line)
    refused(run("info", "--model", folder), line)
    refused(run("bench", "plan", "--model", folder), line)


def test_a_tokenizer_larger_than_the_model(folder: Path, run: Callable[..., Any]) -> None:
    tokenizer = Fast.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(folder)
    said = f"the tokenizer .*go up to number {rows}, '<one more>', but the model has {rows} embed"
    refused(run("generate", "--model", folder, *GENERATE), said)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(rows + 1)
    model.save_pretrained(folder)
    assert run("generate", "--model", folder, *GENERATE).exit_code == 0


def inverse_frequencies(stored: Weights) -> None:
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


def test_what_a_model_may_lack_and_have(folder: Path, run: Callable[..., Any]) -> None:
    """Embeddings that are padded or the head too, buffers of old checkpoints, shards, other dtypes."""
    config = LlamaConfig.from_pretrained(folder)
    for changes in ({"vocab_size": 320}, {"tie_word_embeddings": True}):
        for name, value in changes.items():
            setattr(config, name, value)
        LlamaForCausalLM(config).half().save_pretrained(folder)
        (file,) = folder.glob("*.safetensors")
        assert ("lm_head.weight" in load_file(file)) != config.tie_word_embeddings
        rewrite(folder, inverse_frequencies)
        assert run("generate", "--model", folder, *GENERATE).exit_code == 0
    rewrite(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert run("generate", "--model", folder, *GENERATE).exit_code == 0
    shards(folder)
    assert run("generate", "--model", folder, *GENERATE).exit_code == 0


def test_experts_of_which_some_are_missing(folder: Path, run: Callable[..., Any]) -> None:
    """They are put together while they are read, and transformers says what went wrong in a table only."""
    shared = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None}
    sizes = LlamaConfig.from_pretrained(folder).to_dict()
    named = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    named += ("num_hidden_layers", "num_key_value_heads", "max_position_embeddings")
    config = MixtralConfig(**{name: sizes[name] for name in named}, **shared)
    MixtralForCausalLM(config).save_pretrained(folder)
    assert run("generate", "--model", folder, *GENERATE).exit_code == 0
    rewrite(folder, lambda w: [w.pop(key) for key in list(w) if "experts.1.w1" in key])
    said = r"\(weights that cannot be put together: \S+ \S+mlp\.experts\.gate_up_proj\); give"
    refused(run("generate", "--model", folder, *GENERATE), said)


def test_a_model_that_asks_for_beams_is_streamed(folder: Path, run: Callable[..., Any]) -> None:
    put(folder / "generation_config.json", num_beams=4)
    assert (
        run("generate", "--model", folder, "--prompt", "hi", "--max-new-tokens", 2).exit_code == 0
    )


def test_the_bundled_model_is_held_to_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]
) -> None:
    monkeypatch.setattr(demo, "MODEL_PATH", folder)
    demo.load()
    rewrite(folder, lambda w: w.pop(UP))
    with pytest.raises(weights.ModelFilesError, match=rf"lack .*: {UP}\); reinstall refreshkv$"):
        demo.load()
    refused(run("generate", "--model", "demo", *GENERATE), "reinstall refreshkv$")


def test_the_experiments_say_it_too(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rewrite(folder, lambda w: w.pop(UP))
    out = str(folder / "out")
    given = ["--model", str(folder), "--data", str(folder), "--processes", "1", "--out", out]
    with pytest.raises(SystemExit) as stopped:
        experiments.main(["continuation", *given])
    assert stopped.value.code == 2
    said, where = capfd.readouterr().err.splitlines()
    assert re.fullmatch(rf"refreshkv: error: cannot load the weights of .* \(.*{UP}\); .*", said)
    assert where.startswith("error: the run ")


@pytest.mark.parametrize("end", ["<|endoftext|>", "<eos>"])
def test_a_gguf_file_is_a_model(
    end: str, tmp_path: Path, run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    """Alone or in its folder, in the dtype asked for. transformers adds GPT-2's end to the tokens of one without it."""
    file = tmp_path / "tiny.gguf"
    written = write_gguf(file, end)
    loaded = load(str(file))
    tokens = loaded.tokenizer("abc", return_tensors="pt")["input_ids"]
    assert tokens.shape == (1, 2)
    got, wanted = loaded.model(tokens).logits, written(tokens).logits
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
    for place in (file, tmp_path):
        assert load(str(place), dtype="bfloat16").model.dtype == torch.bfloat16
        result = run("generate", "--model", place, *GENERATE)
        assert last_json(result)["new_tokens"] <= 2
        assert "%|" not in result.stderr  # no bar of the library that reads it
        found = last_json(run("info", "--model", place, "--json"))["model"]
        assert found["supported"] and found["max_positions"] == 128


def test_gguf_files_that_are_none(
    folder: Path, tmp_path: Path, run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    refused(run("generate", "--model", file, *GENERATE), r"the config of model '.*tiny\.gguf' \(")
    write_gguf(file)
    cut(file)
    refused(run("generate", "--model", file, *GENERATE), r"the \w+ of model '.*tiny\.gguf' \(")
    shutil.copy(file, folder / "other.gguf")  # safetensors go first
    assert run("generate", "--model", folder, *GENERATE).exit_code == 0
    (folder / "model.safetensors").unlink()
    shutil.copy(file, folder / "two.gguf")
    said = r"has several GGUF files \(other\.gguf, two\.gguf\); give the one that is meant"
    refused(run("generate", "--model", folder, *GENERATE), said)
    assert run("info", "--model", folder).exit_code == 0  # a config is enough


def test_a_lack_of_memory_is_not_the_fault_of_the_files() -> None:
    with pytest.raises(RuntimeError, match="allocate"), weights.reading("a model"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 GB")
    with pytest.raises(weights.ModelFilesError, match="cannot load x"), weights.reading("x"):
        raise RuntimeError("no file in /models/memory")
