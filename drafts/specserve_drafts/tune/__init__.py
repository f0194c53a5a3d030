"""Training drafts: one module per method, each run by `specserve tune METHOD`."""
