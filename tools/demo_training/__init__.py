"""Training of the small LLaVA that ships with the package, from scratch, on pictures drawn on the fly."""
