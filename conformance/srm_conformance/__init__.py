"""What decides who is right: tolerances derived from each operator's rounding model."""
