"""Neighbours, k-means, pseudo-labels, and the metrics of an assignment."""
