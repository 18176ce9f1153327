"""The front of a served model: an HAProxy that limits what strangers can ask of it."""
