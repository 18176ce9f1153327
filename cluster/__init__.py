"""Topology, placement and their configuration: pure values and decisions, no Ray, no network."""
