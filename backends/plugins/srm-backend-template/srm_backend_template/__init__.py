"""A backend to copy."""
