"""Model directories: their files and digest, loading, and conversion of other checkpoints."""
