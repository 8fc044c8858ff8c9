"""The lm-eval model: arguments, generation under a method, dense log-likelihoods, the command. Offline."""

from __future__ import annotations

import json
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file

from refreshkv.demo import MODEL_PATH
from refreshkv.demo.prompts import make_prompt
from refreshkv.hosts import lm_eval as integration
from refreshkv.hosts.lm_eval import RefreshLM, main, parse_settings
from refreshkv.weights import ModelFilesError

ROOT = Path(__file__).parents[2]
NEW = 16
PROMPTS = [
    make_prompt("key-value", seed, length).prompt for seed, length in enumerate((300, 220, 260))
]
COMMON = {"device": "cpu", "batch_size": 1}


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and nothing written to the home directory."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    integration._warn_dense.cache_clear()


@pytest.fixture
def log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """lm-eval's logger stops propagating once its command has run."""
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    caplog.set_level("INFO", logger=integration.logger.name)
    return caplog


@pytest.fixture(scope="module")
def hf() -> HFLM:
    """lm-eval's own model on the same weights."""
    return HFLM(str(MODEL_PATH), dtype="float32", **COMMON)


def generate(lm: HFLM, prompts: list[str] = PROMPTS) -> list[str]:
    options = {"until": ["\n\n"], "max_gen_toks": NEW}
    return lm.generate_until(
        [
            Instance("generate_until", {}, (prompt, dict(options)), i)
            for i, prompt in enumerate(prompts)
        ],
        disable_tqdm=True,
    )


def score(lm: HFLM) -> list[tuple[float, bool]]:
    return lm.loglikelihood(
        [Instance("loglikelihood", {}, (prompt, "a-b\n"), i) for i, prompt in enumerate(PROMPTS)],
        disable_tqdm=True,
    )


@pytest.mark.parametrize(
    "name, given, parsed",
    [
        ("budget", "0.125", 0.125),
        ("budget", "64", 64),
        ("budget", 64, 64),
        ("stride", "never", None),
        ("stride", None, None),  # lm-eval itself reads "none" so
        ("stride", "7", 7),
        ("threshold", "none", None),
        ("threshold", "0.9", 0.9),
        ("pool_kernel", "5", 5),
        ("decide", "head", "head"),
        ("method", "h2o", "h2o"),
        ("page_size", "32", 32),
        ("budget", "much", "much"),  # refused later, by RefreshConfig
    ],
)
def test_settings_are_parsed(name: str, given: Any, parsed: Any) -> None:
    ours, theirs = parse_settings({name: given, "dtype": "float16"})
    assert ours == {name: parsed} and type(ours[name]) is type(parsed)
    assert theirs == {"dtype": "float16"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"budgte": 0.5}, "'budgte'; did you mean 'budget'"),
        ({"max_lenght": 99}, "'max_lenght'; did you mean 'max_length'"),
        ({"method": "snapvk"}, "did you mean 'snapkv'"),
        ({"preset": "paper-lama"}, "did you mean 'paper-llama'"),
        ({"stride": "0"}, "stride must be"),
        ({"budget": "much"}, "budget must be"),
        ({"pool_kernel": "none"}, "pool_kernel must be"),
        ({"method": "snapkv", "stride": 5}, "'stride'"),
        ({"method": "snapkv", "page_size": 5}, "'page_size'"),
        ({"method": "quest", "page_size": 0}, "page_size must be"),
        ({"preset": "lse-drop", "threshold": "0.5"}, "threshold has no effect"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RefreshLM("/no/such/model", **arguments)


def test_models_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder for the model and for tasks that load the tokenizer; else the command that fetches it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="run 'refreshkv models fetch smollm2-135m'"):
        RefreshLM("smollm2-135m", **COMMON)
    line = ["lm_eval", "run", "--model_args", "pretrained=smollm2-135m", "--tasks", "arc_easy"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "error: --model_args: model 'smollm2-135m' is not fetched" in capsys.readouterr().err
    monkeypatch.setattr("refreshkv.models.path", lambda name: MODEL_PATH)
    asked: list[Any] = []
    monkeypatch.setattr(HarnessCLI, "execute", lambda self, arguments: asked.append(arguments))
    main()
    assert asked[0].metadata == {"tokenizer": str(MODEL_PATH)}


def test_a_model_without_all_its_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL_PATH, folder)
    stored = load_file(folder / "model.safetensors")
    lost = [key for key in stored if "layers.1" in key]
    save_file({key: stored[key] for key in stored if key not in lost}, folder / "model.safetensors")
    said = rf"cannot load the weights of model '{folder}' \(.*lack .* and {len(lost) - 3} more\);"
    with pytest.raises(ModelFilesError, match=said):
        RefreshLM(str(folder), **COMMON)
    line = ["lm_eval", "run", "--model_args", f"pretrained={folder}", "--tasks", "arc_easy"]
    monkeypatch.setattr(sys, "argv", line)
    monkeypatch.setattr(HarnessCLI, "execute", lambda *_: RefreshLM(str(folder), **COMMON))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert re.search(f"^error: --model_args: {said}.*\n\\Z", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize("broken", ["config.json", "tokenizer.json"])
def test_files_that_do_not_load_are_named(broken: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL_PATH, folder)
    (folder / broken).write_text("{")
    with pytest.raises(ModelFilesError, match=f"cannot load the {broken[:-5]} of model '{folder}'"):
        RefreshLM(str(folder), **COMMON)


def test_it_is_registered() -> None:
    assert get_model("refreshkv") is RefreshLM


def test_without_the_harness_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[lm-eval\]'"):
        runpy.run_path(str(integration.__file__))


@pytest.mark.parametrize(
    "settings", [{"method": "full"}, {"budget": 10_000}, {"budget": 8, "stride": 1, "threshold": 1}]
)
def test_exact_settings_give_the_text_of_hf_in_a_padded_batch_too(
    hf: HFLM, settings: dict[str, Any]
) -> None:
    assert generate(RefreshLM("demo", **settings, device="cpu", batch_size=3)) == generate(hf)


def test_generation_runs_under_the_method_and_nothing_else_does(hf: HFLM) -> None:
    lm = RefreshLM("demo", method="streaming-llm", budget="16", **COMMON)
    dense, under_method = generate(hf), generate(lm)
    assert all(a != b for a, b in zip(dense, under_method, strict=True))
    assert lm.stats.kv_read_share < 0.2
    assert lm.stats.full_share == 0
    assert (
        generate(HFLM(lm.model, tokenizer=lm.tokenizer, **COMMON)) == dense
    )  # nothing is left on the model


def test_a_padded_batch_is_its_rows_alone() -> None:
    settings = {"budget": 24, "stride": 4, "threshold": 0.9}
    batch = RefreshLM("demo", **settings, device="cpu", batch_size=3)
    alone = RefreshLM("demo", **settings, **COMMON)
    assert generate(batch) == generate(alone)
    # The same model, one more run: the counts add up.
    before = alone.stats.partial_steps
    generate(alone)
    assert alone.stats.partial_steps == 2 * before


def test_statistics_are_logged_once_and_reported(log: pytest.LogCaptureFixture) -> None:
    lm = RefreshLM("demo", budget=32, **COMMON)
    generate(lm)
    lines = [record.message for record in log.records if "KV read" in record.message]
    assert len(lines) == 1 and lines[0].startswith("refreshkv: ")
    assert "tokens per full pass" in lines[0]  # the default is lossless
    ours = lm.get_model_info()["refreshkv"]
    assert ours["method"] == "refreshkv" and ours["settings"]["budget"] == 32
    assert 0 < ours["stats"]["kv_read_share"] < 1


def test_log_likelihoods_are_dense_with_one_warning(
    hf: HFLM, log: pytest.LogCaptureFixture
) -> None:
    lm = RefreshLM("demo", method="snapkv", budget=16, **COMMON)
    assert score(lm) == score(hf)
    score(lm)
    warnings = [r.message for r in log.records if r.levelname == "WARNING"]
    assert len(warnings) == 1 and "do not exercise the method" in warnings[0]
    assert lm.stats.full_share is None  # no step was taken


def toy_tasks(folder: Path, answers: list[str]) -> list[dict[str, Any]]:
    """A generation task and a multiple-choice task on one JSONL file."""
    data = folder / "toy.jsonl"
    lines = [json.dumps({"prompt": p, "answer": a}) for p, a in zip(PROMPTS, answers, strict=True)]
    data.write_text("\n".join(lines), "utf-8")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "prompt",
        "metadata": {"version": 1.0},
    }
    generating = {
        "task": "toy_generate",
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": NEW},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    choosing = {
        "task": "toy_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": ["a-b", "c-d"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    return [{**common, **task} for task in (generating, choosing)]


def test_toy_tasks_run_in_the_harness(
    hf: HFLM, log: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run = simple_evaluate(
        model="refreshkv",
        model_args="pretrained=demo,budget=0.5,stride=1,threshold=none",  # every step is full
        tasks=toy_tasks(tmp_path, generate(hf)),
        task_manager=TaskManager(include_defaults=False),  # to read them all takes 20 s
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )
    assert run["results"]["toy_generate"]["exact_match,none"] == 1.0
    assert "acc,none" in run["results"]["toy_choice"]
    ours = run["config"]["refreshkv"]
    assert ours["settings"]["threshold"] is None and ours["stats"]["full_share"] == 1
    assert sum("do not exercise the method" in record.message for record in log.records) == 1


def test_the_command_refuses_a_wrong_argument_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model_args", "pretrained=demo,strid=4", "--tasks", "ruler"]
    monkeypatch.setattr(sys, "argv", ["lm-eval", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: --model_args: unknown model argument 'strid'")


@pytest.mark.slow  # lm-eval reads the definitions of all its tasks
def test_the_command(hf: HFLM, tmp_path: Path) -> None:
    for task in toy_tasks(tmp_path, generate(hf)):
        # JSON is YAML.
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(task), "utf-8")
    settings = "pretrained=demo,budget=0.25,method=tova"
    arguments = "--tasks toy_generate.yaml toy_choice.yaml --batch_size 2 --output_path out"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "refreshkv.hosts.lm_eval"),
            *("--model_args", settings, *arguments.split()),
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "PYTHONPATH": str(ROOT / "src"),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(results.read_text("utf-8"))["config"]
    assert config["model"] == "refreshkv"  # by default
    assert config["refreshkv"]["method"] == "tova"
    assert 0.2 < config["refreshkv"]["stats"]["kv_read_share"] < 0.3
    assert done.stderr.count("KV read") == 1
    assert done.stderr.count("do not exercise the method") == 1
