"""Addresses, certificates and identities, and what diagnoses the way to a server."""
