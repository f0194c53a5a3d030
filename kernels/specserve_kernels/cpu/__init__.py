"""The native CPU backend: kernels compiled at install time, once per instruction set.

Operations without a native kernel, or of a shape it does not support, run in the torch reference.
"""

from functools import partial

from torch import Tensor

from specserve_kernels.cpu import attention, linear, sampler
from specserve_kernels.cpu.decoder import CpuDecoder
from specserve_kernels.cpu.draft_head import CpuDraftHead
from specserve_kernels.cpu.native import load
from specserve_kernels.ops import Plan
from specserve_kernels.torch_ref import TorchKernels


class CpuKernels:
    """Implements `Kernels` and `FusedModels` with one of `native.runnable_builds`; exact."""

    exact: bool = True

    plan_attention = staticmethod(attention.SegmentPlan)
    kv_write = staticmethod(TorchKernels.kv_write)
    kv_commit = staticmethod(TorchKernels.kv_commit)
    apply_penalties = staticmethod(TorchKernels.apply_penalties)

    def __init__(self, build: str) -> None:
        self.name = f"cpu-{build}"
        self._library = load(build)
        self._reference = TorchKernels()
        self.decoder = partial(CpuDecoder, self._library)
        self.draft_head = partial(CpuDraftHead, self._library)
        self.packed_linear = partial(linear.packed_linear, self._library)
        self.gumbel_noise = partial(sampler.gumbel_noise, self._library)
        self.gumbel_argmax = partial(sampler.gumbel_argmax, self._library)

    def paged_tree_attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: Plan,
        *,
        scale: float,
        window: int = 0,
    ) -> Tensor:
        """[num_rows, num_heads, head_dim] in q's dtype; see `Kernels.paged_tree_attention`."""
        assert isinstance(plan, attention.SegmentPlan), "a plan belongs to the backend that made it"
        if attention.supports(q.shape[2], plan.group_size, k_cache.dtype):
            return attention.paged_tree_attention(
                self._library, q, k_cache, v_cache, plan, scale, window
            )
        return self._reference.paged_tree_attention(
            q, k_cache, v_cache, plan.reference, scale=scale, window=window
        )
