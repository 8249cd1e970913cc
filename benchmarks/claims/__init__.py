"""Evidence: one small, repeatable experiment for each claim of the two papers (docs/evidence.md)."""
