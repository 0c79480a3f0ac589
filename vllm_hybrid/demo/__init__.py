"""The embedded checkpoint and the drawn pictures that it knows."""
