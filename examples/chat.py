"""A chat: several turns on one KV cache. The model reads each turn once and can look up all that was said before."""

import torch

import refreshkv
from refreshkv.demo import load
from refreshkv.demo.prompts import make_prompt

ASK = "Copy the lines of these keys, in this order: "

model, tokenizer = load()  # or any AutoModelForCausalLM, whose chat template then makes the turns
text = make_prompt("key-value", seed=0, length=1024).prompt.split(ASK)[0]  # a list `key:value`
keys = [line.split(":")[0] for line in text.splitlines()[20:80:20]]

with refreshkv.attach(model) as session:
    cache = session.new_cache()
    said = tokenizer(text, return_tensors="pt").input_ids
    for key in keys:
        turn = tokenizer(f"{ASK}{key}\n", return_tensors="pt").input_ids
        said = torch.cat([said, turn], 1)  # everything so far; `generate` skips what the cache has
        out = model.generate(
            said, attention_mask=torch.ones_like(said), past_key_values=cache, max_new_tokens=40
        )
        print("you:  ", key)
        answer = tokenizer.decode(out[0, said.shape[1] :], skip_special_tokens=True)
        print("model:", answer, end="")
        said = out
    print(session.stats)
