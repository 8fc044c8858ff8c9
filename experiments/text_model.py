"""Train a small model of natural text and code: `python -m experiments train-text --out DIR` (ours).

A yardstick: does a lossy attention method keep the perplexity of a model of real text? The text is what Python brings
along, so nothing is downloaded: sources and documentation of the standard library and of the installed packages.
About 20 minutes on one CPU core. Written are

* `DIR/model`: an ordinary Llama folder, about 5 million weights, for contexts of up to 4,096 tokens;
* `DIR/held-out`: whole files never trained on, as `refreshkv eval --tasks perplexity` reads them;
* `DIR/training_log.jsonl`: losses in nats a token.

The number of steps is fixed in advance: tokenizer and weights depend on the seed and on the installed files only (with
one version of the libraries). The start is the hand-made induction circuit of `structured_start`.

Letters: B windows, L tokens.
"""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.recipe import Phase, Recipe, Stage, llama_config
from experiments.structured_start import structured_start
from experiments.train import LOG, log_line
from refreshkv.demo.tokenizer import BOS, EOS, PAD, build_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SUFFIXES = (".md", ".py", ".rst", ".txt")
SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "__pycache__"}
CONTEXTS = (512, 1024, 2048, 4096)  # tokens; the last measurement is made at each of them
TOKENS_A_MINUTE = 150_000  # one core with bf16 instructions


@dataclass(frozen=True)
class TextRecipe:
    """Everything that decides the weights, besides the corpus and library versions. Sizes of files are in bytes."""

    phase: Phase
    seed: int = 0
    vocabulary: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 1024
    layers: int = 4
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
    return TextRecipe(Phase("text", stages, peak_rate=1.5e-3, cool_share=0.7), seed)


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


class TextTrainer:
    """One training run."""

    def __init__(self, recipe: TextRecipe, corpus: Corpus, out: Path) -> None:
        self.recipe, self.out = recipe, out
        texts = corpus.training.values()
        self.tokenizer = train_tokenizer(texts, recipe)
        backend = self.tokenizer.backend_tokenizer
        self.stream = Stream(texts, backend)
        self.held_out = Stream(corpus.held_out.values(), backend)
        torch.manual_seed(recipe.seed)
        self.model = LlamaForCausalLM(_config(recipe))
        structured_start(self.model, recipe.seed)
        self.optimizers = self._make_optimizers()
        self.begun = time.perf_counter()
        (out / LOG).unlink(missing_ok=True)

    def _make_optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """Muon for the matrices of the layers (it needs fewer tokens than AdamW), AdamW for embedding and norms."""
        decay = self.recipe.weight_decay
        matrices = [w for w in self.model.model.layers.parameters() if w.ndim == 2]
        norms = [w for w in self.model.parameters() if w.ndim < 2]
        others = [
            {"params": [self.model.model.embed_tokens.weight], "weight_decay": decay},
            {"params": norms, "weight_decay": 0.0},
        ]
        return (
            torch.optim.Muon(matrices, lr=0.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), fused=True),
        )

    def run(self, log_every: int = 50) -> None:
        """All steps of the recipe."""
        step = tokens = 0
        losses: list[float] = []
        stages = self.recipe.phase.stages
        steps = sum(stage.steps for stage in stages)
        for number, stage in enumerate(stages):
            for i in range(stage.steps):
                rng = np.random.default_rng([self.recipe.seed, number, i])
                losses.append(self._step(self.stream.batch(rng, stage), step, tokens))
                step, tokens = step + 1, tokens + stage.batch * stage.length
                if step % log_every == 0 or step == steps:
                    loss = float(np.mean(losses[-log_every:]))
                    record = {"step": step, "of": steps, "length": stage.length, "tokens": tokens}
                    self.log(record | {"loss": round(loss, 4)} | self.measure((2048,), 4))

    def _step(self, rows: Tensor, step: int, tokens: int) -> float:
        """One optimiser step on windows [B, L+1]; the loss (nats a token) before it."""
        loss = self._losses(rows, rows.shape[1] - 1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.phase.rate(step, tokens)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def _losses(self, rows: Tensor, scored: int) -> Tensor:
        """Losses [B, scored] of the last tokens of windows [B, L+1], in nats."""
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.model(rows[:, :-1], use_cache=False).last_hidden_state
            logits = self.model.lm_head(hidden[:, -scored:]).float()
        return F.cross_entropy(logits.transpose(1, 2), rows[:, -scored:], reduction="none")

    @torch.no_grad()
    def measure(
        self, lengths: Sequence[int], files: int, scored: int | None = None
    ) -> dict[str, float]:
        """Mean loss over held-out files, by number of tokens; {} where all files are shorter.

        The first tokens of each file are scored; or, with `scored`, the same few tokens given more and more of what
        precedes them.
        """
        losses = {}
        for length in lengths:
            rows = self.held_out.beginnings(max(lengths) if scored else length)[:files]
            if len(rows):
                rows = torch.cat([rows[:, :1], rows[:, -length:]], dim=1)  # <bos> stays
                parts = [self._losses(row[None], scored or length).mean().item() for row in rows]
                name = f"last_{scored}_given_{length}" if scored else f"held_out_{length}"
                losses[name] = round(float(np.mean(parts)), 4)
        return losses

    def log(self, record: Mapping[str, float]) -> None:
        """A line of the log, with the seconds since the start."""
        seconds = round(time.perf_counter() - self.begun, 1)
        log_line(self.out / LOG, {**record, "seconds": seconds})

    def export(self, folder: Path) -> None:
        """Write an ordinary Llama folder: bf16 weights and the tokenizer."""
        self.model.to(torch.bfloat16).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _config(recipe: TextRecipe) -> LlamaConfig:
    """The bundled model's configuration (4 query heads over 2 KV heads of 64) with the sizes of `recipe`."""
    sizes = Recipe(
        phases=(recipe.phase,),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        layers=recipe.layers,
    )
    config = llama_config(sizes)
    config.vocab_size = recipe.vocabulary
    config.rope_parameters["rope_theta"] = 1e6
    return config


def train(recipe: TextRecipe, roots: Mapping[str, Path], out: Path, log_every: int = 50) -> Path:
    """Run `recipe` on the text below `roots`; writes model, held-out files and log into `out`, returns the model's."""
    corpus = read_corpus(roots, recipe)
    held_out = out / "held-out"
    held_out.mkdir(parents=True, exist_ok=True)
    for old in held_out.glob("*.txt"):
        old.unlink()
    for name, text in corpus.held_out.items():
        (held_out / (name.replace("/", "__") + ".txt")).write_text(text, encoding="utf-8")
    trainer = TextTrainer(recipe, corpus, out)
    size = sum(map(len, corpus.training.values()))
    counts = {"files": len(corpus.training), "characters": size}
    counts["stream_tokens"] = len(trainer.stream.tokens)
    counts["weights"] = trainer.model.num_parameters()
    trainer.log(counts | {"held_out_files": len(corpus.held_out)})
    trainer.run(log_every)
    trainer.log(trainer.measure(CONTEXTS, 24) | trainer.measure(CONTEXTS, 24, scored=256))
    trainer.export(out / "model")
    return out / "model"


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
