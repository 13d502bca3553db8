"""Invented names: syllables for people and places, word pairs for works, and a few fixed lists."""

from __future__ import annotations

import random
from collections.abc import Callable

from agentic_r_plugin.errors import ConfigError

# ruff: noqa: SIM905 - word lists read better as one string
_ONSETS = "b br d dr f g gl h j k kr l m n p pr r s sk st t tr v w z".split()
_NUCLEI = "a e i o u ae ia ei".split()
_CODAS = "n r l s m rn st th nd ck v x".split()
_FIRST_ENDS = "a o i e en is or el an ia us eth".split()
_TOWN_ENDS = "ford mar wick stad holm by gard minster dale burg ness haven".split()
_RIVER_ENDS = "a e u ona era ila und isk orra".split()
_TITLE_WORDS = (
    "Glass Silent Winter Hollow Crimson Paper Iron Distant Broken Golden Salt Wooden Blind Burning Little Last "
    "Northern Velvet Restless Painted Borrowed Frozen Hidden Green Copper"
).split()
_TITLE_NOUNS = (
    "Harbor Orchard Lantern Mirror Garden Bridge Shepherd Clock Window Island Feather Tower Letter Stair Meadow "
    "Raven Sister Carriage Furnace Well Bell Crossing Tailor Ladder Anchor Kingdom"
).split()
COMPANY_NOUNS = "Glassworks Foundry Brewery Shipyard Printworks Mills Tannery Instruments Railways Lamps".split()
SCHOOL_NOUNS = "Academy College Institute Lyceum Seminary Conservatory".split()
PRIZE_NOUNS = "Prize Medal Laurel Ribbon Cup".split()
PRODUCTS = (
    "brass buttons,ship bells,window glass,wool blankets,pocket watches,oak barrels,fishing nets,printing ink,tin toys,"
    "lamp oil,leather gloves,copper kettles,paper fans,violin strings,salted herring,blue tiles,wax candles,felt hats,"
    "garden tools,mustard jars,silk thread,church organs,rope ladders,cherry brandy,clay pipes,iron stoves"
).split(",")
PASTIMES = (
    "beekeeping,bird watching,chess,rowing,mending clocks,pressing flowers,stamp collecting,archery,card games,skating,"
    "growing pears,flying kites,training dogs,whittling,mushroom picking,sword dancing,fly fishing,keeping tortoises,"
    "playing the cello,building ship models"
).split(",")

JOBS: dict[str, tuple[str, ...]] = {
    "novelist": ("a novelist", "a teller of long stories", "an author of prose"),
    "composer": ("a composer", "a maker of scores", "a musician who wrote for the stage"),
    "painter": ("a painter", "an artist in oils", "a master of the brush"),
    "director": ("a director", "a maker of films", "a man or woman of the camera"),
    "chemist": ("a chemist", "a worker among acids and salts", "a researcher of compounds"),
    "architect": ("an architect", "a designer of houses", "a planner of public buildings"),
    "astronomer": ("an astronomer", "an observer of comets", "a student of the stars"),
    "botanist": ("a botanist", "a collector of rare plants", "a student of mosses"),
    "engineer": ("an engineer", "a builder of machines", "a designer of pumps"),
    "surveyor": ("a surveyor", "a maker of maps", "a measurer of land"),
}
"""Profession -> phrases used for it in passages, plainest first."""

WORK_KINDS: dict[str, dict[str, str]] = {
    "novel": {"a_kind": "a novel", "maker": "author", "made": "written", "past": "wrote", "job": "novelist"},
    "opera": {"a_kind": "an opera", "maker": "composer", "made": "composed", "past": "composed", "job": "composer"},
    "painting": {"a_kind": "a painting", "maker": "painter", "made": "painted", "past": "painted", "job": "painter"},
    "film": {"a_kind": "a film", "maker": "director", "made": "directed", "past": "directed", "job": "director"},
}
"""Kind of work -> its related words and the profession of its maker."""


class NameMaker:
    """Draws the names of one world, without repeats."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._taken: set[str] = set()

    def person(self) -> str:
        """First name and surname."""
        return self._fresh(lambda: f"{self._first()} {self._stem(2)}")

    def near_person(self, name: str) -> str:
        """A new name with the surname or the first name of the given one."""
        first, last = name.split()
        if self._rng.random() < 0.5:
            return self._fresh(lambda: f"{self._first()} {last}")
        return self._fresh(lambda: f"{first} {self._stem(2)}")

    def town(self) -> str:
        """Name of a town."""
        return self._fresh(lambda: self._stem(1) + self._rng.choice(_TOWN_ENDS))

    def river(self) -> str:
        """Name of a river, without article."""
        return self._fresh(lambda: self._stem(1) + self._rng.choice(_RIVER_ENDS))

    def place(self) -> str:
        """Name part of a lake, a bay or a range of hills."""
        return self._fresh(lambda: self._stem(2))

    def title(self) -> str:
        """Title of a work."""
        return self._fresh(lambda: f"The {self._rng.choice(_TITLE_WORDS)} {self._rng.choice(_TITLE_NOUNS)}")

    def house(self, nouns: list[str]) -> tuple[str, str]:
        """Name and alias of an organisation, such as "Velin Mills" and "the Mills of Velin"."""
        noun = self._rng.choice(nouns)
        name = self._fresh(lambda: f"{self._stem(2)} {noun}")
        return name, f"the {noun} of {name.rpartition(' ')[0]}"

    def _fresh(self, draw: Callable[[], str]) -> str:
        for _ in range(1000):
            name = draw()
            if name not in self._taken:
                self._taken.add(name)
                return name
        raise ConfigError("the world is too large: there are no more names for its people, places or works")

    def _first(self) -> str:
        draw = self._rng.choice
        return (draw(_ONSETS) + draw(_NUCLEI[:5]) + draw("lmnrstv") + draw(_FIRST_ENDS)).capitalize()

    def _stem(self, syllables: int) -> str:
        draw = self._rng.choice
        return ("".join(draw(_ONSETS) + draw(_NUCLEI) for _ in range(syllables)) + draw(_CODAS)).capitalize()
