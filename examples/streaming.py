"""Streaming: tokens are shown as they come. In the lossless mode several come at a time, after each full pass."""

from transformers import TextStreamer

import refreshkv
from refreshkv.demo import load
from refreshkv.demo.prompts import make_prompt

model, tokenizer = load()
example = make_prompt("html-to-tsv", seed=0, length=1024)
inputs = tokenizer(example.prompt, return_tensors="pt")
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

with refreshkv.attach(model) as session:
    model.generate(**inputs, max_new_tokens=example.max_new_tokens, streamer=streamer)
print(session.stats)
