"""What must live or die together in a graph, and how to cut it out."""
