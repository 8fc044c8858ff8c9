"""Every row of the table "Bad input" in docs/cli.md: exit code 2 and that one line on stderr.

The documentation is what is tested: a row without a case here fails, and so does a case without a row.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, PreTrainedTokenizerFast, T5Config

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def documented() -> dict[str, tuple[str, int]]:
    """Input -> (message, exit code)."""
    table = DOCS.read_text(encoding="utf-8").split("## Bad input")[1]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in table.splitlines()
        if line[:2] == "| "
    ]
    return {name: (message, int(code.strip(" |"))) for name, message, code in rows[1:]}


def pattern(message: str) -> str:
    """The message as a regular expression: an ellipsis matches anything on the line."""
    return "refreshkv: error: " + ".*".join(
        re.escape(part.strip(" ")) for part in message.split("…")
    )


Args = list[Any]
CASES: dict[str, Callable[[Path, Path], Args]] = {}


def case(name: str) -> Callable[[Callable[[Path, Path], Args]], Callable[[Path, Path], Args]]:
    """Register the arguments of one documented input; it is given a model folder and an empty one."""

    def register(make: Callable[[Path, Path], Args]) -> Callable[[Path, Path], Args]:
        assert name not in CASES
        CASES[name] = make
        return make

    return register


def generate(model: object, *args: object) -> Args:
    return ["generate", "--model", model, *args]


def simple(name: str, *args: object) -> None:
    """A case that only needs options of `generate`."""
    case(name)(
        lambda tiny, tmp: generate(
            tiny, *(args if "--prompt" in args else ("--prompt", "hello", *args))
        )
    )


simple("empty prompt", "--prompt", "")
simple("prompt longer than the context", "--prompt", "x" * 200)
simple("prompt and answer longer than the context", "--prompt", "x" * 20, "--max-new-tokens", 120)
simple("budget 0", "--budget", "0")
simple("budget negative", "--budget", "-5")
simple("budget share above 1", "--budget", "1.5")
simple("budget that is no number", "--budget", "half")
simple("stride 0", "--stride", "0")
simple("stride in the lossless mode", "--stride", "5", "--mode", "exact")
simple("threshold NaN", "--threshold", "nan")
simple("unknown preset", "--preset", "paper-lama")
simple("budget beyond any context", "--budget", 10**20)
simple("settings of another mode", "--budget", 5, "--mode", "full")
simple("preset of another mode", "--preset", "paper-llama", "--mode", "full")
simple("temperature that divides by nothing", "--temperature", "1e-320")
simple("top-p NaN", "--top-p", "nan", "--temperature", 1)
simple("number beyond any machine", "--max-new-tokens", 10**20)
simple("prompt that is not UTF-8", "--prompt", "\udce9")
simple("temperature NaN", "--temperature", "nan")
simple("top-p without a temperature", "--top-p", "0.9")
simple("compiled layers without graphs", "--compiled", "--no-graphs")
simple("chat without a template", "--chat")
simple("option that does not exist", "--budgets", "5")
case("two prompt sources")(
    lambda tiny, tmp: generate(tiny, "--prompt", "a", "--prompt-file", tiny / "config.json")
)
case("prompt file at nobody's home")(
    lambda tiny, tmp: generate(tiny, "--prompt-file", "~nobody-of-this-name/a")
)
case("prompt file with NUL in its name")(lambda tiny, tmp: generate(tiny, "--prompt-file", "a\0b"))
case("prompt file of too long a name")(
    lambda tiny, tmp: generate(tiny, "--prompt-file", "x" * 5000)
)
case("model at nobody's home")(lambda tiny, tmp: generate("~nobody-of-this-name", "--prompt", "a"))
case("threads beyond the machine")(
    lambda tiny, tmp: ["bench", "decode", "--shape", "demo", "--threads", 100_000]
)
case("plan of less than no time")(lambda tiny, tmp: ["bench", "plan", "--fixed-ms", -1])
case("plan checked against what is no CSV")(
    lambda tiny, tmp: ["bench", "plan", "--check", tiny / "model.safetensors"]
)


def train(name: str, *args: object, out: str = "out") -> None:
    """A case of `train`, with data that are too short."""

    @case(name)
    def _(tiny: Path, tmp: Path) -> Args:
        (tmp / "data.jsonl").write_text('{"text": "short"}\n' * 2)
        folders = ("--model", tiny, "--data", tmp / "data.jsonl", "--out", tmp / out)
        return ["train", *folders, "--batch", 1, "--device", "cpu", *args]


train("training data too short", "--length", 64)
train("training sequences longer than the context")
train("training batch of no whole batches", "--length", 64, "--micro-batch", 2)
train("training of rounded steps with a stride", "--mode", "mixed", "--stride", 5)
train("training folder of something else", "--length", 64, out="data.jsonl")
train("training folder that cannot be", "--length", 64, out="data.jsonl/out")
train("training by an unknown optimiser", "--length", 64, "--optimizer", "adamw")
train("training tail too short to evaluate", "--length", 64, "--tail", 8)
case("empty stdin")(lambda tiny, tmp: generate(tiny))
case("prompt file that is missing")(
    lambda tiny, tmp: generate(tiny, "--prompt-file", tmp / "no.txt")
)
case("prompt file that is a directory")(lambda tiny, tmp: generate(tiny, "--prompt-file", tmp))
case("empty model name")(lambda tiny, tmp: generate("", "--prompt", "a"))
case("model folder that is missing")(lambda tiny, tmp: generate(tmp / "no", "--prompt", "a"))
case("model folder without a config")(lambda tiny, tmp: generate(tmp, "--prompt", "a"))
case("model given as a file")(lambda tiny, tmp: generate(tiny / "config.json", "--prompt", "a"))
case("unknown model to fetch")(lambda tiny, tmp: ["models", "fetch", "smollm"])
case("Hub id that cannot be reached")(lambda tiny, tmp: generate("nobody/nothing", "--prompt", "a"))
case("unknown task")(lambda tiny, tmp: ["demo", "--tasks", "key-value,html-to-csv"])
case("unknown task to print")(lambda tiny, tmp: ["demo", "--print-prompt", "key-vale"])
case("print-prompt with options of the comparison")(
    lambda tiny, tmp: ["demo", "--print-prompt", "key-value", "--json"]
)
case("demo length too short")(lambda tiny, tmp: ["demo", "--length", 3])
case("demo longer than the context")(
    lambda tiny, tmp: ["demo", "--length", 100_000, "--examples", 1]
)
case("unknown shape to time")(lambda tiny, tmp: ["bench", "decode", "--shape", "lama-3.2-1b"])
case("unknown variant to skip")(lambda tiny, tmp: ["bench", "decode", "--skip", "defalt"])
case("command that does not exist")(lambda tiny, tmp: ["generat"])


def preset(tiny: Path, tmp: Path, settings: str, *args: object) -> Args:
    (tmp / "own.json").write_text(f'{{"settings": {settings}}}')
    return generate(tiny, "--prompt", "a", "--preset", tmp / "own.json", *args)


case("preset file that is missing")(
    lambda tiny, tmp: generate(tiny, "--prompt", "a", "--preset", tmp / "no.json")
)
case("preset file that is no preset")(lambda tiny, tmp: preset(tiny, tmp, '{"budgets": 3}'))
case("preset file of another mode")(
    lambda tiny, tmp: preset(tiny, tmp, '{"mode": "refresh", "budget": 3}', "--draft", 3)
)


def compare(tiny: Path, *args: object) -> Args:
    return ["compare", "--model", tiny, "--prompt", "hello", *args]


case("unknown mode to compare")(lambda tiny, tmp: compare(tiny, "--methods", "exakt"))
case("nothing to compare")(lambda tiny, tmp: compare(tiny, "--methods", ","))
case("a bar that is no share")(lambda tiny, tmp: compare(tiny, "--bar", "nan"))
case("preset to write that could not be read")(
    lambda tiny, tmp: compare(tiny, "--write-preset", tmp / "own")
)
case("preset to write into no folder")(
    lambda tiny, tmp: compare(tiny, "--write-preset", tmp / "no" / "own.json")
)


@case("one of several prompts that is too long")
def _(tiny: Path, tmp: Path) -> Args:
    (tmp / "a.txt").write_text("hello")
    (tmp / "long.txt").write_text("x" * 200)
    files = ["--prompt-file", tmp / "a.txt", "--prompt-file", tmp / "long.txt"]
    return ["compare", "--model", tiny, *files, "--new-tokens", 4]


def evaluate(
    model: object, out: Path, *args: object, tasks: str = "key-value", methods: str = "full"
) -> Args:
    return [
        "eval",
        "--model",
        model,
        "--tasks",
        tasks,
        "--methods",
        methods,
        "--limit",
        1,
        "--out",
        out / "run",
        *args,
    ]


def reproduce(name: str, table: str, *args: object, out: str = "out") -> None:
    """A case of `reproduce`, in the folder `out`."""

    @case(name)
    def _(tiny: Path, tmp: Path) -> Args:
        return ["reproduce", table, "--model", tiny, "--out", tmp / out, *args]


reproduce("unknown table", "6")
reproduce("table and problems at once", "2", "--reasoning")
reproduce("table of an unknown column", "10", "--only", "html-4k")
reproduce("table with data of another name", "2", "--data", "arxive=a.txt")
reproduce("table with data that are no pair", "2", "--data", "arxiv")
reproduce("table without its data", "10")
reproduce("table longer than the context", "3", "--only", "chain-of-key")
reproduce("trained model for another table", "2", "--trained", ".")
reproduce("option of a plan without one", "2", "--machine", "h100")
reproduce("plan for an unknown machine", "2", "--dry-run", "--machine", "h10")


@case("table into the folder of another")
def _(tiny: Path, tmp: Path) -> Args:
    about = {"format": "refreshkv-reproduce-1", "table": "long-form"}
    (tmp / "table.json").write_text(json.dumps(about))
    return ["reproduce", 10, "--model", tiny, "--small", "--out", tmp]


@case("table into what is no folder")
def _(tiny: Path, tmp: Path) -> Args:
    (tmp / "out").write_text("a file")
    return ["reproduce", 10, "--model", tiny, "--small", "--out", tmp / "out"]


case("server of no model")(lambda tiny, tmp: ["serve", ""])
case("server in the lossless mode")(lambda tiny, tmp: ["serve", tiny, "--mode", "exact"])
case("option of vLLM among those of RefreshKV")(lambda tiny, tmp: ["serve", tiny, "--port", 8000])
case("seconds between lines of the log that are none")(
    lambda tiny, tmp: ["serve", tiny, "--log-interval", -1]
)


@case("server without vLLM")
def _(tiny: Path, tmp: Path) -> Args:
    if find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    return ["serve", tiny]


case("unknown evaluation task")(lambda tiny, tmp: evaluate(tiny, tmp, tasks="key-valu"))
case("unknown method")(lambda tiny, tmp: evaluate(tiny, tmp, methods="full,refreskv"))
case("unknown setting of a method")(
    lambda tiny, tmp: evaluate(tiny, tmp, methods="refreshkv:strid=5")
)
case("method that cannot be fed")(
    lambda tiny, tmp: evaluate(tiny, tmp, "--mode", "both", methods="full,refreshkv")
)
case("evaluation without a directory")(
    lambda tiny, tmp: ["eval", "--model", tiny, "--tasks", "key-value", "--methods", "full"]
)
case("limit 0")(lambda tiny, tmp: evaluate(tiny, tmp, "--limit", 0))
case("task option that is none")(lambda tiny, tmp: evaluate(tiny, tmp, "--task-option", "keys=1"))
case("task option of a task not asked for")(
    lambda tiny, tmp: evaluate(tiny, tmp, "--task-option", "chain-of-key.keys=4")
)
case("task option that does not exist")(
    lambda tiny, tmp: evaluate(tiny, tmp, "--task-option", "key-value.key=1")
)
case("task option of the wrong type")(
    lambda tiny, tmp: evaluate(tiny, tmp, "--task-option", "key-value.keys=two")
)
case("task without its data")(lambda tiny, tmp: evaluate(tiny, tmp, tasks="perplexity"))
case("length too short for the task")(lambda tiny, tmp: evaluate(tiny, tmp, "--length", 4))
case("task longer than the context")(lambda tiny, tmp: evaluate(tiny, tmp, "--length", 900))
case("task longer than the context with its output")(
    lambda tiny, tmp: evaluate("demo", tmp, "--length", 8192)
)
case("run directory without a name")(lambda tiny, tmp: [*evaluate(tiny, tmp), "--out", ""])

# These get as far as the directory: the tiny model has no room for a prompt of any task, the stand-in for the demo has.
EVAL_SHORT = ("--length", 300, "--task-option", "key-value.keys=1")


@case("run directory with other settings")
def _(tiny: Path, tmp: Path) -> Args:
    (tmp / "run").mkdir()
    config = {
        "format": "refreshkv-eval-1",
        "model": "demo",
        "dtype": "float32",
        "seed": 1,
        "budget": 0.125,
    }
    config |= {"chat": False, "tasks": {}, "methods": []}
    (tmp / "run" / "config.json").write_text(json.dumps(config))
    return evaluate("demo", tmp, *EVAL_SHORT)


@case("run directory with a line that is no result")
def _(tiny: Path, tmp: Path) -> Args:
    (tmp / "run").mkdir()
    (tmp / "run" / "config.json").write_text(
        '{"format": "refreshkv-eval-1", "model": "demo", "dtype": "float32", "seed": 0,'
        ' "budget": null, "chat": false, "tasks": {}, "methods": []}'
    )
    (tmp / "run" / "results.jsonl").write_text('{"score": NaN}\n')
    return evaluate("demo", tmp, *EVAL_SHORT)


@case("run directory of somebody else")
def _(tiny: Path, tmp: Path) -> Args:
    (tmp / "run").mkdir()
    (tmp / "run" / "results.jsonl").write_text("")
    return evaluate("demo", tmp, *EVAL_SHORT)


@case("run directory that cannot be")
def _(tiny: Path, tmp: Path) -> Args:
    (tmp / "run").write_text("a file")
    return evaluate("demo", tmp, *EVAL_SHORT)


@case("device that is not there")
def _(tiny: Path, tmp: Path) -> Args:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    return generate(tiny, "--prompt", "a", "--device", "cuda")


@case("prompt file that is not UTF-8")
def _(tiny: Path, tmp: Path) -> Args:
    (tmp / "latin.txt").write_bytes("café".encode("latin-1"))
    return generate(tiny, "--prompt-file", tmp / "latin.txt")


@case("model folder without weights")
def _(tiny: Path, tmp: Path) -> Args:
    shutil.copy(tiny / "config.json", tmp)
    return generate(tmp, "--prompt", "a")


@case("model folder with pickled weights only")
def _(tiny: Path, tmp: Path) -> Args:
    shutil.copytree(tiny, tmp, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, tmp / "pytorch_model.bin")
    return generate(tmp, "--prompt", "a")


@case("model folder with several GGUF files")
def _(tiny: Path, tmp: Path) -> Args:
    for name in ("b.gguf", "a.gguf"):
        (tmp / name).write_bytes(b"GGUF")
    return generate(tmp, "--prompt", "a")


@case("GGUF file that is none")
def _(tiny: Path, tmp: Path) -> Args:
    (tmp / "a.gguf").write_bytes(b"GGUF")
    return generate(tmp / "a.gguf", "--prompt", "a")


@case("model that is not fetched")
def _(tiny: Path, tmp: Path) -> Args:
    return generate("gemma3-270m", "--prompt", "a")


@case("model whose terms are not accepted")
def _(tiny: Path, tmp: Path) -> Args:
    return ["models", "fetch", "gemma3-270m"]


@case("model folder with broken weights")
def _(tiny: Path, tmp: Path) -> Args:
    shutil.copytree(tiny, tmp, dirs_exist_ok=True)
    (tmp / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    return generate(tmp, "--prompt", "a")


def broken(
    name: str, *, weights: dict[str, torch.Tensor | None] | None = None, **config: Any
) -> None:
    """A case of a model folder with other weights (`None`: without them) or another config."""

    @case(name)
    def _(tiny: Path, tmp: Path) -> Args:
        shutil.copytree(tiny, tmp, dirs_exist_ok=True)
        if weights:
            stored = {**load_file(tmp / "model.safetensors"), **weights}
            kept = {key: value for key, value in stored.items() if value is not None}
            save_file(kept, tmp / "model.safetensors", metadata={"format": "pt"})
        if config:
            text = json.loads((tmp / "config.json").read_text())
            (tmp / "config.json").write_text(json.dumps({**text, **config}))
        return generate(tmp, "--prompt", "a")


broken("model folder without some weights", weights={"lm_head.weight": None})
broken("model folder with other weights", weights={"other.weight": torch.ones(3)})
broken("model folder with weights of other shapes", weights={"model.norm.weight": torch.ones(3)})
broken("config of the wrong type", hidden_size="32")
broken("config out of range", num_hidden_layers=-1)


@case("config that is not JSON")
def _(tiny: Path, tmp: Path) -> Args:
    shutil.copytree(tiny, tmp, dirs_exist_ok=True)
    (tmp / "config.json").write_text("{")
    return generate(tmp, "--prompt", "a")


@case("model folder with another tokenizer")
def _(tiny: Path, tmp: Path) -> Args:
    shutil.copytree(tiny, tmp, dirs_exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp)
    return generate(tmp, "--prompt", "a")


@case("unsupported architecture: encoder-decoder")
def _(tiny: Path, tmp: Path) -> Args:
    shutil.copytree(tiny, tmp, dirs_exist_ok=True)
    T5Config(
        d_model=16, num_layers=1, architectures=["T5ForConditionalGeneration"]
    ).save_pretrained(tmp)
    return generate(tmp, "--prompt", "a")


@case("unsupported architecture: latent attention")
def _(tiny: Path, tmp: Path) -> Args:
    shutil.copytree(tiny, tmp, dirs_exist_ok=True)
    DeepseekV3Config(num_hidden_layers=1, architectures=["DeepseekV3ForCausalLM"]).save_pretrained(
        tmp
    )
    return generate(tmp, "--prompt", "a")


def test_every_documented_row_has_a_case() -> None:
    assert sorted(documented()) == sorted(CASES)


@pytest.mark.usefixtures("small_demo")
@pytest.mark.parametrize("name", documented())
def test_bad_input(
    name: str,
    tiny: Path,
    tmp_path: Path,
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    message, code = documented()[name]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # nothing is fetched
    result = run(*CASES[name](tiny, tmp_path), stdin=b"")
    assert result.exit_code == code, (result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1, result.stderr
    assert re.search(pattern(message), result.stderr), (message, result.stderr)
