"""The bundled model that really retrieves, its tasks and its training recipe (ours).

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
    """
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    model = LlamaForCausalLM.from_pretrained(
        MODEL_PATH, dtype=dtype or torch.float32, local_files_only=True
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL_PATH, local_files_only=True)
    return model.eval(), tokenizer
