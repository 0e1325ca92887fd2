"""sitdist: interpolant transformers that tie camera poses to pictures, on any number of processes."""

__version__ = "0.1.0"
