"""Every error that DuDe raises on purpose: one tree, one line each, one exit code each.

The line is made where the fact is known: what is wrong, where (file:line, layer, tensor, key), what to do.

    DudeError            exit 1    a bug of ours, or a fault without a better name
      ConfigError        exit 2    usage or configuration
      DataError          exit 3    training or evaluation data
      ArtifactError      exit 4    an adapter or model file: corrupt, forged, wrong base
      NumericsError      exit 5    NaN or Inf
      ResourceError      exit 6    disk, memory, permission
      BusyError          exit 75   another process works in the same folder
      StoppedError       exit 130  Ctrl-C; 143 for SIGTERM
"""


class DudeError(Exception):
    """Base of all errors that DuDe raises on purpose; `str(error)` is one line for the user."""

    exit_code = 1
    label = "internal"


class ConfigError(DudeError, ValueError):
    """A wrong option, configuration key or value; also a ValueError, which is what PEFT's users catch."""

    exit_code = 2
    label = "config"


class DataError(DudeError, ValueError):
    """A row, file or data set that cannot be trained on."""

    exit_code = 3
    label = "data"


class ArtifactError(DudeError, ValueError):
    """An adapter file that is damaged, incomplete, or belongs to another base model."""

    exit_code = 4
    label = "artifact"


class NumericsError(DudeError, ValueError):
    """NaN or Inf where a number has to be."""

    exit_code = 5
    label = "numerics"


class ResourceError(DudeError, OSError):
    """The disk, the memory or a permission does not allow it."""

    exit_code = 6
    label = "resource"


class BusyError(DudeError, RuntimeError):
    """Another process works in the same folder."""

    exit_code = 75
    label = "busy"


class StoppedError(DudeError):
    """A signal ended the work; what it says tells how to go on."""

    label = "interrupted"

    def __init__(self, signal_number: int, message: str) -> None:
        """The exit code is 128 and the signal's number, as shells have it."""
        super().__init__(message)
        self.exit_code = 128 + signal_number
