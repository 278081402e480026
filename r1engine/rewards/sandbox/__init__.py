"""Runs code that nobody trusts: the sandbox of the code rewards. No torch.

`protection` finds out what this machine has, `slot` is a process tree in namespaces, `runner` runs programs in it.
`inside` is what runs in the sandbox; it is given the program and its input, never the expected output.
"""

from r1engine.rewards.sandbox.protection import Protection, SandboxError, compiler, probe
from r1engine.rewards.sandbox.runner import DEFAULT_LIMITS, Channel, Limits, ProgramError, ProgramRun, Sandbox

__all__ = [
    "DEFAULT_LIMITS",
    "Channel",
    "Limits",
    "ProgramError",
    "Protection",
    "ProgramRun",
    "Sandbox",
    "SandboxError",
    "compiler",
    "probe",
]
