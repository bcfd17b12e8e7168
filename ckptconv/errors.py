"""Every error ckptconv raises on purpose.

CkptconvError
├── UsageError        the request itself is wrong (exit code 2)
├── FormatError       a file is damaged, lying, or not what it claims to be
├── ConfigError       the architecture is unknown, incomplete, or contradicts the tensors
├── MappingError      a mapping file is wrong (file and rule are named)
├── CoverageError     tensors missing, unexpected or mis-shaped: all of them are listed
├── TopologyError     a layout that cannot be: an axis that does not divide, stages that do not add up
├── ReplicaError      copies that must be equal bit for bit are not
├── ValueLossError    a cast would turn finite values into infinities
├── PlanError         the plan cannot be carried out here: memory bound, disk space, destination
├── ResumeError       unfinished work at the destination belongs to something else
└── ExtraMissingError an optional dependency is not installed (the pip command is named)

A message says what, where (file, rank, tensor), expected and found, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable


class CkptconvError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(CkptconvError, ValueError):
    exit_code = 2


class FormatError(CkptconvError, ValueError):
    """A file is wrong; `where` names it (path, then member inside it)."""

    def __init__(self, where: object, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = str(where)
        self.problem = problem


class ConfigError(CkptconvError, ValueError):
    pass


class MappingError(CkptconvError, ValueError):
    pass


class CoverageError(CkptconvError, ValueError):
    """All the tensors that do not fit, grouped by kind, in one message."""

    def __init__(self, title: str, problems: Iterable[str], advice: str = "") -> None:
        self.problems = list(problems)
        lines = [title, *(f"  {p}" for p in self.problems)]
        super().__init__("\n".join([*lines, advice] if advice else lines))


class TopologyError(CkptconvError, ValueError):
    pass


class ReplicaError(CkptconvError, ValueError):
    pass


class ValueLossError(CkptconvError, ValueError):
    pass


class PlanError(CkptconvError, RuntimeError):
    pass


class ResumeError(CkptconvError, RuntimeError):
    pass


class ExtraMissingError(CkptconvError, ImportError):
    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional dependency: pip install 'ckptconv[{extra}]'")
