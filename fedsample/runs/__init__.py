"""A run from configuration to summary: session, loop, resume, checks, summary and verdict."""
