"""Kernels of the runtime: tensors in, tensors out. `ops` is the contract, `dispatch` picks one."""
