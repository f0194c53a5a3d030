"""The reference implementation of every kernel in plain torch; also the portable backend."""

from specserve_kernels.torch_ref import attention, kv, linear, sampler, tiles


class TorchKernels:
    """Implements `Kernels` on any device that torch supports; exact on the CPU."""

    name: str = "torch"
    exact: bool = True

    plan_attention = staticmethod(tiles.AttentionPlan)
    paged_tree_attention = staticmethod(attention.paged_tree_attention)
    packed_linear = staticmethod(linear.packed_linear)
    kv_write = staticmethod(kv.kv_write)
    kv_commit = staticmethod(kv.kv_commit)
    gumbel_noise = staticmethod(sampler.gumbel_noise)
    gumbel_argmax = staticmethod(sampler.gumbel_argmax)
    apply_penalties = staticmethod(sampler.apply_penalties)
