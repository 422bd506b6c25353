"""Everything around the model: settings, data, checkpoints, the log of a run and its figures."""


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one line that says what and why.

    The training script prints it to stderr and exits with code 2, without a traceback.
    """
