"""Logits processors in the lossless mode, where the rows of a batch are at different positions (ours).

Letters: B batch, T tokens of a pass, V vocabulary.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, SynthIDTextWatermarkLogitsProcessor
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

# These do not look at the text: one call for all rows and positions.
_WITHOUT_TEXT = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
# These look at which row of the batch they have.
_WHOLE_BATCH = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)


# These carry something from call to call, or call the model themselves.
_WITH_STATE = (
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)


def unserved(processors: LogitsProcessorList, rows: int) -> str | None:
    """Why the processors cannot be applied to drafts; `None` where they can.

    They see texts that are taken back, and see them again: each must be a function of the text and the row. Those of
    transformers are known; a caller's own (grammars carry a state) says so by an attribute `stateless` that is true.
    """
    for processor in processors:
        name = type(processor).__name__
        own = not type(processor).__module__.startswith("transformers.")
        if isinstance(processor, _WITH_STATE) or (
            own and not getattr(processor, "stateless", False)
        ):
            hint = "; if it is a function of the text, set its attribute stateless = True"
            return f"{name} may carry a state, which cannot take a draft back{hint if own else ''}"
        if isinstance(processor, _WHOLE_BATCH) and rows > 1:
            return f"{name} wants all rows of the batch at once"
    return None


def process(
    processors: LogitsProcessorList, logits: Tensor, ids: Tensor, lengths: Tensor
) -> Tensor:
    """`[B, T, V]` through the processors; the t-th of row i follows the first `lengths[i] + t` tokens of `ids`."""
    scores = logits
    for processor in processors:
        if type(processor) in _WITHOUT_TEXT:
            scores = processor(ids[:1], scores.flatten(0, 1)).view_as(scores)
        else:
            scores = _by_text(processor, scores, ids, lengths)
    return scores


def _by_text(processor: LogitsProcessor, scores: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """One call for each row and position, with the text that the row would have alone."""
    result = torch.empty_like(scores)
    # A caller's own may look at which row it has: it gets as many as there are, and one result counts.
    own = not type(processor).__module__.startswith("transformers.")
    copies = len(scores) if own else 1
    for row, length in enumerate(lengths.tolist()):
        alone = processor if own else _of_row(processor, row)
        for step in range(scores.shape[1]):
            text = ids[row, : length + step].expand(copies, -1)
            found = alone(text, scores[row, step].repeat(copies, 1))
            result[row, step] = found[row if own else 0]
    return result


def _of_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """A repetition penalty leaves out the padding, which is each row's own."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor):
        processor = copy.copy(processor)
        processor.prompt_ignore_length = ignored[row : row + 1]
    return processor
