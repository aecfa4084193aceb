"""Executable specification of every op in plain torch; slow, readable, public."""
