"""RefreshKV inside vLLM: a plugin that a server can switch on; docs/vllm.md is its manual.

`plugin.register` is the entry point, `settings` reads `--additional-config`, `pages` says where codes lie in vLLM's
pages, `steps` which rows of a step decode, `planner` which of them are full, `decoding` what one layer does with them;
`serving` is what `cpu` and `cuda` lay over vLLM's own backends. Only these two, `plugin` and `surface` import vLLM.
"""
