"""A transformers pipeline: what calls `model.generate` for you runs under RefreshKV too."""

from transformers import pipeline

import refreshkv
from refreshkv.demo import load
from refreshkv.demo.prompts import make_prompt

model, tokenizer = load()
example = make_prompt("key-value", seed=0, length=1024)  # a list; five of its lines are asked for
write = pipeline("text-generation", model=model, tokenizer=tokenizer)

with refreshkv.attach(model, preset="fast") as session:
    (answer,) = write(example.prompt, max_new_tokens=example.max_new_tokens, return_full_text=False)
print(answer["generated_text"])
print(session.stats)
