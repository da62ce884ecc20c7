"""The one exception a user is meant to see."""

from megassm.urls import redacted


class UserError(ValueError):
    """A refusal that a user can act on.

    The message names the place, the value, the rule and the way out; what may be secret in a URL is taken
    out of it here, whoever wrote it. Entry points print it without a traceback and exit with code 1 (see
    `megassm.cli.run_tool`); anything else that escapes is a bug of ours.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))
