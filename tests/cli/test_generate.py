"""`refreshkv generate`: the JSON contract, what reaches the model, and what it says elsewhere."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refreshkv import RefreshConfig
from refreshkv.cli.generate import command

PROMPT = "The quick brown fox\n"


def greedy(folder: Path, prompt: str, new: int) -> str:
    """The same by transformers alone."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_json_contract(tiny: Path, run: Callable[..., Any], last_json: Callable[..., Any]) -> None:
    result = run(
        "generate",
        "--model",
        tiny,
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        12,
        "--preset",
        "paper-llama",
        "--budget",
        "8",
        "--json",
    )
    record = last_json(result)
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    assert isinstance(record.pop("text"), str)
    stats, seconds, config = record.pop("stats"), record.pop("seconds"), record.pop("config")
    assert record == {
        "new_tokens": 12,
        "prompt_tokens": len(PROMPT),
        "mode": "refresh",
        "method": None,
        "budget_tokens": 8,
        "model": str(tiny),
    }
    assert set(stats) == {
        "full_steps",
        "partial_steps",
        "full_share",
        "kv_read_share",
        "effective_stride",
        "acceptance",
        "tokens_per_full_pass",
        "passes_per_token",
    }
    for name in ("acceptance", "tokens_per_full_pass", "passes_per_token"):
        assert stats[name] is None
    assert (
        stats["full_steps"] + stats["partial_steps"] == 2 * 11
    )  # two layers; the first token comes with the prompt
    assert 0 < stats["kv_read_share"] < 1
    assert set(seconds) == {"prefill", "decode"}
    assert all(value > 0 for value in seconds.values())
    assert {"budget", "stride", "threshold", "mode"} <= set(config)


def test_the_default_is_lossless(
    tiny: Path, run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    args = ("generate", "--model", tiny, "--prompt", PROMPT, "--max-new-tokens", 20)
    expected = greedy(tiny, PROMPT, 20)
    for given in ((), ("--mode", "exact"), ("--mode", "exact", "--budget", "3")):
        assert run(*args, *given).stdout == expected + "\n"
        result = run(*args, *given, "--json", "--progress")
        assert "/20" in result.stderr
        record = last_json(result)
        assert record["text"] == expected
        assert record["mode"] == "exact"
        assert record["budget_tokens"] == (3 if "--budget" in given else 2)  # a 16th of 20
        stats = record["stats"]
        assert stats["full_steps"] + stats["partial_steps"] == 2 * 19
        assert stats["acceptance"] is None or 0 <= stats["acceptance"] <= 1
        assert 1 <= stats["tokens_per_full_pass"] <= 19
        assert stats["passes_per_token"] >= 1 / stats["tokens_per_full_pass"]


def test_a_schedule_asks_for_the_lossy_mode(
    tiny: Path, run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    args = ("generate", "--model", tiny, "--prompt", PROMPT, "--max-new-tokens", 4, "--json")
    for given in (("--mode", "refresh"), ("--stride", "5"), ("--threshold", "0.85")):
        record = last_json(run(*args, *given))
        assert (record["mode"], record["budget_tokens"]) == ("refresh", 3)
    result = run(*args, "--mode", "exact", "--stride", "5")
    assert result.exit_code == 2
    assert "stride has no effect in mode 'exact'" in result.stderr


def test_full_mode_is_transformers(
    tiny: Path, run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    args = ("generate", "--model", tiny, "--prompt", PROMPT, "--max-new-tokens", 20, "--json")
    record = last_json(run(*args, "--mode", "full"))
    assert record["text"] == greedy(tiny, PROMPT, 20)
    assert record["budget_tokens"] is None
    assert record["stats"]["full_share"] == 1
    assert record["stats"]["kv_read_share"] == 1
    # A budget that holds everything gives the same text.
    assert (
        last_json(run(*args, "--budget", "1.0", "--stride", "1", "--threshold", "none"))["text"]
        == record["text"]
    )


def test_streamed_text(tiny: Path, run: Callable[..., Any], last_json: Callable[..., Any]) -> None:
    args = ("generate", "--model", tiny, "--prompt", PROMPT, "--max-new-tokens", 20)
    streamed = run(*args)
    assert streamed.exit_code == 0
    assert streamed.stdout == last_json(run(*args, "--json"))["text"] + "\n"
    assert streamed.stderr.count("\n") == 1
    assert "20 tokens after 20" in streamed.stderr


@pytest.mark.parametrize(("budget", "tokens"), [("1", 1), ("1.0", 20), ("0.5", 10), ("7", 7)])
def test_budget_spelling(
    budget: str, tokens: int, tiny: Path, run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    result = run(
        "generate",
        "--model",
        tiny,
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        3,
        "--budget",
        budget,
        "--json",
    )
    assert last_json(result)["budget_tokens"] == tokens


def test_settings_reach_the_config(
    tiny: Path, run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    args = (
        "generate",
        "--model",
        tiny,
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        8,
        "--budget",
        "4",
        "--json",
    )
    record = last_json(run(*args, "--preset", "paper-qwen", "--stride", "never"))
    assert record["config"]["stride"] is None
    assert record["stats"]["full_steps"] == 0
    assert record["stats"]["effective_stride"] is None
    record = last_json(run(*args, "--preset", "paper-qwen"))
    assert record["config"]["threshold"] == 0.95


# Every field of `RefreshConfig`, as typed and as it arrives.
SETTINGS: dict[str, tuple[str, Any]] = {
    "budget": ("8", 8),
    "group_reduction": ("mean", "mean"),
    "pool_kernel": ("3", 3),
    "recent": ("2", 2),
    "successor": ("1", 1),
    "window": ("4", 4),
    "anchor": ("0.25", 0.25),
    "ring": ("indexed", "indexed"),
    "stride": ("never", None),
    "threshold": ("none", None),
    "decide": ("head", "head"),
    "trigger": ("lse-drop", "lse-drop"),
    "drop": ("1.5 --trigger=lse-drop", 1.5),
    "score_only": ("", True),
    "drafter": ("mixed", "mixed"),
    "draft": ("3", 3),
    "confidence": ("0.5", 0.5),
    "key_bits": ("4 --mode=mixed", 4),
    "value_bits": ("3 --mode=mixed", 3),
    "skip": ("0.1 --mode=mixed", 0.1),
    "mode": ("refresh", "refresh"),
}


def test_every_setting_has_an_option_that_describes_it(run: Callable[..., Any]) -> None:
    assert list(SETTINGS) == [field.name for field in dataclasses.fields(RefreshConfig)]
    said = " ".join(run("generate", "--help").stdout.split())
    for name in SETTINGS:
        option = next(o for o in command.params if o.name == name)
        assert option.help and " ".join(option.help.split())[:40] in said


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_arrives(
    tiny: Path, run: Callable[..., Any], last_json: Callable[..., Any], name: str
) -> None:
    typed, expected = SETTINGS[name]
    option = (f"--{name.replace('_', '-')}", *typed.split())
    base = ("generate", "--model", tiny, "--prompt", PROMPT, "--max-new-tokens", 3, "--json")
    assert last_json(run(*base, *option))["config"][name] == expected


def test_a_method_of_the_comparison(
    tiny: Path, run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    base = ("generate", "--model", tiny, "--prompt", PROMPT, "--max-new-tokens", 5, "--json")
    record = last_json(run(*base, "--method", "snapkv", "--budget", "4"))
    assert (record["method"], record["budget_tokens"]) == ("snapkv", 4)
    assert record["stats"]["full_steps"] == 0
    for wrong in (("--method", "snapvk"), ("--method", "snapkv", "--stride", "3")):
        result = run(*base, *wrong)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--mode", "full", "--score-only"), "score_only has no effect in mode 'full'"),
        (("--preset", "fast", "--threshold", "0.5"), "threshold has no effect in mode 'mixed'"),
        (("--preset", "fast", "--draft", "3"), "draft has no effect in mode 'mixed'"),
        (("--key-bits", "4"), "key_bits has no effect with drafter 'partial'"),
        (("--drop", "1"), "drop has no effect with trigger 'query'"),
        (("--mode", "refresh", "--draft", "3"), "draft has no effect in mode 'refresh'"),
        (("--method", "full", "--stride", "3"), "stride has no effect in mode 'full'"),
        (("--method", "quest", "--mode", "full"), "unknown setting of quest: 'mode'"),
    ],
)
def test_a_setting_that_nothing_reads(
    tiny: Path, run: Callable[..., Any], given: tuple[str, ...], said: str
) -> None:
    refused = run("generate", "--model", tiny, "--prompt", PROMPT, *given)
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    assert said in refused.stderr


def test_nothing_to_decode(
    tiny: Path, run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    """One token comes with the prompt; no step follows."""
    args = ("generate", "--model", tiny, "--prompt", PROMPT, "--max-new-tokens", 1)
    record = last_json(run(*args, "--json"))
    assert record["new_tokens"] == 1
    assert record["stats"]["full_share"] is None
    assert run(*args).exit_code == 0


def test_prompt_sources_agree(
    tiny: Path, tmp_path: Path, run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    """Byte for byte: blank lines, carriage returns and the last newline stay."""
    prompt = "\n line\r\n\n\tcafé \n\n"
    file = tmp_path / "prompt.txt"
    file.write_bytes(prompt.encode())
    args = ("generate", "--model", tiny, "--max-new-tokens", 4, "--json")
    sources: list[tuple[tuple[Any, ...], bytes]] = [
        (("--prompt", prompt), b""),
        (("--prompt-file", file), b""),
        (("--prompt-file", "-"), prompt.encode()),
        ((), prompt.encode()),
    ]
    records = [last_json(run(*args, *source, stdin=stdin)) for source, stdin in sources]
    assert {record["prompt_tokens"] for record in records} == {len(prompt.encode())}
    assert len({record["text"] for record in records}) == 1


def test_sampling_follows_the_seed(
    tiny: Path, run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    args = (
        "generate",
        "--model",
        tiny,
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        16,
        "--temperature",
        "1.5",
        "--json",
    )
    texts = [last_json(run(*args, "--seed", seed))["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_chat_template(
    tiny: Path, tmp_path: Path, run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (tmp_path / "chat_template.jinja").write_text(template)
    args = ("generate", "--model", tmp_path, "--prompt", "hello", "--max-new-tokens", 2, "--json")
    assert last_json(run(*args, "--chat"))["prompt_tokens"] == len("<user>hello<assistant>")
    assert last_json(run(*args))["prompt_tokens"] == len("hello")


def test_dtype(tiny: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import refreshkv

    seen: list[torch.dtype] = []
    attach = refreshkv.attach
    monkeypatch.setattr(
        refreshkv,
        "attach",
        lambda m, **given: (seen.append(m.dtype), attach(m, **given))[1],
        raising=False,
    )
    args = ("generate", "--model", tiny, "--prompt", "hello", "--max-new-tokens", 2)
    assert run(*args, "--dtype", "bfloat16").exit_code == 0
    assert run(*args).exit_code == 0
    assert seen == [torch.bfloat16, torch.float32]


def test_progress_bar_goes_to_stderr(
    tiny: Path, run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    args = ("generate", "--model", tiny, "--prompt", "hello", "--max-new-tokens", 2, "--json")
    result = run(*args, "--progress")
    assert "token" in result.stderr
    last_json(result)
    assert result.stdout.count("\n") == 1
    assert run(*args, "--no-progress").stderr == ""


def test_a_failure_is_one_line(
    tiny: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **given: Any) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr("refreshkv.attach", broken, raising=False)
    args = ("generate", "--model", tiny, "--prompt", "hello", "--max-new-tokens", 2)
    result = run(*args)
    assert result.exit_code == 1
    assert (
        result.stderr
        == "refreshkv: error: RuntimeError: out of memory (REFRESHKV_DEBUG=1 shows the traceback)\n"
    )
    monkeypatch.setenv("REFRESHKV_DEBUG", "1")
    assert "Traceback" in run(*args).stderr
