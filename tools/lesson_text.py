"""Writes notebooks/lesson.txt, the text of the lessons: `python tools/lesson_text.py`.

A small grammar makes little stories and sums. There is something to learn at every distance: spelling, "a" or "an",
"he" or "she", singular or plural, who has what, where it was put, and what 3 plums and 4 plums make. Accents, curly
quotes, "€" and "°" take more than one byte, as most of the world's writing does.

Only `random.Random(seed).random()` is used: of that module, Python promises the same numbers in every version for this
method alone. So the file is the same wherever it is made, and so are the outputs that the notebooks store.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).resolve().parent.parent / "notebooks" / "lesson.txt"
SEED, SIZE = 2024, 120_000


class Person(NamedTuple):
    name: str
    he: str
    him: str
    his: str


def phrases(text: str) -> list[str]:
    return [" ".join(phrase.split()) for phrase in text.split("|")]


SHE = "Zoë Anna Chloé Inès Märta Noor Émilie Saskia Łucja Ayşe Mei Halldóra Rosa Thandi Yuki Beatriz".split()
HE = "André Björn José Tomáš Omar Søren Léo Kenji Miguel Jürgen Dávid Kwame Ravi Paul Noël Håkon".split()
PEOPLE = [*(Person(name, "she", "her", "her") for name in SHE), *(Person(name, "he", "him", "his") for name in HE)]

THINGS = """lamp clock key book drum kite basket mirror whistle ladder button coin letter map compass candle feather
    teapot violin blanket bottle marble puppet lantern ribbon pencil stamp telescope wheel bell bucket hammer shell
    needle painting spoon cushion necklace umbrella acorn apron oar envelope engine accordion""".split()
ADJECTIVES = """old small shiny broken heavy yellow silent tiny empty round golden dusty enormous ordinary blue crooked
    wooden soft strange bright green useful ancient red elegant narrow clean purple""".split()
MOODS = "hungry lonely curious sleepy brave".split()
ROOMS = phrases("""in the kitchen|in the garden|under the stairs|in the cellar|behind the curtain|on the roof
    |beside the well|in the attic|under the bridge|on the windowsill|behind the bakery|near the harbour|in the barn
    |at the café|in the library|on the veranda|in the workshop|under the old oak""")
TIMES = phrases("""One morning|One evening|Last winter|Long ago|On a rainy day|Early in spring|After the storm
    |Before breakfast|On Noël's birthday|At midnight|One quiet afternoon|During the holidays""")
FRUITS = "plum pear apple fig orange olive lemon apricot chestnut onion carrot tomato".split()
FOODS = phrases("""soup|bread with honey|crème brûlée|rice and beans|pancakes|goulash|dumplings|jalapeños|apple cake
    |smörgåsbord|noodles|baked potatoes|chestnut purée|roasted corn|pierogi""")
ANIMALS = "ant bee frog mouse squirrel cat fox goat wolf pony cow bear camel elephant whale".split()  # by size
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
CITIES = phrases("""Málaga|Zürich|Kraków|São Paulo|Reykjavík|Århus|Lagos|Kyoto|Montréal|Odessa|Lima|Perth|Izmir
    |Hà Nội""")
NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen twenty""".split()
WEATHER = [(-12, 0, "snow is falling", "woollen scarf"), (1, 9, "fog hides the streets", "warm coat"),
           (10, 18, "rain drums on the roofs", "umbrella"), (19, 26, "a mild wind blows", "bicycle"),
           (27, 38, "the sun burns", "straw hat")]


class Writer:
    """Draws words from one seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed).random

    def number(self, low: int, high: int) -> int:
        return low + int(self.random() * (high - low + 1))

    def one(self, items: Sequence):
        return items[self.number(0, len(items) - 1)]

    def some(self, items: Sequence, n: int) -> list:
        """`n` different ones, in random order."""
        left = list(items)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(n)]


def a(words: str) -> str:
    """ "a" or "an" in front, by the first letter; the word lists above have no exception such as "hour"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def count(n: int, noun: str) -> str:
    """ "1 plum", "2 plums", "2 tomatoes"."""
    return f"{n} {noun}" + ("" if n == 1 else "es" if noun.endswith("o") else "s")


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def finding(w: Writer) -> str:
    one, other = w.some(PEOPLE, 2)
    thing, like, room = w.one(THINGS), w.one(ADJECTIVES), w.one(ROOMS)
    took = w.one(["carried", "brought", "showed", "rolled", "handed"])
    said = w.one(["said", "cried", "whispered", "laughed", "answered"])
    opinion = w.one([f"What {a(like)} {thing}!", f"I have never seen such {a(like)} {thing},",
                     f"Is this {thing} yours?", f"Your {thing} is beautiful,", f"I once had {a(thing)} too,"])
    feeling = w.one(["happy", "proud", "surprised", "a little sad", "quite calm"])
    return (f"{w.one(TIMES)}, {one.name} found {a(f'{like} {thing}')} {room}. {capital(one.he)} {took} it to "
            f"{other.name}. “{opinion}” {said} {other.name}. {one.name} was {feeling}, and {one.he} kept the {thing} "
            f"{w.one(ROOMS)}.")


def placing(w: Writer) -> str:
    n = w.number(2, 3)
    people, things, rooms = w.some(PEOPLE, n), w.some(THINGS, n), w.some(ROOMS, n)
    put = " ".join(f"{who.name} {w.one(['put', 'left', 'hid'])} the {thing} {room}."
                   for who, thing, room in zip(people, things, rooms, strict=True))
    k = w.number(0, n - 1)
    if w.random() < 0.5:
        return f"{put} Where is the {things[k]}? The {things[k]} is {rooms[k]}."
    return f"{put} Who knows where the {things[k]} is? {people[k].name} knows: it is {rooms[k]}."


def giving(w: Writer) -> str:
    (one, other, last), thing = w.some(PEOPLE, 3), w.one(THINGS)
    first = f"{one.name} had {a(f'{w.one(ADJECTIVES)} {thing}')} and gave it to {other.name}."
    if w.random() < 0.4:
        return f"{first} Now {other.name} has the {thing}."
    because = w.one(["did not need it", "liked another one better", "had one already", "wanted to be kind"])
    return (f"{first} {capital(other.he)} {because}, so {other.he} gave it to {last.name}. "
            f"Now {last.name} has the {thing}.")


def summing(w: Writer) -> str:
    (one, other), fruit, n, m = w.some(PEOPLE, 2), w.one(FRUITS), w.number(1, 10), w.number(1, 9)
    if w.random() < 0.5:
        return (f"{one.name} has {count(n, fruit)}. {other.name} gives {one.him} {m} more. "
                f"Now {one.name} has {count(n + m, fruit)}.")
    return (f"{one.name} has {count(n + m, fruit)}. {capital(one.he)} gives {m} to {other.name}. "
            f"Now {one.name} has {count(n, fruit)}.")


def spelling_numbers(w: Writer) -> str:
    n, m = w.number(1, 10), w.number(1, 10)
    return f"{capital(NUMBERS[n])} and {NUMBERS[m]} make {NUMBERS[n + m]}: {n} + {m} = {n + m}."


def buying(w: Writer) -> str:
    who, thing, n, price = w.one(PEOPLE), w.one(THINGS[:12]), w.number(2, 5), w.number(2, 9)
    return (f"“How much is {a(thing)}?” asks {who.name}. “{price} €,” says the seller. {who.name} buys "
            f"{count(n, thing)} and pays {n * price} €.")


def comparing(w: Writer) -> str:
    small, large = sorted(w.some(range(len(ANIMALS)), 2))
    small, large = ANIMALS[small], ANIMALS[large]
    if w.random() < 0.5:
        return f"The {large} is bigger than the {small}, so the {small} is smaller than the {large}."
    first, second = w.some([small, large], 2)
    return f"“Which is bigger, {a(first)} or {a(second)}?” asked {w.one(PEOPLE).name}. “The {large}, of course.”"


def eating(w: Writer) -> str:
    (one, other), (good, bad) = w.some(PEOPLE, 2), w.some(FOODS, 2)
    return (f"“What would you like to eat, {one.name}?” asked {other.name}. “I love {good},” said {one.name}, “but not "
            f"{bad}.” So {other.name} made {good} for {one.him}, and {one.he} thanked {other.him}.")


def days(w: Writer) -> str:
    k = w.number(0, 6)
    if w.random() < 0.5:
        return f"Today is {DAYS[k]}. Tomorrow will be {DAYS[(k + 1) % 7]}, and yesterday was {DAYS[k - 1]}."
    return f"{w.one(PEOPLE).name} asks: “What comes after {DAYS[k]}?” The answer is {DAYS[(k + 1) % 7]}."


def weather(w: Writer) -> str:
    who, (low, high, sky, item) = w.one(PEOPLE), w.one(WEATHER)
    return f"It is {w.number(low, high)} °C in {w.one(CITIES)}, and {sky}. {who.name} takes {who.his} {item}."


def wandering(w: Writer) -> str:
    animal, like = w.one(ANIMALS), w.one(MOODS)
    (one, other), thing = w.some(ANIMALS, 2), w.one(THINGS)
    way = w.one(["through the forest", "over the hills", "along the river", "across the fields", "around the lake"])
    end = w.one([f"They shared {w.one(FOODS)} and became friends.", f"Neither of them spoke about the {thing} again.",
                 f"In the end the {animal} kept the {thing}.", f"From that day on, the {animal} was never alone."])
    other = other if one == animal else one
    return (f"{w.one(TIMES)}, {a(like)} {animal} walked {way}. There it met {a(other)} with {a(thing)}. “Why do you "
            f"carry {a(thing)}?” asked the {animal}. “Because I am {w.one(MOODS)},” said the {other}. {end}")


KINDS: list[Callable[[Writer], str]] = [finding, finding, finding, placing, placing, giving, giving, summing, summing,
                                        spelling_numbers, buying, comparing, eating, eating, days, weather, wandering,
                                        wandering]


def lesson_text(seed: int = SEED, size: int = SIZE) -> str:
    """Stories with an empty line after each, at least `size` bytes of them in UTF-8."""
    writer, stories, written = Writer(seed), [], 0
    while written < size:
        stories.append(writer.one(KINDS)(writer) + "\n\n")
        written += len(stories[-1].encode())
    return "".join(stories)


if __name__ == "__main__":
    PATH.write_bytes(lesson_text().encode())  # bytes: no system may turn the line ends into its own
