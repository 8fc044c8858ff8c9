"""The entry point of the group `vllm.general_plugins`; vLLM calls it in each of its processes, some several times."""

from __future__ import annotations

import os

from refreshkv.hosts.vllm import surface

# vLLM ignores `--attention-backend` on a CPU: there RefreshKV takes the place of its one backend, if this says so.
CPU_SWITCH = "REFRESHKV_VLLM_CPU"
CUDA_BACKEND = "refreshkv.hosts.vllm.cuda.RefreshKVBackend"
CPU_BACKEND = "refreshkv.hosts.vllm.cpu.RefreshKVCPUBackend"


def register() -> None:
    """Make RefreshKV the backend `CUSTOM`, and on a CPU, if `REFRESHKV_VLLM_CPU=1`, the only one.

    Raises:
        surface.UnsupportedVllm: this vLLM is none that it was made for. vLLM starts no server then, which is better
            than one that silently runs something else.
    """
    surface.check()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, CUDA_BACKEND)
    if os.environ.get(CPU_SWITCH, "0") not in ("", "0"):
        register_backend(AttentionBackendEnum.CPU_ATTN, CPU_BACKEND)
