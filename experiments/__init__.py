"""Experiments: regular against cosine-sim attention, trained on real text. Run from the repository's root."""
