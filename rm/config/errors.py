"""The program's own exceptions. Each has the exit code of a process that ends with it."""


class RunError(Exception):
    """The run cannot go on; the message is one line and names the fix."""

    exit_code = 1


class InputError(RunError, ValueError):
    """Wrong user input: an option, a file, a row, a model or a folder; the message is one line and names the fix."""

    exit_code = 2
