"""The CUDA backend. Tests without a GPU run its kernels in Triton's interpreter."""

from specserve_kernels.torch_ref.linear import packed_linear
from specserve_kernels.triton.attention import AttentionPlan, paged_tree_attention
from specserve_kernels.triton.kv import kv_commit, kv_write
from specserve_kernels.triton.sampler import apply_penalties, gumbel_argmax, gumbel_noise


class TritonKernels:
    """Implements `Kernels`; not exact: tile shapes, hence rounding, depend on the segment size."""

    name: str = "triton"
    exact: bool = False

    plan_attention = staticmethod(AttentionPlan)
    paged_tree_attention = staticmethod(paged_tree_attention)
    packed_linear = staticmethod(packed_linear)  # no kernel yet: the reference
    kv_write = staticmethod(kv_write)
    kv_commit = staticmethod(kv_commit)
    gumbel_noise = staticmethod(gumbel_noise)
    gumbel_argmax = staticmethod(gumbel_argmax)
    apply_penalties = staticmethod(apply_penalties)
