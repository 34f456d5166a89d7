"""The exception tree.

    RankloomError
    ├── ConfigError(ValueError)            a setting is wrong: exit code 2
    │   └── IncompatibleError              two settings exclude each other: exit code 2
    ├── DataError(ValueError)              the data set is missing, malformed or trains nothing: exit code 1
    ├── ModelError(RuntimeError)           the base model can't be found or loaded: exit code 1
    ├── TrialError(RuntimeError)           training failed: exit code 1
    ├── RegistryError(RuntimeError)        the registry refused: exit code 1
    ├── AdapterNotFoundError(LookupError)  no such adapter, version or alias: exit code 1
    ├── RequestError(ValueError)           a request asks for something that an engine can't do: exit code 1
    └── OverloadedError(RuntimeError)      an engine has no room now; try again later: exit code 1

A message names the field or file, the value given, what is allowed and what to do. Constructors take one
plain message, so that every error survives pickling between Ray processes.
"""


class RankloomError(Exception):
    """An error that rankloom reports to its user without a stack trace."""

    exit_code = 1


class ConfigError(RankloomError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""

    exit_code = 2


class IncompatibleError(ConfigError):
    """Two settings, each valid alone, exclude each other."""


class DataError(RankloomError, ValueError):
    """A data set is missing, malformed or would train nothing."""


class ModelError(RankloomError, RuntimeError):
    """A base model can't be found, read or trusted."""


class TrialError(RankloomError, RuntimeError):
    """A trial failed while it ran."""


class RegistryError(RankloomError, RuntimeError):
    """The registry refused an operation; nothing was changed."""


class AdapterNotFoundError(RankloomError, LookupError):
    """The registry has no such adapter, version or alias."""

    def __str__(self) -> str:  # LookupError's own would be fine; KeyError's would quote it
        return str(self.args[0]) if self.args else ""


class RequestError(RankloomError, ValueError):
    """A request that no engine of this base can serve: it is too long, or an option is out of range."""


class OverloadedError(RankloomError, RuntimeError):
    """An engine has no room for another request; it did nothing for this one."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """Seconds after which a retry makes sense."""
