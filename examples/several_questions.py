"""Several questions on one text: the text is read once, and each question goes on from a copy of its cache."""

import copy

import torch

import refreshkv
from refreshkv.demo import load
from refreshkv.demo.prompts import make_prompt

ASK = "Copy the lines of these keys, in this order: "

model, tokenizer = load()
text = make_prompt("key-value", seed=0, length=1024).prompt.split(ASK)[0]  # a list `key:value`
keys = [line.split(":")[0] for line in text.splitlines()[20:80:20]]
context = tokenizer(text, return_tensors="pt").input_ids

with refreshkv.attach(model) as session:
    cache = session.new_cache()
    with torch.no_grad():
        model(context, past_key_values=cache, logits_to_keep=1)
    for key in keys:
        question = tokenizer(f"{ASK}{key}\n", return_tensors="pt").input_ids
        both = torch.cat([context, question], 1)
        out = model.generate(
            both,
            attention_mask=torch.ones_like(both),
            past_key_values=copy.deepcopy(cache),
            max_new_tokens=40,
        )
        print(tokenizer.decode(out[0, both.shape[1] :], skip_special_tokens=True), end="")
    print(session.stats)
