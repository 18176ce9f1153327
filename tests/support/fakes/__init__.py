"""Stand-ins for hosts, replicas and device memory, which fail when a test says so."""
