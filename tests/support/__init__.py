"""Scaffolds that test modules share."""
