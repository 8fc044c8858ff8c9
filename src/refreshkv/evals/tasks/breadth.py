"""The families of `evals.breadth` as tasks, so that a run can compare methods on them: `breadth-FAMILY`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from refreshkv.evals.breadth import FAMILIES, Family
from refreshkv.evals.task import Count, Example, Score, Task


@dataclass(frozen=True)
class Breadth(Task):
    """Settings: `length` of the prompt in tokens."""

    family: ClassVar[Family]
    metric = "its task's"
    length: int = 2048

    def examples(self, count: Count, seed: int, limit: int | None) -> Iterator[Example]:
        """See `Task.examples`. 50 examples where no limit is given."""
        return self.family.examples(count, seed, 50 if limit is None else limit, self.length)

    def score(self, example: Example, output: str) -> Score:
        """As the task that the family is made of."""
        return self.family.score(example, output)


def _task(family: Family) -> type[Task]:
    recipe = (
        f"Asks for {family.says}.\n"
        "Data and prompt: seeded, made of the tasks' own phrases, for the bundled model.\n"
        "Of use as a comparison with full attention on the same prompts, solved or not.\n"
        "Source: ours (`evals.breadth`)."
    )
    body = {"name": f"breadth-{family.name}", "family": family, "recipe": recipe}
    return dataclass(frozen=True)(type("Breadth", (Breadth,), {**body, "__module__": __name__}))


TASKS: dict[str, type[Task]] = {
    task.name: task for task in (_task(family) for family in FAMILIES.values())
}
