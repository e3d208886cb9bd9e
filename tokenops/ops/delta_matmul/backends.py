"""The backends of this room, in order of preference, and why each may refuse a call. The reference is alone so far."""

from __future__ import annotations

from typing import Any

from tokenops.ops.wings import backends
from tokenops.reference import delta_matmul as reference


def _objections(*_: Any, **__: Any) -> list[str]:
    return []


BACKENDS = backends("delta_matmul", None, reference, _objections)
