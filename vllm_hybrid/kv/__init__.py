"""Pages with holes: what a slot says about itself, and the two tiers of KV blocks."""
