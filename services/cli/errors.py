"""What a command tells the person who typed it, instead of a traceback."""

from shared.errors import PrfaasError


class CommandError(PrfaasError):
    """The command cannot do its work; the message says why, in one or a few lines."""
