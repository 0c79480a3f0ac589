"""What merging and pruning cost the embedded model in right answers."""
