"""Words for keys: adjective-noun pairs, as the needles of RULER have them; the lists are our own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ADJECTIVES = (
    "able amber ample ancient arctic autumn bitter blunt bold brave brief bright brisk broad bronze calm candid "
    "careful cheerful civil clever coarse coastal common copper cosmic crimson crisp curious daring dense distant "
    "double dusty eager early earnest eastern elastic elder empty equal faint famous fearless final firm fluent foggy "
    "formal frosty gentle giant glad golden graceful grand grateful hasty hidden hollow honest humble hushed icy idle "
    "inner ivory jolly keen kind lasting lively lonely loyal lucid marble mellow mighty misty modest narrow neat "
    "noble northern opaque orange outer pale patient placid plain polite prompt proud quaint quiet rapid ready rigid "
    "robust royal rustic sandy scarlet secret sharp silent silver simple slender smooth solar solemn southern speedy "
    "stable steady stormy sturdy subtle sudden sunny supple tender tidy timely tiny tranquil upper urban valiant vast "
    "vivid warm western wise wooden woolen young zealous"
)
_NOUNS = (
    "acorn actor alley anchor antler apple apron arrow atlas attic badge baker balcony banjo barley barrel basin "
    "basket beacon beaver bell bench birch biscuit blanket blossom bottle boulder branch bridge brook broom bucket "
    "button cabin cable cactus camel canal candle canoe canyon carpet castle cedar cellar chapel chimney circle "
    "clover coach cobbler comet compass copper cottage cradle crane creek cricket crystal curtain daisy desert "
    "diamond dolphin donkey drawer drum eagle easel elbow ember engine falcon farmer feather fence fiddle finch flag "
    "flute forest fossil fountain fox garden garlic gate glacier glove goose granite grape guitar hammer harbor harp "
    "hazel helmet heron hill honey horizon hotel island ivy jacket jar jasmine jewel kettle kitchen kite ladder "
    "lagoon lake lamp lantern leaf ledge lemon letter lighthouse lily lizard locket loom maple market meadow melon "
    "mill mirror mitten monk moon moss motor mountain museum napkin needle nest notebook oak oasis ocean olive onion "
    "orchard otter oven owl paddle palace panther parcel parrot path pearl pebble pencil pepper piano pigeon pillow "
    "pine planet plum pond poppy porch portrait prairie pumpkin puzzle quarry quill rabbit raft railway rake raven "
    "ribbon river robin rocket roof rope rose saddle sailor salmon satchel scarf school shed shell shepherd shield "
    "shovel signal sled sparrow spoon spring stable star station stone stove straw stream summit sunrise swan table "
    "tailor teapot temple thimble thistle thunder ticket tiger timber tower trail train tree trumpet tunnel turtle "
    "valley velvet village violin wagon walnut walrus waterfall weaver whale wheat wheel willow window winter wolf "
    "wren yarn zebra"
)
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()


def keys(count: int, generator: np.random.Generator) -> list[str]:
    """So many different `adjective-noun` keys."""
    total = len(ADJECTIVES) * len(NOUNS)
    assert count <= total, "more keys than there are pairs"
    drawn = generator.choice(total, size=count, replace=False)
    return [f"{ADJECTIVES[n // len(NOUNS)]}-{NOUNS[n % len(NOUNS)]}" for n in drawn.tolist()]


def numbers(count: int, generator: np.random.Generator) -> list[str]:
    """So many different numbers of seven digits."""
    found: dict[str, None] = {}
    while len(found) < count:
        found.update(dict.fromkeys(map(str, generator.integers(1_000_000, 10_000_000, count).tolist())))
    return list(found)[:count]


def uuids(count: int, generator: np.random.Generator) -> list[str]:
    """So many different identifiers in the form of a random UUID."""
    raw = generator.bytes(16 * count)
    found = []
    for number in range(count):
        value = bytearray(raw[16 * number : 16 * number + 16])
        value[6], value[8] = value[6] & 0x0F | 0x40, value[8] & 0x3F | 0x80
        text = value.hex()
        found.append("-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])))
    return found


def coded(count: int, length: int, generator: np.random.Generator) -> list[str]:
    """So many different words of random small letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        letters = generator.integers(0, 26, (count, length))
        found.update(dict.fromkeys("".join(chr(97 + letter) for letter in row) for row in letters.tolist()))
    return list(found)[:count]


def joined(words: Sequence[str]) -> str:
    """`a`, or `a, b, and c`, as RULER lists what is asked for."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"
