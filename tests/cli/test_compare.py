"""`refreshkv compare`: the table, the JSON contract, an interruption, presets in files and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from refreshkv.cli import compare_view
from refreshkv.cli.generate import STATS
from refreshkv.evals import candidates, decoding
from refreshkv.evals.candidates import Candidate
from refreshkv.evals.compare import Comparison, Difference, Row, Text
from refreshkv.evals.decoding import Continued
from refreshkv.evals.verdict import judge

PROMPT = "The quick brown fox jumps over it\n"
NEW = 34  # of one prompt; of two half as many are enough for a verdict


@pytest.fixture(autouse=True)
def fast_mode_is_fast(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Milliseconds a token by mode, instead of a clock; "plain" is a model that is not attached."""
    import refreshkv

    pace = {"plain": 10.0, "full": 10.0, "exact": 8.0, "mixed": 12.0, "refresh": 12.0}
    attached: list[str] = []
    attach, original = refreshkv.attach, decoding.continue_rows

    def watched(*args: Any, **given: Any) -> Any:
        session = attach(*args, **given)
        attached.append(session.config.mode)
        return session

    def continue_rows(*args: Any, **given: Any) -> Continued:
        mode = "plain" if given.get("start") is None else attached[-1]
        done = original(*args, **given)
        seconds = pace[mode] / 1e3 * (len(done.tokens[0]) - 1)
        return dataclasses.replace(done, prefill_s=0.1, decode_s=seconds)

    monkeypatch.setattr(refreshkv, "attach", watched, raising=False)
    monkeypatch.setattr(decoding, "continue_rows", continue_rows)
    return pace


@pytest.fixture
def prompts(tmp_path: Path) -> list[Any]:
    """Options for two prompt files."""
    found: list[Any] = []
    for name, text in (("a.txt", PROMPT), ("b.txt", PROMPT.upper())):
        (tmp_path / name).write_text(text)
        found += ["--prompt-file", tmp_path / name]
    return found


def test_json_contract(
    tiny: Path, prompts: list[Any], run: Callable[..., Any], last_json: Callable[..., Any]
) -> None:
    result = run("compare", "--model", tiny, *prompts, "--new-tokens", NEW // 2, "--json")
    record = last_json(result)
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    assert set(record) == {
        *("model", "dtype", "device", "threads", "max_new_tokens", "repeats", "complete"),
        *("prompts", "baseline", "results", "verdict", "preset_file"),
    }
    assert (record["model"], record["dtype"], record["device"]) == (str(tiny), "float32", "cpu")
    assert (record["max_new_tokens"], record["repeats"], record["complete"]) == (NEW // 2, 3, True)
    assert record["prompts"] == [
        {"name": str(name), "prompt_tokens": len(PROMPT), "new_tokens": NEW // 2}
        for name in (prompts[1], prompts[3])
    ]
    assert [row["name"] for row in record["results"]] == ["transformers", "full", "exact", "fast"]
    for row in record["results"]:
        assert set(row) == {
            *("name", "lossless", "config", "stats", "texts", "same", "agreement"),
            *("perplexity_ratio", "rates", "rates_with_prompt", "kv_read_share"),
            *("cache_bytes", "peak_bytes", "tokens_per_s", "speedup", "speedup_least"),
            "speedup_with_prompt",
        }
        assert len(row["texts"]) == 2
        for text in row["texts"]:
            assert set(text) == {"prompt", "new_tokens", "difference", "agreement"}
    theirs, full, exact, fast = record["results"]
    assert theirs["config"] is theirs["stats"] is None
    assert theirs["agreement"] == 1
    assert set(full["stats"]) == set(STATS)
    assert exact["same"] == 2
    assert exact["config"]["mode"] == "exact"
    assert exact["tokens_per_s"] == pytest.approx(125)
    assert exact["speedup"] == exact["speedup_least"] == pytest.approx(1.25)
    assert 0 <= fast["agreement"] <= 1
    assert record["baseline"] == "transformers"  # of equals the first
    assert record["verdict"] == {
        "text": "use exact: 1.25x full attention, the same text in 2 of 2",
        "use": "exact",
        "bar": 0.95,
        "arguments": {"mode": "exact"},
    }
    assert record["preset_file"] is None


def test_table(
    tiny: Path,
    prompts: list[Any],
    run: Callable[..., Any],
    fast_mode_is_fast: dict[str, float],
) -> None:
    result = run(
        "compare",
        *(
            "--model",
            tiny,
            *prompts,
            "--new-tokens",
            NEW // 2,
            "--methods",
            "exact,snapkv:budget=2",
        ),
    )
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    for heading in (*compare_view.HEADINGS, "transformers", "snapkv:budget=2", "2 prompts"):
        assert heading in result.stdout
    *_, verdict, call = result.stdout.splitlines()
    assert verdict == "use exact: 1.25x full attention, the same text in 2 of 2"
    assert call == "  refreshkv.attach(model, mode='exact')"
    fast_mode_is_fast.update(exact=13.0)
    slow = run("compare", "--model", tiny, *prompts, "--new-tokens", NEW // 2, "--methods", "exact")
    assert slow.stdout.splitlines()[-1] == "stay with full attention: exact is 0.77x"


def test_a_lossy_mode_needs_the_bar(
    tiny: Path,
    run: Callable[..., Any],
    last_json: Callable[..., Any],
    fast_mode_is_fast: dict[str, float],
) -> None:
    fast_mode_is_fast.update(refresh=5.0)
    args = ("compare", "--model", tiny, "--prompt", PROMPT, "--new-tokens", NEW, "--json")
    poor = ("--methods", "refreshkv-paper:budget=1:stride=never")
    record = last_json(run(*args, *poor))
    row = record["results"][-1]
    assert row["agreement"] < 0.95
    assert row["texts"][0]["difference"]["token"] > 1
    assert record["verdict"]["use"] is None
    assert "the bar is 95.0%" in record["verdict"]["text"]
    record = last_json(run(*args, *poor, "--bar", row["agreement"]))
    assert record["verdict"]["use"] == row["name"]


def test_progress_goes_to_stderr(tiny: Path, run: Callable[..., Any]) -> None:
    args = ("compare", "--model", tiny, "--prompt", PROMPT, "--new-tokens", 2, "--methods", "exact")
    assert run(*args, "--no-progress").stderr == ""
    shown = run(*args, "--progress").stderr
    assert "exact, timed" in shown and "/14" in shown


def test_an_interruption_prints_what_there_is(
    tiny: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, left = Comparison._continue, [0]

    def stops(self: Comparison, *args: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return original(self, *args)

    monkeypatch.setattr(Comparison, "_continue", stops)
    args = (
        "compare",
        "--model",
        tiny,
        "--prompt",
        PROMPT,
        "--new-tokens",
        NEW,
        "--methods",
        "exact",
    )
    nothing = run(*args)
    assert (nothing.exit_code, nothing.stdout) == (1, "")
    for runs, said in ((2, "no verdict: the speed was not"), (8, "no verdict: 1 of at least 3")):
        left[0] = runs
        stopped = run(*args)
        assert stopped.exit_code == 1
        assert stopped.stderr == "refreshkv: error: interrupted\n"
        assert said in stopped.stdout.splitlines()[-1]
        left[0] = runs
        record = json.loads(run(*args, "--json").stdout)
        assert record["complete"] is False
        assert record["verdict"]["text"].startswith(said)
        rates = [len(row["rates"]) for row in record["results"]]
        assert rates == ([0, 0, 0] if runs == 2 else [2, 2, 1])


def test_tuned_settings_become_a_preset(
    tiny: Path,
    tmp_path: Path,
    run: Callable[..., Any],
    last_json: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(candidates, "LOSSLESS", {"confidence": (0.5,), "draft": (3, 4)})
    file = tmp_path / "own.json"
    base = ("compare", "--model", tiny, "--prompt", PROMPT, "--new-tokens", NEW, "--json")
    args = (*base, "--methods", "exact", "--tune", "--write-preset", file)
    record = last_json(run(*args))
    names = [f"exact:confidence=0.5:draft={draft}" for draft in (3, 4)]
    assert [row["name"] for row in record["results"]] == ["transformers", "full", *names]
    assert record["preset_file"] == str(file)
    assert record["verdict"]["use"] in names
    written = json.loads(file.read_text())
    assert written["model"] == str(tiny)
    assert written["measured"]["speedup"] == pytest.approx(1.25)
    assert written["measured"]["texts"] == written["measured"]["same"] == 1
    assert written["measured"]["device"] == "cpu"
    # `generate` and `compare` take it.
    answer = ("generate", "--model", tiny, "--prompt", PROMPT, "--max-new-tokens", 3, "--json")
    config = last_json(run(*answer, "--preset", file))["config"]
    assert (config["mode"], config["confidence"]) == ("exact", 0.5)
    assert config["draft"] == written["settings"]["draft"]
    assert last_json(run(*answer, "--preset", file, "--draft", 9))["config"]["draft"] == 9
    again = last_json(run(*base, "--preset", file, "--preset", "paper-qwen"))
    assert [row["name"] for row in again["results"][2:]] == [str(file), "paper-qwen"]
    assert again["results"][2]["config"] == config


def test_no_preset_where_nothing_is_to_be_used(
    tiny: Path, tmp_path: Path, run: Callable[..., Any], fast_mode_is_fast: dict[str, float]
) -> None:
    file = tmp_path / "own.json"
    fast_mode_is_fast.update(exact=11.0, plain=20.0)
    args = ("compare", "--model", tiny, "--prompt", PROMPT, "--new-tokens", NEW)
    result = run(*args, "--methods", "exact", "--write-preset", file)
    assert result.exit_code == 0
    assert "use full: 2.00x transformers' own cache" in result.stdout
    assert result.stderr == "refreshkv: note: no preset was written: the verdict names none\n"
    assert not file.exists()


def test_how_python_asks_for_it() -> None:
    named = Candidate("fast:budget=3", {"preset": "fast", "budget": 3})
    assert compare_view.call(named) == "refreshkv.attach(model, preset='fast', budget=3)"
    own = Candidate("own.json", {"preset": {"mode": "exact", "draft": 3}, "draft": 4})
    assert compare_view.call(own) == "refreshkv.attach(model, mode='exact', draft=4)"


def test_model_text_is_shown_and_not_obeyed(
    tiny: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "refreshkv.evals.compare.difference",
        lambda *_: Difference(2, "[red]a\x1b[2J", "b\n\u202e", "", 0.125),
    )
    args = ("compare", "--model", tiny, "--prompt", PROMPT, "--new-tokens", 2, "--repeats", 1)
    out = run(*args, "--methods", "exact").stdout
    line = next(line for line in out.splitlines() if line.startswith("exact, the prompt"))
    assert line == (
        r"exact, the prompt: token 2 differs after '[red]a\x1b[2J': full attention 'b\n\u202e', here the end"
        " (0.12 nats)"
    )
    assert "\x1b" not in out and "\u202e" not in out


def test_the_table_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = Console(highlight=False, markup=False, width=80)
    monkeypatch.setattr("refreshkv.cli.common.console", lambda: narrow)
    large = {"agreement": 0.9995, "perplexity_ratio": 9.8765, "kv_read_share": 1.0}
    measured = {"rates": [1234.5] * 3, "rates_with_prompt": [1234.5] * 3, "stats": None}
    texts = [Text(f"p{i}", 100, None, None) for i in range(12)]
    rows = [
        Row(
            name=name,
            lossless=True,
            candidate=None,
            texts=texts,
            same=12,
            cache_bytes=size,
            peak_bytes=None,
            **large,
            **measured,
        )
        for name, size in (
            ("transformers", None),
            ("full", 2**30),
            ("exact:draft=9", 2**30 + 345 * 2**20),
        )
    ]
    stand_in = SimpleNamespace(rows=lambda: rows, written={text.prompt: 100 for text in texts})
    compare_view.show(stand_in, judge(rows), None)
    out = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in out
    for cells in (
        " ".join(compare_view.HEADINGS),
        "full 12/12 100.0% 9.877 1234.5 1.00x 1.00x 100% 1 GiB",
        "exact:draft=9 12/12 100.0% 9.877 1234.5 1.00x 1.00x 100% +345 MiB",
    ):
        assert cells in [" ".join(line.split()) for line in out.splitlines()]
