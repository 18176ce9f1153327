"""Code that test modules share: clusters, hosts, coordinators, servers and commands under test."""
