"""Token rewards as pictures: the heatmap, its colours, notebooks."""
