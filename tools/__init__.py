"""Tools that make releases."""
