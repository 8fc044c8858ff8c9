"""The paper's tables on any model: presets, the runs of `refreshkv.evals`, and the paper's numbers beside ours."""
