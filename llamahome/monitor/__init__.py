"""What a run reports: metrics of each step, speed, resources, where they are written and how they are shown."""
