from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class ProbeRequest(_message.Message):
    __slots__ = ("protocol",)
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    def __init__(self, protocol: _Optional[int] = ...) -> None: ...

class ProbeReply(_message.Message):
    __slots__ = ("protocol", "software", "unix_ms", "you", "clients")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    YOU_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    software: str
    unix_ms: int
    you: str
    clients: int
    def __init__(self, protocol: _Optional[int] = ..., software: _Optional[str] = ..., unix_ms: _Optional[int] = ..., you: _Optional[str] = ..., clients: _Optional[int] = ...) -> None: ...
