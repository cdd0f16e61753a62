"""Several processes on one run: who they are, what is dealt to each, and what happens when one dies."""
