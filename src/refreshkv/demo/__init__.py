"""The bundled model that really retrieves, its tokenizer and prompts (ours); experiments/ has its training.

Importing this package is cheap; `load` imports torch and transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MODEL_PATH = Path(__file__).parent / "model"


def load(
    dtype: torch.dtype | None = None,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The bundled model in eval mode, on the CPU, and its tokenizer; no network is touched.

    `dtype` is that of the weights in memory, float32 where not given.

    Raises:
        ValueError: the files are incomplete or damaged.
    """
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from refreshkv import weights

    with weights.reading(f"the bundled model in {str(MODEL_PATH)!r}", "reinstall refreshkv"):
        model = weights.load(
            LlamaForCausalLM, MODEL_PATH, dtype=dtype or torch.float32, local_files_only=True
        )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)
        weights.check_tokens(tokenizer, model)
    return model.eval(), tokenizer
