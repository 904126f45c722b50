"""Token reduction: the state between layers, token selectors, and policies that decide which tokens to keep."""
