"""Acceptance and correctness of drafts on real prompts."""
