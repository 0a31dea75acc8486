"""Rules by which the reduced update moves the model; one rule a file."""
