"""Virtual unmerging attention: one interface, three implementations, and vLLM's view of them."""
