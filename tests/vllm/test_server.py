"""Clients of two servers with different settings: what they get, and what the counters say of it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI

from refreshkv.demo import MODEL_PATH
from refreshkv.demo.prompts import make_prompt
from tests.vllm.engines import Engine, Prompt, ragged
from tests.vllm.servers import Server

NEW = 40
MIXED = {"mode": "mixed", "budget": 64}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """One in the mixed mode by vLLM's command line, and one in the published mode by ours; both at once."""
    one, other, counters = (
        tmp_path_factory.mktemp(name) for name in ("mixed", "refresh", "counters")
    )
    settings = json.dumps({"refreshkv": MIXED | {"log_interval": 1}})
    vllm = [
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(MODEL_PATH),
        "--served-model-name",
        "demo",
    ]
    ours = "refreshkv.cli serve demo --mode refresh --budget 64 --stride 4 --threshold none --log-interval 1 --"
    started = (
        Server(
            one,
            [*vllm, "--additional-config", settings],
            REFRESHKV_VLLM_CPU="1",
            PROMETHEUS_MULTIPROC_DIR=str(counters),
        ),
        Server(other, ours.split(), REFRESHKV_VLLM_CPU="0"),
    )
    try:
        for server in started:
            server.wait()
        yield started
    finally:
        for server in started:
            server.close()


@pytest.fixture(scope="module")
def mixed(servers: tuple[Server, Server]) -> Server:
    return servers[0]


def complete(client: OpenAI, prompt: Prompt | str, **options: Any) -> Any:
    given: dict[str, Any] = {
        "max_tokens": NEW,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    return client.completions.create(model="demo", prompt=prompt, **given | options)


def test_completions_are_those_of_an_engine(mixed: Server) -> None:
    prompts = ragged()
    with Engine(MIXED) as engine:
        expected = engine.generate(prompts, NEW)
    client = mixed.client()
    for prompt, answer in zip(prompts, expected, strict=True):
        found = complete(client, prompt, logprobs=0).choices[0]
        assert found.logprobs.token_logprobs == pytest.approx(answer.logprobs, abs=1e-3)


def test_an_answer_is_right_in_every_form(servers: tuple[Server, Server]) -> None:
    example = make_prompt("html-to-tsv", 3, 900)
    assert example.answer
    asked = {"max_tokens": example.max_new_tokens, "temperature": 0}
    for server in servers:
        client = server.client()
        whole = (
            client.completions.create(model="demo", prompt=example.prompt, **asked).choices[0].text
        )
        assert whole.strip() == example.answer.strip()
        parts = client.completions.create(model="demo", prompt=example.prompt, stream=True, **asked)
        pieces = [part.choices[0].text for part in parts]
        assert "".join(pieces) == whole and len(pieces) > 1
        message: Any = {"role": "user", "content": example.prompt}
        chat = client.chat.completions.create(model="demo", messages=[message], **asked)
        assert chat.choices[0].message.content == whole


def test_parallel_requests_and_disconnects(mixed: Server) -> None:
    client, choose = mixed.client(), random.Random(5)
    prompts = ragged([choose.randrange(20, 700) for _ in range(32)])
    alone = [complete(client, prompt).choices[0].text for prompt in prompts]
    leaving = set(choose.sample(range(32), 10))

    def ask(number: int) -> str | None:
        if number not in leaving:
            return complete(client, prompts[number]).choices[0].text
        with complete(client, prompts[number], stream=True, max_tokens=1000) as stream:
            for count, _ in enumerate(stream):
                if count == number % 7:
                    return None  # and the connection is closed
        raise AssertionError("it ended before its client left")

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, range(32)))
    assert [text for text in found if text is not None] == [
        text for number, text in enumerate(alone) if number not in leaving
    ]

    def in_use() -> str:
        now = mixed.metrics()
        names = (
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
        )
        return ", ".join(f"{name} is {now[name]}" for name in names if now[name])

    mixed.until(in_use)
    assert complete(client, prompts[0]).choices[0].text == alone[0]


def test_the_counters_of_two_servers(servers: tuple[Server, Server]) -> None:
    prompts = ragged((200, 300, 400, 500))
    rows = len(prompts) * (NEW - 1)
    for server, own in zip(
        servers, ("mode mixed budget=64", "mode refresh budget=64"), strict=True
    ):
        server.until(lambda one=server: "" if idle(one) else "counters at rest")
        before, lines = counters(server), len(server.lines())
        for prompt in prompts:
            complete(server.client(), prompt)
        server.until(
            lambda one=server, old=before: (
                "" if counters(one)["rows"] >= old["rows"] + rows else "rows"
            )
        )
        added = {name: value - before[name] for name, value in counters(server).items()}
        assert added["rows"] == rows and added["lost"] == 0
        assert 0 < added["exact_entries"] < added["entries"]
        assert 0 < added["read_bytes"] < added["full_bytes"]
        if "refresh" in own:
            full = sum(
                end % 4 == 0
                for prompt in prompts
                for end in range(len(prompt) + 1, len(prompt) + NEW)
            )
            assert added["full"] == full and added["partial"] == rows - full
        else:
            assert added["full"] == added["partial"] == 0
        assert own in server.lines()[0]
        assert any("decode rows" in line for line in server.lines()[lines:])


def counters(server: Server) -> dict[str, float]:
    """Ours, without what all their names have."""
    names = (
        "rows",
        "full",
        "partial",
        "lost",
        "exact_entries",
        "entries",
        "read_bytes",
        "full_bytes",
    )
    found = server.metrics()
    return {name: found.get(f"refreshkv_{name}_total", 0.0) for name in names}


def idle(server: Server) -> bool:
    """Whether everything that was decoded has been counted."""
    found = server.metrics()
    made = found["vllm:generation_tokens_total"] - found["vllm:request_success_total"]
    return counters(server)["rows"] >= made
