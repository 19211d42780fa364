"""The built-in backends: one package each, registered through the same entry points as anyone else's."""
