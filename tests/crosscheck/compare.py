"""Compare the two halves of the cross-check: `python tests/crosscheck/compare.py JOB OURS KVPRESS`.

Prints a table and exits with 1 if a case that must agree does not, in kept positions or in tokens.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Agreement:
    """One case over all prompts.

    Attributes:
        must: whether both sides have one definition.
        heads, equal_heads: sets of kept positions (layer x KV head x prompt), and those that are equal.
        kept, common: entries kept by us, and those of them that the peer kept too.
        tokens: tokens generated.
        same: tokens before the first difference, summed over prompts.
    """

    must: bool
    heads: int = 0
    equal_heads: int = 0
    kept: int = 0
    common: int = 0
    tokens: int = 0
    same: int = 0

    @property
    def complete(self) -> bool:
        """Everything is equal."""
        return self.equal_heads == self.heads and self.same == self.tokens

    def add(self, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
        """Count one prompt."""
        if [len(layer) for layer in ours["kept"]] != [len(layer) for layer in theirs["kept"]]:
            raise ValueError(
                "the two sides kept entries of different layers or heads: run both halves again"
            )
        for mine, peer in zip(flat(ours["kept"]), flat(theirs["kept"]), strict=True):
            self.heads += 1
            self.equal_heads += mine == peer
            self.kept += len(mine)
            self.common += len(mine & peer)
        pairs = list(zip(ours["tokens"], theirs["tokens"], strict=True))
        self.tokens += len(pairs)
        self.same += next((i for i, (mine, peer) in enumerate(pairs) if mine != peer), len(pairs))


def flat(kept: list[list[list[int]]]) -> list[set[int]]:
    """`[layer][head]` -> the set of each head."""
    return [set(head) for layer in kept for head in layer]


def compare(
    job: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]
) -> dict[str, Agreement]:
    """Every case of the job over its prompts.

    Raises:
        KeyError: a run is missing on one side.
    """
    found = {}
    for name, case in job["cases"].items():
        found[name] = Agreement(case["agree"])
        for prompt in job["prompts"]:
            key = f"{name}|{prompt}"
            found[name].add(ours["runs"][key], theirs["runs"][key])
    return found


def table(found: dict[str, Agreement]) -> str:
    """For people."""
    lines = [
        f"{'case':44} {'kept sets equal':>17} {'kept in common':>15} {'tokens equal':>14}  result"
    ]
    for name, a in found.items():
        result = "agrees" if a.complete else "DISAGREES" if a.must else "differs (expected)"
        sets = f"{a.equal_heads}/{a.heads}" if a.heads else "-"
        common = f"{a.common / a.kept:.1%}" if a.kept else "-"
        lines.append(f"{name:44} {sets:>17} {common:>15} {f'{a.same}/{a.tokens}':>14}  {result}")
    return "\n".join(lines)


def main(*files: str) -> int:
    job, ours, theirs = (json.loads(Path(file).read_text("utf-8")) for file in files)
    found = compare(job, ours, theirs)
    print(f"ours: {ours['versions']}\npeer: {theirs['versions']}")
    print(f"{len(job['prompts'])} prompts, K = {job['budget']}, {job['new_tokens']} tokens each")
    print(table(found))
    return int(any(a.must and not a.complete for a in found.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
