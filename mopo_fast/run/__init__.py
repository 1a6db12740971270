"""A training run: its folder and how it is resumed, and several runs at once."""
