"""Writes home_commands_train.jsonl and home_commands_eval.jsonl: smart home commands as people speak them,
each with the function call that it asks for, as chat rows.

    pip install home-assistant-intents==2026.11.25 hassil==3.13.0
    python recipes/data/home_commands.py [--out FOLDER] [--seed 0]

The sentence templates are those of Home Assistant's users (home-assistant-intents, Apache-2.0). What they
leave open, such as the names of devices, comes from the lists below, by the kind of device that a template is
for. No template, device, room or other name of the evaluation rows occurs in training, and no row twice.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from hassil.expression import Alternative, ListReference, Permutation, RuleReference, Sequence, TextChunk
from hassil.parse_expression import parse_sentence

SYSTEM = "Call a function."  # short: it is read with every command
ROWS = {"train": 2000, "eval": 300}
EVAL_SHARE = 5  # of so many templates with the same slots one is for evaluation

# Function -> intent, and what its slots are called as arguments where the name differs.
FUNCTIONS = {
    "turn_on": ("HassTurnOn", {}),
    "turn_off": ("HassTurnOff", {}),
    "set_light": ("HassLightSet", {"temperature": "color_temperature"}),
    "set_temperature": ("HassClimateSetTemperature", {}),
    "set_volume": ("HassSetVolume", {"volume_level": "volume"}),
    "set_fan_speed": ("HassFanSetSpeed", {"percentage": "speed"}),
    "start_timer": ("HassStartTimer", {"name": "name"}),
    "add_to_shopping_list": ("HassShoppingListAddItem", {}),
    "play_music": ("HassMediaSearchAndPlay", {"search_query": "query", "media_class": "type"}),
    "clean_area": ("HassVacuumCleanArea", {}),
}
ORDER = (
    "device",
    "area",
    "floor",
    "type",
    "query",
    "hours",
    "minutes",
    "seconds",
)  # of arguments, then others
MUSIC = {"artist", "album", "track", "playlist"}
LISTS = {
    "shopping_list_item": "item",
    "search_query": "query",
}  # slots whose values are in NAMES by another name
RANGES = {  # in steps that people say
    "temperature": range(16, 29),
    "brightness": range(5, 101, 5),
    "fan_speed": range(10, 101, 10),
    "volume": range(5, 101, 5),
    "color_temperature": range(2000, 6501, 500),
    "timer_hours": range(2, 13),
    "timer_minutes": range(2, 60),
    "timer_seconds": range(5, 60, 5),
}
# Templates that need to know where the speaker is, or that name no device.
UNUSABLE = ("<here>", "here", "<everywhere>", "<home>", "{timer_command", "{device_class", "cover_classes")
UNUSABLE += ("<clean> <", "timer_half")

# Of training, and after the slash of evaluation. "light stem": what stands before "light" or "lamp".
NAMES = """
light: desk lamp, floor lamp, ceiling light, bedside lamp, reading lamp, night light, wall lamp, chandelier,
    spotlight, string lights, lava lamp, vanity light, tree lights, flood light, wardrobe light, clip lamp,
    paper lantern, globe lamp, counter lights, light strip, christmas lights, oven light, bunk bed lamp
    / table lamp, pendant light, mirror light, salt lamp, fairy lights, picture light
light stem: desk, ceiling, bedside, reading, wall, stairs, closet, hall, window, door, sink, cabinet, mantel,
    bench, cupboard, hobby, bar, cradle, display, tripod, step, tower, kid's
    / table, corner, shelf, sofa, piano
switch: coffee maker, air purifier, space heater, humidifier, water pump, toaster, christmas tree, printer,
    heated blanket, dryer, dishwasher, slow cooker, electric fence, waffle iron, fountain, sprinkler, router,
    hair dryer, egg timer, bug zapper, pasta machine, sewing machine, freezer, wine cooler, washing machine
    / kettle, dehumidifier, rice cooker, towel warmer, aquarium pump
fan: ceiling fan, tower fan, desk fan, box fan, exhaust fan, floor fan, wall fan, bathroom fan, stand fan,
    turbo fan, attic fan, table fan, bedroom fan, pedestal fan, clip fan, hood fan, bladeless fan
    / drum fan, window fan, tall fan
media_player: tv, television, radio, stereo, soundbar, smart speaker, record player, projector, alarm clock,
    jukebox, tablet, game console, cd player, amplifier, music box, speakers, set-top box, turntable, beamer
    / boombox, home theater, hi-fi, media center
climate: thermostat, air conditioner, heat pump, radiator, heater, underfloor heating, fireplace, hot tub,
    pellet stove, wall heater, greenhouse, sauna, pool heater, towel rail, aquarium, incubator
    / boiler, ac unit, furnace
vacuum: robot vacuum, vacuum cleaner, sweeper, dusty, robby, vacuum robot, floor cleaner, wall-e, mop robot,
    scrubber, dust buster, hector, roomba, little helper, rosie / hoover, cleaning robot, floor robot
area: kitchen, living room, bedroom, bathroom, office, hallway, garage, dining room, guest room, nursery,
    laundry room, attic, balcony, pantry, study, patio, den, lobby, conservatory, gym, staircase, mudroom,
    veranda, utility room, music room, lounge, barn, cabin, studio, entrance, shed, wine room, kids room,
    closet, terrace, cloakroom, porch, basement, workshop, loft
    / cellar, playroom, library, sun room, garden, storage room, reading room
floor: first, second, ground, upper, main, fourth, middle / third, top, lower
item: milk, bread, eggs, butter, apples, rice, coffee, olive oil, toilet paper, dish soap, bananas, pasta,
    cheese, tomatoes, onions, chicken breast, orange juice, dog food, yogurt, salt, flour, paper towels,
    potatoes, frozen peas, sugar, garlic, cucumbers, mustard, sponges, cat litter, vinegar, tuna, almonds,
    baking powder, maple syrup, lettuce, mushrooms, toothpaste, trash bags, ketchup, sausages, blueberries,
    cinnamon, lentils, avocados, tortillas, black pepper, hand cream, candles, walnuts, salmon, broccoli
    / honey, oat milk, batteries, green tea, carrots, peanut butter, shampoo, cereal, lemons, light bulbs
query: jazz, the beatles, classical music, taylor swift, bohemian rhapsody, miles davis, eighties hits,
    lofi beats, abbey road, the rolling stones, hotel california, dinner music, queen, country roads,
    johnny cash, piano sonatas, summer hits, thriller, morning coffee, adele, david bowie, purple rain,
    christmas songs, daft punk, moonlight sonata, folk, imagine, nirvana, salsa, beethoven, rumours,
    movie soundtracks, bob marley, gospel, hey jude, coldplay, techno, the four seasons, radiohead,
    billie eilish, blues, yesterday, soul, disco, mozart, let it be, country, pop hits, elton john
    / rock, pink floyd, love songs, rainy day, reggae classics, nina simone, road trip songs
timer_name: pizza, laundry, eggs, pasta, bread, workout, nap, homework, chicken, cookies, tea, rice, oven,
    dishes, yoga, lunch, parking, roast, piano practice, bath, muffins, break, sauna, dough, plants, chess
    / cake, soup, meditation, stretching, potatoes
"""


def read_names() -> dict[str, list[list[str]]]:
    """Kind -> names of training, names of evaluation."""
    names = {}
    for entry in NAMES.replace("\n    ", " ").strip().splitlines():
        kind, _, sides = entry.partition(":")
        names[kind] = [[name.strip() for name in side.split(",")] for side in sides.split("/")]
    return names


class Template(NamedTuple):
    """A sentence with slots. fixed: slots that the template itself sets. kinds: of devices it speaks of."""

    text: str
    fixed: dict[str, Any]
    kinds: list[str]


class Draw:
    """One sentence of a template, drawn at random; `slots` has the values that were drawn."""

    def __init__(self, data: dict[str, Any], names: dict[str, list[str]], rng: random.Random) -> None:
        self.data, self.names, self.rng = data, names, rng
        self.slots: dict[str, Any] = {}

    def sentence(self, template: Template) -> str:
        self.kinds, self.is_stem = template.kinds, "{name} <light>" in template.text
        return " ".join(self.parsed(template.text).split())

    def parsed(self, text: str) -> str:
        return self.words(parse_sentence(text, keep_text=True).expression)

    def words(self, part: Any) -> str:
        rng = self.rng
        if isinstance(part, TextChunk):
            return part.original_text
        if isinstance(part, Sequence):
            return "".join(map(self.words, part.items))
        if isinstance(part, Permutation):
            return " ".join(map(self.words, rng.sample(part.items, len(part.items))))
        if isinstance(part, Alternative):  # the first is what people say most
            return self.words(part.items[0] if rng.random() < 0.7 else rng.choice(part.items))
        if isinstance(part, RuleReference):
            if part.rule_name == "light" and self.is_stem:  # "desk lamp" is a name, as the list has it
                word = rng.choice(["light", "lamp"])
                self.slots["name"] += f" {word}"
                return word
            return self.parsed(self.data["expansion_rules"][part.rule_name])
        if isinstance(part, ListReference):
            return self.value(part.list_name, part.slot_name)
        raise TypeError(type(part))

    def value(self, name: str, slot: str) -> str:
        if name == "name":
            name = "light stem" if self.is_stem else self.rng.choice(self.kinds)
        name = LISTS.get(name, name)
        if name in RANGES:
            self.slots[slot] = self.rng.choice(RANGES[name])
            return str(self.slots[slot])
        if name in self.names:
            self.slots[slot] = self.rng.choice(self.names[name])
            return str(self.slots[slot])
        values = self.data["lists"][name]["values"]
        value = self.rng.choice([each for each in values if name != "media_class" or each["out"] in MUSIC])
        self.slots[slot] = value["out"]
        return self.parsed(value["in"])


def templates(intent: dict[str, Any], kinds_of_device: set[str]) -> Iterator[Template]:
    """The usable templates of an intent."""
    for block in intent["data"]:
        domains = block.get("requires_context", {}).get("domain", [])
        kinds = sorted(kinds_of_device & set([domains] if isinstance(domains, str) else domains))
        fixed = block.get("slots", {})
        if (domains and not kinds) or fixed.get("domain") not in (None, "light", "fan"):
            continue
        for text in block["sentences"]:
            if text != "[<the>] {name}" and not any(word in text for word in UNUSABLE):
                yield Template(text, fixed, kinds)


def arguments(function: str, slots: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call: "turn off the lights" means all of them, so the device is "lights"."""
    is_switch = function.startswith("turn") and "domain" in fixed
    values = {"device": f"{fixed['domain']}s"} if is_switch else {}
    names = {"name": "device", **FUNCTIONS[function][1]}
    values |= {names.get(slot, slot): value for slot, value in slots.items()}
    ordered = sorted(values, key=lambda key: ORDER.index(key) if key in ORDER else -1)
    return {key: values[key] for key in ordered}


def rows(data: dict[str, Any], side: int, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` rows with different sentences; side 0: training, 1: evaluation."""
    rng, seen, all_names = random.Random(f"{seed} {side}"), set[str](), read_names()
    names = {kind: sides[side] for kind, sides in all_names.items()}
    by_function = {}
    for function, (intent, _) in FUNCTIONS.items():
        usable = [*templates(data["intents"][intent], {*names})]
        random.Random(seed).shuffle(usable)
        by_slots: dict[tuple[str, ...], list[Template]] = defaultdict(list)
        for template in usable:
            by_slots[tuple(sorted(set(re.findall(r"\{(\w+)", template.text))))].append(template)
        # One of several with the same slots: evaluation asks for no arguments that training never shows.
        evaluated = [each for alike in by_slots.values() for each in alike[1::EVAL_SHARE]]
        by_function[function] = evaluated if side else [each for each in usable if each not in evaluated]
    while len(seen) < count:
        function = rng.choice([*FUNCTIONS])
        template, draw = rng.choice(by_function[function]), Draw(data, names, rng)
        sentence = draw.sentence(template)
        if sentence.lower() in seen:
            continue
        seen.add(sentence.lower())
        call = {"name": function, "arguments": arguments(function, draw.slots, template.fixed)}
        answer = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": sentence}, answer]
        yield {"messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = json.loads((files("home_assistant_intents") / "data" / "en.json").read_text(encoding="utf-8"))
    for side, (name, count) in enumerate(ROWS.items()):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows(data, side, count, options.seed)]
        path = options.out / f"home_commands_{name}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        sys.stdout.write(f"{path}: {len(lines)} rows\n")


if __name__ == "__main__":
    main()
