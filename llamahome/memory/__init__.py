"""Memory: what is used, what may be used, what will be needed, and who decides the cut."""
