"""The commands beside the server, and what they share."""
