"""The server's side of the streams: connections, requests, and the fleet over them."""
