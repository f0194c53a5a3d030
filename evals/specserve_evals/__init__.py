"""Acceptance and correctness of drafts on real prompts; robustness tests of a running server."""
