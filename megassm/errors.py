"""The one exception a user is meant to see."""


class UserError(ValueError):
    """A refusal that a user can act on.

    The message names the place, the value, the rule and the way out. Entry points print it without
    a traceback and exit with code 1 (see `megassm.cli.run_tool`); anything else that escapes is a bug of ours.
    """
