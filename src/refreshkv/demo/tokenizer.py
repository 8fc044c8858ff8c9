"""The tokenizer of the bundled model: bytes, plus a few fixed merges (ours).

Any text round-trips exactly, because the base vocabulary is the 256 bytes (GPT-2's byte-level
alphabet). On top of the bytes there are

* 90 consonant-vowel syllables (`ba` ... `zu`) and 100 two-digit numbers (`00` ... `99`), each one
  merge of two bytes, so that a word of the tasks is several tokens and must be copied
  smoothly instead of being found in one jump;
* `MARKERS`, the fixed phrases and tags of three evaluation tasks, as ordinary (not special) added tokens.

A `Split` pattern isolates syllables and numbers from left to right before the merges run, so the
tokens of a text never depend on what precedes it except through a shared syllable or number:
`12345` is `12 34 5` and `banana` is `ba na na`.

Special tokens are inserted by the tokenizer only: `<eos>` written in a text is seven bytes
(`split_special_tokens=True` in `tokenizer_config.json`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from refreshkv.tasks import chain_of_key, html_to_tsv, key_value
from refreshkv.tasks.words import CONSONANTS, SYLLABLES, VOWELS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

NUMBERS = tuple(f"{n:02d}" for n in range(100))

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"

# Of RULER's needles only what surrounds keys and codes; the rest of those prompts is bytes.
NEEDLE_PHRASES = (
    "The locker of ",
    " opens with ",
    "Which code opens the locker of ",
    "? Write the code alone.\nCode:\n",
)
MARKERS = (
    *chain_of_key.PHRASES,
    *html_to_tsv.PHRASES,
    *key_value.PHRASES,
    *NEEDLE_PHRASES,
)

VOCAB_SIZE = 512
MAX_LENGTH = 8192


def build_backend() -> Tokenizer:
    """The `tokenizers.Tokenizer` with exactly `VOCAB_SIZE` entries; encoding prepends `<bos>`."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
    )

    special = [PAD, BOS, EOS]
    pieces = special + sorted(pre_tokenizers.ByteLevel.alphabet()) + [*SYLLABLES, *NUMBERS]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [(piece[0], piece[1]) for piece in (*SYLLABLES, *NUMBERS)]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    isolate = Regex(f"[{CONSONANTS}][{VOWELS}]|[0-9]{{2}}")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(isolate, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken(m, normalized=False, special=False) for m in MARKERS])
    # The embedding has a multiple of 64 rows; name every row, so that no id lacks a token.
    spare = VOCAB_SIZE - backend.get_vocab_size()
    backend.add_special_tokens([f"<reserved_{i}>" for i in range(spare)])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, vocab[BOS])],
    )
    return backend


def build_tokenizer(backend: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers uses it: left padding, text never parsed for special tokens.

    `backend` is another one with the same three special tokens; `None`: `build_backend()`.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=build_backend() if backend is None else backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def save_tokenizer(folder: str | Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`."""
    build_tokenizer().save_pretrained(folder)
