"""Client of chat-memory, the memory server for LLM chats.

    from chat_memory import Client, user

    client = Client("127.0.0.1:50051")
    print(client.chat("demo", "My name is Ann.").text())
    for message in client.messages("demo"):
        print(message.content)

`AsyncClient` is the same for asyncio. `chat_memory.langchain` has a chat history for LangChain,
`chat_memory.openai_agents` a session for the OpenAI Agents SDK. Messages and events are the types
of the contract, `chat_memory.proto`; `user`, `assistant`, `system` and `tool` write them
shortly.
"""

from chat_memory._aio import AsyncChatStream, AsyncClient
from chat_memory._client import ChatStream, Client
from chat_memory._errors import (
    Aborted,
    Cancelled,
    ChatMemoryError,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InternalError,
    InvalidArgument,
    NotFound,
    NotImplementedByServer,
    OutcomeUnknown,
    PermissionDenied,
    ResourceExhausted,
    SequenceMismatch,
    SessionCleared,
    TurnInProgress,
    Unauthenticated,
    Unavailable,
)
from chat_memory._messages import assistant, system, text_part, tool, tool_call, user
from chat_memory._proto.chat_memory_pb2 import (
    FINISH_REASON_CONTENT_FILTER,
    FINISH_REASON_LENGTH,
    FINISH_REASON_OTHER,
    FINISH_REASON_STOP,
    FINISH_REASON_TOOL_CALLS,
    ON_CONFLICT_QUEUE,
    ON_CONFLICT_REJECT,
    ON_CONFLICT_SUPERSEDE,
    ON_DISCONNECT_CONTINUE,
    ON_DISCONNECT_STOP,
    ROLE_ASSISTANT,
    ROLE_OTHER,
    ROLE_SYSTEM,
    ROLE_TOOL,
    ROLE_USER,
    Completed,
    ContentPart,
    Delta,
    GetMessagesResponse,
    ImageUrl,
    InlineData,
    Message,
    ModelOptions,
    Started,
    StopChatResponse,
    Tool,
    ToolCall,
    Usage,
)
from chat_memory._requests import Event

__version__ = "0.1.0"

__all__ = [
    "FINISH_REASON_CONTENT_FILTER",
    "FINISH_REASON_LENGTH",
    "FINISH_REASON_OTHER",
    "FINISH_REASON_STOP",
    "FINISH_REASON_TOOL_CALLS",
    "ON_CONFLICT_QUEUE",
    "ON_CONFLICT_REJECT",
    "ON_CONFLICT_SUPERSEDE",
    "ON_DISCONNECT_CONTINUE",
    "ON_DISCONNECT_STOP",
    "ROLE_ASSISTANT",
    "ROLE_OTHER",
    "ROLE_SYSTEM",
    "ROLE_TOOL",
    "ROLE_USER",
    "Aborted",
    "AsyncChatStream",
    "AsyncClient",
    "Cancelled",
    "ChatMemoryError",
    "ChatStream",
    "Client",
    "Completed",
    "ContentPart",
    "DeadlineExceeded",
    "Delta",
    "Event",
    "FailedPrecondition",
    "FieldViolation",
    "GetMessagesResponse",
    "ImageUrl",
    "InlineData",
    "InternalError",
    "InvalidArgument",
    "Message",
    "ModelOptions",
    "NotFound",
    "NotImplementedByServer",
    "OutcomeUnknown",
    "PermissionDenied",
    "ResourceExhausted",
    "SequenceMismatch",
    "SessionCleared",
    "Started",
    "StopChatResponse",
    "Tool",
    "ToolCall",
    "TurnInProgress",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "assistant",
    "system",
    "text_part",
    "tool",
    "tool_call",
    "user",
]
