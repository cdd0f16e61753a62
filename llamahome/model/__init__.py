"""Models: found, checked, loaded, adapted and exported."""
