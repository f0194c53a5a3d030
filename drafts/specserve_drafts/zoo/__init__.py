"""Drafts that ship with specserve: a folder each, made by `specserve tune` and nothing else."""
