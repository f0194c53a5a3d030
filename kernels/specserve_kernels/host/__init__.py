"""Compiled host code of drafting: draft trees are expanded, calibrated, merged in one call each.

After a forward pass the CPU caches hold no code and data of the host any more, and Python code then
takes three times as long as in a loop of its own. `dispatch.native_host` loads the module. Every
user of it also has an equivalent Python implementation, for installations without the module.
"""
