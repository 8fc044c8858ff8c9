"""Without a GPU Triton's kernels are interpreted, which is settled when triton is first imported: often by others."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
