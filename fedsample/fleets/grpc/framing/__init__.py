"""Messages as frames on a stream: headers, zero-copy packing, versions, and the probe for connection tests."""
