"""What training raises: each message names the field, file or images concerned and what to do about it."""


class ConfigError(ValueError):
    """A value of the configuration is unusable; the message names the field and the remedy."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or used here; the message names the file and the remedy."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why. Checkpoints already written are untouched."""
