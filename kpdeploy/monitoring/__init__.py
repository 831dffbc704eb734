"""Watching a served model: what it does now, against what its export promised. No torch here."""
