"""What is checked and set before an engine starts."""
