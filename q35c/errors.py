"""Every error that q35c raises on purpose.

One tree. A message says what is wrong, where, what was expected, what was found, and what to do.
`InputError` is the user's to mend (CLI exit code 1); `InternalError` is ours (exit code 2).
"""


class Q35CError(Exception):
    """Carry one complete message; the parts stay readable as attributes."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.got, self.hint = what, where, expected, got, hint
        lines = [what if where is None else f"{where}: {what}"]
        if expected is not None:
            lines.append(f"  expected: {expected}")
        if got is not None:
            lines.append(f"  got:      {got}")
        if hint is not None:
            lines.append(f"  what to do: {hint}")
        super().__init__("\n".join(lines))


class InputError(Q35CError):
    """What the user gave cannot be used."""


class OptionError(InputError):
    """A command-line option or an argument has a value that is not allowed."""


class CheckpointError(InputError):
    """A model directory is missing, incomplete, malformed or unsafe."""


class ConfigError(CheckpointError):
    """config.json is malformed or contradicts itself."""


class UnsupportedConfig(ConfigError):
    """The configuration is legal but asks for something q35c does not implement."""


class TokenizerError(InputError):
    """The tokenizer file cannot be used, or text cannot be encoded with it."""


class ArtifactError(InputError):
    """A .q35c file is damaged or is not one."""


class ArtifactVersionError(ArtifactError):
    """A .q35c file was written by another format version."""


class IncompatibleCPU(ArtifactError):
    """The artifact was compiled for instructions that this machine lacks."""


class PromptError(InputError):
    """A prompt is empty, too long for the context, or holds ids outside the vocabulary."""


class MemoryRefused(InputError):
    """The work would need more memory than this machine or its cgroup has."""


class DiskRefused(InputError):
    """The file would need more disk space than is free."""


class ToolchainError(InputError):
    """A program or package that compiling needs is missing or failed."""


class InternalError(Q35CError):
    """An invariant of q35c itself does not hold."""


class VerifyError(InternalError):
    """An IR graph breaks a rule of the op table."""


class LoweringError(InternalError):
    """A scheduled op has no kernel for the requested shape, precision or target."""


class ExecutionError(InternalError):
    """Compiled code reported a failure."""
