"""RULER's thirteen kinds of task (Hsieh et al., COLM 2024), made offline from a seed and in our own wording.

`needles`: the eight needle-in-a-haystack kinds; `tracking`: variables; `words`: common and frequent words;
`questions`: answers in one or two of many passages. `haystack`: the text around all of them.
"""

from __future__ import annotations

from refreshkv.tasks.ruler.needles import NEEDLES
from refreshkv.tasks.ruler.questions import OneHop, TwoHops
from refreshkv.tasks.ruler.tracking import VariableTracking
from refreshkv.tasks.ruler.words import CommonWords, FrequentWords
from refreshkv.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (*NEEDLES, VariableTracking, CommonWords, FrequentWords, OneHop, TwoHops)
}
