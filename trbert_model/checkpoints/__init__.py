"""The one home of a model directory: which files count, their digest, loading it, and converting others' into it."""
