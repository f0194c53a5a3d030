"""Compute kernels of the runtime: `ops` defines their interface, `dispatch` selects a backend."""
