"""RefreshKV inside vLLM: a plugin that a server can switch on; docs/vllm.md is its manual.

`plugin.register` is the entry point, `settings` reads `--additional-config`, `pages` says where codes lie in vLLM's
pages, `steps` which rows of a step decode, `planner` which of them are full; `attention` is one layer, which `cpu` and
`cuda` put on vLLM's own backends. Only `plugin`, `cpu`, `cuda` and `surface` import vLLM.
"""
