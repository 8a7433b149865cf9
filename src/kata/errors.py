"""The one error tree.

Every error that a user can see is a `KataError`: it says what failed, on which object and why, and carries
a `hint` with the next thing to try. Clients print ``error: <message>`` and ``hint: <hint>`` and end with
`exit_code`; the ttRPC servers map `grpc_code` to a status. This module is imported on every start, so it
imports nothing.
"""

from __future__ import annotations


class KataError(Exception):
    """Base of all errors of ours.

    Args:
        message: One sentence: what failed, which object, why.
        hint: What to do next, as a sentence or a command; empty when there is nothing useful to say.
    """

    exit_code = 125
    """Exit status of the human commands; 125 is Docker's and Podman's "our own failure"."""
    grpc_code = 13
    """gRPC status number (google.rpc.Code); 13 is INTERNAL."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ToldToEnd(BaseException):
    """A signal asks this command to end: what it has made so far is undone on the way out, as with Ctrl-C.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


# ---- what the caller gave us ----


class UsageError(KataError):
    """An argument, option or request field is malformed or contradictory."""

    grpc_code = 3  # INVALID_ARGUMENT


class ConfigError(UsageError):
    """A configuration file, spec or setting cannot be used."""


class NotFoundError(KataError):
    """The named sandbox, container, process, image or file does not exist."""

    grpc_code = 5  # NOT_FOUND


class AlreadyExistsError(KataError):
    """The name or id is taken."""

    grpc_code = 6  # ALREADY_EXISTS


class StateError(KataError):
    """The object is in a state in which this cannot be done (FAILED_PRECONDITION)."""

    grpc_code = 9


class UnsupportedError(KataError):
    """Asked for something that a VM-isolated container does not or cannot offer."""

    grpc_code = 12  # UNIMPLEMENTED


# ---- the command inside the container ----


class CommandNotFoundError(KataError):
    """The container's command does not exist in its root file system."""

    exit_code = 127
    grpc_code = 5


class CommandNotExecutableError(KataError):
    """The container's command exists but cannot be executed."""

    exit_code = 126
    grpc_code = 7  # PERMISSION_DENIED


# ---- the host ----


class HostError(KataError):
    """The host lacks something: a program, a device, a permission, memory, space."""

    grpc_code = 9


class ResourceExhaustedError(HostError):
    """No memory, no disk space, too many of something."""

    grpc_code = 8


class JournalError(KataError):
    """A journal cannot be read or written, or a resource in it could not be undone."""


# ---- the virtual machine ----


class HypervisorError(KataError):
    """The virtual machine monitor could not be started or refused a command."""


class SavedMachineError(HypervisorError):
    """What was saved of a machine is not there, or is not what it has to be."""


class VMLostError(KataError):
    """The virtual machine ended while something was still running in it."""

    exit_code = 137
    grpc_code = 14  # UNAVAILABLE


class AgentError(KataError):
    """The agent in the guest answered with an error.

    Args:
        message: The sentence for the user.
        hint: As in `KataError`.
        code: The gRPC status number the agent gave.
    """

    def __init__(self, message: str, hint: str = "", code: int = 13) -> None:
        super().__init__(message, hint)
        self.code = code
        self.grpc_code = code


class AgentTimeoutError(AgentError):
    """The agent did not answer in time although its virtual machine is alive."""

    grpc_code = 4  # DEADLINE_EXCEEDED

    def __init__(self, message: str, hint: str = "", code: int = 4) -> None:
        super().__init__(message, hint, code)


class StarvedError(AgentTimeoutError):
    """The agent did not answer in time, since the host kept its virtual machine from running."""


class GuestProtocolError(KataError):
    """The guest sent something that the protocol does not allow; its sandbox is ended."""


# ---- images and guest assets ----


class ImageError(KataError):
    """An image, layer, archive or registry answer cannot be used."""


class RegistryError(ImageError):
    """A registry refused, or could not be reached."""


class GuestAssetError(KataError):
    """The guest's kernel or initrd is missing, incomplete or could not be built."""

    grpc_code = 9
