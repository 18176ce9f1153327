"""The chart for Kubernetes, and what is generated from its values."""
