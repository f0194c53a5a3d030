"""`triton.jit` with a static type, under the name `kernel`.

A function that it decorates is launched as `function[grid](...)` or called from another kernel.
"""

from collections.abc import Callable
from typing import Any

import triton

kernel: Callable[[Callable[..., Any]], Any] = triton.jit
