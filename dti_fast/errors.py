"""The one exception that the command line turns into a line of text and exit code 2."""


class UserError(Exception):
    """Bad input: the message is one line that says what is wrong and what to do."""
