"""What a user can act on: one sentence that says what is wrong, where, and what to do.

The command line prints the message of a `UserError` alone, without a traceback, and ends with exit code 2. Anything else that
escapes is a defect of freeguide and keeps its traceback.
"""

import unicodedata

from freeguide.configs.secrets import masked

_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # categories of Unicode
_TURNING = set(map(chr, (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))))  # the direction of what follows


class UserError(Exception):
    """A mistake or an outage on the user's side. The message is one sentence: what, where, what to do.

    It holds no secrets, and no final period, as what stands last is often copied.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(masked(sentence if sentence.endswith("..") else sentence.removesuffix(".")))


class ConfigError(UserError):
    """A configuration that cannot be used: an unknown key, a value of the wrong type, values that contradict each other."""


class StoreError(UserError):
    """An object store that refuses or does not answer, or an object that is missing or has changed."""


class DataError(UserError):
    """Shards, images or a manifest that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, or that belongs to another run or another network."""


def visible(text: str, most: int = 0) -> str:
    """Text that anyone may have chosen, such as the name of a run or a class, so that it can be printed, encoded and drawn.

    Control characters (they move the cursor, or turn the direction of what follows) and halves of characters are shown as their
    codes. With `most`, longer text loses its middle.
    """

    def one(c: str) -> str:
        plain = unicodedata.category(c) not in _UNPRINTABLE and c not in _TURNING
        return c if plain else c.encode("unicode-escape").decode()

    shown = "".join(map(one, text))
    half = (most - 1) // 2
    return shown if not most or len(shown) <= most else f"{shown[:half]}…{shown[-half:]}"


def counted(number: int, one: str, many: str = "") -> str:
    """A number with its noun: "1 shard", "3 shards", "2 classes" (`many` where it is not `one` and an s)."""
    return f"{number} {one if number == 1 else many or one + 's'}"
