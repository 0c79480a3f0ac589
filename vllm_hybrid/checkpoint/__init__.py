"""A LLaVA checkpoint on disk, checked without loading its weights."""
