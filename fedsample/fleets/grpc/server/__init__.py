"""The server's side of the streams: who is connected, what each was asked, and the fleet over them."""
