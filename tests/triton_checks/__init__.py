"""What the Triton kernels have to show in the interpreter: named checks, a module for each room, run by a worker of
test_triton_interpreter.py.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

Check = Callable[[], object]


class NotServedError(Exception):
    """The kernels object to this call."""


class Checks(dict[str, Check]):
    """The checks of one room by name; its module calls them ``CHECKS``."""

    def add(self, check: Check) -> Check:
        """Decorates a check whose name says what it shows."""
        self[check.__name__.strip("_").replace("_", " ")] = check
        return check


def all_checks() -> dict[str, Check]:
    """Every room's checks, by "room: name"."""
    rooms = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {f"{room}: {name}": check for room in rooms for name, check in importlib.import_module(f"{__name__}.{room}").CHECKS.items()}
