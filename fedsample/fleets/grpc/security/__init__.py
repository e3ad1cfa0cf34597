"""Addresses, certificates, identities, and diagnosis of the connection to a server."""
