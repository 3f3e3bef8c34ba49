"""The mistakes a user can make, and the exit code each kind of them ends with.

An error says where, what, and what would have worked, on one line: `<field or file>: <found> (expected ...); fix: ...`.
`blagpt` prints that line without a traceback and exits with the code of its class.
"""


class UserError(ValueError):
    """Something only the user can mend; the message names the field or file and the fix."""

    exit_code = 2


class ConfigError(UserError):
    """A setting that is unknown, of the wrong type, or impossible beside another one."""


class DataError(UserError):
    """A token shard that is missing, damaged, too small, or not made for this model."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or belongs to another run."""

    exit_code = 4


class Diverged(UserError):
    """A loss, a gradient or a parameter that is no longer finite."""

    exit_code = 5
