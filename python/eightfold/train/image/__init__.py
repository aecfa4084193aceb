"""Training of SANA-like flow transformers on pictures."""
