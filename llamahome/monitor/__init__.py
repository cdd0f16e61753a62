"""What a run says about itself: metrics, sinks, resources, throughput, and the view in the terminal."""
