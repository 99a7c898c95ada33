"""What a user can act on: one sentence that says what is wrong, where, and what to do.

The command line prints the message of a `UserError` alone, without a traceback, and ends with exit code 2. Anything else that
escapes is a defect of freeguide and keeps its traceback.
"""


class UserError(Exception):
    """A mistake or an outage on the user's side. The message is one sentence: what, where, what to do."""


class ConfigError(UserError):
    """A configuration that cannot be used: an unknown key, a value of the wrong type, values that contradict each other."""


class StoreError(UserError):
    """An object store that refuses or does not answer, or an object that is missing or has changed."""


class DataError(UserError):
    """Shards, images or a manifest that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, or that belongs to another run or another network."""
