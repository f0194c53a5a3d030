"""`triton.jit` with types: what it returns is launched as `kernel[grid](...)` or called in one."""

from collections.abc import Callable
from typing import Any

import triton

kernel: Callable[[Callable[..., Any]], Any] = triton.jit
