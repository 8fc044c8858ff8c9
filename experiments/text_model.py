"""Train a small model of natural text and code: `python -m experiments train-text --out DIR` (ours).

A yardstick: does a lossy attention method keep the perplexity of a model of real text? The text is what Python brings
along, so nothing is downloaded: sources and documentation of the standard library and of the installed packages.
About 20 minutes on one CPU core. Written are

* `DIR/model`: an ordinary Llama folder, about 5 million weights, for contexts of up to 4,096 tokens;
* `DIR/held-out`: whole files never trained on, as `refreshkv eval --tasks perplexity` reads them;
* `DIR/metrics.jsonl`: losses in nats a token.

The number of steps is fixed in advance: tokenizer and weights depend on the seed and on the installed files only (with
one version of the libraries). A stopped run goes on. The start is the hand-made induction circuit of
`structured_start`.

Letters: B windows, L tokens.
"""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from experiments import steps
from experiments.recipe import Phase, Recipe, Stage, llama_config
from experiments.structured_start import structured_start
from refreshkv.demo.tokenizer import BOS, EOS, PAD, build_tokenizer
from refreshkv.training.folder import MODEL

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SUFFIXES = (".md", ".py", ".rst", ".txt")
SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "__pycache__"}
MEASURED, MEASURED_FILES = 2048, 4  # tokens of so many held-out files, for the log
TOKENS_A_MINUTE = 150_000  # one core with bf16 instructions


@dataclass(frozen=True, kw_only=True)
class TextRecipe(Recipe):
    """What decides the weights, besides the corpus and library versions. Sizes of files are in bytes."""

    vocabulary: int = 4096
    intermediate_size: int = 1024
    look_ahead: int = 1
    weight_decay: float = 0.05
    smallest_file: int = 2_000
    largest_file: int = 1_000_000
    corpus: int = 40_000_000
    tokenizer_sample: int = 8_000_000
    held_out_share: float = 0.03
    held_out_files: int = 40
    smallest_held_out: int = 20_000


def recipe_for(minutes: float, seed: int = 0) -> TextRecipe:
    """The recipe that takes about so many minutes: windows grow from 512 to 4,096 tokens, in small batches."""
    tokens = minutes * TOKENS_A_MINUTE
    plan = ((512, 3, 0.35), (1024, 2, 0.3), (2048, 1, 0.27), (4096, 1, 0.08))
    stages = tuple(
        Stage(length, batch, math.ceil(share * tokens / (length * batch)))
        for length, batch, share in plan
    )
    phase = Phase("text", stages, peak_rate=1.5e-3, cool_share=0.7)
    return TextRecipe(phases=(phase,), seed=seed)


@dataclass(frozen=True)
class Corpus:
    """File name -> text. `held_out` are whole files, of which nothing is in `training`."""

    training: Mapping[str, str]
    held_out: Mapping[str, str]


def installed_text() -> dict[str, Path]:
    """The folders that are read: the standard library's and the environment's packages."""
    return {name: Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")}


def read_corpus(roots: Mapping[str, Path], recipe: TextRecipe) -> Corpus:
    """Files in the order of a seeded shuffle; which are held out depends on their names alone."""
    paths = sorted(f"{name}/{file}" for name, root in roots.items() for file in _files(root))
    np.random.default_rng(recipe.seed).shuffle(paths)
    training: dict[str, str] = {}
    held_out: dict[str, str] = {}
    seen: set[bytes] = set()
    size = 0
    for path in paths:
        root, _, inner = path.partition("/")
        text = _read(roots[root] / inner, recipe)
        digest = hashlib.sha256(text.encode()).digest()
        if not text or digest in seen:
            continue
        seen.add(digest)
        if _fraction(path) < recipe.held_out_share:
            if len(held_out) < recipe.held_out_files and len(text) >= recipe.smallest_held_out:
                held_out[path] = text
        elif size < recipe.corpus:
            training[path] = text
            size += len(text.encode())
    if not training or not held_out:
        raise ValueError(f"no text to train on, or none to hold out, in {', '.join(roots)}")
    return Corpus(training, held_out)


def _files(root: Path) -> Iterable[str]:
    """Paths below `root` with a text suffix, outside tests."""
    for path in root.rglob("*"):
        inner = path.relative_to(root)
        if path.suffix in SUFFIXES and not SKIPPED_FOLDERS & set(inner.parts):
            yield inner.as_posix()


def _read(path: Path, recipe: TextRecipe) -> str:
    """The text, or "" where a file has not the right size, is not UTF-8 or rather holds data."""
    try:
        if not recipe.smallest_file <= path.stat().st_size <= recipe.largest_file:
            return ""
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    digits = sum(map(text.count, "0123456789"))
    if digits > 0.15 * len(text) or len(text) > 150 * (text.count("\n") + 1):
        return ""
    return text


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32


def train_tokenizer(texts: Iterable[str], recipe: TextRecipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the first `tokenizer_sample` characters; any text round-trips, `<bos>` is prepended."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_first(texts, recipe.tokenizer_sample), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    return build_tokenizer(backend)


def _first(texts: Iterable[str], size: int) -> Iterable[str]:
    for text in texts:
        yield text[:size]
        size -= len(text)
        if size <= 0:
            return


class Stream:
    """All files one after the other, an `<eos>` after each; token ids [N] and where each file begins."""

    def __init__(self, texts: Iterable[str], backend: Tokenizer) -> None:
        backend.encode_special_tokens = True  # "<eos>" in a text is five characters
        eos = backend.token_to_id(EOS)
        files = [
            np.array([*encoded.ids, eos], np.int32)
            for text in texts
            for encoded in [backend.encode(text, add_special_tokens=False)]
        ]
        self.bos = backend.token_to_id(BOS)
        self.tokens = np.concatenate(files)
        self.starts = np.cumsum([0, *map(len, files)])

    def window(self, position: int, length: int) -> list[int]:
        """`<bos>` and `length` tokens around `position`: of its file if long enough, else of it and the next ones."""
        file = int(np.searchsorted(self.starts, position, side="right")) - 1
        first, end = int(self.starts[file]), int(self.starts[file + 1])
        start = min(position, end - length) if end - first >= length else first
        start = max(0, min(start, len(self.tokens) - length))
        return [self.bos, *self.tokens[start : start + length].tolist()]

    def batch(self, rng: np.random.Generator, stage: Stage) -> Tensor:
        """Random windows [B, L+1]."""
        positions = rng.integers(len(self.tokens), size=stage.batch)
        return torch.tensor([self.window(int(p), stage.length) for p in positions])

    def beginnings(self, length: int) -> Tensor:
        """`<bos>` and the first `length` tokens of every file that has them: [B, L+1]."""
        sizes = np.diff(self.starts)
        rows = [
            self.window(int(s), length)
            for s, n in zip(self.starts, sizes, strict=False)
            if n > length
        ]
        return torch.tensor(rows)


class Together(torch.optim.Optimizer):
    """Several optimisers as one, each with weights of its own."""

    def __init__(self, *members: torch.optim.Optimizer) -> None:
        self.members = members
        super().__init__([group for member in members for group in member.param_groups], {})

    def step(self, closure: None = None) -> None:
        for member in self.members:
            member.step()

    def state_dict(self) -> dict[str, Any]:
        return {"members": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for member, state in zip(self.members, state_dict["members"], strict=True):
            member.load_state_dict(state)
        self.param_groups = [group for member in self.members for group in member.param_groups]


def _optimizer(model: LlamaForCausalLM, recipe: TextRecipe) -> Together:
    """Muon for the matrices of the layers (it needs fewer tokens than AdamW), AdamW for embedding and norms."""
    decay = recipe.weight_decay
    matrices = [w for w in model.model.layers.parameters() if w.ndim == 2]
    norms = [w for w in model.parameters() if w.ndim < 2]
    others = [
        {"params": [model.model.embed_tokens.weight], "weight_decay": decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return Together(
        torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=recipe.betas, fused=True),
    )


def _batch(rows: Tensor) -> steps.Batch:
    """What the model takes of windows [B, L+1]."""
    wanted = rows[:, 1:].contiguous()
    labels = {"labels": wanted, "shift_labels": wanted}
    return {"input_ids": rows[:, :-1], **labels, "use_cache": False}


@torch.no_grad()
def measure(model: LlamaForCausalLM, held_out: Stream) -> dict[str, float]:
    """Mean loss of the beginnings of some held-out files; {} where all are shorter."""
    rows = held_out.beginnings(MEASURED)[:MEASURED_FILES]
    with torch.autocast("cpu", torch.bfloat16):
        losses = [model(**_batch(row[None])).loss.item() for row in rows]
    return {f"held_out_{MEASURED}": float(np.mean(losses))} if losses else {}


def train(
    recipe: TextRecipe,
    roots: Mapping[str, Path],
    out: Path,
    log_every: int = 50,
    save_every: int = 100,
) -> Path:
    """Run `recipe` on the text below `roots` (resuming what is there); writes `out`, returns the model's folder."""
    corpus = read_corpus(roots, recipe)
    tokenizer = train_tokenizer(corpus.training.values(), recipe)
    stream, held_out = (
        Stream(texts.values(), tokenizer.backend_tokenizer)
        for texts in (corpus.training, corpus.held_out)
    )
    config = llama_config(recipe)
    config.vocab_size = recipe.vocabulary
    config.rope_parameters["rope_theta"] = 1e6
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config)
    structured_start(model, recipe.seed)

    steps.train(
        model,
        _optimizer(model, recipe),
        recipe,
        lambda rng, stage: _batch(stream.batch(rng, stage)),
        lambda _: measure(model, held_out),
        out,
        log_every=log_every,
        save_every=save_every,
        files=[len(corpus.training), len(corpus.held_out)],
        stream_tokens=[len(stream.tokens), len(held_out.tokens)],
    )
    (out / "held-out").mkdir(exist_ok=True)
    for name, text in corpus.held_out.items():
        (out / "held-out" / (name.replace("/", "__") + ".txt")).write_text(text, encoding="utf-8")
    model.to(torch.bfloat16).save_pretrained(out / MODEL)
    tokenizer.save_pretrained(out / MODEL)
    return out / MODEL


def run(out: Path, *, minutes: float = 20, threads: int = 1, seed: int = 0) -> None:
    """Train a small model of the text that Python brings along.

    Args:
        out: folder for model, log and held-out texts.
        minutes: sets the number of steps.
        threads: of the CPU.
        seed: of corpus, data and weights.
    """
    os.environ["RAYON_NUM_THREADS"] = str(threads)  # read by the tokenizer
    torch.set_num_threads(threads)
    print(f"model written to {train(recipe_for(minutes, seed), installed_text(), out)}")
