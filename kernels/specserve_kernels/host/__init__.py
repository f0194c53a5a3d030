"""Drafting's work on the host, compiled: trees are grown, calibrated and merged in one call each.

After a pass nothing of the host's code and data is left in the caches, and there Python takes
three times as long as in a loop of its own. `dispatch.native_host` has the module; whoever uses it
has a twin in Python beside it, which serves where it is not built.
"""
