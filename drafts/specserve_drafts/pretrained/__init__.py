"""Pretrained drafts that ship with specserve: one directory each, all made by `specserve tune`."""
