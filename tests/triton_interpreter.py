"""Runs the Triton kernels on a CPU: a worker process around Triton's interpreter, and what that gets wrong of bfloat16 and NaN.

``python tests/triton_interpreter.py`` with TRITON_INTERPRET=1 reads names of checks from stdin and answers each with one line of JSON. It
is a process of its own for two reasons: Triton decides at import whether it interprets, and a load out of bounds kills the process
(test_triton_interpreter.py then says which check did it, and goes on with a new worker).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from typing import Any

import torch


def teach_bfloat16() -> None:
    """Makes the interpreter's bfloat16 right where our kernels use it, and an error elsewhere.

    The interpreter holds bfloat16 as uint16 and computes with the bit patterns: products of two bfloat16 tiles and sums are silently wrong,
    and a cast from float32 truncates instead of rounding to nearest even. Kernels of this project feed bfloat16 to tl.dot and cast it; any
    other arithmetic is refused.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

    plain_cast, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    plain_binary, plain_unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op

    def is_bfloat16(handle: Any) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def widen(data: np.ndarray) -> np.ndarray:
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)

    def narrow(data: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        # half of the last kept bit, and one more if that bit is odd: nearest, ties to even
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        # the carry would turn some NaNs into infinities
        return np.where(np.isnan(data), np.uint16(0x7FC0), rounded.astype(np.uint16))

    def cast(self: Any, source: Any, target: Any) -> Any:
        to_bfloat16 = target.scalar == tl.bfloat16
        if is_bfloat16(source) and not to_bfloat16:
            return TensorHandle(widen(source.data).astype(_get_np_dtype(target)), target.scalar)
        if to_bfloat16 and not is_bfloat16(source):
            return TensorHandle(narrow(source.data.astype(np.float32)), target.scalar)
        return plain_cast(self, source, target)

    def round_cast(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        return cast(self, source, target)

    def dot(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        if is_bfloat16(a) and is_bfloat16(b):
            a, b = TensorHandle(widen(a.data), tl.float32), TensorHandle(widen(b.data), tl.float32)
        return plain_dot(self, a, b, accumulator, *options)

    def refuse(operands: tuple[Any, ...], op: Any) -> None:
        if any(is_bfloat16(operand) for operand in operands):
            raise TypeError(f"bfloat16 may only be loaded, stored, cast and fed to tl.dot, got it in {op.__name__}")

    def binary(self: Any, a: Any, b: Any, op: Any) -> Any:
        refuse((a, b), op)
        return plain_binary(self, a, b, op)

    def unary(self: Any, a: Any, op: Any) -> Any:
        refuse((a,), op)
        return plain_unary(self, a, op)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_fp_to_fp = round_cast
    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.binary_op = binary
    InterpreterBuilder.unary_op = unary


def teach_nan() -> None:
    """Makes minima and maxima that are not told to propagate NaN drop it, as a GPU does; the interpreter propagates it either way."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    def least(self: Any, a: Any, b: Any) -> Any:
        return self.binary_op(a, b, np.fmin)

    def greatest(self: Any, a: Any, b: Any) -> Any:
        return self.binary_op(a, b, np.fmax)

    InterpreterBuilder.create_minnumf = least
    InterpreterBuilder.create_maxnumf = greatest


def main() -> None:
    answers = os.dup(sys.stdout.fileno())
    # whatever a library prints goes to stderr: stdout is for answers
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    # torch.empty gives NaN, so a result that a kernel left out shows
    torch.use_deterministic_algorithms(True)
    # numpy remarks on exp2(-inf - -inf) and the like in lanes that a select then drops
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    teach_bfloat16()
    teach_nan()
    from triton_checks import NotServedError, all_checks

    checks = all_checks()

    with os.fdopen(answers, "w") as stream:
        for line in sys.stdin:
            try:
                checks[json.loads(line)]()
                answer = {}
            except NotServedError as refusal:
                answer = {"refusal": str(refusal)}
            except BaseException:
                answer = {"failure": traceback.format_exc()}
            print(json.dumps(answer), file=stream, flush=True)


if __name__ == "__main__":
    main()
