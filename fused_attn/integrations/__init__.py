"""Plugs for other projects, one file each, imported only when asked for."""
