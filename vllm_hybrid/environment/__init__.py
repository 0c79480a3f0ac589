"""What a process runs in, what of it fails, and what the process then says."""
