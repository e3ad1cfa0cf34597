"""What server and devices speak; light to import."""

PROTOCOL = 1
SERVICE = "fedsample.v1.Fleet"
