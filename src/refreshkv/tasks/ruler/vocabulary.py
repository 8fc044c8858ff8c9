"""Our own words and sentences: keys, trades, and text that says nothing in particular."""

from __future__ import annotations

import numpy as np


def _list(words: str) -> tuple[str, ...]:
    return tuple(words.split("|") if "|" in words else words.split())


# The same few sentences again and again, RULER's simplest haystack; the sentences are ours.
NOISE = "Rain falls on the roof. The lamp is lit. A dog sleeps by the door. Nothing else happens tonight."
ADJECTIVES = _list(
    "amber ancient bold brave bright bronze calm careful cheerful clever cold crimson curious dark deep dusty "
    "early eager faint fancy fast fierce foggy fresh gentle giant golden graceful grand green happy heavy hidden "
    "hollow honest humble icy idle jolly keen kind large lazy lively lonely loud lucky mellow merry mild misty "
    "modest muddy narrow noble odd pale patient plain polite proud purple quick quiet rapid rare rough royal "
    "rusty sandy scarlet secret shiny shy silent silver simple sleepy slow small smooth snowy solid spare steady "
    "stormy strange sunny swift tall tender tidy tiny vivid warm wild wise young"
)
NOUNS = _list(
    "acorn anchor anvil apple arrow badger barrel beacon beetle bottle bridge bucket button cabin camel candle "
    "canoe carrot castle cedar cherry clover cobra comet coral cotton crane cricket crown dagger daisy desert "
    "donkey dragon drum eagle ember falcon feather ferry fiddle forest fountain fox garden glacier goblet hammer "
    "harbor hazel helmet heron island jacket kettle ladder lantern lemon lizard magnet maple marble meadow mirror "
    "mitten needle orchard otter oyster paddle panther parrot pebble pepper pillow pirate planet pocket pumpkin "
    "puppet rabbit raven river rocket saddle salmon shovel spider spoon squirrel stone sunset tailor teapot "
    "thistle tiger trumpet tunnel turtle valley violin walnut whistle willow window"
)
PROFESSIONS = _list(
    "clockmaker carpenter botanist surveyor violinist printer weaver geologist tailor chemist"
)
GOODS = _list("salt wool timber glass cheese paper honey copper linen pottery")
DAYS = _list("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_WHO = _list(
    "the baker|a young clerk|the ferryman|my neighbour|the old teacher|a visitor from the coast|the gardener|"
    "the stationmaster|a group of students|the librarian|the two sisters|a retired sailor|the postwoman|"
    "the choir leader|an impatient tourist|the night watchman"
)
_DID = _list(
    "repaired|painted|carried away|looked for|forgot about|described|measured|gave away|asked about|sketched|"
    "cleaned|borrowed|praised|walked past|complained about|took a photograph of"
)
_WHAT = _list(
    "the wooden boat|a basket of pears|the town clock|an old map|the broken fence|a pair of boots|"
    "the stone bridge|the brass bell|a heavy suitcase|the garden gate|a book about birds|the long ladder|"
    "a copper kettle|the market stall|a letter without a stamp|the blue bicycle"
)
_WHERE = _list(
    "near the harbour|behind the school|at the edge of the forest|on the main square|beside the canal|"
    "in the attic|under the arcades|at the foot of the hill|outside the theatre|by the railway line|"
    "in the small kitchen|along the river"
)
_WHEN = _list(
    "early in the morning|after the storm|on a cold Sunday|before the holidays|late in the evening|"
    "during the fair|in the first week of spring|when the bus was late|shortly after lunch|"
    "on the last day of the month|while it was snowing|as the sun went down"
)
_FORMS = (
    "{Who} {did} {what} {where}.",
    "{When}, {who} {did} {what}.",
    "{Who} {did} {what} {when}.",
    "{When}, {who} {did} {what} {where}.",
    "It was {where} that {who} {did} {what}.",
    "{Who} {did} {what} {where}, and nobody was surprised.",
    "{When}, it is said, {who} {did} {what}.",
    "{Who} {did} {what}, but only {when}.",
)


def sentence(rng: np.random.Generator) -> str:
    """One generated sentence of plain English."""
    lists = (_FORMS, _WHO, _DID, _WHAT, _WHERE, _WHEN)
    picks = rng.integers(0, 1 << 30, len(lists))
    form, who, did, what, where, when = (
        words[i % len(words)] for words, i in zip(lists, picks.tolist(), strict=True)
    )
    return form.format(
        who=who, Who=_capital(who), did=did, what=what, where=where, when=when, When=_capital(when)
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
