"""Runs a module as a program without garbage collection: `... without_gc MODULE ARGUMENT...`.

Loading libraries makes objects that are never garbage, and the collector would look through all of
them again and again: a fifth of the time that importing torch takes. The program turns the
collection on when it has loaded what it needs.
"""

import gc
import runpy
import sys

if __name__ == "__main__":
    gc.disable()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
