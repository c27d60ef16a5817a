"""Errors written for people: the command line prints their message without a traceback and exits with status 2."""


class UserError(Exception):
    """Something the user can mend. The message says what was found, what was expected and how to fix it."""


class ConfigError(UserError):
    """A configuration that cannot be used; all its mistakes are listed at once."""


class CheckpointError(UserError):
    """A checkpoint or model folder that is unknown, broken or does not fit."""


class SampleError(UserError):
    """A data sample that cannot be used.

    Args:
        reason: short slug under which the sample is counted, such as ``"no_target"``.
        message: names the sample, what was found and what was expected.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple:  # crosses process borders of loader workers
        return type(self), (self.reason, self.message)
