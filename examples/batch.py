"""A batch: prompts of different lengths side by side, padded on the left, each counted by itself."""

import refreshkv
from refreshkv.demo import load
from refreshkv.demo.prompts import make_prompt
from refreshkv.stats import RowStats

model, tokenizer = load()  # its tokenizer pads on the left, as `generate` wants it
examples = [make_prompt("key-value", seed=0, length=length) for length in (400, 700, 1000)]
inputs = tokenizer([one.prompt for one in examples], return_tensors="pt", padding=True)

stats = RowStats()
with refreshkv.attach(model, stats=stats):
    out = model.generate(**inputs, max_new_tokens=max(one.max_new_tokens for one in examples))

for row, one in enumerate(examples):
    answer = tokenizer.decode(out[row, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    print(f"{inputs.attention_mask[row].sum()} tokens of prompt")
    print("  right" if answer == one.answer else f"  wrong: {answer!r}")
    print(f"  {stats.row(row)}")
