"""Making drafts: one module per method, each behind `specserve tune METHOD`."""
