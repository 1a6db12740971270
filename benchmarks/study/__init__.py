"""The study behind docs/results.md: how its runs are made, what is measured on them, and its tables."""
