"""Every exception a caller can meet, one class per kind of mistake.

The text of each names the argument or file, what was expected and what was found.
"""


class Qwen1mError(Exception):
    """Base of all errors raised by qwen1m_ext itself."""


class ConfigError(Qwen1mError, ValueError):
    """config.json or another configuration file is missing, contradictory or not supported."""


class WeightsError(Qwen1mError, ValueError):
    """The checkpoint's tensors are missing, misshapen, superfluous or unreadable."""


class RequestError(Qwen1mError, ValueError):
    """A prompt or a sampling parameter that cannot be served."""


class ContextTooLong(RequestError):  # noqa: N818 - the name is the contract
    """Prompt plus requested tokens exceed `max_model_len`. Nothing was truncated."""


class SessionFileError(Qwen1mError, ValueError):
    """A session file that is damaged, or belongs to another model or configuration."""


class MemoryBudgetError(Qwen1mError, MemoryError):
    """The work does not fit in memory; raised before it starts."""


class BackendError(Qwen1mError, RuntimeError):
    """The compiled library is missing, or lacks what was asked for."""
