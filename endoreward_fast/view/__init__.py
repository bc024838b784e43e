"""Token rewards as pictures: the heatmap, its colours, and its display in notebooks."""
