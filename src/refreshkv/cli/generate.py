"""`refreshkv generate`: one prompt, one answer, and what it cost."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from refreshkv.cli import common, loading, settings
from refreshkv.cli.common import BadInput
from refreshkv.text import visible

if TYPE_CHECKING:
    from refreshkv import Session
    from refreshkv.evals.decoding import Continued

COLDEST = 1e-6  # logits that are divided by less leave the numbers of the model
# The part of the statistics that is a contract (docs/cli.md); `Stats.as_dict` has more.
STATS = (
    "full_steps",
    "partial_steps",
    "full_share",
    "kv_read_share",
    "effective_stride",
    "acceptance",
    "tokens_per_full_pass",
    "passes_per_token",
)


@click.command("generate", short_help="Continue a prompt with RefreshKV.")
@click.option("--model", required=True, help=common.MODEL_HELP)
@click.option("--prompt", "text", help="The prompt itself.")
@click.option(
    "--prompt-file",
    metavar="FILE",
    help="A UTF-8 text file; '-' is stdin, which is also the default.",
)
@click.option("--chat", is_flag=True, help="Wrap the prompt in the model's chat template.")
@click.option("--max-new-tokens", type=common.count(), default=256, show_default=True)
@settings.options
@loading.dtype_option
@loading.device_option
@click.option(
    "--graphs/--no-graphs",
    default=True,
    show_default=True,
    help="Decode by CUDA graphs where there is a GPU.",
)
@click.option("--compiled", is_flag=True, help="Of layers that torch compiles first, one for all.")
@click.option("--temperature", type=common.Finite(0, 1e6), default=0.0, show_default="0: greedy")
@click.option(
    "--top-p",
    type=common.Finite(0, 1, min_open=True),
    help="Nucleus sampling; needs --temperature.",
)
@click.option(
    "--seed",
    type=common.SEED,
    default=0,
    show_default="0",
    help="Of the sampling.",
)
@click.option(
    "--explain",
    is_flag=True,
    help="Say on stderr what bytes a token moves at least; `refreshkv compare` measures speed.",
)
@loading.trust_option
@common.progress_option
@common.json_option
def command(
    model: str,
    text: str | None,
    prompt_file: str | None,
    chat: bool,
    max_new_tokens: int,
    method: str | None,
    preset: str | None,
    dtype: str,
    device: str,
    graphs: bool,
    compiled: bool,
    temperature: float,
    top_p: float | None,
    seed: int,
    explain: bool,
    trust_remote_code: bool,
    progress: bool | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Continue a prompt with RefreshKV.

    The text streams to stdout and a line of statistics goes to stderr; with --json, stdout ends with one line of JSON
    instead.
    """
    from refreshkv.cli import prompt as prompts

    # What can be checked without the model is checked first: a large one takes minutes to load.
    sampling = sampling_settings(temperature, top_p)
    if compiled and not graphs:
        raise common.BadInput("--compiled without graphs has no effect; leave out --no-graphs")
    asked = {**settings.asked(method, preset, given), "graphs": graphs, "compiled": compiled}
    prompt = prompts.read_prompt(text, prompt_file)
    loaded = loading.load(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    from refreshkv.evals.encoding import encode, text_of

    with common.bad_input():
        tokens = encode(loaded.tokenizer, prompt, chat)
    prompt_tokens = len(tokens)
    prompts.check_length(loaded, prompt_tokens, max_new_tokens)

    if explain:
        from refreshkv.cli.explain import lines

        click.echo("\n".join(lines(loaded.model, prompt_tokens)), err=True)

    import torch

    import refreshkv
    from refreshkv.evals.decoding import continue_rows

    torch.manual_seed(seed)
    if as_json:
        bar = common.progress_bar(max_new_tokens, "token", progress)
        sampling["streamer"] = Ticks(bar)
    else:
        sampling["streamer"] = streamer(loaded.tokenizer)
    with contextlib.ExitStack() as stack:
        with common.bad_input():
            session = stack.enter_context(refreshkv.attach(loaded.model, **asked))
        # A checkpoint may ask for beams, which cannot be streamed.
        output = continue_rows(loaded.model, [tokens], [max_new_tokens], num_beams=1, **sampling)
    if as_json:
        bar.close()
        text = text_of(loaded.tokenizer, output.tokens[0])
        common.emit_json(
            {
                "text": text,
                **record(output, prompt_tokens, session),
                "model": model,
                "method": method,
            }
        )
    else:
        click.echo(summary(output, prompt_tokens, session), err=True)


class Ticks:
    """A streamer that moves a bar by a token at a time; the first `put` is the prompt."""

    def __init__(self, bar: Any) -> None:
        self.advance, self.bar = 0, bar

    def put(self, value: Any) -> None:
        """The prompt, then a token."""
        self.bar.update(self.advance)
        self.advance = 1

    def end(self) -> None:
        """No more tokens."""


def streamer(tokenizer: Any) -> Any:
    """Writes the text to stdout as it comes: as it is, except that a terminal gets nothing which it would obey."""
    from transformers import TextStreamer

    class Visible(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(visible(text, keep="\n\t"), stream_end)

    kind = Visible if sys.stdout.isatty() else TextStreamer
    return kind(tokenizer, skip_prompt=True, skip_special_tokens=True)


def record(output: Continued, prompt_tokens: int, session: Session) -> dict[str, Any]:
    """The machine-readable form (docs/cli.md)."""
    config, stats = session.config, session.stats.as_dict()
    resolved = None if config.mode == "full" else config.resolve_budget(prompt_tokens)
    return {
        "new_tokens": len(output.tokens[0]),
        "prompt_tokens": prompt_tokens,
        "mode": config.mode,
        "budget_tokens": resolved,
        "stats": {name: stats[name] for name in STATS},
        "seconds": {"prefill": output.prefill_s, "decode": output.decode_s},
        "config": config,
    }


def summary(output: Continued, prompt_tokens: int, session: Session) -> str:
    """The line for people."""
    new_tokens = len(output.tokens[0])
    counts = f"{new_tokens} tokens after {prompt_tokens}"
    times = f"prefill {output.prefill_s:.2f} s, decode {output.decode_s:.2f} s"
    if new_tokens > 1:
        times += f", {(new_tokens - 1) / output.decode_s:.1f} tokens/s"
    name = session.config.mode if session.method is None else session.method.name
    return f"[{name}: {counts}; {times}; {session.stats}]"


def sampling_settings(temperature: float, top_p: float | None) -> dict[str, Any]:
    """Arguments of `model.generate`. The command line alone decides: a model's own sampling defaults do not count."""
    if 0 < temperature < COLDEST:
        raise BadInput(f"--temperature must be 0 or at least {COLDEST}; got {temperature}")
    if temperature == 0:
        if top_p is not None:
            raise BadInput(
                "--top-p without --temperature has no effect; add --temperature T, or leave it out"
            )
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": temperature,
        "top_p": 1.0 if top_p is None else top_p,
        "top_k": 0,
    }
